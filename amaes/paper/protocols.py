"""The experiments of the paper by name: channel, classes, and the cases of training and test.

Which cases these are follows from the names of the cases alone (arXiv 2408.00640, and the hold-out of its code).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from amaes.preprocess.source_tables import SOURCES
from amaes.preprocess.sources import hold_out

if TYPE_CHECKING:
    from amaes.data.store import Case, Store

FOLDS, TRAIN_CASES = 6, 20  # networks of every experiment, and the labelled cases that each is trained on
COMMAND = "python -m amaes.preprocess --source {source}=DIR --sequence {channel} --with-labels --out STORE"


@dataclass(frozen=True)
class Protocol:
    """One task of the paper.

    Attributes:
        title: as the paper's tables have it.
        source: key of SOURCES, which has the label map: values of the label files that become others.
        channel: the only channel of a case.
        classes: outputs of the network, background included.
        cases: labelled cases of the release.
        seed: of the hold-out; None: no case is held out.
        tests_held_out: every fold is tested on the held-out cases; else on the pool without its own training cases.
        pattern: finds a case's name in its id, in any capitals.
        form: the name from the groups of the pattern; sorts as the release does.
        example: of a name as it stands in an id.
    """

    title: str
    source: str
    channel: str
    classes: int
    cases: int
    pattern: str
    form: str
    example: str
    seed: int | None = None
    tests_held_out: bool = False

    @property
    def label_map(self) -> Mapping[int, int]:
        return SOURCES[self.source].label_map

    @property
    def command(self) -> str:
        """How the store of this task is written; DIR: the release."""
        return COMMAND.format(source=self.source, channel=self.channel)

    def name_in(self, texts: Iterable[str]) -> str | None:
        """The name of a case, from the first of some texts that holds one; the last of several in a text."""
        for text in texts:
            if matches := re.findall(self.pattern, text, flags=re.IGNORECASE):
                groups = [matches[-1]] if isinstance(matches[-1], str) else matches[-1]
                return self.form.format(*(group.lower() for group in groups))
        return None


def _pairs(label_map: Mapping[int, int]) -> str:
    return " ".join(f"{old}:{new}" for old, new in label_map.items()) or "none"


def _released(source: str) -> dict:
    return {"source": source, **dict(zip(("seed", "cases"), SOURCES[source].held_out, strict=True))}


_BRATS21 = {
    "title": "BraTS21",
    "channel": "FLAIR",
    "classes": 4,
    **_released("brats21"),
    "pattern": r"brats2021_(\d{5})(?!\d)",
    "form": "BraTS2021_{}",
    "example": "BraTS2021_00000",
}
PROTOCOLS = {
    "brats21": Protocol(**_BRATS21, tests_held_out=True),  # Table 4: the 313 held-out cases
    "brats21_cv": Protocol(**_BRATS21),  # Tables 2 and 3: the same training cases, tested on the rest of the pool
    "isles22": Protocol(
        title="ISLES22",
        channel="DWI",
        classes=2,
        **_released("isles22"),
        pattern=r"strokecase(\d{4})(?!\d)",
        form="sub-strokecase{}",
        example="sub-strokecase0001",
    ),
    "wmh": Protocol(  # scanner and number; the folder of the Philips scanner has digits of its own
        title="WMH",
        source="wmh",
        channel="FLAIR",
        classes=2,
        cases=60,
        pattern=r"(utrecht|singapore|ge3t|ge1t5|philips)(?:[ _.-]*vu[ _.-]*petmr[ _.-]*01)?[^0-9]*(\d+)",
        form="{}_{:0>3}",
        example="Utrecht_11",
    ),
}
WMH_OTHER_PATHOLOGY = 2  # in the label files of WMH


@dataclass(frozen=True)
class Evaluation:
    """Cases of another store for the networks of a protocol.

    Attributes:
        title: as the paper's tables have it.
        trained: key of the protocol whose networks are tested.
        cases: labelled cases to test on.
        groups: name of a part of them -> beginnings of the names of its cases.
    """

    title: str
    trained: str
    cases: int
    groups: Mapping[str, tuple[str, ...]]


EVALUATIONS = {
    "wmh_ood": Evaluation(
        title="WMH OOD",
        trained="wmh",
        cases=110,
        groups={
            "unseen scanners (GE1T5, Philips)": ("ge1t5", "philips"),
            "training scanners (Utrecht, Singapore, GE3T)": ("utrecht", "singapore", "ge3t"),
        },
    )
}


# Cases ----------------------------------------------------------------------------------------------------------------


def check_store(store: Store, key: str) -> None:
    """Refuse a store that was not preprocessed for a protocol.

    Raises:
        ValueError: says what was found, and the command that writes the store.
    """
    protocol = PROTOCOLS[key]
    mapped = {int(old): new for old, new in store.config.get("label_map", {}).items() if int(old) != int(new)}
    differences = []
    if not _cases(store, protocol):
        differences.append(f"channels {' '.join(store.channels)}, expected labelled cases of {protocol.channel} alone")
    if not mapped.items() <= protocol.label_map.items() or store.num_classes != protocol.classes:
        differences.append(
            f"{store.num_classes} classes after label map {_pairs(mapped)}, expected {protocol.classes} after "
            f"{_pairs(protocol.label_map)}"
        )
    for name, expected in (("spacing", [1.0, 1.0, 1.0]), ("normalization", "unit")):
        if store.config.get(name) != expected:
            differences.append(f"{name} {store.config.get(name)}, expected {expected}")
    if differences:
        raise ValueError(
            f"{store.path} is not for protocol {key}: {'; '.join(differences)}; write it with: {protocol.command} "
            "(DIR: the release, see docs/reproduce.md)"
        )


def named_cases(store: Store, key: str) -> dict[str, str]:
    """{name in the release: id in the store} of the labelled cases of a protocol.

    The name is looked for in the id, then the subject, then the path of the label file, so that it does not depend on
    the folder that was preprocessed.

    Raises:
        ValueError: a case has no such name, or two have the same.
    """
    protocol, ids = PROTOCOLS[key], {}
    for case in _cases(store, protocol):
        name = protocol.name_in((case.id, case.subject)) or protocol.name_in(
            [store.properties(case.id).get("label_file") or ""]
        )
        if name is None:
            raise ValueError(
                f"{store.path}: case {case.id}: no name of a case of {protocol.title} in its id, such as "
                f"{protocol.example}"
            )
        if name in ids:
            raise ValueError(f"{store.path}: cases {ids[name]} and {case.id} are both {name} of {protocol.title}")
        ids[name] = case.id
    return dict(sorted(ids.items()))


def _cases(store: Store, protocol: Protocol) -> list[Case]:
    """The labelled cases of the protocol's channel; none where the store has other channels."""
    cases = [case for case in store.cases if case.labelled]
    if [name.lower() for name in store.channels] == [protocol.channel.lower()]:
        return cases
    if store.channels == ["image"]:  # a channel that was not named: the sequence tells
        return [case for case in cases if case.sequence == protocol.channel]
    return []


