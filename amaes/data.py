"""Cases of a store, how they are split, and the random patches that training reads.

Arrays are (C, X, Y, Z), RAS+, intensities in [0, 1]. Order, crops and everything else random depend on
(seed, epoch, case) alone, so they are the same for any number of workers, ranks and restarts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from amaes import rng
from amaes.files import write_json

STORE_FORMAT = "amaes-store-1"
SPLITS_FORMAT = "amaes-splits-1"


# Store ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
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
        config: the preprocessing configuration as plain data.

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
        try:
            content = json.loads(index.read_text())
        except ValueError as error:
            raise ValueError(f"{index}: not JSON ({error})") from None
        if not isinstance(content, dict) or content.get("format") != STORE_FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{index}: format {found!r}, expected {STORE_FORMAT!r}")
        try:
            self.channels = [str(name) for name in content["channels"]]
            self.labels = {int(value): str(name) for value, name in content["labels"].items()}
            self.config = dict(content["config"])
            self.cases = [_case(entry, index) for entry in content["cases"]]
            digest = [content["config_hash"], self.channels, content["labels"], [astuple(case) for case in self.cases]]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not a store's index ({type(error).__name__}: {error})") from None
        self._index = {case.id: i for i, case in enumerate(self.cases)}
        self.fingerprint = hashlib.sha256(json.dumps(digest, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def num_classes(self) -> int:
        """Output channels of a segmentation network: the largest label value + 1."""
        return max(self.labels, default=0) + 1

    def index(self, id: str) -> int:
        """Position of a case among the sorted cases."""
        if id not in self._index:
            raise ValueError(f"{self.path}: has no case {id!r}")
        return self._index[id]

    def image(self, id: str) -> np.ndarray:
        """The memory-mapped volume of a case: (C, X, Y, Z), float32 or float16, [0, 1]."""
        return _open(self._file(id, ".npy"), (len(self.channels), *self.cases[self.index(id)].shape), np.floating)

    def label(self, id: str) -> np.ndarray:
        """The memory-mapped label of a case: (X, Y, Z), uint8."""
        return _open(self._file(id, "_label.npy"), self.cases[self.index(id)].shape, np.integer)

    def properties(self, id: str) -> dict:
        """What preprocessing recorded of a case."""
        return json.loads(self._file(id, ".json").read_text())

    def _file(self, id: str, suffix: str) -> Path:
        return self.path / "cases" / f"{id}{suffix}"


def _case(entry: dict, index: Path) -> Case:
    parts = PurePosixPath(entry["id"])
    if parts.is_absolute() or ".." in parts.parts or "\\" in entry["id"]:
        raise ValueError(f"{index}: the id {entry['id']!r} leads out of the store")
    return Case(
        id=entry["id"],
        subject=entry["subject"],
        labelled=bool(entry["labelled"]),
        shape=tuple(entry["shape"]),
        session=entry.get("session"),
        sequence=entry.get("sequence"),
    )


def _open(path: Path, shape: tuple[int, ...], kind: type) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing from the store")
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.shape != shape or not np.issubdtype(array.dtype, kind):
        raise ValueError(f"{path}: holds {array.dtype} {array.shape}, expected {kind.__name__} {shape}")
    return array


# Splits ---------------------------------------------------------------------------------------------------------------


def pretrain_split(store: Store, fraction: float = 0.01, seed: int = 0, group: str = "subject") -> dict[str, list[str]]:
    """Training and validation ids: `ceil(fraction * n)` volumes for validation (arXiv 2408.00640: 1 %).

    Args:
        store: where the cases are.
        fraction: share of volumes, in [0, 1).
        seed: of the shuffle.
        group: "subject" keeps all volumes of a subject on one side (the last subject taken may bring a few more),
            "volume" shuffles volumes as the published code does.
    """
    groups = _groups(store.cases, group)
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
        raise ValueError(f"{store.path}: no labelled case; preprocess with --labels")
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
        f"--train-cases {train_cases}: {store.path} has {len(cases)} labelled cases of {subjects} subjects; "
        "a fold needs that many for training and at least one subject more for testing"
    )


def _chunks(cases: Sequence[Case], size: int, generator: np.random.RandomState) -> Iterator[list[str]]:
    groups, chunk = _groups(cases, "subject"), []
    for i in generator.permutation(len(groups)):
        chunk = chunk + groups[i]
        if len(chunk) >= size:
            yield chunk
            chunk = []


def _groups(cases: Sequence[Case], group: str) -> list[list[str]]:
    if group not in ("subject", "volume"):
        raise ValueError(f"group {group!r} is unknown; accepted: subject, volume")
    members: dict[str, list[str]] = {}
    for case in cases:
        members.setdefault(case.subject if group == "subject" else case.id, []).append(case.id)
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
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error}); delete it to draw splits again") from None
        if not isinstance(content, dict) or content.get("format") != SPLITS_FORMAT:
            raise ValueError(f"{path}: not a file of splits ({SPLITS_FORMAT}); delete it to draw them again")
    name = f"{name}, store {store.fingerprint}"  # a store that has changed gets new splits, the old ones stay on record
    if name not in content["splits"]:
        content["splits"][name] = make()
        if os.access(store.path, os.W_OK):
            write_json(path, content)
    split = content["splits"][name]
    parts = split if isinstance(split, list) else [split]
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


# Patches --------------------------------------------------------------------------------------------------------------


class Patches(Dataset):
    """Random windows of cases, asked for by (epoch, index of the case in the store).

    Args:
        store: where the cases are.
        patch_size: voxels that the network sees, (X, Y, Z).
        window_size: voxels to read around them, so that a rotation finds data there; at least the patch.
        seed: of the run.
        purpose: name of the random stream; a patch of "validation" has nothing to do with one of "crop".
        crop: "window" places the window uniformly in the volume (the published pretraining: the patch, its centre,
            hugs the middle of volumes hardly larger than the window), "patch" places the patch uniformly.
        labels: also read the label.
        foreground: probability that the patch is placed around a random foreground voxel (needs labels, crop "patch").
    """

    def __init__(
        self,
        store: Store,
        patch_size: Sequence[int],
        window_size: Sequence[int] | None = None,
        *,
        seed: int = 0,
        purpose: str = "crop",
        crop: str = "patch",
        labels: bool = False,
        foreground: float = 0.0,
    ) -> None:
        if crop not in CROPS:
            raise ValueError(f"crop {crop!r} is unknown; accepted: {', '.join(CROPS)}")
        self.store = store
        self.patch = tuple(patch_size)
        self.window = tuple(window_size or patch_size)
        self.seed, self.purpose, self.crop, self.labels, self.foreground = seed, purpose, crop, labels, foreground
        self._foreground_of = lru_cache(maxsize=256)(self._read_foreground)

    def __getitem__(self, where: tuple[int, int]) -> dict | Exception:
        """{"image": (C, *window), "epoch", "case"} and with labels "label": (*window), uint8; or what went wrong."""
        epoch, index = where
        case = self.store.cases[index]
        try:
            start = self._start(rng.stream(self.seed, epoch, index, self.purpose), case)
            image = read_window(self.store.image(case.id), start, self.window, self._fill(case))
            if not np.isfinite(image).all():
                raise ValueError("its image holds values that are not finite")
            item = {"image": torch.from_numpy(image), "epoch": epoch, "case": index}
            if self.labels:
                label = read_window(self.store.label(case.id)[None], start, self.window, 0)
                if label.max() >= self.store.num_classes:
                    raise ValueError(f"label value {label.max()}, the store has 0 to {self.store.num_classes - 1}")
                item["label"] = torch.from_numpy(label[0])
            return item
        except Exception as error:  # handed to the training process, which names the case instead of a dead worker
            return ValueError(f"case {case.id} of {self.store.path}: {error}")

    def _start(self, generator: np.random.Generator, case: Case) -> list[int]:
        """First voxel of the window per axis, negative where it begins outside the volume."""
        inner = self.window if self.crop == "window" else self.patch
        around = None
        if self.foreground and generator.random() < self.foreground:
            around = self._foreground_voxel(generator, case)
        start = []
        for axis, (size, length) in enumerate(zip(inner, case.shape, strict=True)):
            if length <= size:
                first = -((size - length) // 2)
            elif around is not None:  # uniform over the starts whose patch holds the voxel
                voxel = int(around[axis])
                first = int(generator.integers(max(0, voxel - size + 1), min(voxel, length - size) + 1))
            else:
                first = int(generator.integers(length - size + 1))
            start.append(first - (self.window[axis] - size) // 2)
        return start

    def _foreground_voxel(self, generator: np.random.Generator, case: Case) -> np.ndarray | None:
        """A voxel of the foreground, uniform over all its classes together; None where the label is empty."""
        shares, voxels = self._foreground_of(case.id)
        if not voxels:
            return None
        chosen = voxels[generator.choice(len(voxels), p=shares)]
        return np.array(np.unravel_index(chosen[generator.integers(len(chosen))], case.shape))

    def _read_foreground(self, id: str) -> tuple[np.ndarray, list[np.ndarray]]:
        properties = self.store.properties(id)
        samples = {value: np.asarray(flat, np.int64) for value, flat in properties["foreground"].items() if len(flat)}
        counts = np.array([properties["label_counts"][value] for value in samples], float)
        return counts / counts.sum() if len(counts) else counts, list(samples.values())

    def _fill(self, case: Case) -> float:
        """The volume's minimum: 0, but in stores of another normalisation."""
        mode = self.store.config["normalization"]
        if mode == "unit":
            return 0.0
        channels = self.store.properties(case.id)["intensity"]
        lows = [(c["min"] - c["mean"]) / c["std"] if mode == "zscore" else c["min"] for c in channels if c]
        return min(lows)


