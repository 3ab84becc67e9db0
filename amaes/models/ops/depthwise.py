"""Depthwise convolution of stride 1, of stride 2, and transposed."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from amaes.models.ops import dispatch
from amaes.models.ops.dispatch import SPACE, autocast_off, compute_dtype, from_rows, to_rows, without_autocast

KERNEL_SIDES = (3, 5)  # that the Triton kernels know


def depthwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, resample: str) -> torch.Tensor:
    """Depthwise convolution of odd kernel k, padding k // 2.

    Args:
        x: (B, C, X, Y, Z).
        weight: (C, 1, k, k, k).
        bias: (C,).
        resample: "same" (stride 1), "down" (stride 2, side n to ceil(n / 2)), or "up" (transposed, stride 2 without
            output padding, side n to 2n - 1).
    """
    if dispatch.use_triton(x) and weight.shape[-1] in KERNEL_SIDES:
        return _triton(x, weight, bias, resample)
    if dispatch.use_cpu_path(x):
        dtype = compute_dtype(x)
        with autocast_off(x):
            return _Depthwise.apply(x.to(dtype), weight.to(dtype), bias.to(dtype), resample)
    return _plain(x, weight, bias, resample)


def _plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, resample: str) -> torch.Tensor:
    convolution = F.conv_transpose3d if resample == "up" else F.conv3d
    stride = 1 if resample == "same" else 2
    x = x.contiguous()  # `pointwise` gives channels-last tensors, with which this is slowest on CUDA
    return convolution(x, weight, bias, stride=stride, padding=weight.shape[-1] // 2, groups=x.shape[1])


# In Triton ------------------------------------------------------------------------------------------------------------


def _triton(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, resample: str) -> torch.Tensor:
    """As rows of channels: without a copy where `x` is in channels-last memory, in which the output is as well."""
    from amaes.models.ops.kernels.depthwise import depthwise as rows_depthwise

    return from_rows(rows_depthwise(to_rows(x), weight, bias, resample))


# On the CPU -----------------------------------------------------------------------------------------------------------


class _Depthwise(torch.autograd.Function):
    """Every pass is a forward convolution in channels-last memory, or a sum of 2D weight gradients.

    oneDNN has fast code for depthwise 3D convolutions in the forward direction only, and for 2D ones in all. The input
    gradient is a convolution with the mirrored kernel; strides are zeros put between the voxels.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, resample):
        ctx.save_for_backward(x, weight)
        ctx.resample = resample
        if resample == "up":
            return _convolve(_spread(x), weight.flip(SPACE), bias)
        return _convolve(x, weight, bias, stride=1 if resample == "same" else 2)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        if ctx.resample == "up":
            grad_x = _convolve(grad, weight, None, stride=2)
            grad_weight = _weight_gradient(grad, x, weight, stride=2)
        else:
            spread = grad if ctx.resample == "same" else _spread(grad, x.shape[2:])
            grad_x = _convolve(spread, weight.flip(SPACE), None)
            grad_weight = _weight_gradient(x, grad, weight, stride=1 if ctx.resample == "same" else 2)
        return grad_x, grad_weight, grad.sum((0, *SPACE)), None


def _convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int = 1) -> torch.Tensor:
    x = x.contiguous(memory_format=torch.channels_last_3d)
    return F.conv3d(x, weight, bias, stride, weight.shape[-1] // 2, groups=x.shape[1])


def _spread(x: torch.Tensor, shape: torch.Size | None = None) -> torch.Tensor:
    """Zeros between the voxels: side n to 2n - 1, or to `shape`."""
    shape = shape or [2 * side - 1 for side in x.shape[2:]]
    spread = x.new_zeros((*x.shape[:2], *shape)).contiguous(memory_format=torch.channels_last_3d)
    spread[..., ::2, ::2, ::2] = x
    return spread


def _weight_gradient(x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
    """Gradient by w of sum(grad * convolve(x, w, stride)), from 2D weight gradients over all slices.

    oneDNN's 2D code is fast up to kernel 3, so a larger kernel is put together from overlapping squares of 3 x 3.
    """
    k, padding, side = weight.shape[-1], weight.shape[-1] // 2, min(3, weight.shape[-1])
    total = torch.zeros_like(weight)
    for b, c in product(range(0, k - side + 1, 2), repeat=2):  # corner of the square
        window, window_padding = x, padding
        if k > side:
            ends = [start + stride * (n - 1) + side for start, n in zip((b, c), grad.shape[3:], strict=True)]
            window = F.pad(x, (padding, padding, padding, padding))[..., b : ends[0], c : ends[1]]
            window_padding = 0
        window = window.contiguous(memory_format=torch.channels_last_3d)
        for a in range(k):
            plane = weight[:, :, a, :side, :side]
            total[:, :, a, b : b + side, c : c + side] = _plane_gradient(
                window, grad, plane, offset=a - padding, stride=stride, padding=window_padding
            )
    return total


def _plane_gradient(
    x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor, offset: int, stride: int, padding: int
) -> torch.Tensor:
    """Gradient by one plane of a kernel, (C, 1, side, side), which reads slice stride * i + offset of x for slice i."""
    first = max(0, -(offset // stride))
    end = min(grad.shape[2], (x.shape[2] - 1 - offset) // stride + 1)
    total = torch.zeros_like(weight)
    if end <= first:
        return total
    begin = stride * first + offset
    for x_one, grad_one in zip(x, grad, strict=True):  # (C, X, Y, Z), one sample
        x_slices = x_one[:, begin : begin + stride * (end - first - 1) + 1 : stride].movedim(1, 0)  # (slices, C, Y, Z)
        grad_slices = grad_one[:, first:end].movedim(1, 0)
        gradients = torch.ops.aten.convolution_backward(
            grad_slices.contiguous(memory_format=torch.channels_last),
            x_slices.contiguous(memory_format=torch.channels_last),
            weight,
            bias_sizes=None,
            stride=[stride] * 2,
            padding=[padding] * 2,
            dilation=[1, 1],
            transposed=False,
            output_padding=[0, 0],
            groups=len(weight),
            output_mask=[False, True, False],  # the weight's alone
        )
        total = total + gradients[1]
    return total
