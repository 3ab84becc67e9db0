"""The plain U-Net encoder of AMAES (arXiv 2408.00640): "B" is 32 wide, "XL" 64."""

from __future__ import annotations

import torch
from torch import nn

from amaes.models.ops import conv_before_norm, norm_act, norm_act_pool, up_conv_norm_act
from amaes.models.stages import run_stage

NUM_STAGES = 5  # full resolution, then four halvings


class ConvUnit(nn.Module):
    """Convolution 3x3x3, instance norm, leaky ReLU of slope 0.01."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm = nn.InstanceNorm3d(out_channels, affine=True)

    def forward(self, x: torch.Tensor, up: nn.ConvTranspose3d | None = None) -> torch.Tensor:
        """See `ConvBlock`."""
        if up is None:
            return norm_act(conv_before_norm(x, self.conv), self.norm)
        return up_conv_norm_act(x, up, self.conv, self.norm)

    def pooled(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The unit's map, and its maxima over blocks of 2x2x2 voxels."""
        return norm_act_pool(conv_before_norm(x, self.conv), self.norm)


class ConvBlock(nn.Sequential):
    """`convs` units in a row, the first from `in_channels`; no residual connection."""

    def __init__(self, in_channels: int, out_channels: int, convs: int) -> None:
        super().__init__(*(ConvUnit(in_channels if i == 0 else out_channels, out_channels) for i in range(convs)))

    def forward(self, x: torch.Tensor, up: nn.ConvTranspose3d | None = None) -> torch.Tensor:
        """(B, C, X, Y, Z) to (B, O, X, Y, Z); with `up`, the block of up(x), which is not written (`ops.up_conv`)."""
        first, *others = self
        x = first(x, up)
        for unit in others:
            x = unit(x)
        return x


class PooledBlock(ConvBlock):
    """A block that also gives its map pooled: what the next stage reads."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, X, Y, Z) to (B, O, X, Y, Z) and (B, O, X/2, Y/2, Z/2)."""
        *others, last = self
        for unit in others:
            x = unit(x)
        return last.pooled(x)


class UNet(nn.Module):
    """U-Net encoder: two convolution units per stage, max pooling between stages.

    Args:
        in_channels: channels of the image.
        width: channels at full resolution.

    Attributes:
        channels: of each stage, finest first.
        strides: of each stage relative to the input, finest first.
        decoders: name -> this family's own form of that decoder: none.
        variant: options of the encoder that do not show in the shapes of its weights: none.
        min_bottleneck_voxels: fewest voxels of the coarsest feature in training. Instance norm makes +1 and -1 of two
            voxels, whatever they were: no gradient passes, and without skip connections the encoder learns nothing.
    """

    min_bottleneck_voxels = 4

    def __init__(self, in_channels: int = 1, width: int = 32) -> None:
        super().__init__()
        self.checkpoint_activations = False
        self.decoders, self.variant = {}, {}
        self.channels = tuple(width * 2**i for i in range(NUM_STAGES))
        self.strides = tuple(2**i for i in range(NUM_STAGES))
        inputs = (in_channels, *self.channels[:-1])
        blocks = [PooledBlock] * (NUM_STAGES - 1) + [ConvBlock]
        self.stages = nn.ModuleList(
            block(i, o, convs=2) for block, i, o in zip(blocks, inputs, self.channels, strict=True)
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, C, X, Y, Z) to one feature map per stage, finest first: (B, channels[i], X/2^i, Y/2^i, Z/2^i)."""
        features = []
        for stage in self.stages[:-1]:
            feature, x = run_stage(self, stage, x)
            features.append(feature)
        return [*features, run_stage(self, self.stages[-1], x)]
