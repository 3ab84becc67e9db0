"""Decoders for any encoder that publishes `channels` and `strides`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from amaes.models.unet import conv_block


class UNetDecoder(nn.Module):
    """Standard U-Net decoder: upsample, concatenate the skip connection, convolve; 1x1x1 convolution to the output.

    Args:
        channels: of the encoder's stages, finest first.
        strides: of the encoder's stages relative to the image, finest first; strides[0] must be 1.
        num_classes: output channels.
        convs: convolution units per stage.
        skips: concatenate the encoder's features; without, only the deepest feature is read.
        deep_supervision: also predict from every coarser stage while training.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        convs: int = 2,
        skips: bool = True,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        if strides[0] != 1:
            raise ValueError(f"the finest feature has stride {strides[0]}; this decoder needs one of stride 1")
        self.skips = skips
        self.deep_supervision = deep_supervision
        self.ups = nn.ModuleList()  # [i] leads from stage i + 1 to stage i
        self.stages = nn.ModuleList()
        for i in range(len(channels) - 1):
            ratio = strides[i + 1] // strides[i]
            self.ups.append(nn.ConvTranspose3d(channels[i + 1], channels[i], kernel_size=ratio, stride=ratio))
            self.stages.append(conv_block(channels[i] * (2 if skips else 1), channels[i], convs))
        heads = channels if deep_supervision else channels[:1]
        self.heads = nn.ModuleList(nn.Conv3d(width, num_classes, kernel_size=1) for width in heads)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """Features of the encoder, finest first, to the output at full resolution: (B, num_classes, X, Y, Z).

        With deep supervision, in training mode: a list of outputs, finest first, one per stage.
        """
        x = features[-1]
        maps = [x]
        for i in reversed(range(len(self.stages))):
            x = self.ups[i](x)
            x = self.stages[i](torch.cat([x, features[i]], dim=1) if self.skips else x)
            maps.insert(0, x)
        if self.deep_supervision and self.training:
            return [head(x) for head, x in zip(self.heads, maps, strict=True)]
        return self.heads[0](x)


class LightDecoder(UNetDecoder):
    """The light decoder of AMAES (arXiv 2408.00640, Sec. 3.1): one convolution unit per stage, by default no skips."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int], num_classes: int, skips: bool = False) -> None:
        super().__init__(channels, strides, num_classes, convs=1, skips=skips)
