"""The optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch


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


def optimizer_step(optimizer: torch.optim.Optimizer, network: torch.nn.Module, on_nan: str) -> torch.Tensor | None:
    """Update the weights; with `on_nan` "skip" not where a gradient is NaN or infinite, without waiting for the device.

    The fused optimizers read the flag on the device, as they do for loss scaling.

    Returns:
        The flag of "skip", a scalar: 1 where the step was left out, else 0. None with `on_nan` "stop".
    """
    skipped = None
    if on_nan == "skip":
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        skipped = (~torch.nn.utils.get_total_norm(gradients).isfinite()).float()
        optimizer.found_inf = skipped
    optimizer.step()
    return skipped
