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
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from amaes.cli import EXIT_OK, Parser, as_options, integer, real, run, workers
from amaes.preprocess.config import CHOICES, IGNORED, MIN_AXIS, SPACING, Config
from amaes.preprocess.file_names import SEQUENCES, printable
from amaes.preprocess.option_types import label_mapping, label_name, region, shard, source
from amaes.preprocess.source_tables import CORPUS_FILTER, SOURCES

if TYPE_CHECKING:
    from amaes.preprocess.collection import Collection

SOURCE_OPTIONS = ("hold_out", "sequence", "with_labels")  # go with --source only
IMAGE_OPTIONS = ("labels", "label_name", "channels", "subject", "label_map", "missing_channel")  # with --images only


# Options --------------------------------------------------------------------------------------------------------------


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser(
        ["--images SCANS --out STORE", "--images IMAGES --labels LABELS --channels FLAIR T1 --out STORE"],
        description="Turn NIfTI files into arrays for training.",
    )
    _add_input_options(parser.add_argument_group("input"))
    _add_output_options(parser.add_argument_group("output"))
    _add_preprocessing_options(parser.add_argument_group("preprocessing"))
    _add_fault_options(parser.add_argument_group("doubtful input"))
    parser.add_argument(
        "--workers",
        type=workers,
        default=available_cores(),
        help="number of worker processes, each of which uses one core; 0: none, work in this process",
    )
    argv = sys.argv[1:] if argv is None else argv
    # A blank before it makes -1:0 a value; argparse would take it for an option.
    args = parser.parse_args([f" {text}" if re.fullmatch(r"-\d+:\S+", text) else text for text in argv])
    if args.qc is None and args.out is None:
        parser.error("the following arguments are required: --out")
    for name, why in (("overwrite", "a shard started again would redo its cases"), ("prune", "a shard has some cases")):
        if args.shard is not None and getattr(args, name):
            parser.error(f"--shard and --{name} exclude each other: {why}")
    for name in ("label_map", "label_names", "regions"):
        _refuse_contradictions(parser, name, getattr(args, name) or ())
    if args.list and not args.dry_run:
        parser.error("--list: goes with --dry-run")
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    if args.qc is not None and (others := [name for name in given if name not in ("qc", "out")]):
        parser.error(f"{_flag(others[0])}: does not go with --qc, which takes --out alone")
    return args


def _refuse_contradictions(parser: Parser, option: str, pairs: Sequence[tuple]) -> None:
    """Refuse one label value (or region) with two meanings, and one name of two values."""
    meaning: dict[object, object] = {}
    for value, new in pairs:
        if meaning.setdefault(value, new) != new:
            parser.error(f"{_flag(option)}: {value} becomes both {meaning[value]} and {new}")
    names = [name for name in meaning.values() if isinstance(name, str)]
    if len(set(names)) < len(names):
        name = max(names, key=names.count)
        parser.error(f"{_flag(option)}: two labels are called {name!r}; --label-map makes them one")


def _add_input_options(group: argparse._ArgumentGroup) -> None:
    kinds = group.add_mutually_exclusive_group(required=True)
    kinds.add_argument(
        "--images",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="folders of .nii and .nii.gz files, searched with their subfolders",
    )
    kinds.add_argument(
        "--source",
        action="append",
        type=source,
        metavar="NAME=DIR",
        help="folder of a data set as it is distributed; each volume is a case; may be given several times; NAME: "
        + ", ".join(SOURCES),
    )
    kinds.add_argument(
        "--qc",
        type=Path,
        metavar="STORE",
        help="check a store instead of writing one: statistics, outliers, contact sheets",
    )
    _add_source_options(group)
    _add_label_options(group)
    group.add_argument(
        "--channels",
        nargs="+",
        metavar="NAME",
        help="the files of a folder that are called NAME, *_NAME or *-NAME are the channels of one case",
    )
    group.add_argument(
        "--subject",
        metavar="REGEX",
        help="finds the subject in the id of a case: its group 'subject', or its first group (default: sub-..., else "
        "the first folder, else the id; without the number of a visit, as of BraTS-GLI-00005-101)",
    )
    group.add_argument(
        "--missing-channel",
        choices=CHOICES["missing_channel"],
        default="error",
        help="a case that lacks a channel is rejected, or the channel is filled with zeros",
    )


