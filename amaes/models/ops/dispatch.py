"""Which way an operation is computed, and in which number type: the one place that chooses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

SPACE = (2, 3, 4)  # axes X, Y, Z of (B, C, X, Y, Z)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)  # of a GPU: bfloat16


def use_cpu_path(x: torch.Tensor) -> bool:
    """Whether `x` is computed by the CPU's own implementations."""
    return x.device.type == "cpu"


def use_triton(x: torch.Tensor) -> bool:
    """Whether `x` is computed by Triton kernels: on a GPU on which they work, in one of KERNEL_DTYPES."""
    if x.device.type != "cuda" or compute_dtype(x) not in KERNEL_DTYPES:
        return False
    if torch.compiler.is_compiling():  # no graph can hold the test: it must have been made before
        return _faults.get(x.device.index, "untested") is None
    return triton_fault(x.device.index) is None


_faults: dict[int, str | None] = {}  # of each CUDA device, tested once per process


def triton_fault(device: int) -> str | None:
    """Why the Triton kernels are not used on CUDA device number `device`; None where they are."""
    if device not in _faults:
        if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
            _faults[device] = "the GPU's compute capability is below {}.{}".format(*MIN_CAPABILITY)
        else:
            _faults[device] = kernels_fault(torch.device("cuda", device))
    return _faults[device]


def kernels_fault(device: torch.device) -> str | None:
    """What keeps the Triton kernels from running on `device` with the right numbers, in one line; None if nothing."""
    try:
        from amaes.models.ops.kernels.self_test import wrong_operators

        wrong = wrong_operators(device)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # whatever is missing or too old: a C compiler, the driver, Triton itself
        lines = str(error).strip().split("\n")
        return f"{type(error).__name__}: {lines[0][:160]}"
    return f"wrong numbers of {', '.join(wrong)}" if wrong else None


def are_fused(device: torch.device) -> bool:
    """Whether networks on `device` have Triton kernels, which do several operations in one."""
    return device.type == "cuda" and triton_fault(_index(device)) is None


def describe(device: torch.device) -> str:
    """For the log: which operations networks on `device` have."""
    if device.type != "cuda":
        return "operations of the CPU" if device.type == "cpu" else "operations of PyTorch"
    fault = triton_fault(_index(device))
    return "operations in Triton" if fault is None else f"operations of PyTorch (no Triton kernels: {fault})"


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The type that autocast asks for where it is on; elsewhere the type of `x`."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def to_rows(x: torch.Tensor) -> torch.Tensor:
    """(B, C, X, Y, Z) to contiguous rows (B, X, Y, Z, C) of `compute_dtype`; no copy of a channels-last tensor."""
    return x.to(compute_dtype(x)).movedim(1, -1).contiguous()


def from_rows(rows: torch.Tensor) -> torch.Tensor:
    """(B, X, Y, Z, C) to (B, C, X, Y, Z), in channels-last memory."""
    return rows.movedim(-1, 1)


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
