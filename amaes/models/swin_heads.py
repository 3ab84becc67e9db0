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
EMBEDDING = 512  # numbers by which views are told apart


def _vae(widths: Sequence[int]) -> list[nn.Module]:
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


def _deconv(widths: Sequence[int]) -> list[nn.Module]:
    """Five transposed convolutions of stride 2, nothing between them."""
    return [nn.ConvTranspose3d(before, after, kernel_size=2, stride=2) for before, after in pairwise(widths)]


def _large_kernel_deconv(widths: Sequence[int]) -> list[nn.Module]:
    """A single transposed convolution of stride 32."""
    side = 2 ** (len(widths) - 1)
    return [nn.ConvTranspose3d(widths[0], widths[-1], kernel_size=side, stride=side)]


# Forms of the reconstruction head: from its widths, deepest first and the image's channels last, to its stages.
RECONSTRUCTION_HEADS: dict[str, Callable[[Sequence[int]], list[nn.Module]]] = {
    "vae": _vae,
    "deconv": _deconv,
    "large_kernel_deconv": _large_kernel_deconv,
}


class SwinHeads(nn.Module):
    """Which rotation, which volume, and the volume itself: three predictions from the deepest feature alone.

    Rotation and embedding are read off single tokens, the first and the second, without pooling, as published.

    Args:
        channels: of the Swin encoder's features, the image first.
        reconstruction: a key of RECONSTRUCTION_HEADS.
    """

    def __init__(self, channels: Sequence[int], reconstruction: str = "vae") -> None:
        super().__init__()
        if reconstruction not in RECONSTRUCTION_HEADS:
            raise ValueError(
                f"reconstruction {reconstruction!r} is unknown; accepted: {', '.join(RECONSTRUCTION_HEADS)}"
            )
        self.channels = tuple(channels)
        self.checkpoint_activations = False
        self.rotation = nn.Linear(channels[-1], ROTATIONS)
        self.embedding = nn.Linear(channels[-1], EMBEDDING)
        self.stages = nn.ModuleList(RECONSTRUCTION_HEADS[reconstruction](self.channels[::-1]))

    def forward(self, features: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features of the encoder to logits (B, 4), embedding (B, 512) and reconstruction (B, C, X, Y, Z)."""
        x = features[-1]  # (B, 16 F, X/32, Y/32, Z/32)
        tokens = x.flatten(2)  # (B, 16 F, n)
        rotation, embedding = self.rotation(tokens[..., 0]), self.embedding(tokens[..., 1])
        for stage in self.stages:
            x = run_stage(self, stage, x)
        return rotation, embedding, x