def _add_label_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--labels",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="folders of labels, named like the images; one for each folder of --images",
    )
    group.add_argument(
        "--label-name",
        metavar="NAME",
        help="labels are called NAME, *_NAME or *-NAME and lie beside the images; with --labels: in those folders, "
        "matched by subject, session, acq and run (BIDS)",
    )
    group.add_argument(
        "--label-map",
        nargs="+",
        type=label_mapping,
        metavar="OLD:NEW",
        help="label values to replace; OLD:ignore leaves voxels out of loss, sampling and scores, as dataset.json does "
        "with a label called ignore",
    )
    group.add_argument(
        "--label-names",
        nargs="+",
        type=label_name,
        metavar="VALUE:NAME",
        help="names of label values, as the files hold them (default: of dataset.json, else label_VALUE)",
    )

    group.add_argument(
        "--regions",
        nargs="+",
        type=region,
        metavar="VALUES:NAME",
        help="label values, as the files hold them, that are scored as one, such as 1,2,4:whole 1,4:core 4:enhancing "
        "(default: of dataset.json, else every class is scored)",
    )


def _add_source_options(group: argparse._ArgumentGroup) -> None:
    with_labels = ", ".join(name for name, source in SOURCES.items() if source.labels)
    group.add_argument(
        "--hold-out",
        nargs="+",
        metavar="NAME",
        help="sources whose published test cases are left out; for the published corpus: brats21",
    )
    group.add_argument(
        "--sequence",
        nargs="+",
        choices=[name for name, _ in SEQUENCES],
        metavar="NAME",
        help="take only these sequences of a --source: " + ", ".join(name for name, _ in SEQUENCES),
    )
    group.add_argument(
        "--with-labels",
        action="store_true",
        help=f"take the label of its case with every volume of a --source, and the label map of its task; for "
        f"{with_labels}",
    )
    group.add_argument(
        "--corpus-filter",
        choices=CORPUS_FILTER,
        default="auto",
        help="skip volumes that are 4-D, thinner than 15 voxels or have negative values; auto: for adni, "
        "oasis3, oasis4 and ppmi, as in the published corpus",
    )


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--out",
        type=Path,
        metavar="STORE",
        help="folder to write; a store that is there grows: its cases are kept. With --qc: folder of the result "
        "(default: STORE/qc)",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="redo cases that are done, from other files or with other settings"
    )
    group.add_argument(
        "--prune", action="store_true", help="take cases out of the store that are not among these, and delete them"
    )
    group.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help="do every Nth case from the Ith on (I = 0..N-1), for array jobs that write one STORE; when all are done, "
        "run once without --shard",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="show which cases there are, which of them will be rejected, and what is in STORE already; open no image, "
        "write nothing",
    )
    group.add_argument("--list", action="store_true", help="with --dry-run: also every case with its files")
    group.add_argument("--dtype", choices=CHOICES["dtype"], default="float32", help="of the images on disk")


def _add_preprocessing_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--spacing",
        nargs=3,
        type=real(*SPACING),
        default=[1.0, 1.0, 1.0],
        metavar=("X", "Y", "Z"),
        help="voxel size, mm",
    )
    group.add_argument(
        "--normalization",
        choices=CHOICES["normalization"],
        default="unit",
        help="of the intensities; unit: to [0, 1], which the networks expect",
    )
    group.add_argument(
        "--crop-from",
        choices=CHOICES["crop_from"],
        default="union",
        help="crop to the foreground of all channels (union) or of the first channel",
    )
    group.add_argument(
        "--crop-extra-plane", action="store_true", help="crop one plane more per axis, as in the published pipeline"
    )
    group.add_argument("--label-resampling", choices=CHOICES["label_resampling"], default="nearest", help="of labels")
    group.add_argument(
        "--background-to-min",
        action="store_true",
        help="in images with negative values, set the most frequent value to the minimum",
    )


def _add_fault_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--verify",
        action="store_true",
        help="check the CRC of gzip files, and refuse headers with two sizes of a voxel",
    )
    group.add_argument(
        "--on-geometry-mismatch",
        choices=CHOICES["on_geometry_mismatch"],
        default="reject",
        help="a channel or label on another grid than the first channel is rejected, or resampled onto that grid",
    )
    group.add_argument(
        "--nan-background",
        choices=CHOICES["nan_background"],
        default="reject",
        help="a file with many NaN voxels is rejected, or every NaN is taken as 0, as statistics packages mean it",
    )
    group.add_argument("--strict-orientation", action="store_true", help="reject files with sform and qform code 0")
    group.add_argument(
        "--assume-ras", action="store_true", help="take the stored axes as RAS where the affine is singular"
    )
    group.add_argument("--min-axis", type=integer(*MIN_AXIS), default=3, help="fewest voxels per stored axis")
    group.add_argument("--fail-fast", action="store_true", help="stop at the first rejected or failed input")
    group.add_argument("--allow-rejects", action="store_true", help="exit with status 0 although inputs were rejected")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# The command ----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Find the cases, write the store, print what became of each; the exit status."""
    args = parse_options(argv)
    if args.qc is not None:
        from amaes.data import quality

        _print(quality.report(args.qc, args.out, progress=True))
        return EXIT_OK
    collection, label_map = _from_sources(args) if args.source else _from_images(args)
    collection = _with_names(collection, args.label_names or (), label_map)
    if args.regions:
        collection = dataclasses.replace(collection, regions=dict(args.regions))
    names = [field.name for field in dataclasses.fields(Config) if field.name not in ("label_map", "spacing")]
    settings = {name: getattr(args, name) for name in names}
    config = Config(label_map=label_map, spacing=tuple(args.spacing), **settings)
    if args.dry_run:
        _print(_plan(collection, args))
        return EXIT_OK
    from amaes.preprocess.write_store import write_store

    result = write_store(
        collection,
        args.out,
        config,
        workers=args.workers,
        overwrite=args.overwrite,
        prune=args.prune,
        fail_fast=args.fail_fast,
        progress=True,
        shard=args.shard,
    )
    _print(result.summary())
    return result.status(args.allow_rejects)


