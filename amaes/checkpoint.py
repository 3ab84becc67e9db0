"""Checkpoints: written whole or not at all, resumed from the newest that is not damaged, turned into networks.

A checkpoint holds tensors and plain data only, so that `torch.load(weights_only=True)` reads it:

    format, task (of `amaes.models.TASKS`), model, optimizer, step,
    build (arguments that rebuild the network), preprocess, channels, labels, patch_size, provenance
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from amaes.files import first_line, write_json, written_whole
from amaes.models.build import build_network
from amaes.models.transfer import Transfer, fits_architecture, fitting_architectures, transfer_weights
from amaes.preprocess.config import Config
from amaes.published import Imported, convert
from amaes.weights.plan import compare, find_plan
from amaes.weights.tensor_files import read

if TYPE_CHECKING:
    from amaes.data.store import Store
    from amaes.models.network import Network

FORMAT = "amaes-checkpoint-1"
BEST = "best.pt"  # the network with the best Dice on validation cases, beside step-N.pt

# Files ----------------------------------------------------------------------------------------------------------------


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
    for unfinished in folder.glob(".step-*.tmp"):  # of a run that was killed while it saved
        unfinished.unlink()
    paths = saved(folder)
    newest = paths.index(path)  # files of later steps are damaged, or this run would have started from them
    for old in (*paths[:newest], *paths[newest + keep :]):
        old.unlink()
    return path


def save_best(folder: Path, content: dict) -> None:
    """Write `folder/best.pt`; it is never continued from."""
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / BEST) as file:
        torch.save({"format": FORMAT, **content}, file)


def saved(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    steps = {path: path.stem.removeprefix("step-") for path in folder.glob("step-*.pt")}
    paths = [path for path, step in steps.items() if re.fullmatch(r"\d+", step)]
    return sorted(paths, key=lambda path: int(steps[path]), reverse=True)


def latest(folder: Path, to_continue: bool = False) -> tuple[dict | None, Path | None, list[str]]:
    """The newest checkpoint that is not damaged.

    Args:
        folder: of the checkpoints.
        to_continue: it must hold what training continues from: weights, optimizer and step.

    Returns:
        Its content and path (None where there is none), and a line for every newer file that is damaged.
    """
    skipped = []
    for path in saved(folder):
        try:
            if not zipfile.is_zipfile(path):
                raise ValueError(f"{path}: not a whole file")
            content = read(path)
            if to_continue:
                _check_entries(path, content, "model", "optimizer", "step")
                if not content["model"] or not content["optimizer"]:
                    raise ValueError(f"{path}: holds no weights, or no optimizer")
            return content, path, skipped
        except Exception as error:  # a damaged file can raise anything
            skipped.append(f"{path}: skipped, it is damaged ({error})")
    return None, None, skipped


def find(path: str | Path, which: str = "last") -> list[Path]:
    """The files that a path stands for where checkpoints are expected.

    Args:
        path: a file, which stands for itself; a run, a fold or their folder `checkpoints`, which stand for the newest
            checkpoint that is not damaged; of a run of several folds, for one of each fold.
        which: "last", or of a folder the "best" on validation cases.

    Raises:
        FileNotFoundError: a folder without a checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    folds = [fold for fold in path.glob("fold*") if fold.name[4:].isdecimal() and (fold / "checkpoints").is_dir()]
    folders = [fold / "checkpoints" for fold in sorted(folds, key=lambda fold: int(fold.name[4:]))]
    if not folders:
        folders = [path / "checkpoints" if (path / "checkpoints").is_dir() else path]
    files = []
    for folder in folders:
        if which == "best":
            if not (folder / BEST).is_file():
                raise FileNotFoundError(f"{folder}: no {BEST} there; training with validation cases writes it")
            files.append(folder / BEST)
            continue
        _, file, damaged = latest(folder)
        if file is None:
            raise FileNotFoundError(f"{folder}: " + ("; ".join(damaged) or "no checkpoint step-N.pt there"))
        files.append(file)
    return files


def find_one(path: str | Path) -> Path:
    """The one file that a path stands for (`find`).

    Raises:
        FileNotFoundError: a folder without a checkpoint.
        ValueError: a run of several folds.
    """
    files = find(path)
    if len(files) > 1:
        raise ValueError(f"{path}: a run of {len(files)} folds, one network is expected, such as {files[0].parents[1]}")
    return files[0]


# Networks -------------------------------------------------------------------------------------------------------------


def read_ours(path: Path, to_segment: bool = False) -> dict:
    """A checkpoint of this library, its entries checked.

    Args:
        path: the file.
        to_segment: refuse networks that do not segment, those of pretraining.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not one of this library, refused, or an entry is missing or of another type.
    """
    content = read(path)
    if not _is_ours(content):
        raise ValueError(f"{path}: format {content.get('format')!r}, expected {FORMAT!r}")
    _check_entries(path, content, "task")
    if to_segment and content["task"] != "segment":
        raise ValueError(
            f"{path}: a checkpoint of task {content['task']!r}; fine-tune it first (train_finetune.py, `weights`)"
        )
    _check_entries(path, content, "model", "build", "preprocess", "channels", "labels", "patch_size")
    _check_input(path, content)
    return content


