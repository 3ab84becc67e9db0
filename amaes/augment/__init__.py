"""Batched augmentation in plain torch: the same code on the CPU and on the GPU (Llambias et al. 2024, Table 5)."""

from amaes.augment.draws import Draws, Options
from amaes.augment.pipeline import FINETUNE_PRESETS, PRESETS, FinetuneAugment, PretrainAugment, check_finite
from amaes.augment.spatial import window_size

__all__ = [
    "FINETUNE_PRESETS",
    "PRESETS",
    "Draws",
    "FinetuneAugment",
    "Options",
    "PretrainAugment",
    "check_finite",
    "window_size",
]
