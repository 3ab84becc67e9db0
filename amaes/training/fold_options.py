"""Options of fine-tuning about its cases: folds, validation, and what contradicts them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from amaes import cli
from amaes.choices import ALL

DRAWN = {"folds": 6, "train_cases": 20, "split_seed": 0, "val_cases": 0}  # as the paper; --splits says it otherwise


def add_fold_options(parser: cli.Parser, protocols: Sequence[str]) -> None:
    """Which cases are trained on, which choose the best checkpoint, which are tested on.

    Args:
        parser: of the script.
        protocols: names that --protocol takes.
    """
    add = parser.add_argument_group("folds: train on few cases, test on all others").add_argument
    explanation = "own folds: JSON or CSV (case, fold, role: train, validation, test), or nnU-Net's splits_final.json"
    add("--splits", dest="splits_file", type=Path, metavar="FILE", help=explanation)
    add("--protocol", choices=list(protocols), help="task of the paper: sets the folds, checks the store")
    add("--allow-incomplete", action="store_true", help="with --protocol: fewer cases than its release has")
    add("--folds", type=cli.folds, default=DRAWN["folds"], metavar="N", help="number of folds")
    explanation = "labelled cases a fold trains on; all: one network on all of them, none is tested on"
    add("--train-cases", type=_all_or_number, default=DRAWN["train_cases"], metavar="N|all", help=explanation)
    explanation = "test cases of each fold to validate on instead; all scans of a subject together"
    add("--val-cases", type=cli.non_negative_int, default=DRAWN["val_cases"], metavar="N", help=explanation)
    explanation = "of the drawing of folds and of validation cases"
    add("--split-seed", type=cli.split_seed, default=DRAWN["split_seed"], metavar="N", help=explanation)
    add("--fold", default="all", metavar="K|all", help="the fold to train, counted from 0")
    add = parser.add_argument_group("length and validation").add_argument
    add("--steps", type=cli.positive_int, default=2500, help="optimizer steps of each fold")
    explanation = "between validations on whole scans, where a fold has validation cases; the best is kept as best.pt"
    add("--val-every", type=cli.positive_int, default=250, metavar="STEPS", help=explanation)
    explanation = "end a fold after N validations without a better Dice (default: never)"
    add("--patience", type=cli.positive_int, metavar="N", help=explanation)


def _all_or_number(text: str) -> int | str:
    return text if text == ALL else cli.positive_int(text)


def fold_contradictions(args: argparse.Namespace) -> list[str]:
    """What the options of `add_fold_options` say against each other."""
    found = []
    if args.splits_file is not None and args.protocol is not None:
        found.append(f"--splits {args.splits_file}: --protocol {args.protocol} sets the folds; leave one out")
    for name, value in DRAWN.items():
        if getattr(args, name) != value:
            given = f"--{name.replace('_', '-')} {getattr(args, name)}"
            if args.splits_file is not None:
                found.append(f"{given}: --splits {args.splits_file} names the cases; leave one out")
            if args.protocol is not None:
                found.append(f"{given}: --protocol {args.protocol} has {value}; leave one out")
    if args.train_cases == ALL and args.val_cases:
        found.append(f"--val-cases {args.val_cases}: --train-cases all leaves no case for validation")
    if args.allow_incomplete and args.protocol is None:
        found.append("--allow-incomplete: accepted with --protocol")
    if args.patience is not None and args.splits_file is None and not args.val_cases:
        found.append(f"--patience {args.patience}: needs validation cases: --val-cases, or --splits with some")
    if args.fold != "all":
        number = int(args.fold) if args.fold.isdecimal() else None
        if number is None or (args.splits_file is None and number >= args.folds):
            found.append(f"--fold {args.fold}: accepted: all, or 0 to {args.folds - 1} (--folds {args.folds})")
        elif args.overwrite:
            folder = f"{args.out}/fold{number}"
            found.append(f"--overwrite --fold {args.fold}: would delete all folds; delete {folder} instead")
    return found


def check_folds(args: argparse.Namespace, splits: Sequence[Mapping]) -> None:
    """Refuse --fold and --patience where the folds do not have what they ask for.

    Raises:
        ValueError: no such fold, or no validation cases in any that is to be trained.
    """
    if args.fold != "all" and int(args.fold) >= len(splits):
        source = args.splits_file or f"--train-cases {args.train_cases}"
        raise ValueError(f"`fold` {args.fold}: {source} has no fold above {len(splits) - 1}")
    chosen = splits if args.fold == "all" else [splits[int(args.fold)]]
    if args.patience is not None and not any(split.get("validation") for split in chosen):
        raise ValueError(f"`patience` {args.patience}: {args.splits_file} has no validation cases")
