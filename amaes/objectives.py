"""What a network is pretrained for: from a batch of volumes to its inputs, its targets, and the terms of its loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from amaes import rng
from amaes.augment import PretrainAugment
from amaes.losses import reconstruction_loss
from amaes.mask import apply_mask, token_mask


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


class MaskedReconstruction:
    """AMAES (arXiv 2408.00640, Sec. 3.1): rebuild a patch from the visible part of an augmented copy of it.

    Args:
        augment: of the input; its spatial part is the target's, too.
        token_size, mask_ratio: see `amaes.mask.token_mask`.
        over: voxels of the mean squared error, see `amaes.losses.reconstruction_loss`.
    """

    labels = False
    validation_batch = 1
    views = 1
    trivial = "the visible mean"

    def __init__(self, augment: PretrainAugment, token_size: int, mask_ratio: float, over: str) -> None:
        self.augment, self.draw, self.window_size = augment, augment.draw, augment.window_size
        self.token_size, self.mask_ratio, self.over = token_size, mask_ratio, over

    def prepare(self, batch: dict, device: torch.device, training: bool = True) -> tuple[torch.Tensor, tuple]:
        """The augmented patch without its hidden tokens; the clean patch and the mask."""
        window = batch["image"].to(device, non_blocking=True)
        if training:
            draws = self.draw(batch["epoch"], batch["case"], window.shape[1])
            source, target = self.augment(window, draws)
        else:
            source = target = window.float()
        purpose = "mask" if training else "validation mask"
        keys = rng.keys(self.augment.seed, batch["epoch"], batch["case"], purpose)
        mask = token_mask(source, self.token_size, self.mask_ratio, keys)
        return apply_mask(source, mask), (target, mask)

    def losses(self, outputs: torch.Tensor, targets: tuple) -> dict[str, torch.Tensor]:
        return {"reconstruction": reconstruction_loss(outputs, *targets, self.over)}

    def baseline(self, targets: tuple) -> torch.Tensor:
        """Predicting the mean of the visible voxels."""
        target, mask = targets
        mean = target.masked_fill(mask, 0).sum() / ((~mask).sum() * target.shape[1])
        return reconstruction_loss(mean.expand_as(target), target, mask, self.over)

    def panels(self, inputs: torch.Tensor, outputs: torch.Tensor, targets: tuple) -> dict[str, torch.Tensor]:
        """The first channel as the network sees it, as it rebuilds it, and as it is, intensities of the store."""
        return {"seen": inputs[:, :1], "rebuilt": outputs[:, :1], "target": targets[0][:, :1]}
