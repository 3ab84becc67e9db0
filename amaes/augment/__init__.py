"""Augmentation of batches in plain torch, the same code on the CPU and on the GPU (Llambias et al. 2024, Table 5).

In: windows (B, C, X, Y, Z) a little larger than the patch, and for segmentation their labels. Out: patches that were
rotated, scaled, deformed, and whose intensities were degraded; in pretraining the clean patch as well.

`options` probabilities and ranges, `draws` what is drawn for a batch, `pipeline` the order of the transforms: begin
there. `spatial`, `intensity` and `kspace` compute the transforms. `python -m amaes.augment SCAN` draws them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amaes.lazy import exports

if TYPE_CHECKING:
    from amaes.augment.draws import Draws
    from amaes.augment.options import FINETUNE_PRESETS, PRETRAIN_PRESETS, Options
    from amaes.augment.pipeline import FinetuneAugment, PretrainAugment, check_finite
    from amaes.augment.spatial import window_size

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "draws": ("Draws",),
        "options": ("FINETUNE_PRESETS", "PRETRAIN_PRESETS", "Options"),
        "pipeline": ("FinetuneAugment", "PretrainAugment", "check_finite"),
        "spatial": ("window_size",),
    },
)