def _from_images(args: argparse.Namespace) -> tuple[Collection, dict[int, int]]:
    """The cases of --images, and the label map; prints the cases of a dry run."""
    from amaes.preprocess.several_folders import collect_folders

    for name in SOURCE_OPTIONS:
        if value := getattr(args, name):
            values = "" if value is True else f" {' '.join(value)}"
            raise ValueError(f"{_flag(name)}{values}: goes with --source")
    collection = collect_folders(
        args.images,
        args.labels or (),
        channels=args.channels or (),
        label_name=args.label_name,
        subject=args.subject,
        missing_channel=args.missing_channel,
    )
    if args.dry_run:
        folders = ", ".join(map(str, args.images))
        notes = [f"  note: {note}" for note in collection.notes]
        _print("\n".join([f"{folders}: {collection.summary()}", *notes, ""]))
    if args.corpus_filter == "on":
        items = [dataclasses.replace(item, corpus_filter=True) for item in collection.items]
        collection = dataclasses.replace(collection, items=items)
    return collection, dict(args.label_map or ())


def _from_sources(args: argparse.Namespace) -> tuple[Collection, dict[int, int]]:
    """The cases of all --source, and the label map of their task; prints the cases of a dry run."""
    from amaes.preprocess.source_report import describe
    from amaes.preprocess.sources import collect_sources, find_source, leave_out_test, take_labels, take_sequences

    for name in IMAGE_OPTIONS:
        if getattr(args, name) not in (None, "error"):
            text = (
                "goes with --images; the volumes of a --source have one channel, and --with-labels takes their labels"
            )
            raise ValueError(f"{_flag(name)}: {text}")
    folders = [find_source(name, root) for name, root in args.source]
    for name in args.hold_out or ():
        leave_out_test(folders, name)
    if args.sequence:
        take_sequences(folders, args.sequence)
    label_map = take_labels(folders) if args.with_labels else {}
    if args.dry_run:
        _print(describe(folders))
    return collect_sources(folders, args.corpus_filter), label_map


def _plan(collection: Collection, args: argparse.Namespace) -> str:
    """What a run would do: the text of a dry run below that on the folders."""
    from amaes.preprocess.earlier_cases import plan
    from amaes.preprocess.report import with_remedy

    problems: dict[str, list[str]] = {}
    for item in collection.items:
        if item.problem is not None:
            problems.setdefault(item.problem[0], []).append(item.problem[1])
    lines = [f"  {len(texts)} will be rejected: {with_remedy(why, texts[0])}" for why, texts in problems.items()]
    lines += plan(args.out, collection)
    if args.list:
        lines += [f"{item.id}: {'; '.join(item.problem or item.files)}" for item in collection.items]
    return "".join(f"{printable(line)}\n" for line in lines)


def _with_names(collection: Collection, pairs: Sequence[tuple[int, str]], label_map: dict[int, int]) -> Collection:
    """The collection with the names of --label-names; refused where they contradict the label map."""
    names: dict[int, str] = {}
    for value, name in pairs:
        new = label_map.get(value, value)
        if new == IGNORED or names.setdefault(new, name) != name:
            reason = "is left out" if new == IGNORED else f"and {names[new]} are one label"
            raise ValueError(f"`label_names` {value}:{name} {reason} by `label_map`; give a class one name")
    return dataclasses.replace(collection, names=dict(pairs))


def _print(text: str) -> None:
    """Print at once, so that it comes before an error; names of files may be invalid Unicode."""
    sys.stdout.write(as_options(text).encode(errors="backslashreplace").decode())
    sys.stdout.flush()


if __name__ == "__main__":
    run(main)
