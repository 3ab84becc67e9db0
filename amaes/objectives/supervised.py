"""Segmentation: fine-tuning, and supervised pretraining on many labelled stores (MedNeXt-v2, arXiv 2512.17774)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from amaes.augment import FinetuneAugment
from amaes.data.classes import Classes
from amaes.data.several_stores import SeveralStores
from amaes.data.store import Store
from amaes.losses import segmentation_loss

Targets = tuple[torch.Tensor, torch.Tensor | None]  # classes, (B, X, Y, Z); those allowed, (B, count), None for all


class SupervisedSegmentation:
    """Segment every class of every store; classes that a store does not declare are left out of its softmax.

    With several stores, the softmax of a case runs over the classes of its store alone, and so does the mean of its
    Dice: where a structure may be there and nobody outlined it, the network learns nothing about it.

    Args:
        augment: of image and label.
        decoder, deep_supervision: of the network, see `amaes.models.build_segmenter`.
        foreground: share of patches placed around a foreground voxel.
        class_weights: of the cross-entropy, by class; 1 for those not named.

    Attributes:
        classes: of the stores, after `see`; the network has `classes.count` outputs.
    """

    task = "segment"
    labels = True
    validation_batch = 1
    views = 1
    trivial = "equal chances"

    def __init__(
        self,
        augment: FinetuneAugment,
        *,
        decoder: str = "unet",
        deep_supervision: bool = False,
        foreground: float = 0.33,
        class_weights: Mapping[int, float] | None = None,
    ) -> None:
        self.augment, self.draw, self.window_size = augment, augment.draw, augment.window_size
        self.reading = {"labels": True, "foreground": foreground}
        self.build = {"decoder": decoder, "deep_supervision": deep_supervision}
        self._class_weights, self._weights = dict(class_weights or {}), None

    def see(self, store: Store | SeveralStores) -> None:
        """Take the classes from the data.

        Raises:
            ValueError: no labels there, or background alone; a weight for a class that is not there.
        """
        self.classes = Classes.of(store)
        if self.classes.count < 2:
            raise ValueError(f"{store.path}: no labels there, or background alone; preprocess with `labels`")
        self.build["num_classes"] = self.classes.count
        if unknown := sorted(set(self._class_weights) - set(range(self.classes.count))):
            raise ValueError(
                f"`class_weights` {unknown[0]}: no class of {store.path}; it has 0 to {self.classes.count - 1}"
            )
        if self._class_weights:
            self._weights = torch.tensor([self._class_weights.get(k, 1.0) for k in range(self.classes.count)])

    @torch.no_grad()
    def prepare(self, batch: dict, device: torch.device, training: bool = True) -> tuple[torch.Tensor, Targets]:
        """The augmented patch, (B, C, X, Y, Z); its classes and those allowed.

        Where a case could not be read and another stands in for it, batch["read"] says which.
        """
        image, label = (batch[name].to(device, non_blocking=True) for name in ("image", "label"))
        if training:
            image, label = self.augment(image, label, self.draw(batch["epoch"], batch["case"], image.shape[1]))
        if self.classes.of_one_store:
            return image.float(), (label, None)
        tables, allowed = (rows.to(device, non_blocking=True) for rows in self.classes.rows(batch["read"]))
        label = tables.gather(1, label.flatten(1).long()).view(label.shape)
        return image.float(), (label, allowed)

    def losses(self, outputs: torch.Tensor | Sequence[torch.Tensor], targets: Targets) -> dict[str, torch.Tensor]:
        """Dice and cross-entropy over the allowed classes, with deep supervision over the stages."""
        weights = None if self._weights is None else self._weights.to(targets[0].device, non_blocking=True)
        return {"segmentation": segmentation_loss(outputs, *targets, self.classes.ignored, weights)}

    def baseline(self, targets: Targets) -> torch.Tensor:
        """All allowed classes equally likely in every voxel."""
        label, allowed = targets
        logits = torch.zeros(1, device=label.device).expand(len(label), self.classes.count, *label.shape[1:])
        return segmentation_loss(logits, label, allowed, self.classes.ignored)

    def panels(self, inputs: torch.Tensor, outputs: torch.Tensor, targets: Targets) -> dict[str, torch.Tensor]:
        """The first channel, and the classes of the network and of the label as shades of grey, background black."""
        label, allowed = targets
        if allowed is not None:
            outputs = outputs.masked_fill(~allowed[:, :, None, None, None], float("-inf"))
        brightest = self.classes.count - 1
        return {
            "seen": inputs[:, :1],
            "predicted": outputs.argmax(dim=1)[:, None] / brightest,
            "label": label.where(label <= brightest, 0)[:, None] / brightest,
        }
