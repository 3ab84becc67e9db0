import math

import pytest
import torch

from amaes.training.optim import FinetuneRates, build_optimizer, optimizer_step, set_lr, stretched_cosine, warmup_cosine
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


# Encoder and decoder --------------------------------------------------------------------------------------------------


def two_layers():
    network = torch.nn.Sequential()
    network.encoder, network.decoder = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)
    network.forward = lambda x: network.decoder(network.encoder(x))
    return network


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [[1, 1, 1, 1]]),
        ({"warmup": 2}, [[0.001, 0.5005, 1, 1]]),
        ({"encoder": 0.1}, [[1, 1, 1, 1], [0.1, 0.1, 0.1, 0.1]]),
        ({"decoder_warmup": 2}, [[1, 1, 1, 1], [0, 0, 1, 1]]),
        ({"decoder_warmup": 1, "warmup": 2, "encoder": 0.1}, [[0.001, 0.5005, 1, 1], [0, 0.0001, 0.05005, 0.1]]),
        ({"freeze": "encoder"}, [[1, 1, 1, 1]]),
    ],
)
def test_rates_of_fine_tuning_by_group(given, expected):
    rates = FinetuneRates(base=1.0, steps=10**6, **given)
    optimizer = build_optimizer(rates.groups(two_layers()), 1.0, 0.0, False)
    assert len(optimizer.param_groups) == len(expected)
    for step, of_groups in enumerate(zip(*expected, strict=True)):
        assert rates.set(optimizer, step) == pytest.approx(of_groups[0], rel=1e-6)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(of_groups, rel=1e-6)


def test_the_one_group_holds_all_weights_as_in_earlier_versions():
    network = two_layers()
    network.decoder.bias.requires_grad_(False)  # as of a head that is not trained
    (group,) = FinetuneRates(base=1.0, steps=10).groups(network)
    assert len(group["params"]) == 4


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
@pytest.mark.parametrize("given", [{"decoder_warmup": 2}, {"freeze": "encoder"}])
def test_a_frozen_encoder_stays_as_it_is_and_begins_afresh(given, on_nan):
    network = two_layers()
    before = network.encoder.weight.clone()
    rates = FinetuneRates(base=0.1, steps=10, **given)
    optimizer = build_optimizer(rates.groups(network), 0.1, 0.5, True)
    for step in range(3):
        decoder = network.decoder.weight.clone()
        rates.set(optimizer, step)
        optimizer.zero_grad(set_to_none=True)
        network(torch.ones(4, 2)).sum().backward()
        optimizer_step(optimizer, network, on_nan)
        assert not torch.equal(network.decoder.weight, decoder)
        assert torch.equal(network.encoder.weight, before) == (step < 2 or "freeze" in given)
    if "freeze" not in given:
        assert optimizer.state[network.encoder.weight]["step"] == 1  # no moments from before
