"""Mean squared error of a masked autoencoder."""

from __future__ import annotations

import torch

from amaes.choices import RECONSTRUCTION_MEANS
from amaes.losses import SMALLEST_SD, reconstruction_loss, visible_mean_sd
from amaes.models.ops import dispatch


def masked_error(
    prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, over: str, standardize: bool
) -> torch.Tensor:
    """`amaes.losses.reconstruction_loss` in float32; in Triton without a copy of any map. The target has no gradient.

    Args:
        prediction, target: (B, C, X, Y, Z).
        mask: (B, 1, X, Y, Z), True = hidden.
        over: voxels of the mean, see `amaes.losses.reconstruction_loss`.
        standardize: the target, by `amaes.losses.visible_mean_sd`.

    Returns:
        Scalar.
    """
    if over in RECONSTRUCTION_MEANS and dispatch.use_triton(prediction):
        return _triton(prediction, target, mask, over, standardize)
    return _plain(prediction, target, mask, over, standardize)


def _plain(
    prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, over: str, standardize: bool
) -> torch.Tensor:
    if standardize:
        mean, sd = visible_mean_sd(target, mask)
        target = (target - mean) / sd
    return reconstruction_loss(prediction, target, mask, over)


# In Triton ------------------------------------------------------------------------------------------------------------


def _triton(
    prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, over: str, standardize: bool
) -> torch.Tensor:
    """As it lies in memory, contiguous or channels-last, without a copy."""
    from amaes.models.ops.kernels.masked_error import masked_error as fused_masked_error

    return fused_masked_error(prediction, target, mask, over, SMALLEST_SD if standardize else 0.0)[0]
