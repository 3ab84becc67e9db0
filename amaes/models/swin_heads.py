"""The three heads of SwinUNETR's self-supervision (arXiv 2111.14791) on a Swin encoder.

Equal to MONAI's `SSLHead`, but that the rotation head gives logits, as the published training expects of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from amaes.models.stages import run_stage

ROTATIONS = 4  # multiples of 90 degrees
EMBEDDING = 512  # length of the vector that the contrastive loss compares


def vae_stages(widths: Sequence[int]) -> list[nn.Module]:
    """Five times convolution, instance norm, leaky ReLU, trilinear upsampling; a 1x1x1 convolution to the image."""
    pairs = zip(widths[:-1], [*widths[1:-1], widths[-2]], strict=True)  # the last of them keeps the width
    stages: list[nn.Module] = [
        nn.Sequential(
            nn.Conv3d(before, after, kernel_size=3, padding=1),
            nn.InstanceNorm3d(after),
            nn.LeakyReLU(0.01),
            nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False),
        )
        for before, after in pairs
    ]
    return [*stages, nn.Conv3d(widths[-2], widths[-1], kernel_size=1)]


def deconv_stages(widths: Sequence[int]) -> list[nn.Module]:
    """Five transposed convolutions of stride 2, nothing between them."""
    return [nn.ConvTranspose3d(before, after, kernel_size=2, stride=2) for before, after in pairwise(widths)]


def large_kernel_deconv_stages(widths: Sequence[int]) -> list[nn.Module]:
    """A single transposed convolution of stride 32."""
    side = 2 ** (len(widths) - 1)
    return [nn.ConvTranspose3d(widths[0], widths[-1], kernel_size=side, stride=side)]


class SwinHeads(nn.Module):
    """Which rotation, which volume, and the volume itself: three predictions from the deepest feature alone.

    Rotation and embedding are read off single tokens, the first and the second, without pooling, as published.

    Args:
        channels: of the Swin encoder's features, the image first.
        build_stages: makes the stages of the reconstruction head from its widths, the deepest first and the image's
            channels last (`vae_stages`, `deconv_stages`, `large_kernel_deconv_stages`).
    """

    def __init__(
        self, channels: Sequence[int], build_stages: Callable[[Sequence[int]], list[nn.Module]] = vae_stages
    ) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.checkpoint_activations = False
        self.rotation = nn.Linear(channels[-1], ROTATIONS)
        self.embedding = nn.Linear(channels[-1], EMBEDDING)
        self.stages = nn.ModuleList(build_stages(self.channels[::-1]))

    def forward(self, features: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features of the encoder to logits (B, 4), embedding (B, 512) and reconstruction (B, C, X, Y, Z)."""
        x = features[-1]  # (B, 16 F, X/32, Y/32, Z/32)
        tokens = x.flatten(2)  # (B, 16 F, n)
        rotation, embedding = self.rotation(tokens[..., 0]), self.embedding(tokens[..., 1])
        for stage in self.stages:
            x = run_stage(self, stage, x)
        return rotation, embedding, x
