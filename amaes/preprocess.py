"""From NIfTI files to arrays: turn to RAS, crop to the foreground, scale to [0, 1], resample to 1 mm.

    python -m amaes.preprocess --images DIR [--labels DIR] --out STORE
    python -m amaes.preprocess --source NAME=DIR [--source NAME=DIR ...] --out STORE

The order is that of the published pipeline (Munk et al. 2024, arXiv 2408.00640): crop, then intensities, then spacing.
`preprocess_case` does one case and writes nothing; `amaes.batch` does a folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from amaes import normalize, quality, resample
from amaes.cli import EXIT_OK, Parser, non_negative_int, positive_float, positive_int, run
from amaes.collect import SEQUENCES, Collection, collect
from amaes.config import CHOICES, FORMAT, Config
from amaes.inputs import Channel, check_corpus, read_channels, read_label
from amaes.nifti import Header, RejectedInput
from amaes.source_tables import SOURCES
from amaes.sources import (
    CORPUS_FILTER,
    describe,
    find,
    gather,
    leave_out_test,
    source_name,
    take_labels,
    take_sequences,
)

MAX_SIDE, MAX_VOXELS = 1024, 512**3  # voxels after resampling
HINTS = {  # reason or warning: the option of this program that helps
    "singular_affine": "--assume-ras takes the stored axes as RAS",
    "label_values": "see --label-map",
    "channel_geometry": "see --on-geometry-mismatch",
    "label_geometry": "see --on-geometry-mismatch",
    "missing_channel": "--missing-channel zeros fills",
    "background_not_min": "see --background-to-min",
    "overflow": "--dtype float32 holds them",
}


def hinted(code: str, message: str) -> str:
    """The message of a reason or warning, with the option that helps."""
    return f"{message}; {HINTS[code]}" if code in HINTS else message


@dataclass(frozen=True)
class Case:
    """A preprocessed case.

    Attributes:
        image: (C, X, Y, Z) float32, RAS+.
        label: (X, Y, Z) uint8, or None.
        properties: plain data: the file's geometry, crop, shapes and statistics; what the way back needs.
    """

    image: np.ndarray
    label: np.ndarray | None
    properties: dict


def preprocess_case(
    images: Sequence[str | Path | None],
    config: Config,
    label: str | Path | None = None,
    *,
    case_id: str = "",
    channels: Sequence[str] = (),
    classes: Sequence[int] = (),
    volumes: Sequence[int] | None = None,
    volumes_in_file: int | None = None,
    corpus_filter: bool = False,
) -> Case:
    """Read, check, turn, crop, scale and resample one case.

    Args:
        images: one file per channel (None = missing, allowed with missing_channel "zeros"), or one 4-D file where
            `channels` names several.
        config: how.
        label: label file, or None.
        case_id: goes into the properties.
        channels: names; by default image, or channel_0, channel_1, ...
        classes: accepted label values, those of the file; empty = 0..255.
        volumes: which volume of a 4-D file each channel is; None = in the order of the channels.
        volumes_in_file: how many a 4-D file has; None = one per channel.
        corpus_filter: refuse what the published corpus does not take from its large sources, as "corpus_filter".

    Raises:
        RejectedInput: the case cannot be used; `code` is the reason.
    """
    names = list(channels) or (["image"] if len(images) == 1 else [f"channel_{k}" for k in range(len(images))])
    paths = [None if path is None else Path(path) for path in images]
    how, warnings = config.reading(), []
    members = read_channels(_checked(paths, names, config), volumes_in_file or len(names), how, warnings, volumes)
    for member in members if corpus_filter else ():
        if member is not None:
            check_corpus(member)
    first = next(member.header for member in members if member is not None)
    box = _crop_box(members, config)
    crop = tuple(slice(start, stop) for start, stop in box)
    cropped = [stop - start for start, stop in box]
    shape = resample.target_shape(cropped, first.ras_spacing, config.spacing)
    if max(shape) > MAX_SIDE or math.prod(shape) > MAX_VOXELS:
        limit = f"at most {MAX_SIDE} voxels per axis and {MAX_VOXELS} in all after resampling"
        raise RejectedInput("implausible_spacing", first.path, f"expected {limit}, found {' x '.join(map(str, shape))}")
    target, facts = None, _label_facts(None, [], crop, first.path, warnings)
    if label is not None:  # before the images' arithmetic, which a bad label would waste
        whole, values = read_label(Path(label), first, classes, config.label_map, how, warnings)
        facts = _label_facts(whole, values, crop, Path(label), warnings)
        target = resample.resample_labels(whole[crop], shape, config.label_resampling)
    image = np.zeros((len(names), *shape), dtype=np.float32)
    intensity = []
    for k, member in enumerate(members):
        if member is not None:
            image[k], statistics = _scaled(member, crop, shape, config, warnings)
        intensity.append(None if member is None else statistics)
    properties = {
        "format": FORMAT,
        "id": case_id,
        "source_files": [None if path is None else str(path) for path in images],
        "label_file": None if label is None else str(Path(label).absolute()),  # found from any working folder
        "channels": names,
        **_geometry(first),
        "crop_box": box,
        "cropped_shape": cropped,
        "target_spacing": [float(value) for value in config.spacing],
        "resampled_shape": list(shape),
        "intensity": intensity,
        **facts,
        "warnings": warnings,
        "config_hash": config.hash(),
    }
    return Case(image, target, properties)


def _checked(paths: list[Path | None], names: Sequence[str], config: Config) -> list[Path | None]:
    present = [path for path in paths if path is not None]
    if not present or len(paths) not in (1, len(names)):
        raise ValueError(f"{len(names)} channels ({' '.join(names)}) need as many files or one, found {len(present)}")
    if len(present) < len(paths) and config.missing_channel == "error":
        missing = " ".join(name for name, path in zip(names, paths, strict=True) if path is None)
        raise RejectedInput("missing_channel", present[0], f"expected channels {' '.join(names)}, missing {missing}")
    return paths


def _crop_box(members: Sequence[Channel | None], config: Config) -> list[list[int]]:
    """[[start, stop], ...]: around the foreground of all channels, or of the first."""
    boxes = []
    for member in members:
        if member is None:
            continue
        try:
            boxes.append(normalize.foreground_box(member.volume))
        except normalize.Unusable as error:
            raise RejectedInput(error.code, member.path, str(error)) from error
    used = boxes[:1] if config.crop_from == "first" else boxes
    shape = next(member.volume.shape for member in members if member is not None)
    extra = int(config.crop_extra_plane)
    return [
        [min(box[axis][0] for box in used), min(max(box[axis][1] for box in used) + extra, shape[axis])]
        for axis in range(3)
    ]


def _scaled(
    member: Channel, crop: tuple[slice, ...], shape: Sequence[int], config: Config, warnings: list[str]
) -> tuple[np.ndarray, dict]:
    """Crop, scale and resample one channel; its statistics."""
    volume = member.volume[crop]
    if volume.min() < 0:
        background = normalize.most_frequent(volume)
        if background != volume.min():
            values = f"most frequent value {background:g}, minimum {volume.min():g}"
            warnings.append(f"background_not_min: {member.path.name}: {values}")
            if config.background_to_min:
                volume = np.where(volume == background, volume.min(), volume)
    try:
        scaled, statistics = normalize.normalize(volume, config.normalization)
    except normalize.Unusable as error:
        raise RejectedInput(error.code, member.path, str(error)) from error
    result = resample.resample_image(scaled, shape)
    low, high = (0.0, 1.0) if config.normalization == "unit" else (-np.finfo("f4").max, np.finfo("f4").max)
    assert low <= result.min() <= result.max() <= high  # false for NaN as well
    limit = float(np.finfo(config.dtype).max)
    if (extreme := max(-float(result.min()), float(result.max()))) > limit:
        raise RejectedInput(
            "overflow", member.path, f"expected values up to {limit:g} ({config.dtype}), found {extreme:g}"
        )
    return result, {**statistics, "n_nonfinite": member.n_nonfinite}


def _label_facts(
    label: np.ndarray | None, raw: list[int], crop: tuple[slice, ...], path: Path, warnings: list[str]
) -> dict:
    """What is in a label, and in its file before mapping; all empty without one."""
    if label is None:
        return {"raw_label_values": [], "label_values": [], "label_counts": {}, "label_voxels_outside_crop": 0}
    counts = np.bincount(label.ravel())
    outside = int(counts[1:].sum()) - int(np.count_nonzero(label[crop]))
    if outside:
        warnings.append(
            f"label_outside_crop: {path.name}: {outside} label voxels lie outside the image's foreground box"
        )
    values = [int(value) for value in np.flatnonzero(counts)]
    return {
        "raw_label_values": raw,
        "label_values": values,
        "label_counts": {str(value): int(counts[value]) for value in values if value},
        "label_voxels_outside_crop": outside,
    }


def _geometry(header: Header) -> dict:
    """What the way back to the file's grid needs."""
    affine = [[float(value) if math.isfinite(value) else None for value in row] for row in header.affine]
    return {
        "original_shape": list(header.shape[:3]),
        "original_affine": affine,
        "sform_code": header.sform_code,
        "qform_code": header.qform_code,
        "orientation_trusted": header.trusted,
        "original_orientation": header.orientation,
        "ras_ornt": header.ornt.tolist(),
        "ras_shape": list(header.ras_shape),
        "ras_spacing": list(header.ras_spacing),
        "header": header.fields,
    }


