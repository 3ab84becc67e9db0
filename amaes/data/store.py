"""A folder of preprocessed cases: its index checked, its arrays memory-mapped.

A store may come from anywhere: its JSON and its arrays are read as plain data, nothing in them is executed, and no id
leads out of the folder. Links inside it are followed, so that its cases may lie on another disk.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from amaes.files import first_line, read_json
from amaes.preprocess.case_record import check_record
from amaes.preprocess.config import IGNORED, STORE_FORMAT, Config
from amaes.preprocess.file_names import fault_of_id

SPLITS_FORMAT = "amaes-splits-1"  # of its splits.json


@dataclass(frozen=True, slots=True)  # slots: a store may have 50,000 of them
class Case:
    """One entry of a store: what `dataset.json` says of it."""

    id: str
    subject: str
    labelled: bool
    shape: tuple[int, int, int]  # voxels of the preprocessed volume
    session: str | None = None
    sequence: str | None = None


class Store:
    """A folder written by `amaes.preprocess`, read through memory maps.

    Attributes:
        path: the folder.
        cases: sorted by id.
        channels: names, in the order of the arrays' first axis.
        labels: value to name, {0: "background", ...}; empty where no case has a label.
        regions: name to label values that are scored as one, such as {"whole": (1, 2, 3)}; mostly empty.
        config: the preprocessing configuration as plain data.
        ignored: the label value of voxels that are left out of losses and scores; None where there are none.

    Raises:
        FileNotFoundError: no store there.
        ValueError: not a store of this version, or an id that leads out of the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = self.path / "dataset.json"
        if not index.is_file():
            raise FileNotFoundError(
                f"{self.path}: no store there (dataset.json not found); write one with python -m amaes.preprocess"
            )
        content = read_json(index)
        if not isinstance(content, dict) or content.get("format") != STORE_FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{index}: format {found!r}, expected {STORE_FORMAT!r}")
        try:
            self.channels = _listed(content, "channels", str)
            self.labels = {int(value): str(name) for value, name in content["labels"].items()}
            self.regions = _regions(content.get("regions", {}), self.labels)
            self.config = dict(content["config"])
            self.cases = [_case(entry) for entry in _listed(content, "cases", dict)]
            ignores = _check(self.channels, self.labels, self.config).ignores
            self.ignored = IGNORED if ignores and IGNORED not in self.labels else None
            self._index = {case.id: i for i, case in enumerate(self.cases)}
            if len(self._index) < len(self.cases):
                raise ValueError("two cases have the same id")
            digest = [content["config_hash"], self.channels, content["labels"], [_row(case) for case in self.cases]]
            self.fingerprint = hashlib.sha256(json.dumps(digest, sort_keys=True).encode()).hexdigest()[:16]
            self._index_state = _state(index)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"{index}: not a store's index ({reason})") from None

    def check_unchanged(self) -> None:
        """Raise a ValueError where the store was written anew, or is being written, since its index was read."""
        index = self.path / "dataset.json"
        try:
            if _state(index) == self._index_state or Store(self.path).fingerprint == self.fingerprint:
                return
        except (FileNotFoundError, ValueError):
            pass
        except OSError:  # a network that does not answer says nothing about the store
            return
        raise ValueError(f"{index}: was changed since it was read; the store's cases may be those of two versions")

    @property
    def num_classes(self) -> int:
        """Output channels of a segmentation network: the largest label value + 1."""
        return max(self.labels, default=0) + 1

    def scored(self, num_classes: int) -> dict[str, tuple[int, ...]]:
        """What is scored, name to classes of a network: the regions, or every class of the store by its number.

        A number between them that no label has (1, 3: 2) is no class.
        """
        groups = self.regions or {str(value): (value,) for value in sorted(self.labels) if value > 0}
        return {name: values for name, values in groups.items() if max(values) < num_classes}

    def declared(self, id: str) -> np.ndarray:
        """Which values the label of a case may hold: (256,), bool."""
        values = np.zeros(256, bool)
        values[[0, *self.labels]] = True
        if self.ignored is not None:
            values[self.ignored] = True
        return values

    def index(self, id: str) -> int:
        """Position of a case among the sorted cases."""
        if id not in self._index:
            raise ValueError(f"{self.path}: has no case {id!r}")
        return self._index[id]

    def image(self, id: str) -> np.ndarray:
        """The memory-mapped volume of a case: (C, X, Y, Z), float32 or float16, [0, 1].

        Raises:
            FileNotFoundError: no such file.
            ValueError: not an array, cut short, or of another shape or type than the index says; names the file.
        """
        return _open(self._file(id, ".npy"), (len(self.channels), *self.cases[self.index(id)].shape), np.floating)

    def label(self, id: str) -> np.ndarray:
        """The memory-mapped label of a case: (X, Y, Z), uint8; raises what `image` does."""
        return _open(self._file(id, "_label.npy"), self.cases[self.index(id)].shape, np.integer)

    def properties(self, id: str, *needed: str) -> dict:
        """What preprocessing recorded of a case.

        Args:
            id: of the case.
            needed: fields that must be there.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a JSON object, or fields are missing or not as in `case_record.FIELDS`; names the file.
        """
        path = self._file(id, ".json")
        content = read_json(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path}: holds a {type(content).__name__}, expected the properties of a case")
        check_record(path, content, needed)
        return content

    def _file(self, id: str, suffix: str) -> Path:
        return self.path / "cases" / f"{id}{suffix}"


