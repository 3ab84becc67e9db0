"""Pictures of a run: what the network makes of fixed patches. Needs matplotlib."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from amaes.data.loader import loader
from amaes.pictures import write_patches

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from amaes.data.patches import Patches
    from amaes.objectives import Objective


@torch.no_grad()
def draw_panels(
    path: Path,
    network: nn.Module,
    objective: Objective,
    patches: Patches,
    cases: Sequence[int],
    *,
    device: torch.device,
    autocast: AbstractContextManager | None = None,
    heading: str = "",
) -> None:
    """Write the pictures that the objective chooses (`Objective.panels`), a row per case.

    Args:
        path: of the PNG file.
        network: without DDP; left in training mode.
        objective: what the network is trained for.
        patches: of validation, the same at every call.
        cases: positions in the store of `patches`.
        device: of the network.
        autocast: context of the forward pass.
        heading: of the page.
    """
    network.eval()
    batch = next(loader(patches, [[(0, case) for case in cases]], workers=0, pin_memory=False))
    inputs, targets = objective.prepare(batch, device, training=False)
    with autocast or nullcontext():
        outputs = network(inputs)
    network.train()
    names = [patches.store.cases[case].id for case in cases]
    write_patches(path, objective.panels(inputs, outputs, targets), names, heading)
