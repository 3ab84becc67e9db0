"""Predict the test cases of every fold, measure them, write the table; with two runs, compare them case by case.

    python evaluate.py RUN [RUN ...]
    python evaluate.py --predictions DIR --labels DIR

The same command again uses the predictions that are there. Read it from top to bottom: options, runs, folds, cases.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from amaes import cli
from amaes.choices import CHECKPOINTS, EMPTY
from amaes.evaluation.command_line import add_inference_options
from amaes.metrics import DEFAULT_METRICS, METRICS
from amaes.paper import protocols


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = cli.Parser(
        ["RUN", "SCRATCH PRETRAINED --metrics dice hd95"],
        description="Dice of every fold of a run on its test cases; further runs are compared with the first, case by "
        "case. Writes RUN/fold<k>/predictions and results.json, RUN/summary.json, summary.md, cases.csv and "
        "report.html; --checkpoint best, --space store and --protocol have files of their own; metrics add up.",
    )
    add = parser.add_argument
    add("runs", type=Path, nargs="*", metavar="RUN", help="folder written by train_finetune.py")
    add("--data", type=Path, metavar="STORE", help="store of the cases (default: the one trained on)")
    add("--checkpoint", choices=CHECKPOINTS, default="last", help="of every fold; best: on its validation cases")
    explanation = "instead of runs: folders of predictions made elsewhere, named as the labels; the tables go there"
    add("--predictions", type=Path, nargs="+", default=[], metavar="DIR", help=explanation)
    add("--labels", type=Path, metavar="DIR", help="label files that --predictions are measured against")
    add("--json", type=cli.output_file, metavar="FILE", help="also write all summaries and comparisons there")
    add = parser.add_argument_group("metrics").add_argument
    names = {"nargs": "+", "choices": list(METRICS), "default": list(DEFAULT_METRICS), "metavar": "NAME"}
    add("--metrics", **names, help=f"Dice always, and any of {', '.join(METRICS)}")
    add("--tau", type=cli.positive_float, default=1.0, help="tolerance of the surface Dice, mm")
    add("--empty", choices=EMPTY, default="nan", help="score of a class that neither map has; nan: left out")
    add(
        "--space",
        choices=["native", "store"],
        default="native",
        help="native: on the scans' grids, against the label files as they are; store: against the preprocessed labels",
    )
    explanation = (
        "cases that cannot be predicted are listed; error: and left out of the means, zero: and count as empty"
    )
    add("--missing", choices=["error", "zero"], default="error", help=explanation)
    add = parser.add_argument_group("the paper's experiments").add_argument
    add("--paper", action="store_true", help="set the numbers beside the paper's, with what differs")
    add("--protocol", choices=list(protocols.EVALUATIONS), help="test on the cases of --data, not on the folds' own")
    add("--allow-incomplete", action="store_true", help="with --protocol: accept fewer cases than there are")
    add(
        "--wmh-label2",
        choices=["ignore", "background"],
        help="voxels of other pathology (label 2) in label files of WMH: left out of both maps, or background (default "
        "for runs with --protocol wmh: ignore)",
    )
    add_inference_options(parser.add_argument_group("prediction"))
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.predictions):
        parser.error("expected RUN, or --predictions DIR --labels DIR, and not both")
    if bool(args.predictions) != (args.labels is not None):
        parser.error("--predictions and --labels are given together")
    if args.predictions and (args.protocol or args.paper or args.data or args.space != "native"):
        parser.error("--predictions: not with --data, --space, --paper or --protocol, which need a run")
    if args.protocol and args.data is None:
        parser.error(f"--protocol {args.protocol}: needs --data, the store of its cases")
    if args.allow_incomplete and not args.protocol:
        parser.error("--allow-incomplete: accepted with --protocol")
    args.metrics = list(dict.fromkeys(["dice", *args.metrics]))
    return args


if __name__ == "__main__":
    ARGS = parse_options()  # before torch is imported, so that --help answers at once

import torch

from amaes import checkpoint
from amaes.data.store import Store
from amaes.distributed import pick_device
from amaes.evaluation import scores, tables
from amaes.evaluation.case_pictures import pictures_of
from amaes.evaluation.folder_scores import folder_note, measure_folder
from amaes.evaluation.folds import Fold, Run, check_cases, check_classes, names_of_scores, open_run, pretraining_options
from amaes.evaluation.measure import metrics_with_earlier, predict_and_measure
from amaes.evaluation.outputs import write_results
from amaes.evaluation.predictions import SPACES, left_out_value, open_predictions
from amaes.files import locked, sha256, write_json
from amaes.hardware import use_bf16
from amaes.inference import MIRROR_AXES
from amaes.paper.compare import compare_with_paper, comparison_text
from amaes.preprocess.config import Config


def main(args: argparse.Namespace) -> int:
    """Evaluate every run alone, then compare the first one with each of the others; the exit status."""
    if args.predictions:
        parts, left_out = [evaluate_folder(folder, args) for folder in args.predictions], []
    else:
        device = pick_device(args.device)
        runs = [choose_cases(open_run(path, args.data, args.paper, args.checkpoint), args) for path in args.runs]
        for run in runs:  # what is missing shows before any work
            check_cases(run.store, run.folds, args.space)
        check_classes(runs)
        parts = [evaluate_run(run, args, device) for run in runs]
        left_out = [line for run in runs for line in run.unfinished]
    summaries, results, texts = map(list, zip(*parts, strict=True))

    comparisons = []
    for summary, of_run in zip(summaries[1:], results[1:], strict=True):
        rows = scores.compare_runs(results[0], of_run)
        comparisons.append({"first": summaries[0]["run"], "second": summary["run"], "dice": rows})
        texts.append(tables.comparison_tables(summaries[0], summary, rows))
    if args.json is not None:
        write_json(args.json, scores.nan_to_null({"runs": summaries, "comparisons": comparisons}))

    print("\n".join(texts), flush=True)
    for summary, of_run in zip(summaries, results, strict=True):
        failed = [(fold["fold"], case) for fold in of_run for case in fold["failed"]]
        fold = "{}" if args.predictions else "{}/fold{}"
        left_out += [f"{fold.format(summary['run'], k)}: {case['id']}: {case['message']}" for k, case in failed]
    for line in left_out:
        print(line, file=sys.stderr)
    return cli.EXIT_REJECTED if left_out else cli.EXIT_OK


# Runs -----------------------------------------------------------------------------------------------------------------


def choose_cases(run: Run, args: argparse.Namespace) -> Run:
    """The run with the cases to test: those of --protocol, or the folds' own; and the label that is left out."""
    folds, groups = [replace(fold, ignored_label=ignored_label(run, args)) for fold in run.folds], {}
    if args.protocol is not None:
        train = {id for fold in folds for id in fold.train}
        trained = run.options.get("protocol")
        ids, groups = protocols.evaluation_cases(run.store, args.protocol, trained, train, args.allow_incomplete)
        folds = [replace(fold, test=ids, suffix=f"-{args.protocol}") for fold in folds]
    own = ("-best" if args.checkpoint == "best" else "") + ("-store" if args.space == "store" else "")
    folds = [replace(fold, suffix=f"{own}{fold.suffix}") for fold in folds]  # nothing replaces what was measured before
    return replace(run, folds=folds, groups=groups)


