"""The validation of pretraining: the mean loss over fixed patches, beside that of a trivial prediction."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import nn

from amaes import distributed
from amaes.data.loader import loader

if TYPE_CHECKING:
    from amaes.data.pretrain_data import PretrainData
    from amaes.objectives import Objective
    from amaes.training.progress import Progress
    from amaes.training.stopping import Stop


@torch.no_grad()
def validate(
    network: nn.Module,
    objective: Objective,
    data: PretrainData,
    autocast: AbstractContextManager,
    ranks: distributed.Ranks,
    progress: Progress,
    stop: Stop,
) -> None:
    """Write the mean loss over the validation volumes, one fixed patch of each, and that of a trivial prediction.

    Ranks share the volumes; each counts once. Where a rank is asked to stop meanwhile, all end it, and write nothing.

    Args:
        network: without DDP; left in training mode.
        objective: what the network is trained for.
        data: of the run.
        autocast: context of the forward pass.
        ranks: this process among all.
        progress: writes the line.
        stop: asked to stop?
    """
    network.eval()
    sums = torch.zeros(4, device=ranks.device)  # loss, baseline, volumes, ranks that were asked to stop
    size, cases = objective.validation_batch, data.validation
    groups = [cases[i : i + size] for i in range(0, len(cases), size)]
    of_this_rank = [[(0, case) for case in group] for group in groups[ranks.rank :: ranks.world]]
    for batch in loader(data.fixed_patches, of_this_rank, workers=0, pin_memory=False):
        if stop.requested:
            sums[3] = 1
            break
        progress.replaced(batch["bad"])
        inputs, targets = objective.prepare(batch, ranks.device, training=False)
        with autocast:
            outputs = network(inputs)
        losses = objective.losses(outputs, targets)
        both = torch.stack([sum(losses.values()), objective.baseline(targets)])
        sums[:3] += torch.cat([both, both.new_ones(1)]) * len(batch["case"])
    loss, baseline, count, stopped = distributed.sum_over_ranks(sums).tolist()
    network.train()
    if stopped:
        stop.agreed = True
    else:
        progress.write_validation(loss / count, baseline / count, objective.trivial, round(count))
