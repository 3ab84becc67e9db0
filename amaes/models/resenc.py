"""The residual encoder U-Net of nnU-Net (ResEnc, arXiv 2404.09556), as dynamic-network-architectures builds it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from amaes.models.decoder import UNetDecoder
from amaes.models.ops import conv_before_norm, norm_act, norm_only
from amaes.models.ops.norm_act import SLOPE
from amaes.models.stages import run_stage


class ConvNorm(nn.Module):
    """Convolution and instance norm, by default followed by leaky ReLU of slope 0.01."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias)
        self.norm = nn.InstanceNorm3d(out_channels, affine=True)

    def forward(self, x: torch.Tensor, activation: bool = True) -> torch.Tensor:
        x = conv_before_norm(x, self.conv)
        return norm_act(x, self.norm) if activation else norm_only(x, self.norm)


class ResidualBlock(nn.Module):
    """Two 3x3x3 units, the input added before the last activation.

    With a stride the input is averaged first; where the channels change it passes a 1x1x1 convolution and a norm.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = ConvNorm(in_channels, out_channels, stride=stride)
        self.conv2 = ConvNorm(out_channels, out_channels)
        same = in_channels == out_channels
        self.shortcut = None if same else ConvNorm(in_channels, out_channels, kernel_size=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, X, Y, Z) to (B, O, X / stride, Y / stride, Z / stride)."""
        y = self.conv2(self.conv1(x), activation=False)
        if self.stride > 1:
            x = F.avg_pool3d(x, self.stride)
        if self.shortcut is not None:
            x = self.shortcut(x, activation=False)
        return F.leaky_relu(y + x, SLOPE, inplace=True)


class ResEnc(nn.Module):
    """Residual encoder: a stem of one convolution unit, then stages of residual blocks, each but the first of stride 2.

    Args:
        in_channels: channels of the image.
        widths: channels of each stage, finest first.
        depths: residual blocks of each stage.

    Attributes:
        channels, strides: of each stage, finest first.
        decoders: name -> this family's own form of that decoder: "unet" is nnU-Net's.
        variant: options of the encoder that do not show in the shapes of its weights: none.
        min_bottleneck_voxels: fewest voxels of the coarsest feature in training, see `unet.UNet`.
    """

    min_bottleneck_voxels = 4

    def __init__(
        self,
        in_channels: int = 1,
        widths: Sequence[int] = (32, 64, 128, 256, 320, 320),
        depths: Sequence[int] = (2, 2, 2, 2, 2, 2),
    ) -> None:
        super().__init__()
        self.checkpoint_activations = False
        self.decoders, self.variant = {"unet": ResEncDecoder}, {}
        self.channels = tuple(widths)
        self.strides = tuple(2**i for i in range(len(widths)))
        self.stem = ConvNorm(in_channels, widths[0])
        self.stages = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            first = ResidualBlock(widths[max(i - 1, 0)], width, stride=2 if i > 0 else 1)
            self.stages.append(nn.Sequential(first, *(ResidualBlock(width, width) for _ in range(depth - 1))))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, C, X, Y, Z) to one feature map per stage, finest first: (B, channels[i], X/2^i, Y/2^i, Z/2^i)."""
        x = self.stem(x)
        features = []
        for stage in self.stages:
            x = run_stage(self, stage, x)
            features.append(x)
        return features


class ResEncDecoder(UNetDecoder):
    """nnU-Net's decoder of a residual encoder: one convolution unit per stage, no head on the deepest feature.

    As in nnU-Net's files there is a head on every other stage. Without deep supervision the coarser ones are not
    trained.

    Args:
        channels, strides, num_classes, deep_supervision: see `UNetDecoder`.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], num_classes: int, deep_supervision: bool = False
    ) -> None:
        super().__init__(channels, strides, num_classes, convs=1, deep_supervision=True)
        self.deep_supervision = deep_supervision
        self.heads = self.heads[: len(self.stages)]
        self.heads[1:].requires_grad_(deep_supervision)