def _label_mapping(text: str) -> tuple[int, int]:
    """argparse type: OLD:NEW."""
    old, separator, new = text.partition(":")
    try:
        pair = int(old), int(new)
    except ValueError:
        separator = ""
    if not separator or not 0 <= pair[1] <= 255:
        raise argparse.ArgumentTypeError(f"{text!r} is not OLD:NEW, two whole numbers, the new one in 0..255")
    return pair


def _source(text: str) -> tuple[str, Path]:
    """argparse type: NAME=DIR."""
    name, separator, folder = text.partition("=")
    try:
        if not separator or not folder:
            raise ValueError(f"{text!r} is not NAME=DIR")
        return source_name(name), Path(folder).expanduser()  # shells leave a ~ after "=" as it is
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _shard(text: str) -> tuple[int, int]:
    """argparse type: I/N."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, two whole numbers, I in 0..N-1")
    return int(match[1]), int(match[2])


def _add_input_options(parser: argparse.ArgumentParser) -> None:
    """The groups input and output."""
    source = parser.add_argument_group("input")
    which = source.add_mutually_exclusive_group(required=True)
    which.add_argument("--images", type=Path, metavar="DIR", help="folder of .nii and .nii.gz files, searched in depth")
    which.add_argument(
        "--source",
        action="append",
        type=_source,
        metavar="NAME=DIR",
        help=f"a data set as it is distributed, each volume a case; may be repeated; NAME: {', '.join(SOURCES)}",
    )
    which.add_argument("--qc", type=Path, metavar="STORE", help="look at a store instead: statistics, outliers, sheets")
    source.add_argument(
        "--hold-out",
        nargs="+",
        metavar="NAME",
        help="sources whose published test cases are left out; the published corpus: brats21",
    )
    source.add_argument(
        "--sequence",
        nargs="+",
        choices=[name for name, _ in SEQUENCES],
        metavar="NAME",
        help="only these of a --source: " + ", ".join(name for name, _ in SEQUENCES),
    )
    source.add_argument(
        "--with-labels",
        action="store_true",
        help="of a --source: the label of its case goes with every volume, with the label map of its task; for "
        + ", ".join(name for name, entry in SOURCES.items() if entry.labels),
    )
    source.add_argument(
        "--corpus-filter",
        choices=CORPUS_FILTER,
        default="auto",
        help="skip volumes that are 4-D, thinner than 15 voxels or have negative values; auto: for adni, "
        "oasis3, oasis4 and ppmi, as in the published corpus",
    )
    source.add_argument("--labels", type=Path, metavar="DIR", help="folder of labels named like the images")
    source.add_argument(
        "--label-name", metavar="NAME", help="labels lie beside the images, called NAME, *_NAME or *-NAME"
    )
    source.add_argument(
        "--channels",
        nargs="+",
        metavar="NAME",
        help="files of a folder called NAME, *_NAME or *-NAME are one case",
    )
    source.add_argument(
        "--subject",
        metavar="REGEX",
        help="subject of an id: group 'subject' or the first (default: sub-XXX, else first folder, else the id)",
    )
    source.add_argument(
        "--missing-channel", choices=CHOICES["missing_channel"], default="error", help="a case without all channels"
    )
    source.add_argument(
        "--label-map", nargs="+", type=_label_mapping, metavar="OLD:NEW", help="label values to replace"
    )
    out = parser.add_argument_group("output")
    out.add_argument("--out", type=Path, metavar="STORE", help="folder to write; done cases are kept. --qc: STORE/qc")
    out.add_argument("--overwrite", action="store_true", help="redo cases that are done, and accept other settings")
    out.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="every Nth case from the Ith on, I = 0..N-1, for array jobs on one STORE; then run once without --shard",
    )
    out.add_argument("--dry-run", action="store_true", help="say what the cases are; open no image, write nothing")
    out.add_argument("--dtype", choices=CHOICES["dtype"], default="float32", help="of the images on disk")


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser(prog="python -m amaes.preprocess", description="Turn NIfTI files into arrays for training.")
    _add_input_options(parser)
    how = parser.add_argument_group("preprocessing")
    how.add_argument(
        "--spacing",
        nargs=3,
        type=positive_float,
        default=[1.0, 1.0, 1.0],
        metavar=("X", "Y", "Z"),
        help="voxel size, mm",
    )
    how.add_argument(
        "--normalization",
        choices=CHOICES["normalization"],
        default="unit",
        help="unit: [0, 1], which the networks expect",
    )
    how.add_argument(
        "--crop-from", choices=CHOICES["crop_from"], default="union", help="channels whose foreground sets the box"
    )
    how.add_argument(
        "--crop-extra-plane", action="store_true", help="one plane more per axis, as in the published pipeline"
    )
    how.add_argument("--label-resampling", choices=CHOICES["label_resampling"], default="nearest", help="of labels")
    how.add_argument(
        "--background-to-min",
        action="store_true",
        help="with negative values: set the most frequent value to the minimum",
    )
    bad = parser.add_argument_group("doubtful input")
    bad.add_argument("--verify", action="store_true", help="check the CRC of gzip files")
    bad.add_argument(
        "--on-geometry-mismatch",
        choices=CHOICES["on_geometry_mismatch"],
        default="reject",
        help="channels or label on another grid than the first channel",
    )
    bad.add_argument("--strict-orientation", action="store_true", help="reject files with sform and qform code 0")
    bad.add_argument("--assume-ras", action="store_true", help="take stored axes as RAS where the affine is singular")
    bad.add_argument("--min-axis", type=positive_int, default=3, help="fewest voxels per stored axis")
    bad.add_argument("--fail-fast", action="store_true", help="stop at the first rejected or failed input")
    bad.add_argument("--allow-rejects", action="store_true", help="exit with status 0 although inputs were rejected")
    parser.add_argument(
        "--workers", type=non_negative_int, default=available_cores(), help="processes, one core each; 0: this one"
    )
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(
        [f" {text}" if re.fullmatch(r"-\d+:\d+", text) else text for text in argv]
    )  # -1:0 is a value
    if args.qc is None and args.out is None:
        parser.error("the following arguments are required: --out")
    if args.shard is not None and args.overwrite:
        parser.error("--shard and --overwrite exclude each other: a shard started again would redo its cases")
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    if args.qc is not None and (others := [name for name in given if name not in ("qc", "out")]):
        parser.error(f"--{others[0].replace('_', '-')}: does not go with --qc, which takes --out alone")
    return args


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _collection(args: argparse.Namespace) -> tuple[Collection, dict[int, int]]:
    """What the cases are, and the label map: the one place that decides it. A dry run is told of them."""
    if not args.source:
        for option in ("hold_out", "sequence", "with_labels"):
            if value := getattr(args, option):
                values = "" if value is True else f" {' '.join(value)}"
                raise ValueError(f"--{option.replace('_', '-')}{values}: goes with --source")
        collection = collect(
            args.images,
            args.labels,
            channels=args.channels or (),
            label_name=args.label_name,
            subject=args.subject,
            missing_channel=args.missing_channel,
        )
        if args.dry_run:
            _tell("\n  note: ".join([f"{args.images}: {collection.summary()}", *collection.notes]) + "\n")
        if args.corpus_filter == "on":
            items = [dataclasses.replace(item, corpus_filter=True) for item in collection.items]
            collection = dataclasses.replace(collection, items=items)
        return collection, dict(args.label_map or ())
    for option in ("labels", "label_name", "channels", "subject", "label_map", "missing_channel"):
        if getattr(args, option) not in (None, "error"):
            given = f"--{option.replace('_', '-')}"
            raise ValueError(f"{given}: goes with --images; a --source has one channel, its labels: --with-labels")
    found = [find(name, root) for name, root in args.source]
    for name in args.hold_out or ():
        leave_out_test(found, name)
    if args.sequence:
        take_sequences(found, args.sequence)
    label_map = take_labels(found) if args.with_labels else {}
    if args.dry_run:
        _tell(describe(found))
    return gather(found, args.corpus_filter), label_map


def _tell(text: str) -> None:
    """Print at once, before an error may; names of files may be no valid text."""
    sys.stdout.write(text.encode(errors="backslashreplace").decode())
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """Find the cases, write the store, say what became of each; the exit status."""
    from amaes import batch

    args = parse_options(argv)
    if args.qc is not None:
        _tell(quality.report(args.qc, args.out, progress=True))
        return EXIT_OK
    collection, label_map = _collection(args)
    config = Config(
        label_map=label_map,
        spacing=tuple(args.spacing),
        **{
            item.name: getattr(args, item.name)
            for item in dataclasses.fields(Config)
            if item.name not in ("label_map", "spacing")
        },
    )
    if args.dry_run:
        return EXIT_OK
    result = batch.write_store(
        collection,
        args.out,
        config,
        workers=args.workers,
        overwrite=args.overwrite,
        fail_fast=args.fail_fast,
        progress=True,
        shard=args.shard,
    )
    sys.stdout.write(result.summary())
    return result.status(args.allow_rejects)


if __name__ == "__main__":
    from amaes.preprocess import main as imported  # not this copy: classes of worker processes must be the same

    run(imported)
