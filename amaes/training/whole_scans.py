"""Validation of fine-tuning: Dice of whole scans, in the space of the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from amaes import distributed
from amaes.data.store import Store
from amaes.inference import sliding_window
from amaes.metrics import dice


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
    """Mean Dice over the classes of the store; of a class over the scans that have it, or are said to.

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
    classes = [value for value in sorted(store.labels) if value > 0]
    sums = torch.zeros(len(classes) + 1, 2)  # of the scans: Dice, number; at last: ranks that gave up
    network.eval()
    for id in ids[ranks.rank :: ranks.world]:
        if stop():
            sums[-1] = 1
            break
        logits = sliding_window(network, store.image(id), patch_size, precision=precision)  # (K, X, Y, Z)
        predicted, label = logits.argmax(0).cpu().numpy(), store.label(id)
        if store.ignored is not None:
            predicted[label == store.ignored] = 0
        for row, value in zip(sums, classes, strict=False):
            score = dice(predicted == value, label == value)
            if score == score:  # not NaN: one of the two has the class
                row += torch.tensor([score, 1.0])
    network.train()
    sums = distributed.sum_over_ranks(sums.to(ranks.device)).cpu()
    if sums[-1, 0]:
        return None
    means = (sums[:-1, 0] / sums[:-1, 1])[sums[:-1, 1] > 0]
    return means.mean().item()
