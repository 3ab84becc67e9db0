"""Predict the test cases of every fold, measure them, write the table; with two runs, compare them case by case.

    python evaluate.py RUN [RUN ...]

The same command again uses the predictions that are there. Read it from top to bottom: options, runs, folds, cases.
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from amaes import checkpoint, cli, metrics
from amaes.data.store import Store
from amaes.distributed import pick_device
from amaes.evaluation import tables
from amaes.files import locked, read_json, sha256, write_json, write_text, written_whole
from amaes.hardware import use_bf16
from amaes.inference import argmax_labels, restore_labels, sliding_window
from amaes.paper import compare, protocols
from amaes.predict import add_inference_options, file_values, inference_options, reason
from amaes.preprocess import nifti
from amaes.preprocess.config import Config
from amaes.preprocess.read_case import read_label

IGNORED = 255  # class number of voxels that are left out of both maps
DEFAULT_METRICS = ["dice", "hd95", "surface_dice", "volume_difference"]


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(
        description="Dice of every fold of a run on its test cases; further runs are compared with the first, case by "
        "case. Writes RUN/fold<k>/predictions and results.json, RUN/summary.json and summary.md."
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder written by train_finetune.py")
    parser.add_argument("--data", type=Path, metavar="STORE", help="store of the cases (default: the one trained on)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all summaries and comparisons there")
    group = parser.add_argument_group("metrics")
    group.add_argument(
        "--metrics",
        nargs="+",
        choices=list(metrics.METRICS),
        default=DEFAULT_METRICS,
        metavar="NAME",
        help=f"Dice always, and any of {', '.join(metrics.METRICS)}",
    )
    group.add_argument("--tau", type=cli.positive_float, default=1.0, help="tolerance of the surface Dice, mm")
    group.add_argument(
        "--empty", choices=metrics.EMPTY, default="nan", help="score of a class that neither map has; nan: left out"
    )
    group.add_argument(
        "--space",
        choices=list(SPACES),
        default="native",
        help="native: on the scans' grids, against the label files as they are; store: against the preprocessed labels",
    )
    group.add_argument(
        "--missing",
        choices=["error", "zero"],
        default="error",
        help="a case that cannot be predicted is left out of the means, or counts as empty; it is listed in any case",
    )
    group = parser.add_argument_group("the paper's experiments")
    group.add_argument("--paper", action="store_true", help="set the numbers beside the paper's, with what differs")
    group.add_argument(
        "--protocol", choices=list(protocols.EVALUATIONS), help="test on the cases of --data instead of the fold's own"
    )
    group.add_argument("--allow-incomplete", action="store_true", help="with --protocol: fewer cases than there are")
    group.add_argument(
        "--wmh-label2",
        choices=["ignore", "background"],
        help="other pathology in label files of WMH: voxels left out of both maps, or background (default of runs with "
        "--protocol wmh: ignore)",
    )
    add_inference_options(parser.add_argument_group("prediction"))
    args = parser.parse_args(argv)
    if args.protocol and args.data is None:
        parser.error(f"--protocol {args.protocol}: needs --data, the store of its cases")
    if args.allow_incomplete and not args.protocol:
        parser.error("--allow-incomplete: accepted with --protocol")
    args.metrics = list(dict.fromkeys(["dice", *args.metrics]))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_options(argv)
    device = pick_device(args.device)

    # What is missing shows before any work.
    runs, groups, complaints = [], {}, []
    for path in args.runs:
        folds, unfinished = find_folds(path)
        store = open_store(path, args.data)
        if args.protocol is not None:
            folds, groups = on_other_cases(path, folds, store, args)
        ignored = ignored_label(path, args)
        folds = [replace(fold, ignored=ignored) for fold in folds]
        check_cases(store, folds, args.space)
        runs.append((path, store, folds))
        complaints += unfinished
    check_classes(runs)
    suffix = runs[0][2][0].suffix

    # Every run alone
    evaluated, text = [], []
    for path, store, folds in runs:
        scored = [evaluate_fold(fold, store, args, device) for fold in folds]
        complaints += [
            f"{path}/fold{f['fold']}: {case['id']}: {case['message']}" for f in scored for case in f["failed"]
        ]
        summary = {
            "format": "amaes-summary-1",
            "run": str(path),
            "store": {"path": str(store.path), "id": store.fingerprint},
            "settings": scored[0]["settings"],
            "checkpoints": [fold["checkpoint"] for fold in scored],
            "labels": {str(value): name for value, name in store.labels.items()},
            **tables.summarise(scored),
        }
        text.append(tables.run_tables(str(path), summary, summary["labels"], describe(summary)))
        if groups:
            summary["groups"] = tables.summarise_groups(scored, groups)
            text[-1] += "\n" + tables.group_table(summary["groups"])
        if args.paper:
            options = options_of(path)
            summary["paper"] = compare.compare(options, summary, args.protocol, pretraining_of(options))
            text[-1] += "\n" + compare.comparison_text(str(path), summary, summary["paper"])
        write_json(path / f"summary{suffix}.json", tables.plain(summary))
        write_text(path / f"summary{suffix}.md", text[-1])
        evaluated.append((path, summary, scored))

    # The first against each of the others
    comparisons = []
    first_path, first_summary, first = evaluated[0]
    for path, summary, scored in evaluated[1:]:
        rows = tables.compare(first, scored)
        comparisons.append({"first": str(first_path), "second": str(path), "dice": rows})
        titles = (str(first_path), str(path))
        text.append(tables.comparison_tables(titles, (first_summary, summary), rows, summary["labels"]))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"runs": [summary for _, summary, _ in evaluated], "comparisons": comparisons}
        write_json(args.json, tables.plain(content))

    print("\n".join(text), flush=True)
    for line in complaints:
        print(line, file=sys.stderr)
    return cli.EXIT_REJECTED if complaints else cli.EXIT_OK


def evaluate_fold(fold: Fold, store: Store, args: argparse.Namespace, device: torch.device) -> dict:
    """Predict and measure the test cases of a fold; predictions and results.json go into its folder."""
    with locked(fold.folder, "another process is evaluating this fold; wait for it, it may make other predictions"):
        return _evaluate_fold(fold, store, args, device)


def _evaluate_fold(fold: Fold, store: Store, args: argparse.Namespace, device: torch.device) -> dict:
    model, meta = checkpoint.load_segmenter(fold.checkpoint, device)
    check_preprocessing(fold, meta, store)
    identity = {"file": fold.checkpoint.name, "step": meta["step"], "sha256": sha256(fold.checkpoint)}
    made_by = {
        "checkpoint": identity["sha256"],
        "store": store.fingerprint,
        "space": args.space,
        "overlap": args.overlap,
        "tta": args.tta,
        "precision": "bf16" if use_bf16(device, args.precision) else "fp32",
    }
    folder = open_predictions(fold, made_by, stamps(store, fold.test))
    space = SPACES[args.space](store, folder, fold.ignored)
    classes_of = regions(store, meta["build"]["num_classes"])

    def predicted(id: str, reference: Reference) -> np.ndarray:
        if space.path(id).is_file():
            try:
                return space.prediction(id, reference)
            except (OSError, ValueError, EOFError) as error:  # damaged: made again, and not a second time
                if getattr(error, "code", "") == "label_geometry":  # sound, but the label is on another grid
                    raise
                space.path(id).unlink()
        space.save(
            id,
            sliding_window(model, store.image(id), meta["patch_size"], **inference_options(args)),
            store.properties(id),
        )
        return space.prediction(id, reference)

    cases, failed = [], {}
    for id in tqdm(fold.test, desc=str(fold.folder), unit="case", disable=None):
        try:  # one case must not end the others
            reference = space.reference(id)
            try:
                prediction = predicted(id, reference)
            except Exception as error:
                if args.missing == "error":
                    raise
                failed[id] = reason(error)
                prediction = np.zeros_like(reference.labels)
            if reference.ignored is not None:
                prediction[reference.ignored] = 0
            classes = metrics.measure_case(
                prediction,
                reference.labels,
                meta["build"]["num_classes"],
                reference.spacing,
                args.metrics,
                args.empty,
                regions=classes_of,
                tau=args.tau,
            )
            cases.append({"id": id, "classes": classes, "warnings": reference.warnings})
        except Exception as error:
            failed[id] = reason(error)

    means = tables.fold_means(cases)
    settings = {
        **made_by,
        "metrics": args.metrics,
        "tau": args.tau,
        "empty": args.empty,
        "missing": args.missing,
        "ignored_label": fold.ignored,
    }
    content = {
        "format": "amaes-results-1",
        "fold": fold.number,
        "checkpoint": identity,
        "settings": settings,
        "config_hash": Config.from_dict(store.config).hash(),
        "dice": tables.fold_score(means),
        "classes": means,
        "cases": cases,
        "failed": [{"id": id, "message": message} for id, message in failed.items()],
    }
    write_json(fold.folder / f"results{fold.suffix}.json", tables.plain(content))
    return content


# Folds ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fold:
    """RUN/fold<number>, trained to the end: its checkpoint and the ids it is tested on.

    Attributes:
        suffix: of the names of what evaluation writes, where the cases are not the fold's own.
        ignored: value of the label files whose voxels are left out of both maps.
    """

    number: int
    folder: Path
    checkpoint: Path
    test: list[str]
    suffix: str = ""
    ignored: int | None = None


def options_of(run: Path) -> dict:
    """The options that a run was made with."""
    path = run / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run}: not a run of train_finetune.py (no config.json there)")
    content = read_json(path)
    options = content.get("options") if isinstance(content, dict) else None
    if not isinstance(options, dict) or not {"steps", "data"} <= options.keys():
        raise ValueError(f"{path}: not that of a run of train_finetune.py")
    return options


def find_folds(run: Path) -> tuple[list[Fold], list[str]]:
    """The folds of a run that are trained to the end, and a line for each that is not.

    Raises:
        FileNotFoundError, ValueError: not a run, or no fold is finished.
    """
    steps = options_of(run)["steps"]
    folders = {int(path.name[4:]): path for path in run.glob("fold*") if path.is_dir() and path.name[4:].isdecimal()}
    folds, unfinished = [], []
    for number, folder in sorted(folders.items()):
        saved = checkpoint.saved(folder / "checkpoints")
        step = int(saved[0].stem.removeprefix("step-")) if saved else 0
        if step == steps and not _is_sound(saved[0]):
            unfinished.append(f"{folder}: {saved[0].name} is damaged, left out; the same training command remakes it")
        elif step == steps:
            test = json.loads((folder / "config.json").read_text())["test"]
            folds.append(Fold(number, folder, saved[0], test))
        else:
            unfinished.append(f"{folder}: at step {step} of {steps}, left out")
    if not folds:
        found = "; ".join(unfinished) or "no folder fold<k> there"
        raise ValueError(f"{run}: no finished fold ({found}); train_finetune.py makes them")
    return folds, unfinished


def on_other_cases(
    run: Path, folds: list[Fold], store: Store, args: argparse.Namespace
) -> tuple[list[Fold], dict[str, list[str]]]:
    """The folds, tested on the cases of --protocol; and the ids of its groups of cases."""
    train = {id for fold in folds for id in json.loads((fold.folder / "config.json").read_text())["train"]}
    trained = options_of(run).get("protocol")
    ids, groups = protocols.evaluation_cases(store, args.protocol, trained, train, args.allow_incomplete)
    return [replace(fold, test=ids, suffix=f"-{args.protocol}") for fold in folds], groups


def ignored_label(run: Path, args: argparse.Namespace) -> int | None:
    """The value of the label files of WMH to leave out.

    Raises:
        ValueError: --wmh-label2 for a run of something else, or labels that hold the value no more.
    """
    if options_of(run).get("protocol") != "wmh":
        if args.wmh_label2 is not None:
            raise ValueError(f"--wmh-label2 {args.wmh_label2}: {run} was not trained with --protocol wmh")
        return None
    if args.wmh_label2 == "background":
        return None
    if args.space != "native":
        raise ValueError(
            f"--space {args.space}: preprocessing made label 2 of WMH background, so that it cannot be left out; "
            "accepted: --space native, or --wmh-label2 background"
        )
    return protocols.WMH_OTHER_PATHOLOGY


def pretraining_of(options: dict) -> dict | None:
    """The options of the pretraining run that the weights of a run are of, where the file is there and says so."""
    path = Path(options["weights"])
    if options["weights"] == "scratch" or not path.is_file():
        return None
    provenance = checkpoint.read(path).get("provenance")
    return provenance.get("options") if isinstance(provenance, dict) else None


def _is_sound(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def open_store(run: Path, data: Path | None) -> Store:
    """The store given, or the one that the run was trained on."""
    if data is not None:
        return Store(data)
    path = Path(options_of(run)["data"])
    if not path.is_absolute() and not path.exists():
        raise FileNotFoundError(
            f"{run}: trained on the store {path}, which is not in the folder {Path.cwd()}; --data STORE gives it"
        )
    return Store(path)


def regions(store: Store, num_classes: int) -> dict[str, tuple[int]]:
    """The classes to score: those of the store; a number that no label has, as between 1 and 3, is none."""
    return {str(value): (value,) for value in sorted(store.labels) if 0 < value < num_classes}


def check_classes(runs: list[tuple[Path, Store, list[Fold]]]) -> None:
    """Refuse runs that score different classes and cannot be compared."""
    found = []
    for path, store, folds in runs if len(runs) > 1 else []:
        meta = checkpoint.load_segmenter(folds[0].checkpoint)[1]
        found.append((path, [int(name) for name in regions(store, meta["build"]["num_classes"])]))
    for path, classes in found[1:]:
        if classes != found[0][1]:
            raise ValueError(
                f"{path} has the classes {classes}, {found[0][0]} has {found[0][1]}: they cannot be compared"
            )


def check_cases(store: Store, folds: list[Fold], space: str) -> None:
    """Refuse a store that lacks test cases and, in native space, missing label files.

    Raises:
        FileNotFoundError, ValueError: names the first such case.
    """
    for id in sorted({id for fold in folds for id in fold.test}):
        if store.index(id) >= 0 and space == "native":
            label_file = store.properties(id).get("label_file")
            if label_file is None or not Path(label_file).is_file():
                raise FileNotFoundError(
                    f"case {id}: its label file {label_file} is not there; --space store takes the preprocessed labels"
                )


def check_preprocessing(fold: Fold, meta: dict, store: Store) -> None:
    """Refuse a store whose volumes are prepared in another way than those that the checkpoint was trained on."""
    trained = {"channels": meta["channels"]} | {key: meta["preprocess"][key] for key in ("spacing", "normalization")}
    for name, value in trained.items():
        found = store.channels if name == "channels" else store.config[name]
        if found != value:
            raise ValueError(f"{fold.checkpoint}: trained with {name} {value}, {store.path} has {name} {found}")


def stamps(store: Store, ids: list[str]) -> dict[str, list]:
    """What a prediction is made from: bytes and time of change (ns) of a case's array and record; [] where absent."""
    found = {}
    for id in ids:
        files = [store.path / "cases" / f"{id}{suffix}" for suffix in (".npy", ".json")]
        stats = [file.stat() for file in files if file.is_file()]
        found[id] = [[stat.st_size, stat.st_mtime_ns] for stat in stats]
    return found


