"""Which case is read when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from amaes import rng


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
