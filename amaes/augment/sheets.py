"""Rows of panels that show what the augmentation does to one scan; `python -m amaes.augment` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from amaes import rng
from amaes.augment.draws import Draws
from amaes.augment.pipeline import PretrainAugment
from amaes.mask import apply_mask, token_mask
from amaes.pictures import Panel, Row, middle_slices

DRAWS = 10


def weak_and_strong(sides: Sequence[int]) -> dict[str, tuple[dict, dict]]:
    """A weak and the strongest setting of each transform, as fields of Draws for one sample of one channel.

    Args:
        sides: of the patch, voxels.
    """
    middle = [side // 2 for side in sides]
    coarse = [max(round(0.5 * side), 1) for side in sides]
    return {
        "rotation": ({"rotation_degrees": [[0, 0, 3]]}, {"rotation_degrees": [[30, 30, 30]]}),
        "scale": ({"scale_factor": [0.99]}, {"scale_factor": [1.1]}),
        "elastic": (
            {"elastic_alpha": [200.0], "elastic_sigma": [30.0]},
            {"elastic_alpha": [600.0], "elastic_sigma": [20.0]},
        ),
        "additive_noise": ({"additive_noise_sigma": [[1e-4]]}, {"additive_noise_sigma": [[1e-3]]}),
        "blur": ({"blur_sigma": [[0.2]]}, {"blur_sigma": [[1.0]]}),
        "multiplicative_noise": ({"multiplicative_noise_sigma": [[1e-4]]}, {"multiplicative_noise_sigma": [[1e-3]]}),
        "ghosting": (
            {"ghosting_alpha": [[0.95]], "ghosting_repetitions": [[10]], "ghosting_axis": [[0]]},
            {"ghosting_alpha": [[0.85]], "ghosting_repetitions": [[2]], "ghosting_axis": [[0]]},
        ),
        "gibbs_ringing": (
            {"gibbs_ringing_lines": [[sides[0] - 2]], "gibbs_ringing_axis": [[0]]},
            {"gibbs_ringing_lines": [[round(0.75 * sides[0])]], "gibbs_ringing_axis": [[0]]},
        ),
        "low_resolution": (
            {"low_resolution_lengths": [[[round(0.9 * sides[0]), *sides[1:]]]]},
            {"low_resolution_lengths": [[coarse]]},
        ),
        "bias_field": ({"bias_field_centre": [[middle]]}, {"bias_field_centre": [[[0, 0, 0]]]}),
        "gamma": (
            {"gamma_value": [[0.9]], "gamma_inversion": [[False]]},
            {"gamma_value": [[2.0]], "gamma_inversion": [[False]]},
        ),
    }


def transform_rows(augment: PretrainAugment, window: torch.Tensor) -> list[Row]:
    """Each transform alone, at a weak and at its strongest setting, with what it changes.

    Args:
        augment: with all transforms.
        window: (1, 1, *augment.window_size).
    """
    nothing, rows = augment.draw([0], [0]).only(), []
    plain = axial(augment(window, nothing)[0])
    for name, pair in weak_and_strong(augment.patch_size).items():
        panels = [Panel(plain, "untouched")]
        for strength, fields in zip(("weak", "strongest"), pair, strict=True):
            draws = replace(nothing.only(name), **{key: np.asarray(value) for key, value in fields.items()})
            result = axial(augment(window, draws)[0])
            change = np.abs(result - plain)
            panels.append(Panel(result, f"{strength}: {parameters(draws, name)}"))
            panels.append(Panel(change / max(change.max(), 1e-6), f"|change|, white = {change.max():.2g}"))
        rows.append(Row(name.replace("_", " "), panels))
    return rows


def draw_rows(augment: PretrainAugment, window: torch.Tensor, token_size: int, mask_ratio: float) -> list[Row]:
    """Ten draws of everything: target, input, mask, masked input.

    Args:
        augment: what draws.
        window: (1, 1, *augment.window_size).
        token_size: side of a hidden cube, voxels.
        mask_ratio: fraction of cubes hidden.
    """
    draws = augment.draw([0] * DRAWS, range(DRAWS))
    source, target = augment(window.expand(DRAWS, -1, -1, -1, -1), draws)
    mask = token_mask(source, token_size, mask_ratio, keys=rng.keys(augment.seed, [0] * DRAWS, range(DRAWS), "mask"))
    images = {
        "target": target,
        "input": source,
        "mask, white = hidden": mask.float(),
        "masked input": apply_mask(source, mask),
    }
    return [
        Row(f"{k}: {draws.summary(k)}", [Panel(axial(image[k : k + 1]), caption) for caption, image in images.items()])
        for k in range(DRAWS)
    ]


def parameters(draws: Draws, name: str) -> str:
    """What the transform `name` drew for the first sample, as a caption."""
    return draws.summary(0).removeprefix(name).strip(" ()")


def axial(batch: torch.Tensor) -> np.ndarray:
    """The middle axial slice of the first volume: (B, C, X, Y, Z) -> (Y, X)."""
    return middle_slices(batch[0, 0].numpy())[0]