def open_predictions(fold: Fold, made_by: dict, cases: dict[str, list]) -> Path:
    """The folder of predictions; those made by another checkpoint, in another way or from other arrays are deleted."""
    name = "predictions" if made_by["space"] == "native" else "predictions_store"
    folder = fold.folder / f"{name}{fold.suffix}"
    record = folder / "made_by.json"
    try:
        before = json.loads(record.read_text())
        known = before.pop("cases")
        current = {id for id, stamp in cases.items() if known.get(id) == stamp} if before == made_by else set()
    except (OSError, ValueError, KeyError, AttributeError):
        current = set()
    for old in [*folder.rglob("*.nii.gz"), *folder.rglob("*.npy")]:
        if old.relative_to(folder).as_posix().removesuffix(".npy").removesuffix(".nii.gz") not in current:
            old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record, {**made_by, "cases": cases})
    return folder


# Cases ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What a prediction is measured against: class numbers (X, Y, Z) in RAS, spacing in mm; voxels to leave out."""

    labels: np.ndarray
    spacing: tuple[float, ...]
    warnings: list[str]
    header: nifti.Header | None = None
    ignored: np.ndarray | None = None


class NativeSpace:
    """Predictions are NIfTI files on the grid of the scans; references are the label files as they are.

    Args:
        ignored: value of the label files whose voxels are marked and made background.
    """

    def __init__(self, store: Store, folder: Path, ignored: int | None) -> None:
        config = Config.from_dict(store.config)
        self._store, self._folder, self._label_map, self._ignored = store, folder, config.label_map, ignored
        self._reading = replace(config, on_geometry_mismatch="reject").reading()

    def path(self, id: str) -> Path:
        return self._folder / f"{id}.nii.gz"

    def save(self, id: str, logits: torch.Tensor, properties: dict) -> None:
        """Write the prediction with the values that the label files hold."""
        nifti.write_like(self.path(id), file_values(restore_labels(logits, properties), self._label_map), properties)

    def reference(self, id: str) -> Reference:
        path, warnings = Path(self._store.properties(id)["label_file"]), []
        header = nifti.read(path, **self._reading.options)[0]
        label_map = self._label_map if self._ignored is None else {**self._label_map, self._ignored: IGNORED}
        labels, _ = read_label(path, header, (), label_map, self._reading, warnings)
        if self._ignored is None:
            return Reference(labels, header.ras_spacing, warnings, header)
        ignored = labels == IGNORED
        labels[ignored] = 0
        return Reference(labels, header.ras_spacing, warnings, header, ignored)

    def prediction(self, id: str, reference: Reference) -> np.ndarray:
        """Class numbers (X, Y, Z) in RAS; RejectedInput where the grid is not that of the label file."""
        return read_label(self.path(id), reference.header, (), self._label_map, self._reading, reference.warnings)[0]


