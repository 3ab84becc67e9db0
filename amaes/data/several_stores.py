"""Several stores read as one: their cases in one list, their classes joined by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from itertools import count as numbers
from pathlib import Path

import numpy as np

from amaes.data.classes import Classes, labelled
from amaes.data.splits import pretrain_split, saved_split
from amaes.data.store import Store

# What decides how a network sees a scan. Stores may differ in all else: label maps, precision, what was refused, ...
_SAME = ("spacing", "normalization", "crop_from", "crop_extra_plane", "background_to_min")


class SeveralStores:
    """Several stores, read as if they were one (`amaes.data.store.Store`).

    Ids and subjects begin with the name of their store, that of its folder, so that they are unique; the same person in
    two stores is two subjects.

    Args:
        stores: two or more, in the order in which their cases are listed and their classes numbered.

    Attributes:
        path: for messages.
        stores, names: the stores, and what their ids begin with.
        store_of: position in `stores` of each case, (cases,).
        cases: of all stores, one store after the other.
        channels: names, joined where they differ.
        labels: class to name over all stores, see `Classes`.
        config: the first store's preprocessing configuration.

    Raises:
        ValueError: stores of different preparation or numbers of channels (shows both values), or one given twice.
    """

    def __init__(self, stores: Sequence[Store]) -> None:
        self.stores = list(stores)
        for i, store in enumerate(self.stores):
            _check_same(self.stores[0], store)
            if store.path.resolve() in [other.path.resolve() for other in self.stores[:i]]:
                raise ValueError(f"{store.path}: given twice")
        self.names = _unique_names(self.stores)
        self.path = " + ".join(str(store.path) for store in self.stores)
        self.cases = [
            replace(case, id=f"{name}/{case.id}", subject=f"{name}/{case.subject}")
            for name, store in zip(self.names, self.stores, strict=True)
            for case in store.cases
        ]
        self.store_of = np.repeat(np.arange(len(self.stores)), [len(store.cases) for store in self.stores])
        self.channels = [
            "+".join(dict.fromkeys(names)) for names in zip(*(s.channels for s in self.stores), strict=True)
        ]
        self.labels = Classes.of(self).names
        self.config = self.stores[0].config
        self._index = {case.id: i for i, case in enumerate(self.cases)}
        digest = [[name, store.fingerprint] for name, store in zip(self.names, self.stores, strict=True)]
        self.fingerprint = hashlib.sha256(json.dumps(digest).encode()).hexdigest()[:16]

    def check_unchanged(self) -> None:
        """`Store.check_unchanged` of each."""
        for store in self.stores:
            store.check_unchanged()

    def index(self, id: str) -> int:
        """Position of a case in the list of all."""
        if id not in self._index:
            raise ValueError(f"{self.path}: has no case {id!r}")
        return self._index[id]

    def home(self, id: str) -> tuple[Store, str]:
        """The store of a case, and its id there."""
        i = self.store_of[self.index(id)]
        return self.stores[i], id.removeprefix(f"{self.names[i]}/")

    def declared(self, id: str) -> np.ndarray:
        """Which values the label of a case may hold, by its own store: (256,), bool."""
        store, id_there = self.home(id)
        return store.declared(id_there)

    def image(self, id: str) -> np.ndarray:
        """The memory-mapped volume of a case: (C, X, Y, Z), float32 or float16, [0, 1]."""
        store, id_there = self.home(id)
        return store.image(id_there)

    def label(self, id: str) -> np.ndarray:
        """The memory-mapped label of a case: (X, Y, Z), uint8, with the values of its own store."""
        store, id_there = self.home(id)
        return store.label(id_there)

    def properties(self, id: str) -> dict:
        """What preprocessing recorded of a case."""
        store, id_there = self.home(id)
        return store.properties(id_there)

    def groups(self, indices: Sequence[int]) -> list[list[int]]:
        """Positions of cases by store, for `MixedBatches`; stores without any are left out."""
        members: dict[int, list[int]] = {}
        for i in indices:
            members.setdefault(int(self.store_of[i]), []).append(int(i))
        return [members[store] for store in sorted(members)]


def open_stores(paths: Sequence[str | Path]) -> Store | SeveralStores:
    """The store, or several of them as one."""
    stores = [Store(path) for path in paths]
    return stores[0] if len(stores) == 1 else SeveralStores(stores)


def saved_pretrain_split(
    store: Store | SeveralStores, *, fraction: float, seed: int, split_by: str, with_labels: bool = False
) -> dict[str, list[str]]:
    """Training and validation ids; of each store the split is drawn as if it were alone, and saved there.

    Args:
        store: one store or several.
        fraction, seed, split_by: see `amaes.data.splits.pretrain_split`.
        with_labels: only cases that have a label.
    """
    name = f"pretrain, {fraction} of volumes by {split_by}, seed {seed}"
    split: dict[str, list[str]] = {"train": [], "validation": []}
    one = isinstance(store, Store)
    for prefix, part in [("", store)] if one else zip([f"{name}/" for name in store.names], store.stores, strict=True):
        draw = partial(pretrain_split, part, fraction, seed, split_by)
        for side, ids in saved_split(part, name, draw, by_subject=split_by == "subject").items():
            split[side] += [f"{prefix}{id}" for id in ids]
    return {side: labelled(store, ids) if with_labels else ids for side, ids in split.items()}


def _check_same(first: Store, other: Store) -> None:
    if len(first.channels) != len(other.channels):
        raise ValueError(
            f"{other.path}: has {len(other.channels)} channels ({', '.join(other.channels)}), {first.path} has "
            f"{len(first.channels)} ({', '.join(first.channels)}); stores trained on together have the same number"
        )
    for name in _SAME:
        if first.config.get(name) != other.config.get(name):
            raise ValueError(
                f"{other.path}: prepared with {name} {other.config.get(name)}, {first.path} with "
                f"{first.config.get(name)}; preprocess both with the same `{name}`"
            )


def _unique_names(stores: Sequence[Store]) -> list[str]:
    """Names of the stores' folders, a number added where one is taken."""
    names: list[str] = []
    for store in stores:
        folder = store.path.resolve().name
        choices = chain([folder], (f"{folder}-{number}" for number in numbers(2)))
        names.append(next(name for name in choices if name not in names))
    return names
