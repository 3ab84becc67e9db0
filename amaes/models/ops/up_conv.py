"""An upsampling and the convolution after it as one convolution of composed weights, before a norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from amaes.models.ops import dispatch
from amaes.models.ops.conv import convolve, weight_without_bias
from amaes.models.ops.dispatch import autocast_off, compute_dtype
from amaes.models.ops.norm_act import norm_act, norm_act_of_phases

FLOAT32_COST = 8  # of a multiplication in float32 on a GPU, as in composing weights, beside one in 16 bits


def fused_is_cheaper(x: torch.Tensor, up: nn.ConvTranspose3d, conv: nn.Conv3d) -> bool:
    """Whether `up_conv_norm_act` needs less arithmetic than two convolutions, the product of their weights included.

    On the CPU, where it was measured, and beside Triton kernels; elsewhere False.
    """
    step, kernel = up.stride[0], conv.kernel_size[0]
    voxels = x[:, 0].numel() * step**3  # after the upsampling
    per_voxel = up.in_channels * up.out_channels + kernel**3 * up.out_channels * conv.out_channels
    fused_kernel = up.in_channels * conv.out_channels * (step + kernel - 1) ** 3  # numbers
    if dispatch.use_triton(x) and _has_phases(up, conv):
        composing = FLOAT32_COST * step**3
    elif dispatch.use_cpu_path(x):
        composing = kernel**3
    else:
        return False
    return fused_kernel * (voxels / step**3 + composing * up.out_channels) < per_voxel * voxels


def up_conv_norm_act(x: torch.Tensor, up: nn.ConvTranspose3d, conv: nn.Conv3d, norm: nn.InstanceNorm3d) -> torch.Tensor:
    """`norm_act(conv(up(x)), norm)`, of which the upsampled map is not written, nor kept for the backward pass.

    Upsampling and convolution are linear, so their composition is one linear map, whose kernel is the convolution of
    theirs.

    Args:
        x: (B, C, X, Y, Z).
        up: kernel equal to its stride, with bias.
        conv: odd kernel k, padding k // 2, with bias.
        norm: see `norm_act`.
    """
    if dispatch.use_triton(x) and _has_phases(up, conv):
        return norm_act_of_phases(*_phases(x, up, conv), norm)
    return norm_act(up_conv(x, up, conv), norm)


def up_conv(x: torch.Tensor, up: nn.ConvTranspose3d, conv: nn.Conv3d) -> torch.Tensor:
    """`conv(up(x))` as one transposed convolution.

    It needs 32 instead of 58 multiply-adds per voxel and pair of channels where sides and channels are halved and the
    kernel is 3.
    """
    with autocast_off(x):  # the fused kernel is rounded once
        kernel = F.conv3d(up.weight, conv.weight, padding=conv.kernel_size[0] - 1)
    y = convolve(x, kernel, None, up.stride, conv.padding, transposed=True)
    with autocast_off(x):
        return y.add_(_bias_map(up.bias, conv, y.shape[2:]).to(y.dtype))


def _bias_map(bias: torch.Tensor, conv: nn.Conv3d, shape: torch.Size) -> torch.Tensor:
    """Convolution of constant channels, (1, O, *shape): constant but where the kernel reaches over a face."""
    margin = conv.padding[0]
    image = bias.view(1, -1, 1, 1, 1).expand(1, -1, *(min(side, 2 * margin + 1) for side in shape))
    y = F.conv3d(image, conv.weight, conv.bias, padding=margin)
    for axis, side in enumerate(shape, start=2):
        if side > y.shape[axis]:
            first, middle, last = y.split((margin, 1, margin), axis)
            sizes = [-1] * axis + [side - 2 * margin] + [-1] * (4 - axis)
            y = torch.cat([first, middle.expand(sizes), last], axis)
    return y


# Beside Triton kernels, on NVIDIA GPUs --------------------------------------------------------------------------------


def _has_phases(up: nn.ConvTranspose3d, conv: nn.Conv3d) -> bool:
    return (up.stride, conv.kernel_size) == ((2, 2, 2), (3, 3, 3))


def _phases(x: torch.Tensor, up: nn.ConvTranspose3d, conv: nn.Conv3d) -> tuple[torch.Tensor, torch.Tensor]:
    """The 8 phases of `conv(up(x))`, its voxels of even and odd places along each axis, as one convolution; the border.

    Without the bias of `conv`, which the norm takes away again. What the bias of `up` adds is a constant, too, but at
    the faces, over which `conv` reaches: the border is the difference, (3, 3, 3, O), of first, middle and last voxels.

    Along an axis, voxels 2m and 2m + 1 of the upsampled map come from voxel m of `x`. The convolution reads
    2m + p - 1, 2m + p and 2m + p + 1 for phase p, which come from m + p - 1 and m + p: two taps.
    """
    dtype, weight = compute_dtype(x), weight_without_bias(conv)
    with autocast_off(x):
        taps = F.conv3d(weight, up.weight, padding=1)  # (O, C, 4, 4, 4), of each axis 2 * tap + phase
        taps = taps.view(*taps.shape[:2], *[2] * 6).permute(3, 5, 7, 0, 1, 2, 4, 6)
        kernel = taps.flatten(0, 3).to(dtype, memory_format=torch.channels_last_3d)  # (8 O, C, 2, 2, 2)
        rows = x.to(dtype).contiguous(memory_format=torch.channels_last_3d)
        phases = F.conv3d(rows, kernel, padding=1)  # (B, 8 O, X + 1, Y + 1, Z + 1)
        bias = up.bias.view(1, -1, 1, 1, 1).expand(1, -1, 3, 3, 3)
        border = F.conv3d(bias, weight, padding=1)
        border = border - border[..., 1:2, 1:2, 1:2]
        return phases, border[0].movedim(0, -1).contiguous()
