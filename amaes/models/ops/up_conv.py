"""An upsampling and the convolution after it as one transposed convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from amaes.models.ops import dispatch
from amaes.models.ops.conv import convolve
from amaes.models.ops.dispatch import autocast_off


def fused_is_cheaper(x: torch.Tensor, up: nn.ConvTranspose3d, conv: nn.Conv3d) -> bool:
    """Whether `up_conv` needs less arithmetic than its two convolutions, the product of their weights included.

    True on the CPU only, where it was measured.
    """
    step, kernel = up.stride[0], conv.kernel_size[0]
    voxels = x[:, 0].numel() * step**3  # after the upsampling
    per_voxel = up.in_channels * up.out_channels + kernel**3 * up.out_channels * conv.out_channels
    fused_kernel = up.in_channels * conv.out_channels * (step + kernel - 1) ** 3  # numbers
    fused = fused_kernel * (voxels / step**3 + kernel**3 * up.out_channels)
    return dispatch.use_cpu_path(x) and fused < per_voxel * voxels


def up_conv(x: torch.Tensor, up: nn.ConvTranspose3d, conv: nn.Conv3d) -> torch.Tensor:
    """`conv(up(x))` as one transposed convolution; the upsampled map is not written, nor kept for the backward pass.

    Both are linear, so their composition is one linear map, whose kernel is the convolution of theirs. It needs 32
    instead of 58 multiply-adds per voxel and pair of channels where sides and channels are halved and the kernel is 3.

    Args:
        x: (B, C, X, Y, Z).
        up: kernel equal to its stride, with bias.
        conv: odd kernel k, padding k // 2, with bias.
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
