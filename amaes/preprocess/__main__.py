"""The command line of preprocessing: NIfTI files to a store.

python -m amaes.preprocess --images DIR [--labels DIR] --out STORE
python -m amaes.preprocess --source NAME=DIR [--source NAME=DIR ...] --out STORE
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from pathlib import Path

from amaes.cli import EXIT_OK, Parser, non_negative_int, positive_float, positive_int
from amaes.data import quality
from amaes.preprocess.config import CHOICES, Config
from amaes.preprocess.find_cases import SEQUENCES, Collection, collect
from amaes.preprocess.source_tables import SOURCES
from amaes.preprocess.sources import (
    CORPUS_FILTER,
    describe,
    find,
    gather,
    leave_out_test,
    source_name,
    take_labels,
    take_sequences,
)


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
        "--channels", nargs="+", metavar="NAME", help="files of a folder called NAME, *_NAME or *-NAME are one case"
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
    from amaes.preprocess import write_store

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
    result = write_store.write_store(
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
