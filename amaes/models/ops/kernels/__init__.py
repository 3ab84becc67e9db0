"""Triton kernels of the operations, as custom operators of torch; `dispatch.triton_fault` says where they are used.

Tensors are rows: (B, X, Y, Z, C), contiguous, which is (B, C, X, Y, Z) in channels-last memory. Modules of this folder
import Triton, so they are imported where they are called. Accumulators and statistics are in float32. Sums over space
go through partial sums of fixed ranges and a second sum, so every run gives the same bits.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

TILE = 4096  # numbers that a program of 4 warps holds at a time: 32 of each thread


def channel_block(channels: int, most: int) -> int:
    """Channels of one program, a power of two up to `most`: a divisor of `channels` where one of 32 or more exists."""
    divisor = channels & -channels
    return min(divisor if divisor >= 32 else power_of_two(channels), most)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def on_device_of(x: torch.Tensor) -> AbstractContextManager:
    """A context in which kernels are launched where `x` is."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
