"""Instance norm and leaky ReLU, of which autograd keeps one tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from amaes.models.ops.dispatch import without_autocast

SLOPE = 0.01  # of the leaky ReLU for negative numbers
MAX_SHIFT = 8.0  # largest |shift| / |scale| at which the norm's input is computed from its output: 3 bits are lost


def norm_act(x: torch.Tensor, norm: nn.InstanceNorm3d) -> torch.Tensor:
    """Instance norm, then leaky ReLU of slope 0.01; in eager mode autograd keeps one tensor for both.

    Both functions can be inverted, so it is enough to keep the output, which the next convolution keeps anyway. The
    input is kept too where the scale of a channel is so small that the inverse loses its digits, and on a GPU, where
    the test of the scales would wait for the device. That is as much as the norm and a leaky ReLU in place keep.

    Args:
        x: (B, C, X, Y, Z).
        norm: affine, without running statistics. Statistics are in float32 (or float64) whatever autocast says.
    """
    if torch.compiler.is_compiling():  # one graph, in which the compiler decides what to keep
        return _plain(x, norm)
    return _NormAct.apply(x, norm.weight, norm.bias, norm.eps)


def _plain(x: torch.Tensor, norm: nn.InstanceNorm3d) -> torch.Tensor:
    return F.leaky_relu(norm(x), SLOPE)


# In eager mode, on every device ---------------------------------------------------------------------------------------


class _NormAct(torch.autograd.Function):
    """The backward pass computes the norm's input from the output where it can."""

    @staticmethod
    def forward(ctx, x, scale, shift, eps):
        rows = x.contiguous().flatten(0, 1)[None]  # (1, B C, X, Y, Z): statistics per sample and channel
        scales, shifts = scale.repeat(len(x)), shift.repeat(len(x))
        y, mean, rstd = torch.native_batch_norm(rows, scales, shifts, None, None, True, 0.0, eps)
        y = F.leaky_relu_(y, SLOPE).view(x.shape)
        ctx.save_for_backward(y, None if _is_invertible(scale, shift) else rows, scales, shifts, mean, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad):
        y, rows, scales, shifts, mean, rstd = ctx.saved_tensors
        grad = torch.ops.aten.leaky_relu_backward(grad.contiguous(), y, SLOPE, True).view(1, -1, *y.shape[2:])
        if rows is None:  # the norm's output has the same normalised values as its input, with another mean and spread
            rows = F.leaky_relu(y, 1 / SLOPE).view_as(grad)
            scales, mean, rstd = rstd * scales.square(), shifts.to(mean.dtype), scales.to(rstd.dtype).reciprocal()
        grad_x, *grads = torch.ops.aten.native_batch_norm_backward(
            grad, rows, scales, None, None, mean, rstd, True, ctx.eps, [True] * 3
        )
        grad_scale, grad_shift = (part.view(len(y), -1).sum(0) for part in grads)
        return grad_x.view_as(y), grad_scale, grad_shift, None


def _is_invertible(scale: torch.Tensor, shift: torch.Tensor) -> bool:
    """Whether the norm's input can be computed from its output; False on a GPU, which is not waited for."""
    if scale.device.type == "cpu":
        return bool((shift.abs() < MAX_SHIFT * scale.abs()).all())
    return scale.device.type == "meta"
