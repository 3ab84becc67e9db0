"""Validation of fine-tuning: Dice of whole scans, in the space of the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from amaes import distributed
from amaes.data.store import Store
from amaes.inference import sliding_window
from amaes.metrics import dice
from amaes.training.verdict import metrics_lines

if TYPE_CHECKING:
    from amaes.training.progress import Progress
    from amaes.training.run_folder import RunFolder
    from amaes.training.stopping import Stop


class BestOnValidation:
    """Dice of a fold's validation cases every few steps; the best network is kept as `checkpoints/best.pt`.

    Args:
        folder: of the fold; its metrics.jsonl ends at the step that training continues from.
        ids: of the validation cases; none: there is no validation.
        every: steps between validations; the last step is validated, too.
        patience: validations without a better Dice after which the fold ends; None: it never does.
        last: step of the run.
        precision: of `amaes.inference.sliding_window`.

    Attributes:
        best: the highest Dice so far, and its step; (-1, 0) before the first.
    """

    def __init__(
        self, folder: RunFolder, ids: Sequence[str], *, every: int, patience: int | None, last: int, precision: str
    ) -> None:
        self._folder, self._ids, self._every, self._patience = folder, list(ids), every, patience
        self._last, self._precision = last, precision
        lines = metrics_lines(folder.path / "metrics.jsonl") if folder.ranks.is_main else []
        known = [(line["step"], line["val_dice"]) for line in lines if "val_dice" in line]
        self.best: tuple[float, int] = (-1.0, 0)
        self._validated = 0
        for step, score in distributed.from_main(known):
            self._count(step, score)

    def _count(self, step: int, mean: float | None) -> bool:
        """Whether this is the best so far; a Dice that is not a number is the worst."""
        self._validated = step
        better = mean is not None and mean > self.best[0]
        if better:
            self.best = (mean, step)
        return better

    def due(self, step: int) -> bool:
        """Whether the network of `step` is to be validated and has not been."""
        return bool(self._ids) and 0 < step != self._validated and (step % self._every == 0 or step == self._last)

    @property
    def exhausted(self) -> bool:
        """Whether the fold ends: too many validations without a better Dice."""
        return self._patience is not None and self._validated >= self.best[1] + self._patience * self._every

    def measure(self, step: int, network: nn.Module, progress: Progress, stop: Stop) -> None:
        """Validate the network of `step`, on all ranks. Where one of them is asked to stop, all give it up."""
        folder = self._folder
        options = {"precision": self._precision, "stop": lambda: stop.requested}
        mean = validation_dice(network, folder.store, self._ids, folder.patch_size, folder.ranks, **options)
        if mean is None:
            stop.agreed = True
            return
        mean = float(f"{mean:.6g}")  # as metrics.jsonl will have it, so that a run that continues decides alike
        better = self._count(step, mean)
        if better:
            folder.save_best(step, network, mean)
        progress.write_dice(mean, len(self._ids), better)

    def summary(self) -> str:
        """The best Dice, in one line; "" without validation."""
        mean, step = self.best
        ended = f"; ended at step {self._validated}, {self._patience} validations later" if self.exhausted else ""
        return f"best validation Dice {100 * mean:.2f} % at step {step}: best.pt{ended}" if step else ""


@torch.no_grad()
def validation_dice(
    network: nn.Module,
    store: Store,
    ids: Sequence[str],
    patch_size: Sequence[int],
    ranks: distributed.Ranks,
    *,
    precision: str = "auto",
    stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean Dice over the classes (or regions) of the store; of a class over the scans that have it, or are said to.

    Voxels that are left out (`Store.ignored`) count for neither.

    Ranks share the scans. The network is in training mode again afterwards.

    Args:
        network: without what DDP and compilation put around it.
        store: has the scans.
        ids: of the scans, all labelled.
        patch_size: of a window, voxels.
        ranks: this process among all.
        precision: of `amaes.inference.sliding_window`.
        stop: asked between scans on every rank; where it says yes, the validation is given up.

    Returns:
        In [0, 1]; NaN where no scan has a class; None where it was given up.
    """
    classes = list(store.scored(256).values())
    sums = torch.zeros(len(classes) + 1, 2)  # of the scans: Dice, number; at last: ranks that gave up
    network.eval()
    for id in ids[ranks.rank :: ranks.world]:
        if stop():
            sums[-1] = 1
            break
        logits = sliding_window(network, store.image(id), patch_size, precision=precision)  # (K, X, Y, Z)
        predicted, label = logits.max(0).indices.cpu().numpy(), store.label(id)
        if store.ignored is not None:
            predicted[label == store.ignored] = 0
        for row, values in zip(sums, classes, strict=False):
            score = dice(np.isin(predicted, values), np.isin(label, values))
            if score == score:  # not NaN: one of the two has the class
                row += torch.tensor([score, 1.0])
    network.train()
    sums = distributed.sum_over_ranks(sums.to(ranks.device)).cpu()
    if sums[-1, 0]:
        return None
    means = (sums[:-1, 0] / sums[:-1, 1])[sums[:-1, 1] > 0]
    return means.mean().item()