def ignored_label(run: Run, args: argparse.Namespace) -> int | None:
    """The value of the label files of WMH to leave out of both maps.

    Raises:
        ValueError: --wmh-label2 for a run of something else, or labels that hold the value no more.
    """
    if run.options.get("protocol") != "wmh":
        if args.wmh_label2 is not None:
            raise ValueError(f"--wmh-label2 {args.wmh_label2}: {run.path} was not trained with --protocol wmh")
        return None
    if args.wmh_label2 == "background":
        return None
    if args.space != "native":
        raise ValueError(
            f"--space {args.space}: preprocessing made label 2 of WMH background, so that it cannot be left out; "
            "accepted: --space native, or --wmh-label2 background"
        )
    return protocols.WMH_OTHER_PATHOLOGY


def evaluate_run(run: Run, args: argparse.Namespace, device: torch.device) -> tuple[dict, list[dict], str]:
    """Means over the folds of a run, the results of the folds, and the Markdown; written into the run's folder."""
    suffix = run.folds[0].suffix
    metrics = metrics_with_earlier(run, args.metrics, suffix)
    results = [evaluate_fold(fold, run.store, metrics, args, device) for fold in run.folds]
    summary = {
        "format": "amaes-summary-1",
        "run": str(run.path),
        "store": {"path": str(run.store.path), "id": run.store.fingerprint},
        "settings": results[0]["settings"],
        "checkpoints": [fold["checkpoint"] for fold in results],
        "labels": names_of_scores(run.store),
        **scores.summarise(results),
    }
    text = tables.run_tables(summary["run"], summary, summary["labels"], tables.settings_note(summary))
    if run.groups:
        summary["groups"] = scores.summarise_groups(results, run.groups)
        text += "\n" + tables.group_table(summary["groups"])
    if args.paper:
        pretraining = pretraining_options(run.options)
        summary["paper"] = compare_with_paper(run.options, summary, args.protocol, pretraining)
        text += "\n" + comparison_text(summary["run"], summary, summary["paper"])
    write_results(run.path, suffix, summary, results, text, pictures_of(run, results, args.space))
    return summary, results, text


