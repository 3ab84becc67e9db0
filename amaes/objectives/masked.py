"""The masked autoencoder with augmentation reversal (AMAES, arXiv 2408.00640)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from amaes import rng
from amaes.augment import PretrainAugment
from amaes.choices import TARGETS
from amaes.losses import visible_mean_sd
from amaes.mask import apply_mask, token_mask
from amaes.models.ops import masked_error

if TYPE_CHECKING:
    from amaes.data.several_stores import SeveralStores
    from amaes.data.store import Store


class MaskedReconstruction:
    """AMAES (arXiv 2408.00640, Sec. 3.1): rebuild a patch from the visible part of an augmented copy of it.

    The networks follow every convolution by an instance norm: a patch and the same patch twice as bright give the same
    features, so that the brightness of the "absolute" target, the published one, cannot be known. The "standardized"
    target leaves it out: of every sample and channel, less the mean of its visible voxels, divided by their standard
    deviation, at least 0.1. (He et al. 2022, Sec. 4, standardize every token by itself.)

    Args:
        augment: of the input; its spatial part is the target's, too.
        token_size, mask_ratio: see `amaes.mask.token_mask`.
        over: voxels of the mean squared error, see `amaes.losses.reconstruction_loss`.
        target: what the network answers with: "standardized" values, or the "absolute" intensities of the store.
        crop: where patches are placed, see `amaes.data.patches.Patches`.
        decoder, skips: of the network, see `amaes.models.build_autoencoder`.

    Raises:
        ValueError: an unknown target.
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
        target: str = "standardized",
        crop: str = "window",
        decoder: str = "light",
        skips: bool = False,
    ) -> None:
        if target not in TARGETS:
            raise ValueError(f"`target` {target!r} is unknown; accepted: {', '.join(TARGETS)}")
        self.augment, self.draw, self.window_size = augment, augment.draw, augment.window_size
        self.standardized = target == "standardized"
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
        """The mean squared error, in units of the target."""
        return {"reconstruction": masked_error(outputs, *targets, self.over, self.standardized)}

    def baseline(self, targets: tuple) -> torch.Tensor:
        """Predicting the mean of the visible voxels: 0 where the target is standardized."""
        target, mask = targets
        if self.standardized:
            return self.losses(torch.zeros_like(target), targets)["reconstruction"]
        mean = target.masked_fill(mask, 0).sum() / ((~mask).sum() * target.shape[1])
        return self.losses(mean.expand_as(target), targets)["reconstruction"]

    def panels(self, inputs: torch.Tensor, outputs: torch.Tensor, targets: tuple) -> dict[str, torch.Tensor]:
        """The first channel as the network sees it, as it rebuilds it, and as it is, intensities of the store."""
        if self.standardized:
            mean, sd = visible_mean_sd(*targets)
            outputs = outputs.float() * sd + mean
        return {"seen": inputs[:, :1], "rebuilt": outputs[:, :1], "target": targets[0][:, :1]}
