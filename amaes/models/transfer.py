"""Weights of one network in another: matched by name, for other input channels, for larger kernels (UpKern)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from amaes.choices import STEMS, TRANSFERS
from amaes.models.build import ARCHITECTURES, build_encoder

REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MIN_COVERAGE = 0.95  # of the encoder's parameters, in a file that is taken without asking

Tensors = Mapping[str, torch.Tensor]
_BLOCK = re.compile(r"^encoder\.stages\.(\d+)\.(?:blocks\.)?(\d+)\.")
_HINTS = {"merging": "; weights made with MONAI before 1.5 need legacy"}  # where a file does not tell


@dataclass
class Transfer:
    """What a network took from a file: names of tensors, and the share of the encoder's parameters."""

    source: str  # what kind of file it is
    loaded: list[str] = field(default_factory=list)  # copied as they are
    adapted: list[str] = field(default_factory=list)  # from other input channels, or from a smaller kernel (UpKern)
    new: list[str] = field(default_factory=list)  # kept at their initial values
    ignored: list[str] = field(default_factory=list)  # in the file, not used
    notes: list[str] = field(default_factory=list)  # what is assumed, because the file does not tell
    coverage: float = 0.0  # parameters loaded or adapted / parameters of the encoder
    decoder: str = "new"

    def table(self) -> str:
        """One line per kind, with the number of tensors and two of their names."""
        lines = [f"  {self.source}"]
        for kind in ("loaded", "adapted", "new", "ignored"):
            names = getattr(self, kind)
            examples = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
            lines.append(f"  {kind:8s} {len(names):4d} tensors  {examples}")
        lines += [f"  {note}" for note in self.notes]
        share = f"{100 * self.coverage:.1f} % of the encoder's parameters have weights from the file"
        return "\n".join([*lines, f"  {share}; the decoder is {self.decoder}"])


def transfer_weights(
    network: nn.Module,
    tensors: Tensors,
    source: str,
    variant: Mapping[str, str | None],
    where: object,
    stem: str = "repeat",
    allow_partial: bool = False,
    transfer: str = "encoder",
) -> Transfer:
    """Copy a file's weights into `network.encoder`, and with `transfer` "all" also into `network.decoder`.

    Args:
        network: has the attributes `encoder` and, for "all", `decoder`. On the meta device nothing is copied.
        tensors: the file's weights under our names, "encoder.stages.0..." and so on.
        source: what kind of file it is, for messages.
        variant: options of the encoder that the weights were made with (`encoder.variant`); None: the file does not
            tell.
        where: the file, for messages.
        stem, allow_partial, transfer: see `amaes.checkpoint.load_encoder`.

    Raises:
        ValueError: see `amaes.checkpoint.load_encoder`; the network is unchanged then.
    """
    for parameter, value, accepted in (("stem", stem, STEMS), ("transfer", transfer, TRANSFERS)):
        if value not in accepted:
            raise ValueError(f"`{parameter}` {value!r} is unknown; accepted: {', '.join(accepted)}")
    report = Transfer(source, notes=_check_variant(where, variant, network.encoder))
    report.notes += _note_on_strides(tensors)
    encoder = _encoder_weights(tensors, network.encoder, stem, allow_partial, where, report)
    decoder = _decoder_weights(tensors, network.decoder, stem, where, report) if transfer == "all" else {}
    used = {f"encoder.{name}" for name in encoder} | {f"decoder.{name}" for name in decoder}
    report.ignored = [key for key in tensors if key not in used]
    taken = (*encoder.values(), *decoder.values())
    if kinds := {str(tensor.dtype) for tensor in taken if tensor.dtype not in REAL}:
        raise ValueError(f"{where}: holds weights of type {', '.join(sorted(kinds))}, expected real numbers")
    if not all(tensor.isfinite().all() for tensor in taken):
        raise ValueError(f"{where}: holds weights that are not finite")
    if not next(network.encoder.parameters()).is_meta:  # on "meta" the question is whether the file fits
        network.encoder.load_state_dict(encoder, strict=False)
        if decoder:
            network.decoder.load_state_dict(decoder, strict=False)
    return report


def _check_variant(where: object, variant: Mapping[str, str | None], encoder: nn.Module) -> list[str]:
    """Refuse weights of another variant of the encoder; return what is assumed where the file does not tell."""
    notes = []
    for option, value in encoder.variant.items():
        made_with = variant.get(option)
        if made_with is None:
            notes.append(f"`{option}` {value} is assumed, the file does not tell{_HINTS.get(option, '')}")
        elif made_with != value:
            raise ValueError(
                f"{where}: made with `{option}` {made_with}, the network has {value}; take `{option}` {made_with}"
            )
    return notes


