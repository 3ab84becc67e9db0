"""Segment NIfTI files with a fine-tuned checkpoint, which brings everything else: preprocessing, channels, patch size.

python -m amaes.predict --weights CKPT --images FILE|DIR --out DIR
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from amaes import checkpoint, cli
from amaes.backend import PRECISIONS
from amaes.collect import Collection, Item, collect
from amaes.distributed import pick_device
from amaes.inference import predict_case
from amaes.nifti import RejectedInput, write_like
from amaes.preprocess import Config, preprocess_case

MIRROR_AXES = (0, 1, 2)  # --tta: 8 mirrorings


def predict_file(
    model: nn.Module,
    meta: Mapping,
    paths: Sequence[str | Path | None],
    *,
    lap: Callable[[str], None] = lambda stage: None,
    **options,
) -> tuple[np.ndarray, dict]:
    """Segment one case.

        model, meta = load_segmenter("step-2500.pt", "cuda")
        labels, properties = predict_file(model, meta, ["scan.nii.gz"])
        write_like("labels.nii.gz", labels, properties)

    Args:
        model, meta: of `amaes.checkpoint.load_segmenter`.
        paths: one file per channel of the checkpoint, in its order, or one 4-D file that holds them all.
        lap: called with "read" and "network" when that stage ends.
        options: of `amaes.inference.sliding_window`.

    Returns:
        Labels on the grid and axes of the (first) file, with the values of the label files that were trained on,
        (X, Y, Z); and the properties of the case, which `write_like` needs.

    Raises:
        RejectedInput: a file cannot be used; its code says why.
        ValueError: another number of files than the checkpoint has channels.
    """
    channels, config = meta["channels"], Config.from_dict(meta["preprocess"])
    if len(paths) not in (1, len(channels)):
        raise ValueError(_channel_mismatch(channels, len(paths)))
    try:
        case = preprocess_case(paths, config, channels=channels)
    except RejectedInput as error:
        if error.code == "bad_ndim" and len(paths) < len(channels):  # not a 4-D file with all channels
            raise ValueError(f"{error.path.name}: {_channel_mismatch(channels, 1)}") from error
        raise
    lap("read")
    labels = predict_case(model, case.image, case.properties, meta["patch_size"], **options)
    lap("network")
    return file_values(labels, config.label_map), case.properties


def file_values(labels: np.ndarray, label_map: Mapping[int, int]) -> np.ndarray:
    """Class numbers to the values that label files hold: undoes `label_map` (old value -> class).

    A class that two or more old values were mapped to keeps its number, and so does the background.
    """
    classes = list(label_map.values())
    back = {new: old for old, new in label_map.items() if old >= 0 and new != 0 and classes.count(new) == 1}
    if not back:
        return labels
    table = np.arange(max(int(labels.max(initial=0)), *back) + 1)
    table[list(back)] = list(back.values())
    return table.astype(np.uint8 if table.max() <= 255 else np.uint16)[labels]


def find_cases(images: Sequence[Path], channels: Sequence[str]) -> Collection:
    """The cases among what --images names.

    Args:
        images: one folder; or files, the channels of one case where the checkpoint has several, else a case each.
        channels: of the checkpoint; they group the files of a folder where files are named after them.

    Raises:
        FileNotFoundError, ValueError: nothing there, a folder among several, or two cases with one name.
    """
    if missing := [path for path in images if not path.exists()]:
        raise FileNotFoundError(f"--images {missing[0]}: no such file or folder")
    if len(images) == 1 and images[0].is_dir():
        try:
            return collect(images[0], channels=channels)
        except ValueError as error:  # not named after the channels: numbered, 4-D, or of a single channel
            collection = collect(images[0])
            if len(collection.channels) != len(channels):
                raise ValueError(f"{_channel_mismatch(channels, len(collection.channels))}; {error}") from error
            return collection
    if folders := [path for path in images if path.is_dir()]:
        raise ValueError(f"--images: {folders[0]} is a folder; accepted: one folder, or files")
    if len(channels) > 1:
        if len(images) not in (1, len(channels)):
            raise ValueError(_channel_mismatch(channels, len(images)))
        return Collection([Item(_stem(images[0]), tuple(images))], list(channels))
    items = [Item(_stem(path), (path,)) for path in images]
    taken = {item.id: item for item in items}
    for item in items:
        if taken[item.id] is not item:
            raise ValueError(
                f"--images: {taken[item.id].files[0]} and {item.files[0]} would both become {item.id}.nii.gz"
            )
    return Collection(items, list(channels))


def _channel_mismatch(channels: Sequence[str], found: int) -> str:
    plural = "" if len(channels) == 1 else "s"
    return f"the checkpoint expects {len(channels)} channel{plural} ({', '.join(channels)}), got {found}"


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


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
    return {
        "overlap": args.overlap, "tta_axes": tta_axes, "batch_size": args.batch_size, "precision": args.precision,
    }  # fmt: skip


def reason(error: Exception) -> str:
    """One line on why a case failed; the kind of error is named where its message may not speak for itself."""
    kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m amaes.predict", description="Segment NIfTI files with a fine-tuned checkpoint.")
    parser.add_argument("--weights", type=Path, required=True, metavar="CKPT", help="checkpoint of train_finetune.py")
    parser.add_argument(
        "--images", type=Path, nargs="+", required=True, metavar="FILE|DIR",
        help="a folder, or files: the channels of one case where the checkpoint has several, else a case each",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR",
        help="folder for <case>.nii.gz on the grid of the input; a file of that name is replaced, in one step",
    )  # fmt: skip
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
    args = parse_options(argv)
    model, meta = checkpoint.load_segmenter(args.weights, pick_device(args.device))
    collection = find_cases(args.images, meta["channels"])
    targets = {item.id: args.out / f"{item.id}.nii.gz" for item in collection.items}
    inputs = {Path(file).resolve(): file for item in collection.items for file in item.files}
    if clash := [inputs[path.resolve()] for path in targets.values() if path.resolve() in inputs]:
        raise ValueError(f"--out {args.out}: {clash[0]} is an input and would be replaced; take another folder")
    for note in collection.notes:
        sys.stderr.write(f"note: {note}\n")
    if args.tta:
        sys.stderr.write("--tta: every window is predicted in 8 mirrorings, 8 times the time\n")

    failed = {}
    for item in collection.items:
        laps = Laps()
        try:
            if item.problem is not None:
                raise ValueError(item.problem[1])
            labels, properties = predict_file(model, meta, item.images, lap=laps, **inference_options(args))
            write_like(targets[item.id], labels, properties)
            laps("write")
        except Exception as error:  # whatever one case does, the others go on
            if sys.flags.dev_mode:
                raise
            failed[item.id] = reason(error)
            continue
        for warning in properties["warnings"]:
            sys.stderr.write(f"{item.id}: {warning}\n")
        sys.stdout.write(f"{targets[item.id]}: {' x '.join(map(str, labels.shape))} voxels; {laps}\n")
        sys.stdout.flush()

    if len(failed) == len(collection.items):
        name, message = next(iter(failed.items()))
        raise ValueError(message if len(failed) == 1 else f"none of {len(failed)} cases; the first, {name}: {message}")
    for name, message in failed.items():
        sys.stderr.write(f"not predicted: {name}: {message}\n")
    if failed:
        sys.stderr.write(f"{len(collection.items) - len(failed)} of {len(collection.items)} cases predicted\n")
    return cli.EXIT_REJECTED if failed else cli.EXIT_OK


if __name__ == "__main__":
    cli.run(main)
