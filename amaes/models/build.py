"""The tables of architectures and decoders, and the functions that build networks from their names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from amaes.models.decoder import LightDecoder, UNetDecoder
from amaes.models.mednext import SIZES, MedNeXt, MedNeXtDecoder
from amaes.models.ops import GRN_DIVISORS
from amaes.models.swin_heads import SwinHeads
from amaes.models.swin_unetr import MERGING, SwinUNETR
from amaes.models.swin_unetr import WIDTHS as SWIN_WIDTHS
from amaes.models.unet import WIDTHS, UNet

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(UNet, width=width) for name, width in WIDTHS.items()},
    **{name: partial(MedNeXt, **size) for name, size in SIZES.items()},
    **{name: partial(SwinUNETR, width=width) for name, width in SWIN_WIDTHS.items()},
}

# Options of encoders that keep every shape and change the mathematics: name -> (architectures, accepted values).
ENCODER_OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "merging": (tuple(SWIN_WIDTHS), tuple(MERGING)),
    "grn": (tuple(name for name, size in SIZES.items() if "grn" in size), GRN_DIVISORS),
}

# An encoder whose family has its own form of a decoder brings it, under the same name, as `encoder.decoders`.
RECONSTRUCTION_DECODERS: dict[str, Callable[..., nn.Module]] = {"light": LightDecoder, "standard": UNetDecoder}
SEGMENTATION_DECODERS: dict[str, Callable[..., nn.Module]] = {"unet": UNetDecoder, "mednext": MedNeXtDecoder}


class Network(nn.Module):
    """An encoder and a decoder, or other heads, that reads its features.

    Raises:
        ValueError: the decoder was built for other channels; (forward) wrong number of channels, a side that is not a
            multiple of the encoder's stride, or an image that shrinks to a single voxel, which has no statistics.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, in_channels: int) -> None:
        super().__init__()
        if tuple(decoder.channels) != tuple(encoder.channels):
            raise ValueError(f"a decoder of channels {decoder.channels} for an encoder of channels {encoder.channels}")
        self.encoder = encoder
        self.decoder = decoder
        self.in_channels = in_channels
        self.stride = encoder.strides[-1]

    def checkpoint_activations(self, on: bool = True) -> list[nn.Module]:
        """Keep only the input of each stage for the backward pass, which runs it again: less memory, same numbers.

        Returns:
            The modules that were run that way before this call.
        """
        was_on = self.encoder.checkpoint_activations
        self.encoder.checkpoint_activations = self.decoder.checkpoint_activations = on
        names = ("stages", "downs", "ups", "laterals")
        parts = (self.encoder, self.decoder) if was_on else ()
        return [module for part in parts for name in names for module in getattr(part, name, ())]

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor, ...]:
        if x.shape[1] != self.in_channels:
            raise ValueError(f"the network takes {self.in_channels} channels, got {x.shape[1]}")
        sides = tuple(x.shape[2:])
        if any(side % self.stride for side in sides):
            raise ValueError(f"sides {sides} must be multiples of {self.stride}")
        if all(side == self.stride for side in sides):
            raise ValueError(f"sides {sides}: at least one must be {2 * self.stride} or more")
        return self.decoder(self.encoder(x))


def build_encoder(arch: str, in_channels: int = 1, **options: str) -> nn.Module:
    """The encoder named `arch` (a key of ARCHITECTURES).

    Args:
        arch: a key of ARCHITECTURES.
        in_channels: channels of the image.
        options: of that encoder, see ENCODER_OPTIONS; None is its default.
    """
    make = _pick(ARCHITECTURES, "arch", arch)
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        archs, accepted = _pick(ENCODER_OPTIONS, "option", name)
        if arch not in archs:
            raise ValueError(f"{name} {value!r}: {arch} has no such option; those that have it: {', '.join(archs)}")
        if value not in accepted:
            raise ValueError(f"{name} {value!r} is unknown; accepted: {', '.join(accepted)}")
    return make(in_channels, **given)


def build_autoencoder(
    arch: str, in_channels: int = 1, decoder: str = "light", skips: bool = False, **options: str
) -> Network:
    """Encoder and reconstruction decoder: (B, C, X, Y, Z) to the same shape.

    Args:
        arch: a key of ARCHITECTURES.
        in_channels: channels of image and reconstruction.
        decoder: "light" (one convolution per stage) or "standard" (two).
        skips: connect the encoder's features to the decoder.
        options: see `build_encoder`.
    """
    encoder = build_encoder(arch, in_channels, **options)
    kind = _pick(RECONSTRUCTION_DECODERS, "decoder", decoder)
    return Network(encoder, kind(encoder.channels, encoder.strides, in_channels, skips=skips), in_channels)


def build_segmenter(
    arch: str,
    in_channels: int = 1,
    num_classes: int = 2,
    decoder: str = "unet",
    deep_supervision: bool = False,
    **options: str,
) -> Network:
    """Encoder and segmentation decoder with skip connections: (B, C, X, Y, Z) to logits (B, num_classes, X, Y, Z).

    Args:
        arch: a key of ARCHITECTURES.
        in_channels: channels of the image.
        num_classes: output channels, background included.
        decoder: a key of SEGMENTATION_DECODERS; the encoder's own form of it where it has one.
        deep_supervision: in training mode return logits of every stage, finest first.
        options: see `build_encoder`.
    """
    encoder = build_encoder(arch, in_channels, **options)
    kind = encoder.decoders.get(decoder) or _pick(SEGMENTATION_DECODERS, "decoder", decoder)
    head = kind(encoder.channels, encoder.strides, num_classes, deep_supervision=deep_supervision)
    return Network(encoder, head, in_channels)


def build_swin_ssl(
    arch: str = "swin_unetr", in_channels: int = 1, reconstruction: str = "vae", **options: str
) -> Network:
    """Swin encoder and its self-supervised heads: (B, C, X, Y, Z) to logits (B, 4), embedding (B, 512), reconstruction.

    Args:
        arch: a Swin encoder of ARCHITECTURES.
        in_channels: channels of image and reconstruction.
        reconstruction: a key of `amaes.models.swin_heads.RECONSTRUCTION_HEADS`.
        options: see `build_encoder`.
    """
    if arch not in SWIN_WIDTHS:
        raise ValueError(f"arch {arch!r}: these heads read a Swin encoder; accepted: {', '.join(SWIN_WIDTHS)}")
    encoder = build_encoder(arch, in_channels, **options)
    return Network(encoder, SwinHeads(encoder.channels, reconstruction), in_channels)


TASKS: dict[str, Callable[..., Network]] = {
    "pretrain": build_autoencoder,
    "segment": build_segmenter,
    "swin": build_swin_ssl,
}


def build_network(task: str, build: dict, checkpoint_activations: bool = False) -> Network:
    """The network that a checkpoint describes: `task` a key of TASKS, `build` the arguments of its builder."""
    network = _pick(TASKS, "task", task)(**build)
    network.checkpoint_activations(checkpoint_activations)
    return network


def _pick(table: dict, option: str, name: str):
    if name not in table:
        raise ValueError(f"{option} {name!r} is unknown; accepted: {', '.join(table)}")
    return table[name]