def check_label(label: np.ndarray, declared: np.ndarray) -> None:
    """Refuse values that a label may not hold.

    Args:
        label: of any shape, uint8.
        declared: which values it may hold, (256,), bool (`Store.declared`).

    Raises:
        ValueError: names the first other value, and what is accepted.
    """
    if not declared[label].all():
        known = " ".join(map(str, np.flatnonzero(declared)))
        raise ValueError(f"label value {label[~declared[label]][0]}, its store declares {known}")


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file is written anew."""
    state = path.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns


def _listed(content: dict, name: str, kind: type) -> list:
    """A list of the index, all of one type."""
    if not isinstance(content[name], list) or not all(isinstance(entry, kind) for entry in content[name]):
        raise ValueError(f"its {name} are {content[name]!r:.80}, expected a list of {kind.__name__}")
    return content[name]


def _case(entry: dict) -> Case:
    case = Case(
        id=entry["id"],
        subject=entry["subject"],
        labelled=bool(entry["labelled"]),
        shape=tuple(entry["shape"]),
        session=entry.get("session"),
        sequence=entry.get("sequence"),
    )
    if fault := fault_of_id(case.id):
        raise ValueError(f"case {case.id!r:.80}: {fault}")
    names = (case.subject, case.session or "", case.sequence or "")
    if not all(isinstance(name, str) and name.isprintable() for name in names):
        raise ValueError(f"case {case.id!r:.80}: expected subject, session and sequence as text, found {names!r:.160}")
    if len(case.shape) != 3 or not all(type(side) is int and side > 0 for side in case.shape):
        raise ValueError(f"case {case.id!r}: shape {case.shape!r:.80}, expected three positive integers")
    return case


def _row(case: Case) -> tuple:
    """What the fingerprint says of a case."""
    return case.id, case.subject, case.labelled, case.shape, case.session, case.sequence


def _regions(content: dict, labels: dict[int, str]) -> dict[str, tuple[int, ...]]:
    regions = {name: tuple(values) for name, values in content.items()}
    for name, values in regions.items():
        known = all(type(value) is int and value > 0 and value in labels for value in values)
        if not name.isprintable() or not values or not known:
            raise ValueError(f"region {name!r:.80}: labels {values!r:.80}, expected some of {sorted(labels)!r:.80}")
    return regions


def _check(channels: list[str], labels: dict[int, str], config: dict) -> Config:
    if not channels:
        raise ValueError("it has no channels")
    if not all(0 <= value <= 255 for value in labels):
        raise ValueError(f"label values {sorted(labels)!r:.80}, expected 0 to 255")
    missing = [name for name in ("spacing", "normalization") if name not in config]
    if missing:
        raise ValueError(f"its config has no {missing[0]!r}")
    return Config.from_dict(config)


def _open(path: Path, shape: tuple[int, ...], kind: type) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing from the store")
    try:  # maps no more than the file holds, and knows no pickle
        with np.errstate(over="ignore"):  # sides whose product is no number: refused without a warning
            array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, TypeError, EOFError, OverflowError, SyntaxError) as error:  # what a broken header may raise
        reason = f"{first_line(error)}; the file has {path.stat().st_size} bytes"
        raise ValueError(f"{path}: not a whole array ({reason})") from None
    if array.shape != shape or not np.issubdtype(array.dtype, kind):
        raise ValueError(f"{path}: holds {array.dtype} {array.shape}, expected {kind.__name__} {shape}")
    return array
