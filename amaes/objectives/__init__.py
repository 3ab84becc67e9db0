"""What a network is trained for: from a batch of patches to its inputs, its targets, and the terms of the loss.

In: batches of `amaes.data.loader`. Out: what the loops of train_pretrain.py and train_finetune.py ask for, `Objective`.
masked.py is the masked autoencoder (AMAES), swin.py SwinUNETR's self-supervision, supervised.py segmentation.

To add one: write a class with the members of `Objective` in a module here, and a function for it in OBJECTIVES. Its
keyword-only arguments become options of train_pretrain.py once `amaes.training.options` has a help text for each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from amaes.data.several_stores import SeveralStores
    from amaes.data.store import Store

Patch = Sequence[int]  # (X, Y, Z), voxels


class Objective(Protocol):
    """What a training loop asks of an objective.

    Attributes:
        task: key of `amaes.models.TASKS`: the kind of network it trains.
        build: what it adds to the arguments that build the network (its decoder, ...); complete after `see`.
        window_size: voxels to read per patch, (X, Y, Z), a margin for the augmentation included.
        reading: arguments of `amaes.data.patches.Patches` that it needs (labels, where patches are placed).
        labels: whether the label of a patch is read as well.
        validation_batch: volumes that are validated together.
        views: inputs of the network per patch.
        trivial: what `baseline` predicts, in words.
    """

    task: str
    build: dict
    window_size: tuple[int, int, int]
    reading: dict
    labels: bool
    validation_batch: int
    views: int
    trivial: str

    def see(self, store: Store | SeveralStores) -> None:
        """Take from the data what the objective depends on: the classes, if it segments.

        Raises:
            ValueError: the data cannot be used for it.
        """

    def draw(self, epochs: Sequence[int], samples: Sequence[int], channels: int) -> Any:
        """What is drawn for a batch, an object with fields; depends on (seed, epoch, sample) alone."""

    def prepare(self, batch: dict, device: torch.device, training: bool = True) -> tuple[torch.Tensor, Any]:
        """Inputs of the network and the targets of its outputs, computed on `device` in float32.

        Args:
            batch: {"image": (B, C, *window), "epoch": list, "case": list} and with labels "label", of
                `amaes.data.loader`.
            device: of the network.
            training: augment; without, what is drawn is the same in every validation.
        """

    def losses(self, outputs: Any, targets: Any) -> dict[str, torch.Tensor]:
        """The terms of the loss, weighted, by name; the loss is their sum."""

    def baseline(self, targets: Any) -> torch.Tensor:
        """The loss of a trivial prediction of the same targets."""

    def panels(self, inputs: torch.Tensor, outputs: Any, targets: Any) -> dict[str, torch.Tensor]:
        """What a person should look at, (B, 1, X, Y, Z) in [0, 1], by caption."""


# By name. The arguments that all have: patch_size; seed of every draw; augment, a name of
# `amaes.augment.PRETRAIN_PRESETS`; augment_options, fields of `amaes.augment.Options`. The keyword-only ones are the
# objective's options: what stands here is the default of the command line.


def _amaes(
    patch_size: Patch,
    seed: int,
    augment: str,
    augment_options: Mapping,
    *,
    crop: str = "window",
    mask_ratio: float = 0.6,
    token_size: int = 8,
    loss_over: str = "all",
    target: str = "standardized",
    decoder: str = "light",
    skips: bool = False,
) -> Objective:
    from amaes.augment import PretrainAugment
    from amaes.objectives.masked import MaskedReconstruction

    return MaskedReconstruction(
        PretrainAugment(patch_size, augment, seed, **augment_options),
        token_size=token_size,
        mask_ratio=mask_ratio,
        over=loss_over,
        target=target,
        crop=crop,
        decoder=decoder,
        skips=skips,
    )


def _swin(
    patch_size: Patch,
    seed: int,
    augment: str,
    augment_options: Mapping,
    *,
    corruption: float = 0.3,
    reconstruction_head: str = "vae",
) -> Objective:
    from amaes.objectives.swin import SwinSelfSupervision

    if augment != "all" or augment_options:
        raise ValueError(
            f"`augment` {augment}: this objective has views of its own and reads neither `augment` nor "
            "`augment_options`"
        )
    return SwinSelfSupervision(patch_size, seed, corruption, reconstruction_head=reconstruction_head)


def _supervised(
    patch_size: Patch,
    seed: int,
    augment: str,
    augment_options: Mapping,
    *,
    decoder: str = "unet",
    deep_supervision: bool = False,
    foreground: float = 0.33,
) -> Objective:
    from amaes.augment import FinetuneAugment
    from amaes.objectives.supervised import SupervisedSegmentation

    return SupervisedSegmentation(
        FinetuneAugment(patch_size, augment, seed, **augment_options),
        decoder=decoder,
        deep_supervision=deep_supervision,
        foreground=foreground,
    )


OBJECTIVES: dict[str, Callable[..., Objective]] = {"amaes": _amaes, "swin": _swin, "supervised": _supervised}


def options_of(objective: str) -> dict[str, object]:
    """The options that only this objective has, with their defaults."""
    parameters = inspect.signature(OBJECTIVES[objective]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