def _check_count(store: Store, purpose: str, count: int, expected: int, allow_incomplete: bool) -> None:
    if count > expected or (count < expected and not allow_incomplete):
        remedy = "" if count > expected else "; `allow_incomplete` takes what is there, for numbers of no paper"
        raise ValueError(f"{store.path}: found {count} cases for {purpose}, expected {expected}{remedy}")


# Folds ----------------------------------------------------------------------------------------------------------------


def saved_folds(store: Store, key: str, allow_incomplete: bool = False) -> list[dict[str, list[str]]]:
    """The folds of a protocol as {"train": ids, "test": ids}, written to STORE/splits.json the first time.

    Args:
        store: passes `check_store`.
        key: of PROTOCOLS.
        allow_incomplete: apply the rule to fewer cases than the release has; the name of the split says so.

    Raises:
        ValueError: another number of cases than the protocol's, or names that are not of its release.
    """
    from amaes.data.splits import saved_split  # here: it imports torch, which --help does without

    protocol, ids = PROTOCOLS[key], named_cases(store, key)
    _check_count(store, f"protocol {key}", len(ids), protocol.cases, allow_incomplete)
    pool, held_out = _pool(protocol, list(ids))
    share = "none held out" if protocol.seed is None else f"{len(held_out)} held out with seed {protocol.seed}"
    count = f"{len(ids)} cases" if len(ids) == protocol.cases else f"INCOMPLETE, {len(ids)} of {protocol.cases} cases"
    name = (
        f"protocol {key}: {count}, {share}, pool of {len(pool)}; {FOLDS} folds of {TRAIN_CASES} training cases, "
        "seed 1000 + repetition"
    )
    return saved_split(store, name, lambda: _folds(protocol, ids), by_subject=False)  # a case is a subject


