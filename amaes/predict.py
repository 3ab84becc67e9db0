"""Segment NIfTI files with a fine-tuned checkpoint, which brings everything else: preprocessing, channels, patch size.

python -m amaes.predict --weights CKPT --images FILE|DIR --out DIR
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from amaes import checkpoint, cli
from amaes.distributed import pick_device
from amaes.hardware import PRECISIONS
from amaes.inference import predict_case
from amaes.preprocess.case import preprocess_case
from amaes.preprocess.config import Config
from amaes.preprocess.find_cases import Collection, Item, NoSuchChannels, channel_prefix, collect, stem_of
from amaes.preprocess.nifti import RejectedInput, write_like

MIRROR_AXES = (0, 1, 2)  # --tta: 8 mirrorings


def predict_file(
    model: nn.Module,
    meta: Mapping,
    paths: Sequence[str | Path | None],
    *,
    channels: Sequence[str] | None = None,
    restore_values: bool = False,
    lap: Callable[[str], None] = lambda stage: None,
    **options,
) -> tuple[np.ndarray, dict]:
    """Segment one case.

        model, meta = load_segmenter("step-2500.pt", "cuda")
        labels, properties = predict_file(model, meta, ["scan.nii.gz"])
        write_like("labels.nii.gz", labels, properties)

    Args:
        model, meta: of `amaes.checkpoint.load_segmenter`.
        paths: one file per channel (None = missing, where the checkpoint's preprocessing allows that), or one 4-D file
            that holds them all.
        channels: names of the files or volumes, in their order (default: those of the checkpoint).
        restore_values: give the values of the label files that were trained on (`file_values`), not class numbers.
        lap: called with "read" and "network" when that stage ends.
        options: of `amaes.inference.sliding_window`.

    Returns:
        Labels on the grid and axes of the (first) file, (X, Y, Z); and the properties of the case, which `write_like`
        needs.

    Raises:
        RejectedInput: a file cannot be used; its code says why.
        ValueError: another number of files than the checkpoint has channels, or other names.
    """
    wanted, config = meta["channels"], Config.from_dict(meta["preprocess"])
    order = channel_order(wanted if channels is None else channels, wanted)
    if len(paths) not in (1, len(wanted)):
        raise ValueError(_channel_mismatch(wanted, len(paths)))
    if len(paths) == len(wanted):
        paths = [paths[k] for k in order]
    try:
        case = preprocess_case(paths, config, channels=wanted, volumes=order if len(paths) < len(wanted) else None)
    except RejectedInput as error:
        if error.code == "bad_ndim" and len(paths) < len(wanted):  # not a 4-D file with all channels
            raise ValueError(f"{error.path.name}: {_channel_mismatch(wanted, 1)}") from error
        raise
    lap("read")
    labels = predict_case(model, case.image, case.properties, meta["patch_size"], **options)
    lap("network")
    return file_values(labels, config.label_map) if restore_values else labels, case.properties


def file_values(labels: np.ndarray, label_map: Mapping[int, int]) -> np.ndarray:
    """Class numbers to the values that label files hold: undoes `label_map` (old value -> class).

    The map of a store names every old value of a class that others were mapped onto ({2: 1, 1: 1}), so a class with one
    old value has no other. A class of several, and the background, keep their number; where that number stands for
    another class in the label files, a class of several takes its smallest old value.
    """
    classes = list(label_map.values())
    back = {}
    for old, new in sorted(label_map.items(), reverse=True):
        if old >= 0 and new != 0 and (classes.count(new) == 1 or label_map.get(new, new) != new):
            back[new] = old
    if not back:
        return labels
    table = np.arange(max(int(labels.max(initial=0)), *back) + 1)
    table[list(back)] = list(back.values())
    return table.astype(np.uint8 if table.max() <= 255 else np.uint16)[labels]


def channel_order(found: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """For each wanted channel, where it is among the found ones; by name in any case, generic names keep their order.

    Raises:
        ValueError: another number, or other names.
    """
    if len(found) != len(wanted):
        raise ValueError(_channel_mismatch(wanted, len(found)))
    here, there = ([name.lower() for name in names] for names in (found, wanted))
    if here == there or _is_generic(here) or _is_generic(there):
        return list(range(len(wanted)))
    if sorted(here) != sorted(there) or len(set(here)) != len(here):
        raise ValueError(
            f"the checkpoint has the channels {', '.join(wanted)}, dataset.json declares {', '.join(found)}; "
            "files given one by one are taken in the checkpoint's order"
        )
    return [here.index(name) for name in there]


def find_cases(images: Sequence[Path], channels: Sequence[str], missing_channel: str = "error") -> Collection:
    """The cases among what --images names.

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
        raise FileNotFoundError(f"--images {missing[0]}: no such file or folder")
    if len(images) == 1 and images[0].is_dir():
        return _in_folder(images[0], channels, missing_channel)
    if folders := [path for path in images if path.is_dir()]:
        raise ValueError(f"--images: {folders[0]} is a folder; accepted: one folder, or files")
    if len(channels) > 1:
        if len(images) not in (1, len(channels)):
            raise ValueError(_channel_mismatch(channels, len(images)))
        return Collection([_of_files(images, channels)], list(channels))
    items = [Item(stem_of(path.name), (path,)) for path in images]
    taken = {item.id: item for item in items}
    for item in items:
        if taken[item.id] is not item:
            raise ValueError(
                f"--images: {taken[item.id].files[0]} and {item.files[0]} would both become {item.id}.nii.gz"
            )
    return Collection(items, list(channels))


def _in_folder(folder: Path, channels: Sequence[str], missing_channel: str) -> Collection:
    options = {"missing_channel": missing_channel, "network_channels": len(channels)}
    try:
        return collect(folder, channels=channels, **options)
    except NoSuchChannels as error:  # numbered, 4-D, or of a single channel
        collection = collect(folder, **options)
        if len(collection.channels) != len(channels):
            raise ValueError(f"{_channel_mismatch(channels, len(collection.channels))}; {error}") from error
    channel_order(collection.channels, channels)
    return collection


def _of_files(images: Sequence[Path], channels: Sequence[str]) -> Item:
    """One case of files: in the order of the channels where all are named after them, else as given.

    Its id is what the names share, or the name of their folder: T1.nii.gz and FLAIR.nii.gz of two patients differ there
    alone.
    """
    stems = [stem_of(path.name) for path in images]
    if len(images) == 1:
        return Item(stems[0], tuple(images))
    folder = images[0].absolute().parent.name
    named = [channel_prefix(path, channels) for path in images]
    if all(named):
        order = [name for name, _ in named]
        if len(set(order)) < len(order):
            raise ValueError(f"--images: two files are called {max(order, key=order.count)}; expected one per channel")
        return Item(named[0][1] or folder, tuple(images[order.index(name)] for name in channels))
    starts = [stems[0][: cut.start()] for cut in re.finditer("[_-]", stems[0]) if cut.start()]
    shared = [start for start in starts if all(re.match(re.escape(start) + "[_-]", stem) for stem in stems)]
    return Item(shared[-1] if shared else folder, tuple(images))


def _is_generic(names: Sequence[str]) -> bool:
    """Names that preprocessing gives where none are known."""
    return all(re.fullmatch(r"image|channel_\d+", name) for name in names)


def _channel_mismatch(channels: Sequence[str], found: int) -> str:
    plural = "" if len(channels) == 1 else "s"
    return f"the checkpoint expects {len(channels)} channel{plural} ({', '.join(channels)}), got {found}"


# Command line ---------------------------------------------------------------------------------------------------------


def add_inference_options(parser: argparse._ActionsContainer) -> None:
    """Options of the sliding window, the same for every script that predicts."""
    parser.add_argument(
        "--tta", action="store_true", help="average over the 8 mirrorings of every window: 8 times the time"
    )
    parser.add_argument("--overlap", type=cli.fraction, default=0.5, help="share of a window that neighbours overlap")
    parser.add_argument(
        "--batch-size",
        type=cli.positive_int,
        help="windows per call of the network (default: 1 to 8, by patch size and device)",
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is a GPU"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="auto", help="auto: bf16 autocast on CUDA, fp32 on the CPU"
    )


def inference_options(args: argparse.Namespace) -> dict:
    """The arguments of `sliding_window` that `add_inference_options` asked for."""
    tta_axes = MIRROR_AXES if args.tta else ()
    return {"overlap": args.overlap, "tta_axes": tta_axes, "batch_size": args.batch_size, "precision": args.precision}


def reason(error: Exception) -> str:
    """One line on why a case failed; the kind of error is named where its message may not speak for itself."""
    kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = cli.Parser(prog="python -m amaes.predict", description="Segment NIfTI files with a fine-tuned checkpoint.")
    parser.add_argument("--weights", type=Path, required=True, metavar="CKPT", help="checkpoint of train_finetune.py")
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
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for <case>.nii.gz on the grid of the input; a file of that name is replaced, in one step",
    )
    parser.add_argument(
        "--restore-labels",
        action="store_true",
        help="write the values of the label files trained on: --label-map of preprocessing undone, except for classes "
        "that several values were mapped to",
    )
    add_inference_options(parser)
    return parser.parse_args(argv)


