"""The random patches that training reads."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch.utils.data import Dataset

from amaes import rng
from amaes.choices import CROPS
from amaes.data.store import Case, Store, check_label


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
            raise ValueError(f"`crop` {crop!r} is unknown; accepted: {', '.join(CROPS)}")
        self.store = store
        self.patch = tuple(patch_size)
        self.window = tuple(window_size or patch_size)
        self.seed, self.purpose, self.crop, self.labels, self.foreground = seed, purpose, crop, labels, foreground
        self.replace_by = None if replace_by is None else np.asarray(replace_by)
        self._foreground: dict[str, tuple[np.ndarray, list[np.ndarray]]] = {}  # of the cases read last

    def sample_bytes(self) -> int:
        """Memory that one sample takes at most: float32 image, uint8 label."""
        return (4 * len(self.store.channels) + self.labels) * math.prod(self.window)

    def crop_coverage(self, indices: Sequence[int]) -> float:
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
        errors = []
        for position in self._case_and_replacements(epoch, index):
            case = self.store.cases[position]
            try:
                replaced = [f"{text}; {case.id} in its place" for text in errors]
                return self._read(epoch, index, case) | {"read": position, "bad": replaced}
            except Exception as error:  # handed to the training process, which names the case instead of a dead worker
                reason = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
                errors.append(f"case {case.id} of {self.store.path}: {reason}")
                if _of_the_machine(error):
                    return ValueError(errors[-1])
        if self.replace_by is None:
            return ValueError(f"{errors[0]} (`on_bad_case` skip takes another case instead)")
        return ValueError(f"{len(errors)} cases in a row cannot be read, too many to go on: {'; '.join(errors)}")

    def _case_and_replacements(self, epoch: int, index: int) -> Iterator[int]:
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
            check_label(label, self.store.declared(case.id))
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
