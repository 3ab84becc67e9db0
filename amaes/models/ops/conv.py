"""A convolution whose output goes into an instance norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from amaes.models.ops import dispatch
from amaes.models.ops.dispatch import autocast_off, compute_dtype, from_rows, without_autocast

IMAGE_CHANNELS = 4  # most of an input whose convolution is computed as a matrix product
MOST_TAPS = 128  # and most of its channels * kernel^3
FEW_CHANNELS = 16  # fewer have a quicker backward pass on the CPU


def conv_before_norm(x: torch.Tensor, conv: nn.Conv3d) -> torch.Tensor:
    """`conv(x)`, but for a constant of each channel, which the norm after it takes away again.

    Args:
        x: (B, C, X, Y, Z).
        conv: of odd kernel k, padding k // 2.
    """
    if dispatch.use_triton(x):
        return _channels_last(x, conv)
    return convolve(x, conv.weight, conv.bias, conv.stride, conv.padding)


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    transposed: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.conv3d`, or `conv_transpose3d`, with a quicker backward pass on the CPU for few channels."""
    few = 1 < min(x.shape[1], *weight.shape[:2]) < FEW_CHANNELS
    if few and dispatch.use_cpu_path(x) and compute_dtype(x) == weight.dtype and not torch.compiler.is_compiling():
        return _FewChannels.apply(x, weight, bias, stride, padding, transposed)
    return (F.conv_transpose3d if transposed else F.conv3d)(x, weight, bias, stride, padding)


# Beside Triton kernels, on NVIDIA GPUs --------------------------------------------------------------------------------


def _channels_last(x: torch.Tensor, conv: nn.Conv3d) -> torch.Tensor:
    """In channels-last memory, without the bias, which PyTorch adds in a pass of its own.

    cuDNN is slow where the input has few channels, as an image has. That convolution is a product of matrices.
    """
    weight = weight_without_bias(conv)
    few = x.shape[1] <= IMAGE_CHANNELS and weight[0].numel() <= MOST_TAPS and conv.stride == (1, 1, 1)
    if few and not x.requires_grad and not torch.compiler.is_compiling():
        dtype = compute_dtype(x)
        with autocast_off(x):
            return from_rows(_Product.apply(x.to(dtype), weight.to(dtype)))
    if x.shape[1] == 1:  # one channel says "channels last" by its strides alone
        x = from_rows(x[:, 0, ..., None])
    x = x.contiguous(memory_format=torch.channels_last_3d)
    return F.conv3d(x, weight, None, conv.stride, conv.padding)


def weight_without_bias(conv: nn.Conv3d) -> torch.Tensor:
    """The weight, for a convolution before a norm without its bias, which gets a gradient of zeros."""
    return conv.weight if conv.bias is None else _ZeroGradient.apply(conv.weight, conv.bias)


class _ZeroGradient(torch.autograd.Function):
    """The weight; in the backward pass the bias gets zeros, as a bias before a norm does, up to rounding.

    Without any gradient, optimizers would leave it out, and DDP would wait for it.
    """

    @staticmethod
    def forward(ctx, weight, bias):
        ctx.save_for_backward(bias)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        (bias,) = ctx.saved_tensors
        return grad, torch.zeros_like(bias)


class _Product(torch.autograd.Function):
    """Convolution of stride 1 as a product of the neighbourhoods of all voxels, which are written twice but not kept.

    (B, C, X, Y, Z) and (O, C, k, k, k) to rows (B, X, Y, Z, O). The input gets no gradient.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        taps = weight.flatten(1)
        rows = _neighbourhoods(x, weight.shape[-1])
        y = rows @ F.pad(taps, (0, rows.shape[1] - taps.shape[1])).t()
        return y.view(len(x), *x.shape[2:], len(weight))

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = _neighbourhoods(x, weight.shape[-1])
        taps = grad.reshape(-1, len(weight)).t() @ rows
        return None, taps[:, : weight[0].numel()].reshape(weight.shape)


def _neighbourhoods(x: torch.Tensor, k: int) -> torch.Tensor:
    """(B, C, X, Y, Z) to (B X Y Z, C k^3), with zeros up to a multiple of 16 columns, as matrix units want."""
    cubes = F.pad(x, (k // 2,) * 6)
    for axis in (2, 3, 4):
        cubes = cubes.unfold(axis, k, 1)  # at last (B, C, X, Y, Z, k, k, k)
    taps = x.shape[1] * k**3
    rows = x.new_zeros((x[:, 0].numel(), taps + -taps % 16))
    rows[:, :taps].view(len(x), *x.shape[2:], x.shape[1], k, k, k).copy_(cubes.movedim(1, 4))
    return rows


# On the CPU -----------------------------------------------------------------------------------------------------------


class _FewChannels(torch.autograd.Function):
    """The backward pass in channels-last memory: with 8 channels oneDNN needs a third of the time."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, transposed):
        ctx.save_for_backward(x, weight)
        ctx.about = (stride, padding, [1] * 3, transposed, [0] * 3, 1)  # dilation, padding of the output, groups
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        return torch.convolution(x, weight, bias, *ctx.about)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad):
        tensors = [t.contiguous(memory_format=torch.channels_last_3d) for t in (grad, *ctx.saved_tensors)]
        wanted = list(ctx.needs_input_grad[:3])
        grads = torch.ops.aten.convolution_backward(*tensors, ctx.bias_sizes, *ctx.about, wanted)
        return *(g if g is None else g.contiguous() for g in grads), None, None, None
