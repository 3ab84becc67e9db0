"""Checkpoints: written whole or not at all, resumed from the newest that is sound, turned into networks and encoders.

A checkpoint holds tensors and plain data only, so that `torch.load(weights_only=True)` reads it:

    format, task (of `amaes.models.TASKS`), model, optimizer, step,
    build (arguments that rebuild the network), preprocess, channels, labels, patch_size, provenance
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from amaes.files import write_json, written_whole
from amaes.models import ARCHITECTURES, build_encoder, build_network
from amaes.models.mednext import grow_kernel
from amaes.published import Imported, convert

FORMAT = "amaes-checkpoint-1"

# NumPy's numbers and arrays, which older published files keep beside their tensors: plain data, no code.
_MULTIARRAY = getattr(np, "_core", None) or np.core  # NumPy 2 renamed it
_NUMPY = [
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdSU"},
    *(
        (function, f"{package}.multiarray.{function.__name__}")
        for function in (_MULTIARRAY.multiarray.scalar, _MULTIARRAY.multiarray._reconstruct)
        for package in ("numpy.core", "numpy._core")
    ),
]


# Files ----------------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict:
    """A checkpoint as a dictionary, on the CPU; nothing in the file is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of tensors and plain data.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if zipfile.is_zipfile(path):  # torch never compresses; a small file that unpacks to a huge one is no accident
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError(f"{path}: not a checkpoint (its entries are compressed)")
    try:
        with torch.serialization.safe_globals(_NUMPY), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # refused in our words, or read all the same
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file can raise anything
        reason = "it holds other objects" if "weights_only" in str(error) else str(error).split("\n")[0][:120]
        raise ValueError(
            f"{path}: not a checkpoint ({reason or type(error).__name__}); only tensors and plain data are read"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, a checkpoint is a dictionary")
    for name, tensor in _tensors(content):
        if tensor.numel() * tensor.element_size() > max(tensor.untyped_storage().nbytes(), MOST_REPEATED):
            raise ValueError(f"{path}: its tensor {name} claims {tuple(tensor.shape)}, the file holds less than that")
    return content


MOST_REPEATED = 2**31  # bytes that a tensor may claim by repeating what is stored once


def _tensors(content: Mapping, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of nested dictionaries, with their names."""
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            yield f"{name}{key}", value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{name}{key}.")


def save(folder: Path, content: dict, keep: int) -> Path:
    """Write `folder/step-N.pt` and `folder/last.json`, then delete all but the `keep` newest.

    Args:
        content: the checkpoint; "format" is added.
        keep: how many of the newest to keep, at least 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    step = content["step"]
    path = folder / f"step-{step}.pt"
    with written_whole(path) as file:
        torch.save({"format": FORMAT, **content}, file)
    write_json(folder / "last.json", {"step": step, "file": path.name})
    for left in folder.glob(".step-*.tmp"):  # of a run that was killed while it saved
        left.unlink()
    found = saved(folder)
    newest = found.index(path)  # files of later steps were not sound, or this run would have gone on from them
    for old in (*found[:newest], *found[newest + keep :]):
        old.unlink()
    return path


def saved(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    found = [
        (int(match[1]), path) for path in folder.glob("step-*.pt") if (match := re.fullmatch(r"step-(\d+)", path.stem))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def latest(folder: Path) -> tuple[dict | None, Path | None, list[str]]:
    """The newest checkpoint that loads whole.

    Returns:
        Its content and path (None where there is none), and a line for every newer file that is not sound.
    """
    complaints = []
    for path in saved(folder):
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()  # checksums of all entries; torch.load does not look at them
            if broken is not None:
                raise ValueError(f"{path}: entry {broken} is damaged")
            return read(path), path, complaints
        except Exception as error:  # as in `read`
            complaints.append(f"{path}: skipped, not sound ({error})")
    return None, None, complaints


# Networks -------------------------------------------------------------------------------------------------------------


def load_segmenter(path: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """The segmentation network of a checkpoint, in evaluation mode, and the rest of the checkpoint.

    Raises:
        FileNotFoundError, ValueError: no such file, not a checkpoint of this library, or one of pretraining.
    """
    content = read(Path(path))
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: format {content.get('format')!r}, expected {FORMAT!r}")
    _check_entries(path, content, "task")
    if content["task"] != "segment":
        raise ValueError(
            f"{path}: a checkpoint of task {content['task']!r}; fine-tune it first (train_finetune.py --weights)"
        )
    _check_entries(path, content, "model", "build", "preprocess", "channels", "labels", "patch_size")
    network = _rebuild(path, content)
    try:
        network.load_state_dict(content["model"])
    except RuntimeError as error:
        raise ValueError(f"{path}: its weights do not fit its network ({str(error).splitlines()[0]})") from None
    meta = {key: value for key, value in content.items() if key not in ("model", "optimizer")}
    return network.to(device).eval(), meta


# Types of a checkpoint's entries. A file can hold anything; what is read is checked first.
_ENTRIES = {
    **dict.fromkeys(("model", "build", "preprocess", "labels"), dict),
    **dict.fromkeys(("channels", "patch_size"), list),
    "task": str,
}


def _check_entries(path: Path, content: dict, *names: str) -> None:
    for name in names:
        if not isinstance(content.get(name), _ENTRIES[name]):
            found = type(content[name]).__name__ if name in content else "nothing"
            raise ValueError(f"{path}: its {name!r} is {found}, expected {_ENTRIES[name].__name__}")
    model = content["model"].items() if "model" in names else ()
    if not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in model):
        raise ValueError(f"{path}: its 'model' holds other things than tensors")


def _rebuild(path: Path, content: dict) -> nn.Module:
    try:
        return build_network(content["task"], content["build"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: its 'build' describes no network ({error})") from None


# Weights into an encoder ----------------------------------------------------------------------------------------------


def import_weights(path: Path, arch: str | None = None) -> dict[str, torch.Tensor]:
    """Weights of one of our checkpoints or of a published file (`amaes.published`), under our names.

    Args:
        path: the file.
        arch: a key of ARCHITECTURES: refuse a file that does not hold the whole encoder of that name, the number of
            input channels aside.

    Raises:
        FileNotFoundError, ValueError: see `read`; also a file of unknown names, or one that does not fit `arch`.
    """
    tensors = _import(Path(path)).tensors
    if arch is not None and not _fits(tensors, arch):
        raise ValueError(f"{path}: does not hold the encoder of {arch}; {_fitting(tensors)}")
    return tensors


def _import(path: Path) -> Imported:
    content = read(path)
    if content.get("format") != FORMAT:
        return convert(content, path)
    _check_entries(path, content, "task", "model", "build")
    with torch.device("meta"):
        variant = _rebuild(path, content).encoder.variant
    return Imported(content["model"], f"checkpoint of {content['build'].get('arch')}", variant)


def _fits(tensors: dict[str, torch.Tensor], arch: str) -> bool:
    with torch.device("meta"):
        own = build_encoder(arch).state_dict()
    given = {name: tensors.get(f"encoder.{name}") for name in own}
    if any(key.startswith("encoder.") and key.removeprefix("encoder.") not in own for key in tensors):
        return False
    return all(t is not None and _same_but_channels(t, own[name]) for name, t in given.items())


def _fitting(tensors: dict[str, torch.Tensor]) -> str:
    archs = [arch for arch in ARCHITECTURES if _fits(tensors, arch)]
    return f"it fits --arch {' or '.join(archs)}" if archs else "it fits no architecture as a whole"


@dataclass
class Transfer:
    """What went where when a network took weights: names of tensors, and the share of the encoder's parameters."""

    source: str = ""  # what kind of file it was
    loaded: list[str] = field(default_factory=list)  # copied as they are
    adapted: list[str] = field(default_factory=list)  # of other input channels, or of a smaller kernel (UpKern)
    new: list[str] = field(default_factory=list)  # kept at their initial values
    ignored: list[str] = field(default_factory=list)  # in the file, not used
    notes: list[str] = field(default_factory=list)  # what the file does not tell
    coverage: float = 0.0  # parameters loaded or adapted / parameters of the encoder
    decoder: str = "new"

    def table(self) -> str:
        """One line per kind with count and examples."""
        lines = [f"  {self.source}"]
        for kind in ("loaded", "adapted", "new", "ignored"):
            names = getattr(self, kind)
            examples = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
            lines.append(f"  {kind:8s} {len(names):4d} tensors  {examples}")
        lines += [f"  {note}" for note in self.notes]
        share = f"{100 * self.coverage:.1f} % of the encoder's parameters have weights from the file"
        return "\n".join([*lines, f"  {share}; the decoder is {self.decoder}"])


def load_encoder(
    network: nn.Module, path: Path, stem: str = "repeat", allow_partial: bool = False, transfer: str = "encoder"
) -> Transfer:
    """Copy the encoder's weights from a file into `network.encoder`, and with `transfer` "all" also the decoder's.

    Depthwise kernels of a smaller side are enlarged (UpKern, arXiv 2303.09975, Sec. 2.3).

    Args:
        network: has an attribute `encoder`, and for "all" `decoder`.
        path: one of our checkpoints or a published file (`import_weights`).
        stem: a first convolution of another number of input channels gets the file's, summed over its channels and
            divided by the new number ("repeat": equal channels give the old response), or is left "random".
        allow_partial: accept a file that gives less than 95 % of the encoder's parameters.
        transfer: "encoder": the decoder stays as it is; "all": it takes the file's, which must be of the same kind;
            heads stay where the file has none, or of another number of outputs.

    Raises:
        ValueError: less than 95 % of the encoder's parameters found, weights of another variant of the encoder, or for
            "all" no decoder or another kind of decoder (nothing is changed then); or unknown `stem` or `transfer`.
    """
    for option, value, accepted in (("stem", stem, STEMS), ("transfer", transfer, TRANSFERS)):
        if value not in accepted:
            raise ValueError(f"{option} {value!r} is unknown; accepted: {', '.join(accepted)}")
    imported = _import(Path(path))
    source = imported.tensors
    own = network.encoder.state_dict()
    first = next(name for name, tensor in own.items() if tensor.dim() == 5)
    report = Transfer(imported.family)
    report.notes = _check_variant(path, imported, network.encoder)
    found = _match(source, "encoder.", own, (first,) if stem == "repeat" else (), report)
    foreign = [key for key in source if key.startswith("encoder.") and key.removeprefix("encoder.") not in own]
    # Left new without asking: a first convolution (--stem random), and response norms, which begin as the identity.
    essential = [name for name in report.new if name != first and ".grn." not in name]
    total = sum(tensor.numel() for tensor in own.values())
    report.coverage = sum(tensor.numel() for tensor in found.values()) / total
    if not found or (report.coverage < 0.95 and not allow_partial):
        raise ValueError(
            f"{path}: gives {100 * report.coverage:.1f} % of the encoder's parameters ({len(found)} of {len(own)} "
            f"tensors), at least 95 % are needed; the file ({imported.family}) holds {_sizes(source)}; the encoder "
            f"needs {_sizes({'encoder.' + name: own[name] for name in report.new})}; {_fitting(source)} "
            "(--allow-partial takes what fits)"
        )
    if (foreign or essential) and not allow_partial:
        parts = [f"{len(foreign)} encoder tensors of the file have no place, e.g. {foreign[0]}"] if foreign else []
        parts += [f"{len(essential)} of the encoder are not in it, e.g. {essential[0]}"] if essential else []
        raise ValueError(
            f"{path}: holds another encoder: {'; '.join(parts)}; {_fitting(source)} (--allow-partial takes what fits)"
        )
    decoder = _decoder_weights(path, source, network.decoder, stem, report) if transfer == "all" else {}
    used = {f"encoder.{name}" for name in found} | {f"decoder.{name}" for name in decoder}
    report.ignored = [key for key in source if key not in used]
    if not all(tensor.isfinite().all() for tensor in (*found.values(), *decoder.values())):
        raise ValueError(f"{path}: holds weights that are not finite")
    if not next(network.encoder.parameters()).is_meta:  # on "meta" the question was whether the file fits
        network.encoder.load_state_dict(found, strict=False)
        if decoder:
            network.decoder.load_state_dict(decoder, strict=False)
    return report


def _match(
    source: dict[str, torch.Tensor],
    prefix: str,
    own: dict[str, torch.Tensor],
    repeated: Sequence[str],
    report: Transfer,
) -> dict[str, torch.Tensor]:
    """Weights of the file for a part of the network, by the part's names; the report says which are new.

    Args:
        source: weights of the file.
        prefix: of the part's names in the file.
        own: weights of the part.
        repeated: names of convolutions of the image, which may take those of other input channels.
        report: is added to.
    """
    found = {}
    shown = "" if prefix == "encoder." else prefix
    for name, tensor in own.items():
        given = source.get(prefix + name)
        if given is not None and given.shape == tensor.shape:
            found[name] = given
            report.loaded.append(shown + name)
        elif name in repeated and given is not None and _same_but_channels(given, tensor):
            found[name] = given.sum(dim=1, keepdim=True).expand_as(tensor) / tensor.shape[1]
            report.adapted.append(shown + name)
        elif given is not None and name.endswith("depthwise.weight") and _smaller_kernel(given, tensor):
            found[name] = grow_kernel(given, tensor.shape[-1])
            report.adapted.append(shown + name)
        else:
            report.new.append(shown + name)
    return found


def _decoder_weights(
    path: Path, source: dict[str, torch.Tensor], decoder: nn.Module, stem: str, report: Transfer
) -> dict[str, torch.Tensor]:
    """The file's weights for a decoder of the same kind; heads of other outputs stay new."""
    own = decoder.state_dict()
    given = [key.removeprefix("decoder.") for key in source if key.startswith("decoder.")]
    if not given:
        raise ValueError(f"{path}: --transfer all: it ({report.source}) holds no decoder; take --transfer encoder")
    of_image = [name for name in own if name.startswith("laterals.0.")]  # of SwinUNETR, which decodes the image, too
    found = _match(source, "decoder.", own, of_image if stem == "repeat" else (), report)
    strange = [name for name in given if name not in own and not name.startswith("heads.")]
    missing = [
        name for name in own if name not in found and name not in of_image and not re.match(r"heads\.|.*\.grn\.", name)
    ]
    if strange or missing:
        parts = [f"{len(strange)} tensors of it have no place, e.g. decoder.{strange[0]}"] if strange else []
        parts += [f"{len(missing)} of the network's do not fit or are not in it, e.g. {missing[0]}"] if missing else []
        raise ValueError(
            f"{path}: --transfer all: its decoder is of another kind: {'; '.join(parts)}; take the --decoder it was "
            "trained with, or --transfer encoder"
        )
    new = len(own) - len(found)
    report.decoder = f"but for {new} tensors the file's" if new else "the file's"
    return found


STEMS = ("repeat", "random")
TRANSFERS = ("encoder", "all")


def _check_variant(path: Path, imported: Imported, encoder: nn.Module) -> list[str]:
    """Refuse weights of another variant of the encoder; say which one is assumed where the file does not tell."""
    notes = []
    for option, value in encoder.variant.items():
        made = imported.variant.get(option)
        if made is None:
            notes.append(f"--{option} {value} is assumed, the file does not tell")
        elif made != value:
            raise ValueError(f"{path}: made with --{option} {made}, the network has {value}; give --{option} {made}")
    return notes


def _sizes(tensors: dict[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in list(tensors.items())[:2]) + ", ..."


def _same_but_channels(given: torch.Tensor, own: torch.Tensor) -> bool:
    return given.dim() == own.dim() and given.shape[0] == own.shape[0] and given.shape[2:] == own.shape[2:]


def _smaller_kernel(given: torch.Tensor, own: torch.Tensor) -> bool:
    return given.dim() == 5 and given.shape[:2] == own.shape[:2] and given.shape[-1] < own.shape[-1]
