import math

import pytest
import torch

from amaes.training.optim import build_optimizer, set_lr, stretched_cosine, warmup_cosine
from amaes.training.presets import PRESETS, hyperparameters


def test_warmup_then_cosine_to_zero_and_no_further():
    lr = [warmup_cosine(s, 1e-4, warmup_steps=10, total_steps=110) for s in range(200)]
    assert lr[0] == pytest.approx(1e-7)
    assert lr[5] == pytest.approx(1e-4 * (0.001 + 0.999 * 0.5))
    assert lr[10] == pytest.approx(1e-4)
    assert lr[60] == pytest.approx(0.5e-4)
    assert lr[35] == pytest.approx(0.5e-4 * (1 + math.cos(math.pi / 4)))
    assert lr[110] == lr[199] == pytest.approx(0, abs=1e-12)


def test_warmup_of_the_whole_run_is_defined():
    assert warmup_cosine(3, 1.0, warmup_steps=3, total_steps=3) == 1.0


def test_fine_tuning_ends_at_four_percent():
    assert stretched_cosine(0, 5e-4, 2500) == pytest.approx(5e-4)
    assert stretched_cosine(2500, 5e-4, 2500) / 5e-4 == pytest.approx(0.0414, abs=1e-4)


@pytest.mark.parametrize(
    ("preset", "task", "arch", "lr", "batch"),
    [
        ("appendix_r1", "pretrain", "unet_xl", 1e-4, 16),
        ("appendix_r1", "pretrain", "swin_unetr", 1e-4, 8),
        ("appendix_r1", "finetune", "unet_b", 5e-4, 8),
        ("appendix_r1", "finetune", "mednext_l", 6e-4, 2),
        ("appendix_r2", "pretrain", "mednext_m", 5e-4, 8),
        ("appendix_r2", "pretrain", "mednext_l", 1e-4, 8),
        ("appendix_r2", "finetune", "unet_xl", 1e-4, 4),
        ("code", "finetune", "unet_xl", 1e-4, 8),
    ],
)
def test_presets(preset, task, arch, lr, batch):
    values = hyperparameters(preset, task, arch)
    assert (values["lr"], values["batch_size"]) == (lr, batch)
    assert values["amsgrad"] is (preset != "code")
    assert values["weight_decay"] == (0.01 if preset == "code" else 3e-5)


def test_unknown_preset_is_named():
    with pytest.raises(ValueError, match="accepted: " + ", ".join(PRESETS)):
        hyperparameters("mine", "pretrain", "unet_b")


def test_optimizer_takes_the_published_settings():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer([weight], lr=1e-3, weight_decay=0.1, amsgrad=True)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"], group["amsgrad"]) == ((0.9, 0.999), 1e-8, 0.1, True)
    set_lr(optimizer, 0.5)
    weight.grad = torch.zeros(3)
    optimizer.step()
    assert torch.allclose(weight, torch.full((3,), 1 - 0.5 * 0.1))  # decoupled decay alone
