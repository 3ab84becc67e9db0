"""What pretraining reads: a store or several, split into volumes to train on and to validate on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from amaes import distributed
from amaes.data.patches import Patches
from amaes.data.several_stores import SeveralStores, saved_pretrain_split
from amaes.data.store import Store


@dataclass(frozen=True)
class PretrainData:
    """Volumes and their patches.

    Attributes:
        store: one store, or several read as one.
        train, validation: positions of the cases in it.
        validation_ids: their ids.
        patches: random ones, to train on.
        fixed_patches: always the same one of a volume, to validate on.
    """

    store: Store | SeveralStores
    train: list[int]
    validation: list[int]
    validation_ids: list[str]
    patches: Patches
    fixed_patches: Patches


def split_for_pretraining(
    store: Store | SeveralStores,
    patch_size: Sequence[int],
    window_size: Sequence[int],
    *,
    fraction: float,
    split_by: str,
    seed: int,
    reading: Mapping,
    skip_bad_cases: bool,
) -> PretrainData:
    """Split a store and say how its patches are read. All ranks call it; rank 0 draws the split and saves it.

    Args:
        store: one store or several.
        patch_size: voxels that the network sees, (X, Y, Z).
        window_size: voxels to read around them.
        fraction, split_by: of the split, see `amaes.data.splits.pretrain_split`.
        seed: of the split and the patches.
        reading: further arguments of `Patches` for training; with "labels" only cases that have a label are taken.
        skip_bad_cases: another case takes the place of one that cannot be read.

    Raises:
        ValueError: no case, or labels that the store does not declare.
    """
    labels = bool(reading.get("labels"))
    split = None
    if distributed.on_main():
        split = saved_pretrain_split(store, fraction=fraction, seed=seed, split_by=split_by, with_labels=labels)
    split = distributed.from_main(split)
    train, validation = ([store.index(id) for id in split[side]] for side in ("train", "validation"))
    spare = train if skip_bad_cases else None
    patches = Patches(store, patch_size, window_size, seed=seed, replace_by=spare, **reading)
    spare = validation + train if skip_bad_cases else None
    fixed = Patches(store, patch_size, seed=seed, purpose="validation", labels=labels, replace_by=spare)
    return PretrainData(store, train, validation, split["validation"], patches, fixed)