class Laps:
    """Seconds per stage of one case."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now

    def __str__(self) -> str:
        return ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items())


def main(argv: list[str] | None = None) -> int:
    """Predict every case that is found, list those that fail; the exit status."""
    args = parse_options(argv)
    model, meta = checkpoint.load_segmenter(args.weights, pick_device(args.device))
    collection = find_cases(args.images, meta["channels"], meta["preprocess"].get("missing_channel", "error"))
    targets = {item.id: args.out / f"{item.id}.nii.gz" for item in collection.items}
    inputs = {Path(file).resolve(): file for item in collection.items for file in item.files}
    if clash := [inputs[path.resolve()] for path in targets.values() if path.resolve() in inputs]:
        raise ValueError(f"--out {args.out}: {clash[0]} is an input and would be replaced; take another folder")
    for note in collection.notes:
        sys.stderr.write(f"note: {note}\n")
    if args.tta:
        sys.stderr.write("--tta: every window is predicted in 8 mirrorings, 8 times the time\n")

    failed = {str(path): "not used, no channel of the checkpoint" for path in collection.unused}
    done = 0
    for item in collection.items:
        laps = Laps()
        try:
            if item.problem is not None:
                raise ValueError(item.problem[1])
            labels, properties = predict_file(
                model,
                meta,
                item.images,
                channels=collection.channels,
                restore_values=args.restore_labels,
                lap=laps,
                **inference_options(args),
            )
            write_like(targets[item.id], labels, properties)
            laps("write")
        except Exception as error:  # whatever one case does, the others go on
            if sys.flags.dev_mode:
                raise
            failed[item.id] = reason(error)
            continue
        done += 1
        for warning in properties["warnings"]:
            sys.stderr.write(f"{item.id}: {warning}\n")
        sys.stdout.write(f"{targets[item.id]}: {' x '.join(map(str, labels.shape))} voxels; {laps}\n")
        sys.stdout.flush()

    if not done:
        name, message = next((name, text) for name, text in failed.items() if name not in map(str, collection.unused))
        total = len(collection.items)
        raise ValueError(message if total == 1 else f"none of {total} cases; the first, {name}: {message}")
    for name, message in failed.items():
        sys.stderr.write(f"not predicted: {name}: {message}\n")
    if failed:
        sys.stderr.write(f"{done} of {len(collection.items)} cases predicted\n")
    return cli.EXIT_REJECTED if failed else cli.EXIT_OK


if __name__ == "__main__":
    cli.run(main)