CROPS = ("window", "patch")


def read_window(array: np.ndarray, start: Sequence[int], size: Sequence[int], fill: float) -> np.ndarray:
    """Copy the window [start, start + size) of (C, X, Y, Z), `fill` where it lies outside; reads that part alone."""
    inside, place = [slice(None)], [slice(None)]
    for first, length, limit in zip(start, size, array.shape[1:], strict=True):
        low, high = max(first, 0), min(first + length, limit)
        inside.append(slice(low, max(low, high)))
        place.append(slice(low - first, low - first + max(0, high - low)))
    part = array[tuple(inside)]
    if part.shape[1:] == tuple(size):
        return np.array(part)
    window = np.full((array.shape[0], *size), fill, array.dtype)
    window[tuple(place)] = part
    return window


class Batches:
    """Which (epoch, case) this rank reads in every micro-step of the steps [start, stop).

    The samples of a step depend on (seed, step) alone: ranks and micro-steps only share them out. An epoch is a
    shuffled pass over the cases; with `drop_last` its incomplete last batch is left out, else batches run on into the
    next pass. A batch larger than the number of cases takes from several passes.
    """

    def __init__(
        self,
        indices: Sequence[int],
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = True,
    ) -> None:
        if not len(indices):
            raise ValueError("there is no case to train on")
        self.indices = np.asarray(indices)
        self.batch_size, self.seed, self.start, self.stop = batch_size, seed, start, stop
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self.pass_length = len(indices)  # samples of a pass that are used
        if drop_last and len(indices) >= batch_size:
            self.pass_length = len(indices) // batch_size * batch_size
        self._order = lru_cache(maxsize=2)(lambda epoch: rng.stream(seed, epoch, 0, "order").permutation(self.indices))

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.batch_size // (self.accumulate * self.world)
        for step in range(self.start, self.stop):
            batch = self.of_step(step)
            for micro in range(self.accumulate):
                first = (micro * self.world + self.rank) * size
                yield batch[first : first + size]

    def of_step(self, step: int) -> list[tuple[int, int]]:
        """(epoch, case) of the whole global batch."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [
            (k // self.pass_length, int(self._order(k // self.pass_length)[k % self.pass_length])) for k in positions
        ]


def loader(patches: Patches, batches: Batches | Sequence, workers: int, pin_memory: bool) -> Iterator[dict]:
    """Batches of patches, read ahead by `workers` processes.

    Returns:
        {"image": (B, C, *window), "epoch": list, "case": list} and with labels "label": (B, *window), per batch.

    Raises:
        ValueError: (while iterating) names the case that could not be read.
    """
    source = DataLoader(
        patches,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        prefetch_factor=2 if workers else None,
    )
    for batch in source:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _collate(items: list[dict | Exception]) -> dict | Exception:
    for item in items:
        if isinstance(item, Exception):
            return item
    batch = {key: [item[key] for item in items] for key in items[0]}
    return {key: torch.stack(values) if key in ("image", "label") else values for key, values in batch.items()}