class StoreSpace:
    """Predictions are arrays on the grid of the store; references are its labels."""

    def __init__(self, store: Store, folder: Path, ignored: None) -> None:
        assert ignored is None  # a store has classes, not the values of the files
        self._store, self._folder = store, folder

    def path(self, id: str) -> Path:
        return self._folder / f"{id}.npy"

    def save(self, id: str, logits: torch.Tensor, properties: dict) -> None:
        with written_whole(self.path(id)) as file:
            np.save(file, argmax_labels(logits))

    def reference(self, id: str) -> Reference:
        at = self._store.properties(id)
        sides = zip(at["cropped_shape"], at["ras_spacing"], at["resampled_shape"], strict=True)
        spacing = tuple(count * size / resampled for count, size, resampled in sides)  # shapes are rounded, so not 1 mm
        return Reference(np.asarray(self._store.label(id)), spacing, [])

    def prediction(self, id: str, reference: Reference) -> np.ndarray:
        return np.load(self.path(id), allow_pickle=False)


SPACES = {"native": NativeSpace, "store": StoreSpace}


# Text and files -------------------------------------------------------------------------------------------------------


def describe(summary: dict) -> str:
    """What was measured, where, and with which weights."""
    settings = summary["settings"]
    space = {
        "native": "Native space: the scans' own grids, label files as they are.",
        "store": "Preprocessed space: not comparable with scores on the scans' own grids.",
    }[settings["space"]]
    empty = "left out" if settings["empty"] == "nan" else "1"
    weights = ", ".join(f"{c['file']} ({c['sha256'][:8]})" for c in summary["checkpoints"])
    tta = ", 8 mirrorings" if settings["tta"] else ""
    ignored = settings["ignored_label"]
    left_out = "" if ignored is None else f" Voxels of label {ignored} in the label files are left out of both maps."
    return (
        f"{space} Store {summary['store']['id']}; weights {weights}; overlap {settings['overlap']:g}{tta}; "
        f"a class that neither map has: {empty}.{left_out}"
    )


if __name__ == "__main__":
    cli.run(main)
