"""Several stores as one: their cases in one list, their classes joined by name, and the order they are drawn in."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from itertools import count as numbers
from pathlib import Path

import numpy as np
import torch

from amaes import rng
from amaes.data import Batches
from amaes.store import Store

# What decides how a network sees a scan. Stores may differ in all else: label maps, precision, what was refused, ...
_SAME = ("spacing", "normalization", "crop_from", "crop_extra_plane", "background_to_min")
_PLACEHOLDER = re.compile(r"label_\d+")  # the name that preprocessing gives to a value without one


class Pool:
    """Several stores, read as if they were one (`amaes.store.Store`).

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


@dataclass(frozen=True)
class Classes:
    """The classes of one network for several stores: those of the same name, in any case, are one.

    Value 0 is background in every store, whatever it is called there. Values that preprocessing named for want of a
    name ("label_1") are classes of their store alone. With one store the classes are its label values as they are.

    Attributes:
        names: class to name.
        count: output channels of the network.
        tables: class of each stored value, (stores, 256), int64; `count`, which no loss takes, where not declared.
        allowed: classes that a store declares, (stores, count), bool.
        store_of: position of the store of each case, (cases,).
    """

    names: dict[int, str]
    count: int
    tables: np.ndarray
    allowed: np.ndarray
    store_of: np.ndarray

    @classmethod
    def of(cls, store: Store | Pool) -> Classes:
        """The classes that the stores declare."""
        if isinstance(store, Store):
            declared, count = [{value: value for value in (0, *store.labels)}], store.num_classes
            names, store_of = {0: "background"} | store.labels, np.zeros(len(store.cases), np.int64)
        else:
            declared, names = _join(store)
            count, store_of = len(names), store.store_of
        tables, allowed = np.full((len(declared), 256), count), np.zeros((len(declared), count), bool)
        for row, values in enumerate(declared):
            tables[row, list(values)] = list(values.values())
            allowed[row, list(values.values())] = True
        return cls(names, count, tables, allowed, store_of)

    def rows(self, cases: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables (B, 256) and allowed classes (B, count) of a batch, on the CPU."""
        stores = self.store_of[list(cases)]
        return torch.from_numpy(self.tables[stores]), torch.from_numpy(self.allowed[stores])


def _join(pool: Pool) -> tuple[list[dict[int, int]], dict[int, str]]:
    """Per store the class of each declared value, and the names of all classes."""
    names, known, declared = {0: "background"}, {"background": 0}, []
    for prefix, store in zip(pool.names, pool.stores, strict=True):
        values = {0: 0}
        for value, name in sorted(store.labels.items()):
            if value == 0:
                continue
            full = f"{prefix}: {name}" if _PLACEHOLDER.fullmatch(name) else name
            index = known.setdefault(full.strip().casefold(), len(names))
            names.setdefault(index, full)
            values[value] = index
        declared.append(values)
    return declared, names


def labelled(store: Store | Pool, ids: Sequence[str]) -> list[str]:
    """Those of the cases that have a label.

    Raises:
        ValueError: a label holds a value that its store does not declare (`check_labels`).
    """
    found = [id for id in ids if store.cases[store.index(id)].labelled]
    check_labels(store, found)
    return found


def check_labels(store: Store | Pool, ids: Sequence[str]) -> None:
    """Refuse labels with values that their store does not declare, by what preprocessing counted of each case.

    Raises:
        ValueError: names the file and the value.
    """
    for id in ids:
        home, own = (store, id) if isinstance(store, Store) else store.home(id)
        counts = home.properties(own).get("label_counts", {})
        strange = sorted(int(value) for value in counts if int(value) not in (0, *home.labels))
        if strange:
            declared = ", ".join(f"{value} {name}" for value, name in sorted(home.labels.items()))
            raise ValueError(
                f"{home.path / 'cases' / own}_label.npy: holds label value {strange[0]} ({counts[str(strange[0])]} "
                f"voxels), {home.path / 'dataset.json'} declares {declared or 'no labels'}"
            )


# Order ----------------------------------------------------------------------------------------------------------------


class MixedBatches(Batches):
    """As `amaes.data.Batches`, but each sample is drawn: a store, in proportion to the root of its size, then a case.

    So that large stores do not drown small ones, and small ones are not seen all the time. Every draw depends on (seed,
    position in the run) alone. The position is also what the crop and the augmentation take for the epoch: a case that
    comes again gets another crop, in the same pass, too.

    Args:
        groups: positions of the cases to train on, by store (`Pool.groups`).
        batch_size, seed, start, stop, accumulate, rank, world: see `Batches`.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.groups = [np.asarray(group) for group in groups if len(group)]
        indices = [i for group in self.groups for i in group]
        super().__init__(indices, batch_size, seed, start, stop, accumulate, rank, world)
        roots = np.sqrt([len(group) for group in self.groups])
        self.shares = roots / roots.sum()

    def of_step(self, step: int) -> list[tuple[int, int]]:
        """(position in the run, case) of the whole global batch."""
        batch = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            stream = rng.stream(self.seed, position, 0, "mixed order")
            group = self.groups[stream.choice(len(self.groups), p=self.shares)]
            batch.append((position, int(stream.choice(group))))
        return batch