def _folds(protocol: Protocol, ids: Mapping[str, str]) -> list[dict[str, list[str]]]:
    """The folds as lists of ids, sorted by name (see `training_sets`); `ids` is {name: id}."""
    pool, held_out = _pool(protocol, list(ids))
    splits = []
    for train in training_sets(pool):
        test = held_out if protocol.tests_held_out else set(pool) - set(train)
        splits.append({"train": [ids[name] for name in train], "test": [ids[name] for name in sorted(test)]})
    return splits


def _pool(protocol: Protocol, names: list[str]) -> tuple[list[str], list[str]]:
    return (names, []) if protocol.seed is None else hold_out(names, protocol.seed)


def training_sets(pool: Sequence[str], folds: int = FOLDS, size: int = TRAIN_CASES) -> list[list[str]]:
    """The training cases of every fold, sorted; how the paper drew them is not published, this rule is ours.

    The sorted pool, shuffled with RandomState(1000 + r), is cut into n disjoint chunks of `size`; the remainder is
    never trained on. Fold k has chunk k mod n of repetition r = k // n.

    Raises:
        ValueError: the pool has no chunk and a case more.
    """
    pool, chunks = sorted(pool), len(pool) // size
    if len(pool) <= size:
        raise ValueError(f"a pool of {len(pool)} cases; a fold needs {size} for training and at least one more")
    sets = []
    for fold in range(folds):
        repetition, chunk = divmod(fold, chunks)
        order = np.random.RandomState(1000 + repetition).permutation(len(pool))
        sets.append(sorted(pool[i] for i in order[chunk * size : (chunk + 1) * size]))
    return sets


# Evaluation on other cases --------------------------------------------------------------------------------------------


def evaluation_cases(
    store: Store, key: str, trained: str | None, train_ids: Iterable[str], allow_incomplete: bool = False
) -> tuple[list[str], dict[str, list[str]]]:
    """The ids to test on, and those of every group of them.

    Args:
        store: of the cases to test on.
        key: of EVALUATIONS.
        trained: protocol that the networks were trained with.
        train_ids: ids of the cases that they were trained on, in their own store.
        allow_incomplete: take fewer cases than there are.

    Raises:
        ValueError: networks of another protocol, a store that is not for it, another number of cases, or cases that
            the networks were trained on.
    """
    evaluation = EVALUATIONS[key]
    if trained != evaluation.trained:
        actual = "without `protocol`" if trained is None else f"with `protocol` {trained}"
        raise ValueError(f"`protocol` {key} tests networks trained with `protocol` {evaluation.trained}, not {actual}")
    check_store(store, trained)
    ids = named_cases(store, trained)
    if both := sorted(ids.keys() & {PROTOCOLS[trained].name_in([id]) for id in train_ids}):
        raise ValueError(f"{store.path}: has {len(both)} cases that the networks were trained on, such as {both[0]}")
    _check_count(store, f"`protocol` {key}", len(ids), evaluation.cases, allow_incomplete)
    groups = {
        name: [id for case, id in ids.items() if case.startswith(starts)] for name, starts in evaluation.groups.items()
    }
    return list(ids.values()), groups