def _note_on_strides(tensors: Tensors) -> list[str]:
    """Strides do not show in the shapes of an encoder; those of the decoder that it was trained with tell them."""
    kernels = [tuple(w.shape[2:]) for name, w in tensors.items() if name.startswith("decoder.ups.") and w.dim() == 5]
    odd = sorted({"x".join(map(str, kernel)) for kernel in kernels if len(set(kernel)) > 1})
    text = "WARNING: trained with strides of {}, the network's are the same along all axes; what it learned may not fit"
    return [text.format(", ".join(odd))] if odd else []


def _encoder_weights(
    tensors: Tensors, encoder: nn.Module, stem: str, allow_partial: bool, where: object, report: Transfer
) -> dict[str, torch.Tensor]:
    """The file's weights for an encoder, by the encoder's names; they must be (nearly) all, and no others."""
    target = encoder.state_dict()
    first = next(name for name, tensor in target.items() if tensor.dim() == 5)
    weights = _matching_weights(tensors, "encoder.", target, [first] if stem == "repeat" else [], report)
    total = sum(tensor.numel() for tensor in target.values())
    report.coverage = sum(tensor.numel() for tensor in weights.values()) / total
    if not weights or (report.coverage < MIN_COVERAGE and not allow_partial):
        raise ValueError(
            f"{where}: gives {100 * report.coverage:.1f} % of the encoder's parameters ({len(weights)} of "
            f"{len(target)} tensors), at least {100 * MIN_COVERAGE:.0f} % are needed; "
            f"{_difference(tensors, target, report)}; {fitting_architectures(tensors)} "
            "(`allow_partial` takes what fits)"
        )
    without_place = [name for name in _names(tensors, "encoder.") if name not in target]
    # A first convolution may be new (`stem` "random"), and so may response norms, which begin as the identity.
    missing = [name for name in report.new if name != first and ".grn." not in name]
    if (without_place or missing) and not allow_partial:
        parts = []
        if without_place:
            parts.append(
                f"{len(without_place)} encoder tensors of the file have no place, e.g. encoder.{without_place[0]}"
            )
        if missing:
            parts.append(f"{len(missing)} of the encoder are not in it, e.g. {missing[0]}")
        raise ValueError(
            f"{where}: holds another encoder: {'; '.join(parts)}; {_difference(tensors, target, report)}; "
            f"{fitting_architectures(tensors)} (`allow_partial` takes what fits)"
        )
    return weights


def _decoder_weights(
    tensors: Tensors, decoder: nn.Module, stem: str, where: object, report: Transfer
) -> dict[str, torch.Tensor]:
    """The file's weights for a decoder of the same kind; heads with another number of outputs stay new."""
    target = decoder.state_dict()
    names = _names(tensors, "decoder.")
    if not names:
        raise ValueError(f"{where}: `transfer` all: it ({report.source}) holds no decoder; take `transfer` encoder")
    of_image = [name for name in target if name.startswith("laterals.0.")]  # SwinUNETR decodes the image, too
    weights = _matching_weights(tensors, "decoder.", target, of_image if stem == "repeat" else [], report)
    without_place = [name for name in names if name not in target and not name.startswith("heads.")]
    may_be_new = re.compile(r"heads\.|.*\.grn\.")
    missing = [name for name in target if name not in weights and name not in of_image and not may_be_new.match(name)]
    if without_place or missing:
        parts = []
        if without_place:
            parts.append(f"{len(without_place)} tensors of it have no place, e.g. decoder.{without_place[0]}")
        if missing:
            parts.append(f"{len(missing)} of the network's do not fit or are not in it, e.g. {missing[0]}")
        raise ValueError(
            f"{where}: `transfer` all: its decoder is of another kind: {'; '.join(parts)}; take the `decoder` it was "
            "trained with, or `transfer` encoder"
        )
    new = len(target) - len(weights)
    report.decoder = f"the file's, except {new} tensors" if new else "the file's"
    return weights


def _matching_weights(
    tensors: Tensors, prefix: str, target: Tensors, of_image: Iterable[str], report: Transfer
) -> dict[str, torch.Tensor]:
    """The file's weights for a part of the network, by the part's names.

    Args:
        tensors: weights of the file.
        prefix: "encoder." or "decoder.", before the part's names in the file.
        target: weights of the part.
        of_image: names of convolutions of the image; they may take those for another number of input channels.
        report: names of tensors that are loaded, adapted and new are added to it.
    """
    weights = {}
    shown_prefix = "" if prefix == "encoder." else prefix
    for name, tensor in target.items():
        given = tensors.get(prefix + name)
        if given is not None and given.shape == tensor.shape:
            weights[name] = given
            report.loaded.append(shown_prefix + name)
        elif name in of_image and given is not None and _same_but_channels(given, tensor):
            weights[name] = given.sum(dim=1, keepdim=True).expand_as(tensor) / tensor.shape[1]
            report.adapted.append(shown_prefix + name)
        elif given is not None and name.endswith("depthwise.weight") and _is_smaller_kernel(given, tensor):
            weights[name] = grow_kernel(given, tensor.shape[-1])
            report.adapted.append(shown_prefix + name)
        else:
            report.new.append(shown_prefix + name)
    return weights


