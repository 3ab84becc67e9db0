"""Checkpoints: written whole or not at all, resumed from the newest that is sound, turned into networks and encoders.

A checkpoint holds tensors and plain data only, so that `torch.load(weights_only=True)` reads it:

    format, task ("pretrain" or "segment"), model, optimizer, step,
    build (arguments that rebuild the network), preprocess, channels, labels, patch_size, provenance
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from amaes.models import build_network

FORMAT = "amaes-checkpoint-1"


# Files ----------------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, write: Callable) -> None:
    """Call `write(file)` on a temporary file beside `path`, flush it to the disk, then give it the name.

    Raises:
        OSError: nothing was written under `path`, and what stood there is untouched; names the path and the reason.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a failed write as RuntimeError
        temporary.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else _root_cause(error)
        raise OSError(f"{path}: could not be written ({reason}); what was saved before is untouched") from error


def _root_cause(error: BaseException) -> str:
    while error.__context__ is not None:
        error = error.__context__
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON, atomically."""
    text = json.dumps(content, indent=1, default=str) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def read(path: Path) -> dict:
    """A checkpoint as a dictionary, on the CPU; nothing in the file is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of tensors and plain data.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError, OSError) as error:
        reason = "it holds other objects" if "weights_only" in str(error) else str(error).split("\n")[0][:120]
        raise ValueError(
            f"{path}: not a checkpoint ({reason or type(error).__name__}); only tensors and plain data are read"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, a checkpoint is a dictionary")
    return content


def save(folder: Path, content: dict, keep: int) -> Path:
    """Write `folder/step-N.pt` and `folder/last.json`, then delete all but the `keep` newest.

    Args:
        content: the checkpoint; "format" is added.
        keep: how many of the newest to keep, at least 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    step = content["step"]
    path = folder / f"step-{step}.pt"
    write_atomic(path, lambda file: torch.save({"format": FORMAT, **content}, file))
    write_json(folder / "last.json", {"step": step, "file": path.name})
    for old in saved(folder)[keep:]:
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
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            complaints.append(f"{path}: skipped, not sound ({error})")
    return None, None, complaints


# Networks -------------------------------------------------------------------------------------------------------------


def load_segmenter(path: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """The segmentation network of a fine-tuning checkpoint, in evaluation mode, and the rest of the checkpoint.

    Raises:
        FileNotFoundError, ValueError: no such file, not a checkpoint of this library, or one of pretraining.
    """
    content = read(Path(path))
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: format {content.get('format')!r}, expected {FORMAT!r}")
    if content["task"] != "segment":
        raise ValueError(
            f"{path}: a checkpoint of task {content['task']!r}; fine-tune it first (train_finetune.py --weights)"
        )
    network = build_network(content["task"], content["build"])
    network.load_state_dict(content["model"])
    meta = {key: value for key, value in content.items() if key not in ("model", "optimizer")}
    return network.to(device).eval(), meta


# Weights into an encoder ----------------------------------------------------------------------------------------------

# Names of the published AMAES U-Nets and ours. Stage i counts from full resolution; theirs count in order of execution.
_AMAES_UNET = (
    (r"^(rec_head|pred_head)\.", "decoder."),
    (r"\bin_conv\.", "stages.0."),
    (r"\bencoder_conv(\d)\.", r"stages.\1."),
    (r"\bdecoder_conv(\d)\.", lambda m: f"stages.{4 - int(m[1])}."),
    (r"\bupsample(\d)\.", lambda m: f"ups.{4 - int(m[1])}."),
    (r"\bds_out_conv(\d)\.", lambda m: f"heads.{4 - int(m[1])}."),
    (r"\bout_conv\.", "heads.0."),
    (r"\.conv(\d)\.(?=conv|norm)", lambda m: f".{int(m[1]) - 1}."),
)
_WRAPPERS = re.compile(r"\b(module|model|_orig_mod)\.")


def import_weights(path: Path) -> dict[str, torch.Tensor]:
    """Weights of one of our checkpoints or of a published AMAES U-Net, under our names.

    Published files hold a plain state dict or one under "state_dict" or "model"; the prefixes `module.`, `model.` and
    `_orig_mod.` are taken off wherever they stand.

    Raises:
        FileNotFoundError, ValueError: see `read`; also a file without tensors.
    """
    content = read(Path(path))
    if content.get("format") == FORMAT:
        return content["model"]
    for outer in ("state_dict", "model"):
        if isinstance(content.get(outer), dict):
            content = content[outer]
    tensors = {_WRAPPERS.sub("", key): value for key, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{path}: holds no tensors; entries: {', '.join(map(str, list(content)[:5]))}")
    return {rename(key, _AMAES_UNET): value for key, value in tensors.items()}


def rename(key: str, rules: tuple) -> str:
    """`key` with every (pattern, replacement) of `rules` applied in order."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


@dataclass
class Transfer:
    """What went where when an encoder took weights: names of tensors, and the share of the encoder's parameters."""

    loaded: list[str] = field(default_factory=list)  # copied as they are
    adapted: list[str] = field(default_factory=list)  # the first convolution, to another number of channels
    new: list[str] = field(default_factory=list)  # kept at their initial values
    ignored: list[str] = field(default_factory=list)  # in the file, not in the encoder
    coverage: float = 0.0  # parameters loaded or adapted / parameters of the encoder

    def table(self) -> str:
        """One line per kind with count and examples."""
        lines = []
        for kind in ("loaded", "adapted", "new", "ignored"):
            names = getattr(self, kind)
            examples = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
            lines.append(f"  {kind:8s} {len(names):4d} tensors  {examples}")
        return "\n".join(
            [*lines, f"  {100 * self.coverage:.1f} % of the encoder's parameters have weights from the file"]
        )


def load_encoder(network: nn.Module, path: Path, stem: str = "repeat", allow_partial: bool = False) -> Transfer:
    """Copy the encoder's weights from a file into `network.encoder`; decoder and head stay as they are.

    Args:
        network: has an attribute `encoder`.
        path: one of our checkpoints or a published file (`import_weights`).
        stem: a first convolution of another number of input channels gets the file's, summed over its channels and
            divided by the new number ("repeat": equal channels give the old response), or is left "random".
        allow_partial: accept a file that gives less than 95 % of the encoder's parameters.

    Raises:
        ValueError: less than 95 % of the encoder's parameters found (nothing is changed then), or unknown `stem`.
    """
    if stem not in STEMS:
        raise ValueError(f"stem {stem!r} is unknown; accepted: {', '.join(STEMS)}")
    source = import_weights(path)
    own = network.encoder.state_dict()
    first = next(name for name, tensor in own.items() if tensor.dim() == 5)
    report, found = Transfer(), {}
    for name, tensor in own.items():
        given = source.get(f"encoder.{name}")
        if given is not None and given.shape == tensor.shape:
            found[name] = given
            report.loaded.append(name)
        elif name == first and stem == "repeat" and given is not None and _same_but_channels(given, tensor):
            found[name] = given.sum(dim=1, keepdim=True).expand_as(tensor) / tensor.shape[1]
            report.adapted.append(name)
        else:
            report.new.append(name)
    report.ignored = [
        key for key in source if key.removeprefix("encoder.") not in found or not key.startswith("encoder.")
    ]
    total = sum(tensor.numel() for tensor in own.values())
    report.coverage = sum(tensor.numel() for tensor in found.values()) / total
    if not found or (report.coverage < 0.95 and not allow_partial):
        raise ValueError(
            f"{path}: gives {100 * report.coverage:.1f} % of the encoder's parameters ({len(found)} of {len(own)} "
            f"tensors), at least 95 % are needed; the file holds {_sizes(source)}; the encoder needs "
            f"{_sizes({'encoder.' + name: own[name] for name in report.new})}; is it another --arch? "
            "(--allow-partial takes what fits)"
        )
    network.encoder.load_state_dict(found, strict=False)
    return report


STEMS = ("repeat", "random")


def _sizes(tensors: dict[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in list(tensors.items())[:2]) + ", ..."


def _same_but_channels(given: torch.Tensor, own: torch.Tensor) -> bool:
    return given.dim() == own.dim() and given.shape[0] == own.shape[0] and given.shape[2:] == own.shape[2:]
