"""What the pretraining loop asks of an objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Objective(Protocol):
    """What the pretraining loop asks of an objective.

    Attributes:
        window_size: voxels to read per patch, (X, Y, Z), a margin for the augmentation included.
        labels: whether the label of a patch is read as well.
        validation_batch: volumes that are validated together.
        views: inputs of the network per patch.
        trivial: what `baseline` predicts, in words.
    """

    window_size: tuple[int, int, int]
    labels: bool
    validation_batch: int
    views: int
    trivial: str

    def draw(self, epochs: Sequence[int], samples: Sequence[int], channels: int) -> Any:
        """What is drawn for a batch, an object with fields; depends on (seed, epoch, sample) alone."""

    def prepare(self, batch: dict, device: torch.device, training: bool = True) -> tuple[torch.Tensor, Any]:
        """Inputs of the network and the targets of its outputs, computed on `device` in float32.

        Args:
            batch: {"image": (B, C, *window), "epoch": list, "case": list} and with labels "label", of `amaes.data`.
            device: of the network.
            training: augment; without, what is drawn is the same in every validation.
        """

    def losses(self, outputs: Any, targets: Any) -> dict[str, torch.Tensor]:
        """The terms of the loss, weighted, by name; the loss is their sum."""

    def baseline(self, targets: Any) -> torch.Tensor:
        """The loss of a trivial prediction of the same targets."""

    def panels(self, inputs: torch.Tensor, outputs: Any, targets: Any) -> dict[str, torch.Tensor]:
        """What a person should look at, (B, 1, X, Y, Z) in [0, 1], by caption."""
