"""Encoders, decoders, and the tables that build them by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from amaes.models.decoder import LightDecoder, UNetDecoder
from amaes.models.unet import WIDTHS, UNet

__all__ = [
    "ARCHITECTURES",
    "RECONSTRUCTION_DECODERS",
    "SEGMENTATION_DECODERS",
    "LightDecoder",
    "Network",
    "UNet",
    "UNetDecoder",
    "build_autoencoder",
    "build_encoder",
    "build_network",
    "build_segmenter",
]

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    name: partial(UNet, width=width) for name, width in WIDTHS.items()
}

RECONSTRUCTION_DECODERS: dict[str, Callable[..., nn.Module]] = {"light": LightDecoder, "standard": UNetDecoder}
SEGMENTATION_DECODERS: dict[str, Callable[..., nn.Module]] = {"unet": UNetDecoder}


class Network(nn.Module):
    """An encoder and a decoder that reads its features.

    Raises:
        ValueError: (forward) wrong number of channels, or a side that is not a multiple of the encoder's stride.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, in_channels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.in_channels = in_channels
        self.stride = encoder.strides[-1]

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        if x.shape[1] != self.in_channels:
            raise ValueError(f"the network takes {self.in_channels} channels, got {x.shape[1]}")
        if any(side % self.stride for side in x.shape[2:]):
            raise ValueError(f"sides {tuple(x.shape[2:])} must be multiples of {self.stride}")
        return self.decoder(self.encoder(x))


def build_encoder(arch: str, in_channels: int = 1) -> nn.Module:
    """The encoder named `arch` (a key of ARCHITECTURES)."""
    return _pick(ARCHITECTURES, "arch", arch)(in_channels)


def build_autoencoder(arch: str, in_channels: int = 1, decoder: str = "light", skips: bool = False) -> Network:
    """Encoder and reconstruction decoder: (B, C, X, Y, Z) to the same shape.

    Args:
        arch: a key of ARCHITECTURES.
        in_channels: channels of image and reconstruction.
        decoder: "light" (one convolution per stage) or "standard" (two).
        skips: connect the encoder's features to the decoder.
    """
    encoder = build_encoder(arch, in_channels)
    kind = _pick(RECONSTRUCTION_DECODERS, "decoder", decoder)
    return Network(encoder, kind(encoder.channels, encoder.strides, in_channels, skips=skips), in_channels)


def build_segmenter(
    arch: str, in_channels: int = 1, num_classes: int = 2, decoder: str = "unet", deep_supervision: bool = False
) -> Network:
    """Encoder and segmentation decoder with skip connections: (B, C, X, Y, Z) to logits (B, num_classes, X, Y, Z).

    Args:
        arch: a key of ARCHITECTURES.
        in_channels: channels of the image.
        num_classes: output channels, background included.
        decoder: a key of SEGMENTATION_DECODERS.
        deep_supervision: in training mode return logits of every stage, finest first.
    """
    encoder = build_encoder(arch, in_channels)
    kind = _pick(SEGMENTATION_DECODERS, "decoder", decoder)
    head = kind(encoder.channels, encoder.strides, num_classes, deep_supervision=deep_supervision)
    return Network(encoder, head, in_channels)


def build_network(task: str, build: dict) -> Network:
    """The network that a checkpoint describes: task "pretrain" or "segment", `build` the arguments of its builder."""
    return _pick({"pretrain": build_autoencoder, "segment": build_segmenter}, "task", task)(**build)


def _pick(table: dict, option: str, name: str):
    if name not in table:
        raise ValueError(f"{option} {name!r} is unknown; accepted: {', '.join(table)}")
    return table[name]
