"""Supervised pretraining on many labelled stores with one network (as MedNeXt-v2, arXiv 2512.17774, is pretrained)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from amaes.augment import FinetuneAugment
from amaes.data.classes import Classes
from amaes.losses import segmentation_loss


class SupervisedSegmentation:
    """Segment every class of every store; a case is silent about the classes that its store does not declare.

    The softmax of a case runs over the classes of its store alone, and so does the mean of its Dice: where a structure
    may be there and nobody outlined it, the network is told nothing about it.

    Args:
        augment: of image and label.
        classes: of the stores; the network has `classes.count` outputs.
    """

    labels = True
    validation_batch = 1
    views = 1
    trivial = "equal chances"

    def __init__(self, augment: FinetuneAugment, classes: Classes) -> None:
        self.augment, self.draw, self.window_size = augment, augment.draw, augment.window_size
        self.classes = classes

    @torch.no_grad()
    def prepare(
        self, batch: dict, device: torch.device, training: bool = True
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """The augmented patch, (B, C, X, Y, Z); its classes, (B, X, Y, Z), and those allowed, (B, classes.count).

        Where a case could not be read and another stands in for it, batch["read"] says which.
        """
        image, label = (batch[name].to(device, non_blocking=True) for name in ("image", "label"))
        if training:
            image, label = self.augment(image, label, self.draw(batch["epoch"], batch["case"], image.shape[1]))
        tables, allowed = (rows.to(device, non_blocking=True) for rows in self.classes.rows(batch["read"]))
        label = tables.gather(1, label.flatten(1).long()).view(label.shape)
        return image.float(), (label, allowed)

    def losses(
        self, outputs: torch.Tensor | Sequence[torch.Tensor], targets: tuple[torch.Tensor, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Dice and cross-entropy over the allowed classes, with deep supervision over the stages."""
        return {"segmentation": segmentation_loss(outputs, *targets)}

    def baseline(self, targets: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """All allowed classes equally likely in every voxel."""
        label, allowed = targets
        logits = torch.zeros(1, device=label.device).expand(len(label), allowed.shape[1], *label.shape[1:])
        return segmentation_loss(logits, label, allowed)

    def panels(
        self, inputs: torch.Tensor, outputs: torch.Tensor, targets: tuple[torch.Tensor, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The first channel, and the classes of the network and of the label as shades of grey, background black."""
        label, allowed = targets
        predicted = outputs.masked_fill(~allowed[:, :, None, None, None], float("-inf")).argmax(dim=1)
        brightest = max(1, self.classes.count - 1)
        return {"seen": inputs[:, :1], "predicted": predicted[:, None] / brightest, "label": label[:, None] / brightest}
