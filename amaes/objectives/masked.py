"""The masked autoencoder with augmentation reversal (AMAES, arXiv 2408.00640)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from amaes import rng
from amaes.augment import PretrainAugment
from amaes.losses import reconstruction_loss
from amaes.mask import apply_mask, token_mask

if TYPE_CHECKING:
    from amaes.data.several_stores import SeveralStores
    from amaes.data.store import Store


class MaskedReconstruction:
    """AMAES (arXiv 2408.00640, Sec. 3.1): rebuild a patch from the visible part of an augmented copy of it.

    Args:
        augment: of the input; its spatial part is the target's, too.
        token_size, mask_ratio: see `amaes.mask.token_mask`.
        over: voxels of the mean squared error, see `amaes.losses.reconstruction_loss`.
        crop: where patches are placed, see `amaes.data.patches.Patches`.
        decoder, skips: of the network, see `amaes.models.build_autoencoder`.
    """

    task = "pretrain"
    labels = False
    validation_batch = 1
    views = 1
    trivial = "the visible mean"

    def __init__(
        self,
        augment: PretrainAugment,
        *,
        token_size: int,
        mask_ratio: float,
        over: str = "all",
        crop: str = "window",
        decoder: str = "light",
        skips: bool = False,
    ) -> None:
        self.augment, self.draw, self.window_size = augment, augment.draw, augment.window_size
        self.token_size, self.mask_ratio, self.over = token_size, mask_ratio, over
        self.reading = {"crop": crop}
        self.build = {"decoder": decoder, "skips": skips}

    def see(self, store: Store | SeveralStores) -> None:
        """Nothing of the data changes this objective."""

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
