"""The input of a block that changes the resolution, added to its output, without copies of whole maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from amaes.models.ops.depthwise import depthwise
from amaes.models.ops.dispatch import from_rows


def depthwise_down(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`depthwise(x, weight, bias, "down")`, and the voxels of `x` at even places along all axes.

    The gradients of the two are one tensor.

    Args:
        x: (B, C, X, Y, Z).
        weight, bias: see `depthwise`.

    Returns:
        Twice (B, C, X / 2, Y / 2, Z / 2), rounded up; the second in channels-last memory.
    """
    x, second = (x, x[..., ::2, ::2, ::2]) if torch.compiler.is_compiling() else _EverySecond.apply(x)
    return depthwise(x, weight, bias, "down"), second


def add_upsampled(y: torch.Tensor, shortcut: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Add a transposed 1x1x1 convolution of stride 2 to a block's output, and a plane of zeros in front of each axis.

    Transposed convolutions of stride 2 end at 2n - 1 voxels, of which the shortcut reaches those at even places and its
    bias all. The planes of zeros are filled by the decoder's skip connection alone.

    Args:
        y: (B, C, 2X - 1, 2Y - 1, 2Z - 1).
        shortcut: of stride 1 and without bias, (B, C, X, Y, Z).
        bias: (C,).

    Returns:
        (B, C, 2X, 2Y, 2Z), in channels-last memory.
    """
    if torch.compiler.is_compiling():
        return _plain(y, shortcut, bias)
    return _AddUpsampled.apply(y, shortcut, bias)


def _plain(y: torch.Tensor, shortcut: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    y = F.pad(y + bias.to(y.dtype)[:, None, None, None], (1, 0, 1, 0, 1, 0))
    y[..., 1::2, 1::2, 1::2] += shortcut
    return y


# In eager mode --------------------------------------------------------------------------------------------------------


class _EverySecond(torch.autograd.Function):
    """The map, for `depthwise` alone, and its voxels at even places.

    The backward pass adds in place to the gradient that `depthwise` gives, a new tensor which nothing else reads.
    """

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x), from_rows(x.movedim(1, -1)[:, ::2, ::2, ::2].contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_second):
        grad[..., ::2, ::2, ::2] += grad_second
        return grad


class _AddUpsampled(torch.autograd.Function):
    """Every number is written once, and those at even places a second time."""

    @staticmethod
    def forward(ctx, y, shortcut, bias):
        ctx.dtypes = shortcut.dtype, bias.dtype
        rows = y.movedim(1, -1)
        out = rows.new_empty((len(rows), *(side + 1 for side in rows.shape[1:4]), rows.shape[-1]))
        for axis in (1, 2, 3):
            out.select(axis, 0).zero_()
        inner = out[:, 1:, 1:, 1:]
        torch.add(rows, bias.to(y.dtype), out=inner)
        inner[:, ::2, ::2, ::2] += shortcut.movedim(1, -1)
        return from_rows(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        of_shortcut, of_bias = ctx.dtypes
        inner = grad.movedim(1, -1)[:, 1:, 1:, 1:]
        grad_shortcut = inner[:, ::2, ::2, ::2].to(of_shortcut).contiguous()
        return from_rows(inner), from_rows(grad_shortcut), inner.sum((0, 1, 2, 3), dtype=of_bias)