def load_segmenter(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """The segmentation network of a checkpoint, in evaluation mode, and the checkpoint without its tensors.

    Args:
        path: a file, a fold, or a run of one network (`find_one`).
        device: of the network.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint of this library, or one of pretraining.
    """
    path = find_one(path)
    content = read_ours(path, to_segment=True)
    if "num_classes" not in content["build"]:
        raise ValueError(f"{path}: its 'build' does not say how many classes there are (num_classes)")
    network = _rebuild(path, content)
    load_weights(network, path, content["model"])
    meta = {key: value for key, value in content.items() if key not in ("model", "optimizer")}
    return network.to(device).eval(), meta


def load_ensemble(paths: Sequence[str | Path], device: torch.device | str = "cpu") -> tuple[list[nn.Module], dict]:
    """Segmentation networks that see and say the same, so that their probabilities can be averaged.

    Args:
        paths: as of `load_segmenter`, at least one.
        device: of the networks.

    Returns:
        The networks, and what `load_segmenter` tells of the first.

    Raises:
        FileNotFoundError, ValueError: see `load_segmenter`; or the networks differ in preprocessing, channels, classes
            or patch size: names the two files and the values.
    """
    networks, metas = zip(*(load_segmenter(path, device) for path in paths), strict=True)
    first = _seen_and_said(metas[0])
    for path, meta in zip(paths, metas, strict=True):
        for name, value in _seen_and_said(meta).items():
            if value != first[name]:
                text = f"{name} {value}, {paths[0]} has {first[name]}; an ensemble needs networks of one task"
                raise ValueError(f"{path}: has {text}")
    return list(networks), metas[0]


def _seen_and_said(meta: Mapping) -> dict:
    """What the networks of an ensemble must have in common."""
    preprocess = Config.from_dict(meta["preprocess"]).as_dict()
    own = {"channels": list(meta["channels"]), "labels": meta["labels"], "patch_size": list(meta["patch_size"])}
    return {**preprocess, **own, "num_classes": meta["build"].get("num_classes")}


def load_weights(network: nn.Module, path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Load a checkpoint's weights into the network that it was made from.

    Raises:
        ValueError: they are of another network, or no real numbers.
    """
    kinds = {name: tensor.is_floating_point() for name, tensor in network.state_dict().items()}
    for name, tensor in weights.items():
        if kinds.get(name, False) != tensor.is_floating_point() and name in kinds:
            raise ValueError(f"{path}: its weight {name} is of type {tensor.dtype}, expected real numbers")
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path}: its weights do not fit its network ({first_line(error)})") from None


def _is_ours(content: Mapping) -> bool:
    return isinstance(content.get("format"), str) and content["format"] == FORMAT


# Types of a checkpoint's entries. A file can hold anything, so an entry is checked before it is used.
_ENTRY_TYPES = {
    **dict.fromkeys(("model", "optimizer", "build", "preprocess", "labels"), dict),
    **dict.fromkeys(("channels", "patch_size"), list),
    "task": str,
    "step": int,
}


def _check_entries(path: Path, content: dict, *names: str) -> None:
    for name in names:
        if not isinstance(content.get(name), _ENTRY_TYPES[name]):
            given = type(content[name]).__name__ if name in content else "nothing"
            raise ValueError(f"{path}: its {name!r} is {given}, expected {_ENTRY_TYPES[name].__name__}")
    model = content["model"].items() if "model" in names else ()
    if not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in model):
        raise ValueError(f"{path}: its 'model' holds other things than tensors")


def _check_input(path: Path, content: dict) -> None:
    """Refuse a checkpoint that does not say what its network sees, and what its outputs are called."""
    for name, (is_right, expected) in _INPUT.items():
        if not is_right(content[name]):
            raise ValueError(f"{path}: its {name!r} is {content[name]!r:.80}, expected {expected}")
    try:
        Config.from_dict(content["preprocess"])
    except ValueError as error:
        raise ValueError(f"{path}: its 'preprocess' is not what preprocessing wrote ({error})") from None
    count = content["build"].get("in_channels", len(content["channels"]))
    if count != len(content["channels"]):
        raise ValueError(f"{path}: its network takes {count!r:.80} channels, it names {len(content['channels'])}")


def _is_class(value: object, name: object) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"\d{1,3}", value)) and isinstance(name, str)


_INPUT = {  # of a checkpoint: whether a value of the right type is right, and which are
    "channels": (lambda value: value and all(isinstance(name, str) for name in value), "names of channels"),
    "labels": (lambda value: all(_is_class(*pair) for pair in value.items()), "label values and their names"),
    "patch_size": (
        lambda value: len(value) == 3 and all(type(side) is int and 1 <= side <= 4096 for side in value),
        "three sides of 1 to 4096 voxels",
    ),
}


_MOST = {"in_channels": 4096, "num_classes": 65536}


def _rebuild(path: Path, content: dict) -> Network:
    for name, most in _MOST.items():  # a damaged number must not fill the memory
        count = content["build"].get(name, 1)
        if type(count) is not int or not 1 <= count <= most:
            raise ValueError(f"{path}: its 'build' describes no network ({name} is {count!r:.80}, at most {most})")
    try:
        return build_network(content["task"], content["build"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: its 'build' describes no network ({first_line(error)})") from None


# Preprocessing --------------------------------------------------------------------------------------------------------


SAME = ("spacing", "normalization")  # settings of preprocessing that a network must find again


def check_preprocessing(path: Path, content: Mapping, store: Store, channels: bool = False) -> str:
    """Refuse a store whose volumes are prepared in another way than those that a checkpoint was trained on.

    A published file is accepted; if a plan says how its volumes were prepared, the two are compared in words.

    Args:
        path: of the checkpoint, for messages.
        content: the checkpoint, with or without its weights (`read`, `load_segmenter`).
        store: the volumes that the network is to see next.
        channels: the names of the store's channels must be equal, not only the settings of SAME.

    Returns:
        A line for the log; "": nothing is known beyond what was checked.

    Raises:
        ValueError: the two differ; shows both values.
    """
    if not isinstance(content.get("preprocess"), Mapping):
        plan = find_plan(content, Path(path))
        return "" if plan is None else compare(plan, store.config, path, store.path)
    trained = {name: content["preprocess"].get(name) for name in SAME}
    given = {name: store.config[name] for name in SAME}
    if channels:
        trained["channels"], given["channels"] = content.get("channels"), store.channels
    for name, value in trained.items():
        if given[name] != value:
            remedy = f"preprocess with the same `{name}`, or train again" if name in SAME else "take another store"
            raise ValueError(
                f"{path}: trained on volumes with {name} {value}, {store.path} has {given[name]}; {remedy}"
            )
    return ""


# Weights into an encoder ----------------------------------------------------------------------------------------------


def import_weights(path: str | Path, arch: str | None = None) -> dict[str, torch.Tensor]:
    """Weights of one of our checkpoints or of a published file (`amaes.published`), under our names.

    Args:
        path: the file, or a run (`find_one`).
        arch: a key of ARCHITECTURES: refuse a file that does not hold the whole encoder of that name, the number of
            input channels aside.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see `read` and `amaes.published.convert`; or a file that does not fit `arch`.
    """
    tensors = _import(find_one(path)).tensors
    if arch is not None and not fits_architecture(tensors, arch):
        raise ValueError(f"{path}: does not hold the encoder of {arch}; {fitting_architectures(tensors)}")
    return tensors


def _import(path: Path) -> Imported:
    content = read(path)
    if not _is_ours(content):
        return convert(content, path, find_plan(content, path))
    _check_entries(path, content, "task", "model", "build")
    with torch.device("meta"):
        variant = _rebuild(path, content).encoder.variant
    return Imported(content["model"], f"checkpoint of {content['build'].get('arch')}", variant)


def load_encoder(
    network: nn.Module, path: str | Path, stem: str = "repeat", allow_partial: bool = False, transfer: str = "encoder"
) -> Transfer:
    """Copy the encoder's weights from a file into `network.encoder`, and with `transfer` "all" also the decoder's.

    Depthwise kernels of a smaller side are enlarged (UpKern, arXiv 2303.09975, Sec. 2.3).

    Args:
        network: has an attribute `encoder`, and for "all" `decoder`.
        path: one of our checkpoints, a run (`find_one`), or a published file (`import_weights`).
        stem: what the first convolution gets where the numbers of input channels differ. "repeat": the file's weights,
            summed over its channels and divided by the new number, so that equal channels give the old response;
            "random": its initial weights.
        allow_partial: accept a file that gives less than 95 % of the encoder's parameters, or holds others.
        transfer: "encoder": the decoder keeps its weights; "all": it takes the file's, which must be of the same kind.
            Heads keep theirs where the file has none, or some with another number of outputs.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see `import_weights`; the file gives less than 95 % of the encoder's parameters, or holds another
            encoder or another variant of it; with "all" it holds no decoder, or one of another kind; weights that are
            not finite; unknown `stem` or `transfer`. The network is unchanged then.
    """
    path = find_one(path)
    imported = _import(path)
    return transfer_weights(
        network,
        imported.tensors,
        source=imported.family,
        variant=imported.variant,
        where=path,
        stem=stem,
        allow_partial=allow_partial,
        transfer=transfer,
    )
