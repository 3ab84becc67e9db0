"""Splits that a user brings: JSON or CSV, or nnU-Net's splits_final.json."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from amaes.data.store import Store
from amaes.files import read_json

ROLES = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
_COLUMNS = ["case", "fold", "role"]


def read_splits(path: str | Path, store: Store, log: Callable[[str], None] | None = None) -> list[dict[str, list[str]]]:
    """The folds of a file.

    JSON is a list with one object per fold, {"train": ids, "validation": ids, "test": ids}; CSV has the columns case,
    fold (0, 1, ...) and role. "val" means validation. A fold without "test" is tested on its "val", as nnU-Net scores
    the folds of its splits_final.json; it has no validation then.

    Args:
        path: ends in .csv, anything else is JSON.
        store: has the cases.
        log: is told of subjects with cases in several parts of a fold.

    Returns:
        One dict per fold, "train", "test" (perhaps empty) and, where it has such cases, "validation"; ids sorted.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or an id is unknown, unlabelled, given twice, or in two roles of a fold.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`splits` {path}: no such file")
    folds = _read_csv(path) if path.suffix.lower() == ".csv" else _read_json(path)
    labelled = {case.id: case.labelled for case in store.cases}
    folds = [_checked(f"{path}: fold {number}", fold, labelled) for number, fold in enumerate(folds)]
    for number, fold in enumerate(folds):
        if log and (shared := shared_subjects(fold, store)):
            several = f"{len(shared)} subjects have cases in several parts, such as {shared[0]}"
            log(f"WARNING: {path}: fold {number}: {several}; scores on them are too good")
    return folds


def _read_csv(path: Path) -> list[dict[str, list[str]]]:
    try:
        rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")))
        if sorted(rows.fieldnames or ()) != sorted(_COLUMNS):
            raise ValueError(f"{path}: has the columns {rows.fieldnames}, expected {', '.join(_COLUMNS)}")
        folds: dict[int, dict[str, list[str]]] = {}
        for row in rows:
            where = f"{path}: line {rows.line_num}"
            if not (row["fold"] or "").isdecimal():
                raise ValueError(f"{where}: fold {row['fold']!r}, expected 0, 1, ...")
            if row["role"] not in ROLES:
                raise ValueError(f"{where}: role {row['role']!r}, expected one of {', '.join(ROLES)}")
            folds.setdefault(int(row["fold"]), {}).setdefault(row["role"], []).append(row["case"])
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file ({error})") from None
    if sorted(folds) != list(range(len(folds))) or not folds:
        raise ValueError(f"{path}: has the folds {sorted(folds)}, expected 0, 1, ... without a gap")
    return [folds[number] for number in sorted(folds)]


def _read_json(path: Path) -> list[dict[str, list[str]]]:
    folds = read_json(path)
    if not isinstance(folds, list) or not folds:
        raise ValueError(f"{path}: not a list of folds, such as [{{'train': [ids], 'test': [ids]}}]")
    for number, fold in enumerate(folds):
        if not isinstance(fold, dict) or not set(fold) <= set(ROLES):
            names = sorted(fold) if isinstance(fold, dict) else fold
            raise ValueError(f"{path}: fold {number} has {names!r:.80}, accepted: {', '.join(ROLES)}")
        for role, ids in fold.items():
            if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids):
                raise ValueError(f"{path}: fold {number}: {role!r} is {ids!r:.80}, expected a list of ids")
    return folds


def _checked(where: str, fold: dict[str, list[str]], labelled: dict[str, bool]) -> dict[str, list[str]]:
    if "test" not in fold and "val" in fold:
        fold = {("test" if role == "val" else role): ids for role, ids in fold.items()}
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for role, ids in fold.items():
        parts[ROLES[role]] = parts[ROLES[role]] + ids
    role_of: dict[str, str] = {}
    for role, ids in parts.items():
        for id, count in Counter(ids).items():
            if id not in labelled:
                raise ValueError(f"{where}: {role} case {id!r} is not in the store")
            if not labelled[id]:
                raise ValueError(f"{where}: {role} case {id!r} has no label")
            if count > 1:
                raise ValueError(f"{where}: {role} case {id!r} is given twice")
            if id in role_of:
                raise ValueError(f"{where}: case {id!r} is in two roles, {role_of[id]} and {role}")
            role_of[id] = role
    if not parts["train"]:
        raise ValueError(f"{where}: has no case to train on")
    return {role: sorted(ids) for role, ids in parts.items() if ids or role == "test"}


def shared_subjects(split: dict[str, list[str]], store: Store) -> list[str]:
    """Subjects with cases in more than one part of a fold."""
    subject = {case.id: case.subject for case in store.cases}
    parts = Counter(name for ids in split.values() for name in {subject[id] for id in ids})
    return sorted(name for name, count in parts.items() if count > 1)
