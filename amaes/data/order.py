"""Which case is read when: the order of all cases over the steps of a run, shared out to ranks and micro-steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from amaes import rng
from amaes.data.several_stores import SeveralStores
from amaes.data.store import Store


@dataclass(frozen=True)
class Share:
    """How a global batch is shared out, and which part this process reads.

    Attributes:
        batch_size: patches per step over all ranks.
        accumulate: micro-steps per step.
        rank, world: this process among all.
    """

    batch_size: int
    accumulate: int = 1
    rank: int = 0
    world: int = 1

    @property
    def of_rank(self) -> int:
        """Patches of a rank per step."""
        return self.batch_size // self.world

    @property
    def of_micro_step(self) -> int:
        """Patches of a rank per micro-step."""
        return self.batch_size // (self.world * self.accumulate)


class Batches:
    """Which (epoch, case) this rank reads in every micro-step of the steps [start, stop).

    The samples of a step depend on (seed, step) alone: ranks and micro-steps only share them out. An epoch is a
    shuffled pass over the cases; with `drop_last` its incomplete last batch is left out, else batches run on into the
    next pass. A batch larger than the number of cases takes from several passes.

    Args:
        indices: positions of the cases in the store.
        share: of each batch.
        seed: of the shuffle.
        start, stop: steps.
        drop_last: see above.

    Raises:
        ValueError: there is no case.
    """

    def __init__(
        self, indices: Sequence[int], share: Share, *, seed: int, start: int, stop: int, drop_last: bool = True
    ) -> None:
        if not len(indices):
            raise ValueError("there is no case to train on")
        self.indices = np.asarray(indices)
        self.share, self.seed, self.start, self.stop = share, seed, start, stop
        self.pass_length = len(indices)  # samples of a pass that are used
        if drop_last and len(indices) >= share.batch_size:
            self.pass_length = len(indices) // share.batch_size * share.batch_size
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> np.ndarray:
        return rng.stream(self.seed, epoch, 0, "order").permutation(self.indices)

    def __len__(self) -> int:
        return (self.stop - self.start) * self.share.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.share.of_micro_step
        for step in range(self.start, self.stop):
            batch = self.of_step(step)
            for micro in range(self.share.accumulate):
                first = (micro * self.share.world + self.share.rank) * size
                yield batch[first : first + size]

    def of_step(self, step: int) -> list[tuple[int, int]]:
        """(epoch, case) of the whole global batch."""
        size = self.share.batch_size
        epochs_and_places = (divmod(k, self.pass_length) for k in range(step * size, (step + 1) * size))
        return [(epoch, int(self._order(epoch)[place])) for epoch, place in epochs_and_places]


class MixedBatches(Batches):
    """As `Batches`, but each sample is drawn: a store, in proportion to the root of its size, then a case.

    So that large stores do not drown small ones, and small ones are not seen all the time. Every draw depends on (seed,
    position in the run) alone. The position is also what the crop and the augmentation take for the epoch: a case that
    comes again gets another crop, also in the same pass.

    Args:
        groups: positions of the cases to train on, by store (`amaes.data.several_stores.SeveralStores.groups`).
        share, seed, start, stop: see `Batches`.
    """

    def __init__(self, groups: Sequence[Sequence[int]], share: Share, *, seed: int, start: int, stop: int) -> None:
        self.groups = [np.asarray(group) for group in groups if len(group)]
        indices = [i for group in self.groups for i in group]
        super().__init__(indices, share, seed=seed, start=start, stop=stop)
        roots = np.sqrt([len(group) for group in self.groups])
        self.probabilities = roots / roots.sum()

    def of_step(self, step: int) -> list[tuple[int, int]]:
        """(position in the run, case) of the whole global batch."""
        batch = []
        for position in range(step * self.share.batch_size, (step + 1) * self.share.batch_size):
            stream = rng.stream(self.seed, position, 0, "mixed order")
            group = self.groups[stream.choice(len(self.groups), p=self.probabilities)]
            batch.append((position, int(stream.choice(group))))
        return batch


def order_of(
    store: Store | SeveralStores,
    indices: Sequence[int],
    share: Share,
    *,
    seed: int,
    start: int,
    stop: int,
    balanced: bool = False,
) -> Batches:
    """The order in which pretraining reads its cases.

    Args:
        store: one store or several.
        indices: positions of the cases to train on.
        share, seed, start, stop: see `Batches`.
        balanced: draw from several stores as `MixedBatches` does.
    """
    if balanced and isinstance(store, SeveralStores):
        return MixedBatches(store.groups(indices), share, seed=seed, start=start, stop=stop)
    return Batches(indices, share, seed=seed, start=start, stop=stop)
