"""MedNeXt (arXiv 2303.09975) and MedNeXt-v2 (arXiv 2512.17774): ConvNeXt blocks in 3D, encoder and decoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from amaes.choices import GRN_DIVISORS
from amaes.models.decoder import Decoder, stage_widths
from amaes.models.ops import add_upsampled, depthwise, depthwise_down, norm_mlp, pointwise
from amaes.models.stages import run_stage


class ResponseNorm(nn.Module):
    """Parameters of global response normalisation, zero at first: then it is the identity (`ops.response_norm`)."""

    def __init__(self, channels: int, divisor: str) -> None:
        super().__init__()
        if divisor not in GRN_DIVISORS:
            raise ValueError(f"`grn` {divisor!r} is unknown; accepted: {', '.join(GRN_DIVISORS)}, None")
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1, 1))
        self.divisor = divisor


class Block(nn.Module):
    """Depthwise convolution, instance norm, expand, GELU, (GRN,) project; plus the input.

    Args:
        in_channels, out_channels: equal for "same".
        ratio: hidden channels / input channels.
        kernel_size: of the depthwise convolution, odd.
        grn: None, or the divisor of global response normalisation, "mean" or "sum".
        resample: "same", "down" (stride 2) or "up" (transposed, stride 2); the latter two add the input to their
            output through a 1x1x1 convolution of the same stride.

    Raises:
        ValueError: unknown `grn`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        ratio: int,
        kernel_size: int = 3,
        grn: str | None = None,
        resample: str = "same",
    ) -> None:
        super().__init__()
        self.resample = resample
        hidden = ratio * in_channels
        layer = nn.ConvTranspose3d if resample == "up" else nn.Conv3d
        self.depthwise = layer(in_channels, in_channels, kernel_size, groups=in_channels)  # strides: see `forward`
        self.norm = nn.GroupNorm(in_channels, in_channels)
        self.expand = nn.Conv3d(in_channels, hidden, kernel_size=1)
        self.grn = None if grn is None else ResponseNorm(hidden, grn)
        self.project = nn.Conv3d(hidden, out_channels, kernel_size=1)
        self.shortcut = None if resample == "same" else layer(in_channels, out_channels, kernel_size=1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, X, Y, Z) to (B, O, X', Y', Z'); "down" halves the sides, rounding up, "up" doubles them."""
        weights = self.depthwise.weight, self.depthwise.bias
        if self.resample == "down":
            y, second = depthwise_down(x, *weights)
            residual = pointwise(second, self.shortcut.weight, self.shortcut.bias)
        else:
            y, residual = depthwise(x, *weights, self.resample), x if self.resample == "same" else None
        y = norm_mlp(y, self.norm, self.expand, self.project, self.grn, residual)
        if self.resample == "up":
            y = add_upsampled(y, pointwise(x, self.shortcut.weight.transpose(0, 1)), self.shortcut.bias)
        return y


def _stage(channels: int, depth: int, ratio: int, kernel_size: int, grn: str | None) -> nn.Sequential:
    return nn.Sequential(*(Block(channels, channels, ratio, kernel_size, grn) for _ in range(depth)))


class MedNeXt(nn.Module):
    """MedNeXt encoder: a 1x1x1 stem, then stages of blocks with a down block before each but the first.

    Args:
        in_channels: channels of the image.
        width: channels at full resolution; they double at each stage.
        depths, ratios: blocks and expansion of each stage, finest first.
        kernel_size: of the depthwise convolutions, odd.
        grn: None (v1), or the divisor of global response normalisation in every block (v2): "mean" over channels as in
            the code of the authors, or "sum" as in their paper's formula. Weights convert: gamma_sum = hidden width *
            gamma_mean, up to an epsilon of 1e-6.

    Attributes:
        channels, strides: of each stage, finest first.
        decoders: name -> this family's own form of that decoder: "mednext" mirrors the encoder.
        variant: options of the encoder that do not show in the shapes of its weights.
        min_bottleneck_voxels: fewest voxels of the coarsest feature in training; two are enough, as each norm has a
            residual connection around it.
    """

    min_bottleneck_voxels = 2

    def __init__(
        self,
        in_channels: int = 1,
        width: int = 32,
        depths: Sequence[int] = (2, 2, 2, 2, 2),
        ratios: Sequence[int] = (2, 2, 2, 2, 2),
        kernel_size: int = 3,
        grn: str | None = None,
    ) -> None:
        super().__init__()
        self.checkpoint_activations = False
        self.channels = tuple(width * 2**i for i in range(len(depths)))
        self.strides = tuple(2**i for i in range(len(depths)))
        common = {"kernel_size": kernel_size, "grn": grn}
        self.decoders = {"mednext": partial(MedNeXtDecoder, depths=depths[:-1], ratios=ratios[:-1], **common)}
        self.variant = {} if grn is None else {"grn": grn}
        self.stem = nn.Conv3d(in_channels, width, kernel_size=1)
        self.downs = nn.ModuleList()  # [i] leads from stage i to stage i + 1, with the ratio of the latter
        self.stages = nn.ModuleList()
        for i, (channels, depth, ratio) in enumerate(zip(self.channels, depths, ratios, strict=True)):
            if i > 0:
                self.downs.append(Block(channels // 2, channels, ratio, resample="down", **common))
            self.stages.append(_stage(channels, depth, ratio, **common))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, C, X, Y, Z) to one feature map per stage, finest first: (B, channels[i], X/2^i, Y/2^i, Z/2^i)."""
        x = pointwise(x, self.stem.weight, self.stem.bias)
        features = []
        for i, stage in enumerate(self.stages):
            x = run_stage(self, stage, run_stage(self, self.downs[i - 1], x) if i > 0 else x)
            features.append(x)
        return features


class MedNeXtDecoder(Decoder):
    """MedNeXt decoder: up block, skip connection added, blocks; 1x1x1 to the output.

    Args:
        channels, strides, deep_supervision: see `Decoder`; each stride must be twice the last.
        num_classes: output channels.
        depths, ratios: blocks and expansion of each stage but the deepest, finest first; by default 2 and 2, those of
            MedNeXt-S. An up block has the ratio of the stage it leads to.
        kernel_size, grn: see `MedNeXt`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        depths: Sequence[int] | None = None,
        ratios: Sequence[int] | None = None,
        kernel_size: int = 3,
        grn: str | None = None,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__(channels, strides, deep_supervision=deep_supervision, ratio=2)
        widths = stage_widths(channels)
        stages = len(channels) - 1
        for i, depth, ratio in zip(range(stages), depths or (2,) * stages, ratios or (2,) * stages, strict=True):
            self.ups.append(Block(widths[i + 1], widths[i], ratio, kernel_size, grn, resample="up"))
            self.stages.append(_stage(widths[i], depth, ratio, kernel_size, grn))
        for count, width in zip(channels, widths, strict=True):  # a skip connection is added: it must be as wide
            self.laterals.append(nn.Identity() if count == width else nn.Conv3d(count, width, kernel_size=1))
        heads = widths if deep_supervision else widths[:1]
        self.heads.extend(nn.ConvTranspose3d(width, num_classes, kernel_size=1) for width in heads)

    def merge(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return x + skip
