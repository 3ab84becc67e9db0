"""Sizes of the networks, the tables of what can be built by name, and the functions that build.

The tables' keys are the choices of the command line. Torch and the classes are imported when something is built, so
that a command's help does not wait for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from amaes.choices import GRN_DIVISORS, MERGINGS

if TYPE_CHECKING:
    from torch import nn

    from amaes.models.network import Network

# Sizes ----------------------------------------------------------------------------------------------------------------

# Width: channels at full resolution, of Swin encoders those of the first stage. They double at each stage.
UNETS: dict[str, dict] = {"unet_tiny": {"width": 8}, "unet_b": {"width": 32}, "unet_xl": {"width": 64}}
SWINS: dict[str, dict] = {"swin_unetr": {"width": 48}, "swin_tiny": {"width": 12}}
# Depths: residual blocks per stage. All have the widths of nnU-Net; AMAES-300K names the size L `resenc_unet_b`.
RESENCS: dict[str, dict] = {"resenc_s": {"depths": (2, 2, 2, 2, 2, 2)}, "resenc_l": {"depths": (1, 3, 4, 6, 6, 6)}}

# Depths (blocks) and ratios (expansion) of the stages from full resolution to the bottleneck; decoders mirror them.
_S = {"width": 32, "depths": (2, 2, 2, 2, 2), "ratios": (2, 2, 2, 2, 2)}
_B = {"width": 32, "depths": (2, 2, 2, 2, 2), "ratios": (2, 3, 4, 4, 4)}
_M = {"width": 32, "depths": (3, 4, 4, 4, 4), "ratios": (2, 3, 4, 4, 4)}
_L = {"width": 32, "depths": (3, 4, 8, 8, 8), "ratios": (3, 4, 8, 8, 8)}
_MEDNEXT_V1 = {"mednext_s": _S, "mednext_b": _B, "mednext_m": _M, "mednext_l": _L}
MEDNEXTS: dict[str, dict] = {
    **_MEDNEXT_V1,
    **{f"{name}_k5": size | {"kernel_size": 5} for name, size in _MEDNEXT_V1.items()},
    "mednext_v2_base": _L | {"grn": "mean"},
    "mednext_v2_wide": _L | {"grn": "mean", "width": 64},
}


# Encoders -------------------------------------------------------------------------------------------------------------


def _unet(in_channels: int = 1, **size) -> nn.Module:
    from amaes.models.unet import UNet

    return UNet(in_channels, **size)


def _mednext(in_channels: int = 1, **size) -> nn.Module:
    from amaes.models.mednext import MedNeXt

    return MedNeXt(in_channels, **size)


def _resenc(in_channels: int = 1, **size) -> nn.Module:
    from amaes.models.resenc import ResEnc

    return ResEnc(in_channels, **size)


def _swin(in_channels: int = 1, **size) -> nn.Module:
    from amaes.models.swin_unetr import SwinUNETR

    return SwinUNETR(in_channels, **size)


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(_unet, **size) for name, size in UNETS.items()},
    **{name: partial(_mednext, **size) for name, size in MEDNEXTS.items()},
    **{name: partial(_resenc, **size) for name, size in RESENCS.items()},
    **{name: partial(_swin, **size) for name, size in SWINS.items()},
}

# Options of encoders that keep every shape and change the mathematics: name -> (architectures, accepted values).
ENCODER_OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "merging": (tuple(SWINS), MERGINGS),
    "grn": (tuple(name for name, size in MEDNEXTS.items() if "grn" in size), GRN_DIVISORS),
}


def build_encoder(arch: str, in_channels: int = 1, **options: str | None) -> nn.Module:
    """The encoder named `arch`.

    Args:
        arch: a key of ARCHITECTURES.
        in_channels: channels of the image.
        options: options of that encoder, see ENCODER_OPTIONS; None is the encoder's default.

    Raises:
        ValueError: unknown `arch` or option, or an option or value that the encoder does not have.
    """
    builder = _pick(ARCHITECTURES, "`arch`", arch)
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        archs, accepted = _pick(ENCODER_OPTIONS, "option", name)
        if arch not in archs:
            raise ValueError(f"`{name}` {value!r}: {arch} has no such option; those that have it: {', '.join(archs)}")
        if value not in accepted:
            raise ValueError(f"`{name}` {value!r} is unknown; accepted: {', '.join(accepted)}")
    return builder(in_channels, **given)


# Decoders and heads ---------------------------------------------------------------------------------------------------


def _light_decoder(channels: Sequence[int], strides: Sequence[int], out_channels: int, skips: bool) -> nn.Module:
    from amaes.models.decoder import LightDecoder

    return LightDecoder(channels, strides, out_channels, skips=skips)


def _standard_decoder(channels: Sequence[int], strides: Sequence[int], out_channels: int, skips: bool) -> nn.Module:
    from amaes.models.decoder import UNetDecoder

    return UNetDecoder(channels, strides, out_channels, skips=skips)


def _unet_decoder(
    channels: Sequence[int], strides: Sequence[int], num_classes: int, deep_supervision: bool
) -> nn.Module:
    from amaes.models.decoder import UNetDecoder

    return UNetDecoder(channels, strides, num_classes, deep_supervision=deep_supervision)


def _mednext_decoder(
    channels: Sequence[int], strides: Sequence[int], num_classes: int, deep_supervision: bool
) -> nn.Module:
    from amaes.models.mednext import MedNeXtDecoder

    return MedNeXtDecoder(channels, strides, num_classes, deep_supervision=deep_supervision)


def _vae_head(widths: Sequence[int]) -> list[nn.Module]:
    from amaes.models.swin_heads import vae_stages

    return vae_stages(widths)


def _deconv_head(widths: Sequence[int]) -> list[nn.Module]:
    from amaes.models.swin_heads import deconv_stages

    return deconv_stages(widths)


def _large_kernel_deconv_head(widths: Sequence[int]) -> list[nn.Module]:
    from amaes.models.swin_heads import large_kernel_deconv_stages

    return large_kernel_deconv_stages(widths)


RECONSTRUCTION_DECODERS: dict[str, Callable[..., nn.Module]] = {"light": _light_decoder, "standard": _standard_decoder}
# An encoder whose family has its own form of one of these brings it, under the same name, as `encoder.decoders`.
SEGMENTATION_DECODERS: dict[str, Callable[..., nn.Module]] = {"unet": _unet_decoder, "mednext": _mednext_decoder}
# Stages of the reconstruction head of `SwinHeads`, from its widths: the deepest first, the image's channels last.
RECONSTRUCTION_HEADS: dict[str, Callable[[Sequence[int]], list[nn.Module]]] = {
    "vae": _vae_head,
    "deconv": _deconv_head,
    "large_kernel_deconv": _large_kernel_deconv_head,
}


# Networks -------------------------------------------------------------------------------------------------------------


def build_autoencoder(
    arch: str, in_channels: int = 1, decoder: str = "light", skips: bool = False, **options: str | None
) -> Network:
    """Encoder and reconstruction decoder: (B, C, X, Y, Z) to the same shape.

    Args:
        arch: a key of ARCHITECTURES.
        in_channels: channels of image and reconstruction.
        decoder: a key of RECONSTRUCTION_DECODERS: "light" (one convolution per stage) or "standard" (two).
        skips: connect the encoder's features to the decoder.
        options: see `build_encoder`.

    Raises:
        ValueError: unknown `decoder`; see also `build_encoder`.
    """
    from amaes.models.network import Network

    encoder = build_encoder(arch, in_channels, **options)
    build_decoder = _pick(RECONSTRUCTION_DECODERS, "`decoder`", decoder)
    return Network(encoder, build_decoder(encoder.channels, encoder.strides, in_channels, skips=skips), in_channels)


def build_segmenter(
    arch: str,
    in_channels: int = 1,
    num_classes: int = 2,
    decoder: str = "unet",
    deep_supervision: bool = False,
    **options: str | None,
) -> Network:
    """Encoder and segmentation decoder with skip connections: (B, C, X, Y, Z) to logits (B, num_classes, X, Y, Z).

    Args:
        arch: a key of ARCHITECTURES.
        in_channels: channels of the image.
        num_classes: output channels, background included.
        decoder: a key of SEGMENTATION_DECODERS; the encoder's own form of it where it has one.
        deep_supervision: in training mode return logits of every stage, finest first.
        options: see `build_encoder`.

    Raises:
        ValueError: unknown `decoder`; see also `build_encoder`.
    """
    from amaes.models.network import Network

    encoder = build_encoder(arch, in_channels, **options)
    build_decoder = encoder.decoders.get(decoder) or _pick(SEGMENTATION_DECODERS, "`decoder`", decoder)
    head = build_decoder(encoder.channels, encoder.strides, num_classes, deep_supervision=deep_supervision)
    return Network(encoder, head, in_channels)


def build_swin_ssl(
    arch: str = "swin_unetr", in_channels: int = 1, reconstruction: str = "vae", **options: str | None
) -> Network:
    """Swin encoder and its self-supervised heads: (B, C, X, Y, Z) to logits (B, 4), embedding (B, 512), reconstruction.

    Args:
        arch: a Swin encoder of ARCHITECTURES.
        in_channels: channels of image and reconstruction.
        reconstruction: a key of RECONSTRUCTION_HEADS.
        options: see `build_encoder`.

    Raises:
        ValueError: `arch` is no Swin encoder; unknown `reconstruction`; see also `build_encoder`.
    """
    from amaes.models.network import Network
    from amaes.models.swin_heads import SwinHeads

    if arch not in SWINS:
        raise ValueError(f"`arch` {arch!r}: these heads read a Swin encoder; accepted: {', '.join(SWINS)}")
    encoder = build_encoder(arch, in_channels, **options)
    build_stages = _pick(RECONSTRUCTION_HEADS, "`reconstruction`", reconstruction)
    return Network(encoder, SwinHeads(encoder.channels, build_stages), in_channels)


TASKS: dict[str, Callable[..., Network]] = {
    "pretrain": build_autoencoder,
    "segment": build_segmenter,
    "swin": build_swin_ssl,
}


def build_network(task: str, build: Mapping, checkpoint_activations: bool = False) -> Network:
    """The network that a checkpoint describes.

    Args:
        task: a key of TASKS.
        build: the arguments of that task's function.
        checkpoint_activations: see `Network.checkpoint_activations`.

    Raises:
        ValueError: unknown `task`, or a value that its function refuses.
    """
    network = _pick(TASKS, "task", task)(**build)
    network.checkpoint_activations(checkpoint_activations)
    return network


Entry = TypeVar("Entry")


def _pick(table: Mapping[str, Entry], what: str, name: str) -> Entry:
    if name not in table:
        raise ValueError(f"{what} {name!r} is unknown; accepted: {', '.join(table)}")
    return table[name]
