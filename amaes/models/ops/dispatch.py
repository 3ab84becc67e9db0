"""Which way an operation is computed, and in which number type: the one place that chooses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

SPACE = (2, 3, 4)  # axes X, Y, Z of (B, C, X, Y, Z)


def use_cpu_path(x: torch.Tensor) -> bool:
    """Whether `x` is computed by the CPU's own implementations."""
    return x.device.type == "cpu"


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The type that autocast asks for where it is on; elsewhere the type of `x`."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of statistics and sums of numbers of type `dtype`: float32, for float64 float64."""
    return torch.promote_types(dtype, torch.float32)


def autocast_off(x: torch.Tensor) -> AbstractContextManager:
    """A context without autocast, in which operations keep the types of their inputs.

    The meta device, on which only shapes are computed, has no autocast.
    """
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def without_autocast(backward: Callable) -> Callable:
    """Decorate a backward pass: it computes in the types of the forward pass, also if autocast is on when it runs."""

    def run(ctx, grad: torch.Tensor):
        with autocast_off(grad):
            return backward(ctx, grad)

    return run
