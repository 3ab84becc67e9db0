"""The folds of a run that can be evaluated: their checkpoints, the cases they are tested on, the store of these."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from amaes import checkpoint
from amaes.choices import SCRATCH
from amaes.data.store import Store
from amaes.files import read_json


@dataclass(frozen=True)
class Fold:
    """RUN/fold<number>, trained to the end.

    Attributes:
        number: counted from 0.
        folder: RUN/fold<number>.
        checkpoint: the last one, or the best.
        train: ids of the cases that it was trained on.
        test: ids of the cases to test.
        suffix: is added to the names of what evaluation writes; not empty where `test` are not the fold's own cases, or
            where they are measured on the store's grid.
        ignored_label: value of the label files whose voxels are left out of both maps; None: none is.
    """

    number: int
    folder: Path
    checkpoint: Path
    train: list[str]
    test: list[str]
    suffix: str = ""
    ignored_label: int | None = None


@dataclass(frozen=True)
class Run:
    """A run of train_finetune.py to evaluate.

    Attributes:
        path: its folder.
        options: those it was trained with.
        store: holds the test cases.
        folds: those trained to the end, at least one.
        unfinished: a line for each of the other folds.
        groups: name of a part of the test cases -> their ids.
    """

    path: Path
    options: dict
    store: Store
    folds: list[Fold]
    unfinished: list[str]
    groups: dict[str, list[str]]


def read_options(run: Path, for_paper: bool = False) -> dict:
    """The options that a run was trained with.

    Args:
        run: its folder.
        for_paper: those that the comparison with the paper reads must be there, too.

    Raises:
        FileNotFoundError, ValueError: not a run of train_finetune.py, or its config.json is damaged.
    """
    path = run / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run}: not a run of train_finetune.py (no config.json there)")
    content = read_json(path)
    options = content.get("options") if isinstance(content, dict) else None
    if not isinstance(options, dict):
        raise ValueError(f"{path}: not that of a run of train_finetune.py")
    if content.get("task", "segment") != "segment":
        raise ValueError(f"{run}: a run of pretraining; fine-tune it first (train_finetune.py, `weights`)")
    if missing := [name for name in ("steps", "data") if name not in options]:
        raise ValueError(f"{path}: not that of a run of train_finetune.py, its options have no {missing[0]!r}")
    if missing := [name for name in OF_PAPER if for_paper and name not in options]:
        raise ValueError(f"{path}: its options have no {missing[0]!r}, which the comparison with the paper needs")
    for name, (is_right, expected) in READ_OPTIONS.items():
        if name in options and not is_right(options[name]):
            raise ValueError(f"{path}: its option {name!r} is {options[name]!r:.80}, expected {expected}")
    return options


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


READ_OPTIONS = {  # of config.json that evaluation reads: whether a value is right, and which are
    "steps": (lambda value: type(value) is int and value >= 1, "a number >= 1"),
    "protocol": (lambda value: value is None or _is_text(value), "the name of a protocol, or null"),
    **dict.fromkeys(("data", "weights", "arch", "decoder", "preset"), (_is_text, "a text")),
}
OF_PAPER = ("weights", "arch", "decoder")
OF_PRETRAINING = ("decoder", "skips", "augment", "objective", "preset")  # names and switches


def find_folds(run: Path, which: str = "last") -> tuple[list[Fold], list[str]]:
    """The folds of a run that are trained to the end, and a line for each that is not.

    Args:
        run: its folder.
        which: "last" checkpoint, or the "best" on the validation cases.

    Raises:
        FileNotFoundError, ValueError: not a run, no fold is finished, or one has no best checkpoint.
    """
    steps = read_options(run)["steps"]
    folders = {int(path.name[4:]): path for path in run.glob("fold*") if path.is_dir() and path.name[4:].isdecimal()}
    folds, unfinished = [], []
    for number, folder in sorted(folders.items()):
        saved = checkpoint.saved(folder / "checkpoints")
        step = int(saved[0].stem.removeprefix("step-")) if saved else 0
        if step and (step == steps or step == _ended_at(folder / "config.json")):
            chosen = saved[0] if which == "last" else folder / "checkpoints" / checkpoint.BEST
            if not chosen.exists():
                raise FileNotFoundError(f"{chosen}: not there, the fold was trained without validation cases")
            if is_sound(chosen):
                split = read_split(folder / "config.json")
                folds.append(Fold(number, folder, chosen, train=split["train"], test=split["test"]))
            else:
                unfinished.append(f"{folder}: {chosen.name} is damaged, left out; the same training command remakes it")
        else:
            unfinished.append(f"{folder}: at step {step} of {steps}, left out")
    if not folds:
        state = "; ".join(unfinished) or "no folder fold<k> there"
        raise ValueError(f"{run}: no finished fold ({state}); train_finetune.py makes them")
    return folds, unfinished


def _ended_at(path: Path) -> object:
    """The step at which a fold ended early, from its config.json; None where it did not."""
    content = read_json(path) if path.is_file() else None
    return content.get("ended_at") if isinstance(content, dict) else None


def read_split(path: Path) -> dict[str, list[str]]:
    """The ids of a fold's cases, {"train": [...], "test": [...]}, from its config.json.

    Raises:
        FileNotFoundError, ValueError: not there or damaged, no test cases, an id twice, or a test case that was trained
            on.
    """
    content = read_json(path)
    split = {part: content.get(part) if isinstance(content, dict) else None for part in ("train", "test")}
    if split["train"] and split["test"] == []:
        raise ValueError(f"{path}: the fold has no case to test on (`train_cases` all, or `splits` without any)")
    for part, ids in split.items():
        if not isinstance(ids, list) or not ids or not all(isinstance(id, str) for id in ids):
            raise ValueError(f"{path}: {part!r} is {ids!r:.80}, expected a list of the ids of its cases")
        if len(set(ids)) < len(ids):
            raise ValueError(f"{path}: {part!r} has {max(ids, key=ids.count)!r} twice")
    if both := sorted(set(split["train"]) & set(split["test"])):
        raise ValueError(f"{path}: {len(both)} test cases were trained on, such as {both[0]!r}")
    return split


def is_sound(path: Path) -> bool:
    """Whether a checkpoint is a whole zip archive: the checksums of all its entries are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def open_run(path: Path, data: Path | None = None, for_paper: bool = False, which: str = "last") -> Run:
    """A run, its finished folds, and the store of their test cases.

    Args:
        path: the folder of the run.
        data: the store; None: the one that the run was trained on.
        for_paper: of `read_options`.
        which: of `find_folds`.

    Raises:
        FileNotFoundError, ValueError: not a run, no fold is finished, or no store there.
    """
    folds, unfinished = find_folds(path, which)
    options = read_options(path, for_paper)
    if data is None:
        data = Path(options["data"])
        if not data.is_absolute() and not data.exists():
            raise FileNotFoundError(
                f"{path}: trained on the store {data}, which is not in the folder {Path.cwd()}; `data` STORE gives it"
            )
    return Run(path, options, Store(data), folds, unfinished, groups={})


