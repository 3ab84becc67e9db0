"""Hyper-parameters as published, the optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

# Appendix A of arXiv 2408.00640: AdamW with amsgrad, weight decay 3e-5. Its table lost the spans of two rows, so that
# learning rate and batch size can be read in two ways, "appendix_r1" and "appendix_r2"; "code" is what the published
# program passes to AdamW. Rows: (task, first part of the architecture's name), the first that fits is taken.
_APPENDIX = {"weight_decay": 3e-5, "amsgrad": True}
_R1 = {
    ("pretrain", "swin"): {"lr": 1e-4, "batch_size": 8},
    ("pretrain", ""): {"lr": 1e-4, "batch_size": 16},
    ("finetune", "mednext"): {"lr": 6e-4, "batch_size": 2},
    ("finetune", "swin"): {"lr": 1e-4, "batch_size": 4},
    ("finetune", ""): {"lr": 5e-4, "batch_size": 8},
}
_R2 = {
    ("pretrain", "mednext_m"): {"lr": 5e-4, "batch_size": 8},
    ("pretrain", "mednext"): {"lr": 1e-4, "batch_size": 8},
    ("pretrain", "swin"): {"lr": 6e-4, "batch_size": 2},
    ("pretrain", ""): {"lr": 1e-4, "batch_size": 16},
    ("finetune", ""): {"lr": 1e-4, "batch_size": 4},
}
_CODE = {("pretrain", ""): {"lr": 1e-4, "batch_size": 16}, ("finetune", ""): {"lr": 1e-4, "batch_size": 8}}
PRESETS: dict[str, tuple[dict, dict]] = {
    "appendix_r1": (_R1, _APPENDIX),
    "appendix_r2": (_R2, _APPENDIX),
    "code": (_CODE, {"weight_decay": 0.01, "amsgrad": False}),
}


def hyperparameters(preset: str, task: str, arch: str) -> dict:
    """Learning rate, global batch size, weight decay and amsgrad of a preset.

    Args:
        preset: a key of PRESETS.
        task: "pretrain" or "finetune".
        arch: name of the architecture.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown; accepted: {', '.join(PRESETS)}")
    rows, common = PRESETS[preset]
    row = next(row for (row_task, start), row in rows.items() if row_task == task and arch.startswith(start))
    return row | common


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], lr: float, weight_decay: float, amsgrad: bool
) -> torch.optim.AdamW:
    """AdamW, betas (0.9, 0.999), eps 1e-8; one group: the published runs decay norms and biases too."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, amsgrad=amsgrad, fused=True)


def warmup_cosine(step: int, base: float, warmup_steps: int, total_steps: int) -> float:
    """Pretraining's learning rate: linear warm-up from 0.001 base, then cosine to 0 at `total_steps`, 0 after it."""
    if step < warmup_steps:
        return base * (0.001 + 0.999 * step / warmup_steps)
    decay = max(1, total_steps - warmup_steps)
    return base * 0.5 * (1 + math.cos(math.pi * min(step - warmup_steps, decay) / decay))


def stretched_cosine(step: int, base: float, total_steps: int, stretch: float = 1.15, floor: float = 1e-9) -> float:
    """Fine-tuning's learning rate: a cosine over 1.15 times the run, so that it ends at about 4 % of `base`."""
    return floor + 0.5 * (base - floor) * (1 + math.cos(math.pi * step / (stretch * total_steps)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def skip_if_not_finite(optimizer: torch.optim.Optimizer, network: torch.nn.Module) -> torch.Tensor:
    """Make the next `optimizer.step()` do nothing if a gradient is NaN or infinite, without waiting for the device.

    The fused optimizers read the flag where they run, as they do for loss scaling.

    Returns:
        The flag, a scalar: 1 where the step will be left out, else 0.
    """
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    optimizer.found_inf = (~torch.nn.utils.get_total_norm(gradients).isfinite()).float()
    return optimizer.found_inf
