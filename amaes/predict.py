"""Segment NIfTI files with a fine-tuned checkpoint, which brings everything else: preprocessing, channels, patch size.

    python -m amaes.predict --weights CKPT|RUN --images FILE|DIR --out DIR

Begin with `predict_file`, or with `predict_array` for arrays in memory; `cases_to_predict` says which files are one
case; the command line is at the end.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from amaes import cli
from amaes.choices import CHECKPOINTS
from amaes.evaluation.command_line import PROBABILITIES, add_inference_options, failure_message, stop_if_disk_full
from amaes.preprocess.collection import Collection, Item
from amaes.preprocess.file_names import channel_prefix, shorten, stem_of
from amaes.preprocess.find_cases import NoSuchChannels, collect

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from amaes.preprocess.case import PreprocessedCase

SEGMENTATION = re.compile(
    r"[_-](d?seg|segmentation|labels?|mask|gt)$", re.IGNORECASE
)  # what such a file's name ends in


def predict_file(
    model: nn.Module | Sequence[nn.Module],
    meta: Mapping,
    paths: Sequence[str | Path | None],
    *,
    channels: Sequence[str] | None = None,
    restore_values: bool = False,
    **options,
) -> tuple[np.ndarray, dict]:
    """Segment one case.

        model, meta = load_segmenter("step-2500.pt", "cuda")
        labels, properties = predict_file(model, meta, ["scan.nii.gz"])
        write_like("labels.nii.gz", labels, properties)

    Args:
        model, meta: of `amaes.checkpoint.load_segmenter`, or of `load_ensemble`.
        paths: one file per channel (None = missing, where the checkpoint's preprocessing allows that), or one 4-D file
            that holds them all.
        channels: names of the files or volumes, in their order (default: those of the checkpoint).
        restore_values: give the values of the label files that were trained on (`amaes.inference.undo_label_map`), not
            class numbers.
        options: of `amaes.inference.sliding_window`.

    Returns:
        Labels on the grid and axes of the (first) file, (X, Y, Z); and the properties of the case, which `write_like`
        needs.

    Raises:
        RejectedInput: a file cannot be used; its code says why.
        ValueError: another number of files than the checkpoint has channels, or other names.
    """
    case = prepare_files(meta, paths, channels)
    return _labels(_logits(model, meta, case, **options), meta, case, restore_values), case.properties


def predict_array(
    model: nn.Module | Sequence[nn.Module],
    array: np.ndarray,
    affine: np.ndarray,
    meta: Mapping,
    *,
    restore_values: bool = False,
    **options,
) -> np.ndarray:
    """Segment an array in memory, exactly as the file that holds it would be.

        model, meta = load_segmenter("RUN/fold0")
        labels = predict_array(model, scan[None], affine, meta)

    Args:
        array: intensities as in the file, (C, X, Y, Z), channels in the order of meta["channels"].
        affine: (4, 4), voxel to RAS+ mm; the axes may point anywhere.
        model, meta, restore_values, options: of `predict_file`.

    Returns:
        Labels on the grid and axes of the array, (X, Y, Z).

    Raises:
        RejectedInput: the array cannot be used; its code says why.
        ValueError: another number of channels.
    """
    from amaes.preprocess.case import preprocess_array
    from amaes.preprocess.config import Config

    case = preprocess_array(array, affine, Config.from_dict(meta["preprocess"]), meta["channels"])
    return _labels(_logits(model, meta, case, **options), meta, case, restore_values)


def prepare_files(
    meta: Mapping, paths: Sequence[str | Path | None], channels: Sequence[str] | None = None
) -> PreprocessedCase:
    """The files of a case as the network of a checkpoint sees them; arguments and errors as of `predict_file`."""
    from amaes.preprocess.case import preprocess_case
    from amaes.preprocess.config import Config
    from amaes.preprocess.nifti import RejectedInput

    wanted, config = meta["channels"], Config.from_dict(meta["preprocess"])
    order = channel_order(wanted if channels is None else channels, wanted)
    if len(paths) not in (1, len(wanted)):
        raise ValueError(_channel_mismatch(wanted, len(paths)))
    if len(paths) == len(wanted):
        paths = [paths[k] for k in order]
    try:
        return preprocess_case(paths, config, channels=wanted, volumes=order if len(paths) < len(wanted) else None)
    except RejectedInput as error:
        if error.code == "bad_ndim" and len(paths) < len(wanted):  # not a 4-D file with all channels
            raise ValueError(f"{error.path.name}: {_channel_mismatch(wanted, 1)}") from error
        raise


def _logits(model: nn.Module | Sequence[nn.Module], meta: Mapping, case: PreprocessedCase, **options) -> torch.Tensor:
    """Logits (K, x, y, z) on the grid of the preprocessed case."""
    from amaes.inference import ensemble_logits  # here, as it needs torch, and --help does not

    models = model if isinstance(model, Sequence) else [model]
    return ensemble_logits(models, case.image, meta["patch_size"], **options)


def _labels(logits: torch.Tensor, meta: Mapping, case: PreprocessedCase, restore_values: bool) -> np.ndarray:
    """Class numbers on the grid of the case's file, or the values of the label files that were trained on."""
    from amaes.inference import restore_labels, undo_label_map
    from amaes.preprocess.config import Config

    labels = restore_labels(logits, case.properties)
    return undo_label_map(labels, Config.from_dict(meta["preprocess"]).label_map) if restore_values else labels


def channel_order(given: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """For each wanted channel, its place among the given ones.

    Names are compared without regard to capitals. Generic names (image, channel_0) keep their order.

    Raises:
        ValueError: another number, or other names.
    """
    if len(given) != len(wanted):
        raise ValueError(_channel_mismatch(wanted, len(given)))
    given_names, wanted_names = ([name.lower() for name in names] for names in (given, wanted))
    if given_names == wanted_names or _are_generic(given_names) or _are_generic(wanted_names):
        return list(range(len(wanted)))
    if sorted(given_names) != sorted(wanted_names) or len(set(given_names)) != len(given_names):
        raise ValueError(
            f"the checkpoint has the channels {', '.join(wanted)}, dataset.json declares {', '.join(given)}; "
            "files given one by one are taken in the checkpoint's order"
        )
    return [given_names.index(name) for name in wanted_names]


def cases_to_predict(images: Sequence[Path], channels: Sequence[str], missing_channel: str = "error") -> Collection:
    """Which of the given files make which case.

    Args:
        images: one folder; or files, the channels of one case where the checkpoint has several, else a case each.
        channels: of the checkpoint; they group the files of a folder where files are named after them.
        missing_channel: of `amaes.preprocess.find_cases.collect`.

    Returns:
        The cases; `Collection.channels` says in which order their files or volumes are.

    Raises:
        FileNotFoundError, ValueError: nothing there, a folder among several, other channels than those of the
            checkpoint, or two cases with one name.
    """
    if missing := [path for path in images if not path.exists()]:
        raise FileNotFoundError(f"`images` {missing[0]}: no such file or folder")
    if len(images) == 1 and images[0].is_dir():
        return _in_folder(images[0], channels, missing_channel)
    if folders := [path for path in images if path.is_dir()]:
        raise ValueError(f"`images`: {folders[0]} is a folder; accepted: one folder, or files")
    if len(channels) > 1:
        if len(images) not in (1, len(channels)):
            raise ValueError(_channel_mismatch(channels, len(images)))
        return Collection([_of_files(images, channels)], list(channels))
    items = [Item(stem_of(path.name), (path,)) for path in images]
    item_of = {item.id: item for item in items}
    for item in items:
        if item_of[item.id] is not item:
            raise ValueError(
                f"`images`: {item_of[item.id].files[0]} and {item.files[0]} would both become {item.id}.nii.gz"
            )
    return Collection(items, list(channels))


def _in_folder(folder: Path, channels: Sequence[str], missing_channel: str) -> Collection:
    options = {"missing_channel": missing_channel, "network_channels": len(channels)}
    try:
        return _set_aside(collect(folder, channels=channels, **options))
    except NoSuchChannels as error:  # numbered, 4-D, or of a single channel
        collection = collect(folder, **options)
        if len(collection.channels) != len(channels):
            raise ValueError(f"{_channel_mismatch(channels, len(collection.channels))}; {error}") from error
    channel_order(collection.channels, channels)
    return _set_aside(collection)


def _set_aside(collection: Collection) -> Collection:
    """The collection without segmentations and other files that lie beside the scans of its cases; notes name them.

    Where channels are told by names, these are segmentations, and the other files of a complete case: a_T2 beside a_T1
    and a_FLAIR. Where a file is a case, they are those called after a segmentation, unless all are.
    """
    starts = defaultdict(set)  # folder to the beginnings of its scans' names
    for item in collection.items:
        for path in item.images if item.problem is None else ():
            if path is not None and (named := channel_prefix(path, collection.channels)):
                starts[path.parent].add(named[1])
    items = [item for item in collection.items if not _is_segmentation(item)]
    labels = [item.images[0] for item in collection.items if _is_segmentation(item)] if items else []
    labels += [path for path in collection.unused if SEGMENTATION.search(f"_{stem_of(path.name)}")]
    aside, unused = [], []
    for path in sorted(set(collection.unused) - set(labels)):
        known = starts[path.parent]
        beside = "" in known or stem_of(path.name).startswith(tuple(start + cut for start in known for cut in "_-"))
        (aside if beside else unused).append(path)
    notes = [f"{len(labels)} label files are left out, by their names: {shorten(sorted(labels))}"] if labels else []
    notes += [f"{len(aside)} files beside the scans are not used: {shorten(sorted(aside))}"] if aside else []
    return replace(collection, items=items or collection.items, unused=unused, notes=[*collection.notes, *notes])


def _is_segmentation(item: Item) -> bool:
    """Whether the one file of a case is called after a segmentation."""
    return len(item.images) == 1 and bool(SEGMENTATION.search(stem_of(item.images[0].name)))


def _of_files(images: Sequence[Path], channels: Sequence[str]) -> Item:
    """The case that some files make: in the order of the channels where all are named after them, else as given.

    Its id is what the names share, or else the name of their folder: T1.nii.gz and FLAIR.nii.gz of two patients differ
    only in their folder.
    """
    stems = [stem_of(path.name) for path in images]
    if len(images) == 1:
        return Item(stems[0], tuple(images))
    folder = images[0].absolute().parent.name
    named = [channel_prefix(path, channels) for path in images]
    if all(named):
        order = [name for name, _ in named]
        if len(set(order)) < len(order):
            raise ValueError(f"`images`: two files are called {max(order, key=order.count)}; expected one per channel")
        return Item(named[0][1] or folder, tuple(images[order.index(name)] for name in channels))
    starts = [stems[0][: cut.start()] for cut in re.finditer("[_-]", stems[0]) if cut.start()]
    shared = [start for start in starts if all(re.match(re.escape(start) + "[_-]", stem) for stem in stems)]
    return Item(shared[-1] if shared else folder, tuple(images))


def _are_generic(names: Sequence[str]) -> bool:
    """Whether these are the names that preprocessing gives where none are known."""
    return all(re.fullmatch(r"image|channel_\d+", name) for name in names)


def _channel_mismatch(channels: Sequence[str], count: int) -> str:
    plural = "" if len(channels) == 1 else "s"
    return f"the checkpoint expects {len(channels)} channel{plural} ({', '.join(channels)}), got {count}"


# Command line ---------------------------------------------------------------------------------------------------------


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = cli.Parser(
        ["--weights RUN --images SCANS --out MASKS", "--weights RUN/fold0 --images a.nii.gz b.nii.gz --out MASKS"],
        description="Segment NIfTI files with a fine-tuned checkpoint.",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        nargs="+",
        required=True,
        metavar="CKPT|RUN",
        help="checkpoint of train_finetune.py, a fold, or a run: its newest; the probabilities of several, and of all "
        "folds of a run, are averaged",
    )
    parser.add_argument(
        "--checkpoint", choices=CHECKPOINTS, default="last", help="of a run or fold; best: on its validation cases"
    )
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE|DIR",
        help="a folder, or files: the channels of one case where the checkpoint has several (in its order, unless all "
        "are named after them), else a case each",
    )
    parser.add_argument(
        "--out",
        type=cli.output_folder,
        required=True,
        metavar="DIR",
        help="folder for <case>.nii.gz on the grid of the input; a file of that name is replaced, in one step",
    )
    parser.add_argument(
        "--restore-labels",
        action="store_true",
        help="write the values of the label files that were trained on, not class numbers: undoes --label-map of "
        "preprocessing, except for classes that several values were mapped to",
    )
    parser.add_argument(
        "--probabilities",
        action="store_true",
        help="also write DIR/probabilities/<case>.nii.gz: (X, Y, Z, classes), float32",
    )
    add_inference_options(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    """Predict every case that is found, list those that fail; the exit status."""
    from amaes import checkpoint
    from amaes.distributed import pick_device
    from amaes.inference import MIRROR_AXES

    if args.checkpoint == "best" and not any(path.is_dir() for path in args.weights):
        raise ValueError("`checkpoint` best: `weights` names files; accepted with a run or a fold")
    files = [file for path in args.weights for file in checkpoint.find(path, args.checkpoint)]
    if twice := [file for file in files if files.count(file) > 1]:
        raise ValueError(f"`weights`: {twice[0]} is given twice, and would count twice")
    if files != args.weights:
        sys.stderr.write(f"weights: {', '.join(map(str, files))}\n")
        if len({file.name for file in files if file.parent.name == "checkpoints"}) > 1:
            sys.stderr.write("note: these are of different steps; is every fold trained to its end?\n")
    models, meta = checkpoint.load_ensemble(files, pick_device(args.device))
    collection = cases_to_predict(args.images, meta["channels"], meta["preprocess"].get("missing_channel", "error"))
    outputs = _output_files(collection, args.out)
    for note in collection.notes:
        sys.stderr.write(f"note: {cli.as_options(note)}\n")
    if args.tta:
        sys.stderr.write("--tta: every window is predicted in 8 mirrorings, 8 times the time\n")

    windows = {"overlap": args.overlap, "tta_axes": MIRROR_AXES if args.tta else ()}
    windows |= {"batch_size": args.batch_size, "precision": args.precision}
    failed = {str(path): "not used, no channel of the checkpoint" for path in collection.unused}
    done = 0
    for item in collection.items:
        began = time.perf_counter()
        try:
            if item.problem is not None:
                raise ValueError(item.problem[1])
            properties, shape = _predict_item(models, meta, collection, item, outputs[item.id], args, windows)
        except Exception as error:  # whatever one case does, the others go on
            if sys.flags.dev_mode:
                raise
            stop_if_disk_full(error, f"{args.out}: {done} of {len(collection.items)} cases predicted")
            failed[item.id] = failure_message(error)
            continue
        done += 1
        for warning in properties["warnings"]:
            sys.stderr.write(f"{item.id}: {cli.as_options(warning)}\n")
        sides, seconds = " x ".join(map(str, shape)), time.perf_counter() - began
        sys.stdout.write(f"{outputs[item.id]}: {sides} voxels, {seconds:.1f} s\n")
        sys.stdout.flush()
    return _report_failures(collection, failed, done)


def _predict_item(
    models: Sequence[nn.Module],
    meta: Mapping,
    collection: Collection,
    item: Item,
    output: Path,
    args: argparse.Namespace,
    windows: dict,
) -> tuple[dict, tuple[int, ...]]:
    """Predict one case and write its files; its properties and the shape of its labels."""
    from amaes.inference import restore_probabilities
    from amaes.preprocess.nifti import write_like, write_probabilities

    case = prepare_files(meta, item.images, collection.channels)
    logits = _logits(models, meta, case, **windows)
    if args.probabilities:
        path = args.out / PROBABILITIES / output.relative_to(args.out)
        write_probabilities(path, restore_probabilities(logits, case.properties), case.properties)
    labels = _labels(logits, meta, case, args.restore_labels)
    write_like(output, labels, case.properties)
    return case.properties, labels.shape


def _output_files(collection: Collection, folder: Path) -> dict[str, Path]:
    """{id: the file to write} of every case; refused where one would replace an input."""
    outputs = {item.id: folder / f"{item.id}.nii.gz" for item in collection.items}
    inputs = {Path(file).resolve(): file for item in collection.items for file in item.files}
    for path in outputs.values():
        if path.resolve() in inputs:
            raise ValueError(
                f"--out {folder}: {inputs[path.resolve()]} is an input and would be replaced; take another folder"
            )
    return outputs


def _report_failures(collection: Collection, failed: Mapping[str, str], done: int) -> int:
    """List what was not predicted; the exit status. A ValueError where nothing was."""
    total = len(collection.items)
    if not done:
        name = next(item.id for item in collection.items if item.id in failed)
        message = failed[name]
        raise ValueError(message if total == 1 else f"none of {total} cases; the first, {name}: {message}")
    for name, message in failed.items():
        sys.stderr.write(f"not predicted: {name}: {message}\n")
    if failed:
        sys.stderr.write(f"{done} of {total} cases predicted\n")
    return cli.EXIT_REJECTED if failed else cli.EXIT_OK


if __name__ == "__main__":
    cli.run(main, parse_options())
