"""Several stores as one: their cases in one list, their classes joined by name, and the order they are drawn in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from itertools import count as numbers
from pathlib import Path

import numpy as np

from amaes.data.classes import Classes
from amaes.data.store import Store

# What decides how a network sees a scan. Stores may differ in all else: label maps, precision, what was refused, ...
_SAME = ("spacing", "normalization", "crop_from", "crop_extra_plane", "background_to_min")


class Pool:
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
        store, own = self.home(id)
        return store.declared(own)

    def image(self, id: str) -> np.ndarray:
        """The memory-mapped volume of a case: (C, X, Y, Z), float32 or float16, [0, 1]."""
        store, own = self.home(id)
        return store.image(own)

    def label(self, id: str) -> np.ndarray:
        """The memory-mapped label of a case: (X, Y, Z), uint8, with the values of its own store."""
        store, own = self.home(id)
        return store.label(own)

    def properties(self, id: str) -> dict:
        """What preprocessing recorded of a case."""
        store, own = self.home(id)
        return store.properties(own)

    def groups(self, indices: Sequence[int]) -> list[list[int]]:
        """Positions of cases by store, for `MixedBatches`; stores without any are left out."""
        members: dict[int, list[int]] = {}
        for i in indices:
            members.setdefault(int(self.store_of[i]), []).append(int(i))
        return [members[store] for store in sorted(members)]


def open_stores(paths: Sequence[str | Path]) -> Store | Pool:
    """The store, or several of them as one."""
    stores = [Store(path) for path in paths]
    return stores[0] if len(stores) == 1 else Pool(stores)


def split_each(store: Store | Pool, draw: Callable[[Store], dict[str, list[str]]]) -> dict[str, list[str]]:
    """The splits of all stores together: each is drawn, and saved, as if its store were alone."""
    if isinstance(store, Store):
        return draw(store)
    split: dict[str, list[str]] = {}
    for name, part in zip(store.names, store.stores, strict=True):
        for side, ids in draw(part).items():
            split.setdefault(side, []).extend(f"{name}/{id}" for id in ids)
    return split


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
                f"{first.config.get(name)}; preprocess both with the same --{name.replace('_', '-')}"
            )


def _unique_names(stores: Sequence[Store]) -> list[str]:
    """Names of the stores' folders, a number added where one is taken."""
    names: list[str] = []
    for store in stores:
        own = store.path.resolve().name
        choices = chain([own], (f"{own}-{number}" for number in numbers(2)))
        names.append(next(name for name in choices if name not in names))
    return names


# Classes --------------------------------------------------------------------------------------------------------------


# Order ----------------------------------------------------------------------------------------------------------------