def _names(tensors: Tensors, prefix: str) -> list[str]:
    return [key.removeprefix(prefix) for key in tensors if key.startswith(prefix)]


def _shapes(tensors: Tensors) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in list(tensors.items())[:2]) + ", ..."


def _difference(tensors: Tensors, target: Tensors, report: Transfer) -> str:
    """For messages: how the encoder of a file and that of a network are built; shapes, where that says nothing."""
    wanted = {f"encoder.{name}": tensor for name, tensor in target.items()}
    given, needed = describe_encoder(tensors), describe_encoder(wanted)
    if not given or given == needed:
        given, needed = _shapes(tensors), _shapes({name: wanted[f"encoder.{name}"] for name in report.new})
    return f"the file ({report.source}) has {given}, the network {needed}"


def describe_encoder(tensors: Tensors) -> str:
    """For messages: number of blocks and width of each stage, sides of the kernels; "" where names tell no stages."""
    blocks: dict[int, set[str]] = {}
    widths: dict[int, int] = {}
    kernels = set()
    for name, tensor in tensors.items():
        if match := _BLOCK.match(name):
            blocks.setdefault(int(match[1]), set()).add(match[2])
            if tensor.dim() == 1 and ".norm" in name:
                widths.setdefault(int(match[1]), tensor.shape[0])
            if tensor.dim() == 5 and max(tensor.shape[2:]) > 1:
                kernels.add("x".join(map(str, tensor.shape[2:])))
    parts = [f"stages of {_row(len(blocks[stage]) for stage in sorted(blocks))} blocks"] if blocks else []
    parts += [f"widths {_row(widths[stage] for stage in sorted(widths))}"] if widths else []
    parts += [f"kernels {_row(sorted(kernels))}"] if kernels else []
    return ", ".join(parts)


def _row(values: Iterable[object]) -> str:
    return " ".join(map(str, values))


def _same_but_channels(given: torch.Tensor, wanted: torch.Tensor) -> bool:
    return given.dim() == wanted.dim() and given.shape[0] == wanted.shape[0] and given.shape[2:] == wanted.shape[2:]


def _is_smaller_kernel(given: torch.Tensor, wanted: torch.Tensor) -> bool:
    return given.dim() == 5 and given.shape[:2] == wanted.shape[:2] and given.shape[-1] < wanted.shape[-1]


# Which architecture weights belong to ---------------------------------------------------------------------------------


def fits_architecture(tensors: Tensors, arch: str) -> bool:
    """Whether weights under our names are the whole encoder `arch`, the number of input channels aside."""
    target = _encoder_on_meta(arch)
    given = {name: tensors[f"encoder.{name}"] for name in _names(tensors, "encoder.")}
    return given.keys() == target.keys() and all(_same_but_channels(given[name], target[name]) for name in target)


@cache
def _encoder_on_meta(arch: str) -> Tensors:
    with torch.device("meta"):
        return build_encoder(arch).state_dict()


def fitting_architectures(tensors: Tensors) -> str:
    """For messages: the architectures whose whole encoder is in the weights."""
    archs = [arch for arch in ARCHITECTURES if fits_architecture(tensors, arch)]
    return f"it fits `arch` {' or '.join(archs)}" if archs else "it fits no architecture as a whole"


# Larger kernels from trained ones -------------------------------------------------------------------------------------


def grow_kernel(weight: torch.Tensor, size: int) -> torch.Tensor:
    """Depthwise kernels (C, 1, k, k, k) resampled to side `size`, trilinearly; magnitudes are not rescaled."""
    return F.interpolate(weight.float(), size=(size,) * 3, mode="trilinear", align_corners=False).to(weight.dtype)


def upkern_(network: nn.Module, weights: Tensors) -> list[str]:
    """UpKern (arXiv 2303.09975, Sec. 2.3): start a network from the weights of one with smaller kernels, in place.

    Args:
        network: contains MedNeXt blocks.
        weights: state dict of the same network with smaller kernels; a head of other classes is left out.

    Returns:
        Names of the network's tensors that kept their values.

    Raises:
        ValueError: nothing in `weights` fits.
    """
    fitting, kept = {}, []
    for name, tensor in network.state_dict().items():
        given = weights.get(name)
        if given is not None and given.shape == tensor.shape:
            fitting[name] = given
        elif given is not None and name.endswith("depthwise.weight") and given.shape[:2] == tensor.shape[:2]:
            fitting[name] = grow_kernel(given, tensor.shape[-1])
        else:
            kept.append(name)
    if not fitting:
        raise ValueError(f"none of {len(weights)} tensors fits the network, e.g. {', '.join(list(weights)[:2])}")
    network.load_state_dict(fitting, strict=False)
    return kept
