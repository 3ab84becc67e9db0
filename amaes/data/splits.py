"""How the cases of a store are split: training and validation, or folds of training and test.

A split is drawn once from its seed, and kept in STORE/splits.json.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from amaes import rng
from amaes.choices import SPLIT_BY
from amaes.data.store import SPLITS_FORMAT, Case, Store
from amaes.files import read_json, write_json


def pretrain_split(
    store: Store, fraction: float = 0.01, seed: int = 0, split_by: str = "subject"
) -> dict[str, list[str]]:
    """Training and validation ids: `ceil(fraction * n)` volumes for validation (arXiv 2408.00640: 1 %).

    Args:
        store: where the cases are.
        fraction: share of volumes, in [0, 1).
        seed: of the shuffle.
        split_by: "subject" keeps all volumes of a subject on one side (the last subject taken may bring a few more),
            "volume" shuffles volumes as the published code does.
    """
    groups = _groups(store.cases, split_by)
    wanted, validation = int(np.ceil(fraction * len(store.cases))), []
    for i in rng.stream(seed, 0, 0, "split").permutation(len(groups))[:-1]:  # one group always stays for training
        if len(validation) >= wanted:
            break
        validation += groups[i]
    held = set(validation)
    return {"train": [case.id for case in store.cases if case.id not in held], "validation": sorted(held)}


def fold_splits(store: Store, folds: int = 6, train_cases: int = 20, seed: int = 0) -> list[dict[str, list[str]]]:
    """Inverted cross-validation: every fold trains on few labelled cases and tests on all others.

    The subjects, sorted, are shuffled with RandomState(1000 (seed + 1) + r) and cut into disjoint chunks of
    `train_cases` cases (whole subjects); fold k trains on chunk k mod n of repetition r = k // n. The remainder is
    never a training chunk.

    Returns:
        {"train": ids, "test": ids} per fold.

    Raises:
        ValueError: fewer labelled cases than one chunk and one case to test on.
    """
    cases = [case for case in store.cases if case.labelled]
    if not cases:
        raise ValueError(f"{store.path}: no labelled case; preprocess with `labels`")
    splits: list[dict[str, list[str]]] = []
    for repetition in range(folds):  # a repetition gives at least one fold
        for chunk in _chunks(cases, train_cases, np.random.RandomState(1000 * (seed + 1) + repetition)):
            train = set(chunk)
            test = [case.id for case in cases if case.id not in train]
            if test:
                splits.append({"train": sorted(train), "test": test})
        if len(splits) >= folds:
            return splits[:folds]
        if not splits:
            break
    subjects = len(_groups(cases, "subject"))
    raise ValueError(
        f"`train_cases` {train_cases}: {store.path} has {len(cases)} labelled cases of {subjects} subjects; "
        "a fold needs that many for training and at least one subject more for testing"
    )


def hold_out_validation(split: dict[str, list[str]], store: Store, cases: int, seed: int) -> dict[str, list[str]]:
    """Move test cases of a fold to its validation: the first subjects of a shuffled list, until `cases` are reached.

    Args:
        split: {"train": ids, "test": ids}.
        store: has the cases.
        cases: how many, 0 leaves the fold as it is; the last subject taken may bring a few more.
        seed: of the shuffle.

    Raises:
        ValueError: no case would be left to test on.
    """
    if not cases:
        return split
    subject = {case.id: case.subject for case in store.cases}
    subjects = sorted({subject[id] for id in split["test"]})
    order = rng.stream(seed, 0, 0, "validation").permutation(len(subjects))
    taken: list[str] = []
    for i in order:
        if len(taken) >= cases:
            break
        taken += [id for id in split["test"] if subject[id] == subjects[i]]
    test = sorted(set(split["test"]) - set(taken))
    if not test or len(taken) < cases:
        raise ValueError(f"`val_cases` {cases}: the fold has {len(split['test'])} cases to test on; none would be left")
    return {**split, "validation": sorted(taken), "test": test}


def first_difference(old: Sequence[dict[str, list[str]]], new: Sequence[dict[str, list[str]]]) -> str:
    """What differs first between two lists of folds, in words; "" where nothing does."""
    for number, (before, now) in enumerate(zip(old, new, strict=False)):
        was, is_now = ({id: part for part, ids in fold.items() for id in ids} for fold in (before, now))
        for id in sorted({*was, *is_now}):
            if was.get(id) != is_now.get(id):
                return f"fold {number}: case {id} is {is_now.get(id, 'in no part')}, was {was.get(id, 'in no part')}"
    return "" if len(old) == len(new) else f"{len(new)} folds, were {len(old)}"


def all_cases(store: Store) -> list[dict[str, list[str]]]:
    """One fold that trains on every labelled case and tests on none."""
    cases = [case.id for case in store.cases if case.labelled]
    if not cases:
        raise ValueError(f"{store.path}: no labelled case; preprocess with `labels`")
    return [{"train": cases, "test": []}]


def _chunks(cases: Sequence[Case], size: int, generator: np.random.RandomState) -> Iterator[list[str]]:
    """Ids of whole subjects in random order, in disjoint lists of `size` or a few more; the remainder is left out."""
    groups, chunk = _groups(cases, "subject"), []
    for i in generator.permutation(len(groups)):
        chunk = chunk + groups[i]
        if len(chunk) >= size:
            yield chunk
            chunk = []


def _groups(cases: Sequence[Case], split_by: str) -> list[list[str]]:
    """Ids of the cases that stay together, a list per subject or per volume, sorted."""
    if split_by not in SPLIT_BY:
        raise ValueError(f"`split_by` {split_by!r} is unknown; accepted: {', '.join(SPLIT_BY)}")
    members: dict[str, list[str]] = {}
    for case in cases:
        members.setdefault(case.subject if split_by == "subject" else case.id, []).append(case.id)
    return [members[key] for key in sorted(members)]


def saved_split(store: Store, name: str, make: Callable[[], object], by_subject: bool = True) -> object:
    """The split `name` of STORE/splits.json; made the first time, and written there where the store can be written to.

    Args:
        store: where the cases are.
        name: what the split follows from.
        make: draws it: {side: ids}, or a list of such, one per fold.
        by_subject: no subject may be on two sides.

    Raises:
        ValueError: not a file of splits, or the split names cases that the store does not have, or has a subject on
            two sides.
    """
    path = store.path / "splits.json"
    content = {"format": SPLITS_FORMAT, "splits": {}}
    if path.is_file():
        content = read_json(path)
        if (
            not isinstance(content, dict)
            or content.get("format") != SPLITS_FORMAT
            or not isinstance(content.get("splits"), dict)
        ):
            raise ValueError(f"{path}: not a file of splits ({SPLITS_FORMAT}); delete it to draw them again")
    name = f"{name}, store {store.fingerprint}"  # a store that has changed gets new splits, the old ones stay on record
    if name not in content["splits"]:
        content["splits"][name] = make()
        if os.access(store.path, os.W_OK):
            write_json(path, content)
    split = content["splits"][name]
    parts = split if isinstance(split, list) else [split]
    if not parts or not all(_is_split(part) for part in parts):
        raise ValueError(
            f"{path}: split {name!r} is not two lists of ids, train and another; delete it to draw it again"
        )
    subject = {case.id: case.subject for case in store.cases}
    missing = sorted({id for part in parts for side in part.values() for id in side} - set(subject))
    if missing:
        raise ValueError(
            f"{path}: split {name!r} names {len(missing)} cases that the store does not have, e.g. {missing[0]}"
        )
    for part in parts if by_subject else []:
        train, other = ({subject[id] for id in side} for side in part.values())
        if train & other:
            raise ValueError(
                f"{path}: split {name!r} has subject {min(train & other)} on both sides; delete it to draw it again"
            )
    return split


def _is_split(part: object) -> bool:
    """{"train": ids, "validation" or "test": ids}."""
    return (
        isinstance(part, dict)
        and set(part) in ({"train", "validation"}, {"train", "test"})
        and all(isinstance(side, list) and all(isinstance(id, str) for id in side) for side in part.values())
    )