def evaluate_folder(folder: Path, args: argparse.Namespace) -> tuple[dict, list[dict], str]:
    """What `evaluate_run` gives, of a folder of predictions made elsewhere; written there."""
    measured = {"metrics": args.metrics, "empty": args.empty, "tau": args.tau}
    summary, results = measure_folder(folder, args.labels, measured=measured, missing=args.missing)
    text = tables.run_tables(summary["run"], summary, summary["labels"], folder_note(summary))
    write_results(folder, "", summary, results, text, pictures=None)
    return summary, results, text


# Folds ----------------------------------------------------------------------------------------------------------------


def evaluate_fold(fold: Fold, store: Store, metrics: list[str], args: argparse.Namespace, device: torch.device) -> dict:
    """Predict and measure the test cases of a fold; predictions and results.json go into its folder."""
    with locked(fold.folder, "another process is evaluating this fold; wait for it, it may make other predictions"):
        model, meta = checkpoint.load_segmenter(fold.checkpoint, device)
        checkpoint.check_preprocessing(fold.checkpoint, meta, store, channels=True)
        made_by = {
            "checkpoint": sha256(fold.checkpoint),
            "store": store.fingerprint,
            "space": args.space,
            "overlap": args.overlap,
            "tta": args.tta,
            "precision": "bf16" if use_bf16(device, args.precision) else "fp32",
        }
        space = SPACES[args.space](store, open_predictions(fold, store, made_by), fold.ignored_label)
        windows = {name: getattr(args, name) for name in ("overlap", "batch_size", "precision")}
        windows["tta_axes"] = MIRROR_AXES if args.tta else ()
        measured = {"metrics": metrics, "empty": args.empty, "tau": args.tau}
        how = {"measured": measured, "windows": windows, "missing": args.missing}
        cases, failed = predict_and_measure(fold, store, model, meta, space, **how)
        means = scores.fold_means(cases)
        settings = (
            made_by | measured | {"missing": args.missing, "ignored_label": left_out_value(store, fold.ignored_label)}
        )
        content = {
            "format": "amaes-results-1",
            "fold": fold.number,
            "checkpoint": {"file": fold.checkpoint.name, "step": meta.get("step"), "sha256": made_by["checkpoint"]},
            "settings": settings,
            "config_hash": Config.from_dict(store.config).hash(),
            "dice": scores.fold_score(means),
            "classes": means,
            "cases": cases,
            "failed": [{"id": id, "message": message} for id, message in failed.items()],
        }
        write_json(fold.folder / f"results{fold.suffix}.json", scores.nan_to_null(content))
    return content


if __name__ == "__main__":
    cli.run(main, ARGS)