def pretraining_options(options: dict) -> dict | None:
    """The options of the pretraining run that made the weights of a fine-tuning run.

    Args:
        options: of the fine-tuning run.

    Returns:
        None where there was no pretraining, or the file is gone or does not say how it was made.
    """
    path = Path(options["weights"])
    if options["weights"] == SCRATCH or not path.is_file():
        return None
    provenance = checkpoint.read(path).get("provenance")
    made_with = provenance.get("options") if isinstance(provenance, dict) else None
    if not isinstance(made_with, dict) or any(isinstance(made_with.get(name), list | dict) for name in OF_PRETRAINING):
        return None
    return made_with


def names_of_scores(store: Store) -> dict[str, str]:
    """What tables call the scores: the names of the classes; regions with their labels."""
    regions = {name: f"{name} ({' + '.join(map(str, values))})" for name, values in store.regions.items()}
    return {**{str(value): name for value, name in store.labels.items()}, **regions}


def check_classes(runs: Sequence[Run]) -> None:
    """Refuse runs that score different classes and cannot be compared.

    Raises:
        ValueError: names the two runs and their classes.
    """
    if len(runs) < 2:
        return
    classes = []
    for run in runs:
        num_classes = checkpoint.load_segmenter(run.folds[0].checkpoint)[1]["build"]["num_classes"]
        classes.append(", ".join(run.store.scored(num_classes)))
    for run, of_run in zip(runs, classes, strict=True):
        if of_run != classes[0]:
            raise ValueError(
                f"{run.path} has the classes {of_run}, {runs[0].path} has {classes[0]}: they cannot be compared"
            )


def check_cases(store: Store, folds: Iterable[Fold], space: str) -> None:
    """Refuse a store that lacks test cases and, in native space, missing label files.

    Args:
        store, folds: of a run.
        space: "native" or "store".

    Raises:
        FileNotFoundError, ValueError: names the first such case.
    """
    for id in sorted({id for fold in folds for id in fold.test}):
        store.index(id)  # refuses an unknown case
        if space == "native":
            label_file = store.properties(id).get("label_file")
            if label_file is None or not Path(label_file).is_file():
                raise FileNotFoundError(
                    f"case {id}: its label file {label_file} is not there; `space` store takes the preprocessed labels"
                )
