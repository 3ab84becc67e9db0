"""Decoders for any encoder that publishes `channels` and `strides`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import nn

from amaes.models.ops import fused_is_cheaper, head
from amaes.models.stages import run_stage
from amaes.models.unet import ConvBlock


def check_stages(channels: Sequence[int], strides: Sequence[int], ratio: int | None = None) -> None:
    """Refuse features that no decoder can join.

    Args:
        channels: of the encoder's stages, finest first.
        strides: of the encoder's stages relative to the image, finest first.
        ratio: the only accepted step between strides, or None for any whole one.

    Raises:
        ValueError: names what does not fit.
    """
    if len(channels) != len(strides) or len(channels) < 2:
        raise ValueError(f"{len(channels)} channels and {len(strides)} strides; a decoder needs two or more of each")
    if strides[0] != 1:
        raise ValueError(f"the finest feature has stride {strides[0]}; this decoder needs one of stride 1")
    for fine, coarse in pairwise(strides):
        if coarse % fine or coarse == fine or (ratio and coarse != ratio * fine):
            accepted = f"{ratio} times the last" if ratio else "whole multiples of the last"
            raise ValueError(f"strides {tuple(strides)}: {coarse} after {fine}; each must be {accepted}")


def stage_widths(channels: Sequence[int]) -> tuple[int, ...]:
    """Channels of a decoder's stages: those of the encoder, but at least half those of the next coarser stage.

    The image itself may be an encoder's finest feature; its one channel is no width to decode in.
    """
    widths = [channels[-1]]
    for count in reversed(channels[:-1]):
        widths.insert(0, max(count, widths[0] // 2))
    return tuple(widths)


class Decoder(nn.Module):
    """From the deepest feature up: upsample, take in the skip connection, a stage; at last a head.

    A subclass fills `ups` ([i] leads from stage i + 1 to stage i), `stages`, and `heads` (finest first), and, where the
    encoder's features are not taken as they are, `laterals` (one per feature).

    Args:
        channels: of the encoder's stages, finest first.
        strides: of the encoder's stages relative to the image, finest first; strides[0] must be 1.
        skips: read the encoder's features; without, only the deepest is read.
        deep_supervision: also predict from every coarser stage while training.
        ratio: the only accepted step between strides, or None for any whole one.

    Raises:
        ValueError: see `check_stages`; (forward) features of other channels.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        skips: bool = True,
        deep_supervision: bool = False,
        ratio: int | None = None,
    ) -> None:
        super().__init__()
        check_stages(channels, strides, ratio)
        self.channels = tuple(channels)
        self.skips = skips
        self.deep_supervision = deep_supervision
        self.checkpoint_activations = False
        self.ups = nn.ModuleList()
        self.stages = nn.ModuleList()
        self.laterals = nn.ModuleList()
        self.heads = nn.ModuleList()

    def merge(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """Upsampled map and skip connection as the input of a stage."""
        return torch.cat([x, skip], dim=1)

    def stage(self, i: int, x: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
        """From the map of stage i + 1 and the skip connection, if any, to the map of stage i."""
        x = run_stage(self, self.ups[i], x)
        return run_stage(self, self.stages[i], x if skip is None else self.merge(x, skip))

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """Features of the encoder, finest first, to the output at full resolution: (B, num_classes, X, Y, Z).

        With deep supervision, in training mode: a list of outputs, finest first, one per head.
        """
        x = self._lateral(features, len(self.channels) - 1)
        maps = [x]
        for i in reversed(range(len(self.stages))):
            x = self.stage(i, x, self._lateral(features, i) if self.skips else None)
            maps.insert(0, x)
        if self.deep_supervision and self.training:
            return [head(x, layer) for layer, x in zip(self.heads, maps, strict=False)]  # the deepest may have none
        return head(x, self.heads[0])

    def _lateral(self, features: list[torch.Tensor], i: int) -> torch.Tensor:
        return run_stage(self, self.laterals[i], features[i]) if self.laterals else features[i]


class UNetDecoder(Decoder):
    """Standard U-Net decoder: transposed convolution, concatenated skip connection, convolutions; 1x1x1 to the output.

    Args:
        channels, strides, skips, deep_supervision: see `Decoder`.
        num_classes: output channels.
        convs: convolution units per stage.
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
        super().__init__(channels, strides, skips, deep_supervision)
        widths = stage_widths(channels)
        for i in range(len(channels) - 1):
            step = strides[i + 1] // strides[i]
            self.ups.append(nn.ConvTranspose3d(widths[i + 1], widths[i], kernel_size=step, stride=step))
            self.stages.append(ConvBlock(widths[i] + (channels[i] if skips else 0), widths[i], convs))
        heads = widths if deep_supervision else widths[:1]
        self.heads.extend(nn.Conv3d(width, num_classes, kernel_size=1) for width in heads)

    def stage(self, i: int, x: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
        if skip is None and fused_is_cheaper(x, self.ups[i], self.stages[i][0].conv):
            return run_stage(self, partial(self.stages[i], up=self.ups[i]), x)
        return super().stage(i, x, skip)


class LightDecoder(UNetDecoder):
    """The light decoder of AMAES (arXiv 2408.00640, Sec. 3.1): one convolution unit per stage, by default no skips."""

    def __init__(self, channels: Sequence[int], strides: Sequence[int], num_classes: int, skips: bool = False) -> None:
        super().__init__(channels, strides, num_classes, convs=1, skips=skips)
