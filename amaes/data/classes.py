"""The classes of one network for one store or several: which class a stored label value is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from amaes.data.store import Store
from amaes.preprocess.config import IGNORED, PLACEHOLDER

if TYPE_CHECKING:
    from amaes.data.several_stores import SeveralStores


@dataclass(frozen=True)
class Classes:
    """The classes of one network for several stores: those of the same name, in any case, are one.

    Value 0 is background in every store, whatever it is called there. Values that preprocessing named for want of a
    name ("label_1") are classes of their store alone. With one store the classes are its label values as they are.

    Attributes:
        names: class to name.
        count: output channels of the network.
        tables: class of each stored value, (stores, 256), int64; `count`, which no loss takes, where not declared; of
            the value that a store leaves out, that value.
        allowed: classes that a store declares, (stores, count), bool.
        store_of: position of the store of each case, (cases,).
        ignored: what `tables` and the stores hold in voxels that are left out; None: nothing is left out.
    """

    names: dict[int, str]
    count: int
    tables: np.ndarray
    allowed: np.ndarray
    store_of: np.ndarray
    ignored: int | None = None

    @property
    def of_one_store(self) -> bool:
        """Stored values are the classes, and all of them are allowed."""
        return len(self.tables) == 1

    @classmethod
    def of(cls, store: Store | SeveralStores) -> Classes:
        """The classes that the stores declare.

        Raises:
            ValueError: so many classes that none of 256 values is left for what is left out.
        """
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
        leaving_out = [one.ignored is not None for one in ([store] if isinstance(store, Store) else store.stores)]
        if any(leaving_out) and count >= IGNORED:
            raise ValueError(
                f"{store.path}: {count} classes; where voxels are left out, fewer than {IGNORED} are accepted"
            )
        tables[leaving_out, IGNORED] = IGNORED
        return cls(names, count, tables, allowed, store_of, IGNORED if any(leaving_out) else None)

    def rows(self, cases: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables (B, 256) and allowed classes (B, count) of a batch, on the CPU."""
        stores = self.store_of[list(cases)]
        return torch.from_numpy(self.tables[stores]), torch.from_numpy(self.allowed[stores])


def _join(stores: SeveralStores) -> tuple[list[dict[int, int]], dict[int, str]]:
    """Per store the class of each declared value, and the names of all classes."""
    names, class_of, declared = {0: "background"}, {"background": 0}, []
    for prefix, store in zip(stores.names, stores.stores, strict=True):
        values = {0: 0}
        for value, name in sorted(store.labels.items()):
            if value == 0:
                continue
            full = f"{prefix}: {name}" if PLACEHOLDER.fullmatch(name) else name
            index = class_of.setdefault(full.strip().casefold(), len(names))
            names.setdefault(index, full)
            values[value] = index
        declared.append(values)
    return declared, names


def labelled(store: Store | SeveralStores, ids: Sequence[str]) -> list[str]:
    """Those of the cases that have a label.

    Raises:
        ValueError: a label holds a value that its store does not declare (`check_labels`).
    """
    with_label = [id for id in ids if store.cases[store.index(id)].labelled]
    check_labels(store, with_label)
    return with_label


def check_labels(store: Store | SeveralStores, ids: Sequence[str]) -> None:
    """Refuse labels with values that their store does not declare, by what preprocessing counted of each case.

    Raises:
        ValueError: names the file and the value.
    """
    for id in ids:
        home, id_there = (store, id) if isinstance(store, Store) else store.home(id)
        counts = home.properties(id_there).get("label_counts", {})
        undeclared = sorted(int(value) for value in counts if int(value) not in (0, *home.labels, home.ignored))
        if undeclared:
            declared = ", ".join(f"{value} {name}" for value, name in sorted(home.labels.items()))
            raise ValueError(
                f"{home.path / 'cases' / id_there}_label.npy: holds label value {undeclared[0]} "
                f"({counts[str(undeclared[0])]} voxels), {home.path / 'dataset.json'} declares "
                f"{declared or 'no labels'}"
            )
