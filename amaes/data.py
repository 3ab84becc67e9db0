"""Cases of a store, how they are split, and the random patches that training reads.

Arrays are (C, X, Y, Z), RAS+, intensities in [0, 1]. Order, crops and everything else random depend on
(seed, epoch, case) alone, so they are the same for any number of workers, ranks and restarts.
"""

from __future__ import annotations

import errno
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from amaes import backend, rng
from amaes.files import read_json, write_json
from amaes.store import Case, Store
from amaes.workers import Watch, read_on

SPLITS_FORMAT = "amaes-splits-1"


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
        replace_by: positions of the cases of which another is drawn where one cannot be read; None stops there.
            Which one follows from (seed, epoch, case), and so does its crop: the sample keeps its random streams.
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
        replace_by: Sequence[int] | None = None,
    ) -> None:
        if crop not in CROPS:
            raise ValueError(f"crop {crop!r} is unknown; accepted: {', '.join(CROPS)}")
        self.store = store
        self.patch = tuple(patch_size)
        self.window = tuple(window_size or patch_size)
        self.seed, self.purpose, self.crop, self.labels, self.foreground = seed, purpose, crop, labels, foreground
        self.replace_by = None if replace_by is None else np.asarray(replace_by)
        self._foreground: dict[str, tuple[np.ndarray, list[np.ndarray]]] = {}  # of the cases read last

    def sample_bytes(self) -> int:
        """Memory that one sample takes at most: float32 image, uint8 label."""
        return (4 * len(self.store.channels) + self.labels) * math.prod(self.window)

    def reach(self, indices: Sequence[int]) -> float:
        """Share of the places in these cases' volumes that a patch can be taken from, (0, 1]; their mean."""
        shapes = np.array([self.store.cases[index].shape for index in indices])
        placed = self.window if self.crop == "window" else self.patch
        starts, all_starts = (np.maximum(shapes - size, 0) + 1 for size in (placed, self.patch))
        return float((starts / all_starts).prod(axis=1).mean())

    def __getitem__(self, where: tuple[int, int]) -> dict | Exception:
        """{"image": (C, *window), "epoch", "case", "read", "bad"} and with labels "label": (*window); or an error.

        "read" is the case whose voxels these are: another than "case" where that could not be read; "bad" says so.
        """
        epoch, index = where
        bad = []
        for position in self._in_turn(epoch, index):
            case = self.store.cases[position]
            try:
                found = {"read": position, "bad": [f"{text}; {case.id} in its place" for text in bad]}
                return self._read(epoch, index, case) | found
            except Exception as error:  # handed to the training process, which names the case instead of a dead worker
                told = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
                bad.append(f"case {case.id} of {self.store.path}: {told}")
                if _of_the_machine(error):
                    return ValueError(bad[-1])
        if self.replace_by is None:
            return ValueError(f"{bad[0]} (--on-bad-case skip takes another case instead)")
        return ValueError(f"{len(bad)} cases in a row cannot be read, too many to go on: {'; '.join(bad)}")

    def _in_turn(self, epoch: int, index: int) -> Iterator[int]:
        """The case asked for, then those that may stand in for it."""
        yield index
        if self.replace_by is not None:
            order = rng.stream(self.seed, epoch, index, f"{self.purpose} in place").permutation(self.replace_by)
            yield from islice((int(other) for other in order if other != index), BAD_IN_A_ROW - 1)

    def _read(self, epoch: int, index: int, case: Case) -> dict:
        """The sample (epoch, index), its voxels taken from `case`."""
        start = self._start(rng.stream(self.seed, epoch, index, self.purpose), case)
        image = read_window(self.store.image(case.id), start, self.window, self._fill(case))
        if not np.isfinite(image).all():
            raise ValueError("its image holds values that are not finite")
        item = {"image": torch.from_numpy(image), "epoch": epoch, "case": index}
        if self.labels:
            label = read_window(self.store.label(case.id)[None], start, self.window, 0)
            declared = self.store.declared(case.id)
            if not declared[label].all():
                known = " ".join(map(str, np.flatnonzero(declared)))
                raise ValueError(f"label value {label[~declared[label]][0]}, its store declares {known}")
            item["label"] = torch.from_numpy(label[0])
        return item

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
        if case.id not in self._foreground:
            if len(self._foreground) == 256:
                self._foreground.clear()
            self._foreground[case.id] = self._read_foreground(case.id)
        shares, voxels = self._foreground[case.id]
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

# Of 100 visits to a bad case, 6 end the run where half of the cases are bad, 0.01 where a tenth is, none below.
BAD_IN_A_ROW = 5


def _of_the_machine(error: Exception) -> bool:
    """Whether memory or file handles have run out, which is no fault of the case."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in (errno.ENOMEM, errno.EMFILE, errno.ENFILE)


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
        {"image": (B, C, *window), "epoch", "case", "read", "bad": lists} and with labels "label": (B, *window), per
        batch; "bad" has a line for each case that could not be read and was replaced (`Patches`).

    Raises:
        ValueError: (while iterating) names the case that could not be read.
        ChildProcessError: (while iterating) a worker was killed; says by what, what was read, what may help.
        OSError: (while iterating) a batch does not fit into shared memory.
    """
    asked: deque[list[tuple[int, int]]] = deque()  # batches that have not arrived

    def noted() -> Iterator[list[tuple[int, int]]]:
        for batch in batches:
            asked.append(batch)
            yield batch

    source = DataLoader(
        patches,
        batch_sampler=noted(),
        num_workers=workers,
        worker_init_fn=read_on,
        collate_fn=_collate,
        pin_memory=pin_memory,
        prefetch_factor=backend.PREFETCH if workers else None,
    )
    with Watch():
        arriving = iter(source)
    try:
        while True:
            try:
                batch = next(arriving, None)
            except Exception as error:
                reading = dict.fromkeys(patches.store.cases[case].id for batch in asked for _, case in batch)
                raise Watch.explained(error, getattr(arriving, "_workers", []), list(reading)) from error
            if batch is None:
                return
            if isinstance(batch, Exception):
                raise batch
            asked.popleft()
            yield batch
    finally:
        del arriving  # ends the workers now, whoever still holds this frame


def _collate(items: list[dict | Exception]) -> dict | Exception:
    for item in items:
        if isinstance(item, Exception):
            return item
    batch = {key: [item[key] for item in items] for key in items[0]}
    batch["bad"] = [text for texts in batch["bad"] for text in texts]
    try:
        return {key: _stack(values) if key in ("image", "label") else values for key, values in batch.items()}
    except (RuntimeError, MemoryError) as error:  # of a worker that may not have the memory it asks for
        return OSError(f"no memory for a batch of patches ({str(error).splitlines()[0]}); {backend.memory_advice()}")


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """(B, ...); in a worker straight into shared memory, so that a lack of it is an error here and not later."""
    if len({tensor.dtype for tensor in tensors}) > 1:  # float16 and float32 stores, in one batch
        tensors = [tensor.float() for tensor in tensors]
    return default_collate(tensors)
