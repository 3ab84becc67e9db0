"""Intensity transforms of single channels: noise, blur, low resolution, bias field, gamma.

Every function takes volumes (N, X, Y, Z), one per sample and channel, with parameters of shape (N, ...), and returns
new volumes of the same shape and dtype. With `clip` every result stays within the range of its input volume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from amaes import rng


def value_range(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of each volume: (N, X, Y, Z) -> two of (N, 1, 1, 1)."""
    flat = x.flatten(1)
    return flat.amin(1).view(-1, 1, 1, 1), flat.amax(1).view(-1, 1, 1, 1)


def clip_to(y: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Clip in place, for volumes that the caller has just made."""
    return torch.clamp_(y, low, high)


def column(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One number per volume, ready to broadcast: (N,) -> (N, 1, 1, 1) in the dtype of x."""
    return values.to(x.dtype).view(-1, 1, 1, 1)


def voxel_noise(keys: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise, one key per volume: (N,) -> (N, *shape), float32."""
    return rng.normal(keys, math.prod(shape)).view(-1, *shape)


def additive_noise(x: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor, clip: bool = True) -> torch.Tensor:
    """x + sigma z, with z standard normal per voxel."""
    y = torch.addcmul(x, noise.to(x.dtype), column(sigma, x))
    return clip_to(y, *value_range(x)) if clip else y


def multiplicative_noise(x: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor, clip: bool = True) -> torch.Tensor:
    """x (1 + sigma z), with z standard normal per voxel."""
    y = torch.addcmul(x, x * noise.to(x.dtype), column(sigma, x))
    return clip_to(y, *value_range(x)) if clip else y


def blur(x: torch.Tensor, sigma: torch.Tensor, radius: int = 4, clip: bool = True) -> torch.Tensor:
    """Gaussian blur, the same width along the three axes; the image is mirrored at its faces, edge voxels repeated.

    Args:
        sigma: (N,), voxels; the kernel ends at floor(4 sigma + 0.5) voxels, so that sigma < 0.125 changes nothing.
        radius: of the widest kernel in use, voxels.
    """
    first, *taps = blur_taps(sigma, radius).to(x.dtype)[..., None, None, None].unbind(1)  # 2 radius + 1 of (N, 1, 1, 1)
    index = {side: _mirrored(side, radius, x.device) for side in set(x.shape[1:])}
    y = x
    for axis in (1, 2, 3):
        side = x.shape[axis]
        padded = y.index_select(axis, index[side])
        y = padded.narrow(axis, 0, side) * first
        for place, tap in enumerate(taps, start=1):
            y.addcmul_(padded.narrow(axis, place, side), tap)
    return clip_to(y, *value_range(x)) if clip else y


def _mirrored(side: int, radius: int, device: torch.device) -> torch.Tensor:
    """Index of voxels -radius, ..., side + radius - 1, mirrored at the faces, edge voxels repeated."""
    index = torch.arange(-radius, side + radius, device=device).remainder(2 * side)
    return torch.minimum(index, 2 * side - 1 - index)


def blur_taps(sigma: torch.Tensor, radius: int) -> torch.Tensor:
    """Normalised kernels: (N,) -> (N, 2 radius + 1), float64, zero beyond floor(4 sigma + 0.5)."""
    lag = torch.arange(-radius, radius + 1, device=sigma.device, dtype=torch.float64)
    sigma = sigma.double()[:, None]
    weights = (-0.5 * (lag / sigma.clamp(min=1e-3)) ** 2).exp() * (lag.abs() <= (4 * sigma + 0.5).floor())
    return weights / weights.sum(1, keepdim=True)


def low_resolution(
    x: torch.Tensor, lengths: torch.Tensor, operators: Sequence[torch.Tensor], lost: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Down by nearest neighbour without smoothing, up by cubic B-spline: a scan with thick slices.

    The result is clipped to the range of the voxels that survive the way down, which lies within that of x. This is
    part of the resampling, in fine-tuning too, where no stage clips to its input's range.

    Args:
        lengths: samples left along each axis, (N, 3), integer; the side of x where nothing happens.
        operators: per axis (R, n, n), float64, for the lengths n - R + 1, ..., n; see `low_resolution_tables`.
        lost: per axis (R, n), bool, the voxels that do not survive the way down.
    """
    rows = [lengths[:, axis] - (x.shape[axis + 1] - len(operators[axis]) + 1) for axis in range(3)]
    y = x.double()
    y = (operators[0][rows[0]] @ y.flatten(2)).view_as(y)
    y = operators[1][rows[1]][:, None] @ y
    y = (y.flatten(1, 2) @ operators[2][rows[2]].mT).view_as(y).to(x.dtype)
    low = high = x
    for axis in (2, 1, 0):  # the surviving voxels are a product of three index sets
        mask = lost[axis][rows[axis]].view(len(x), *(1,) * axis, -1)
        low = low.masked_fill(mask, torch.inf).amin(-1)
        high = high.masked_fill(mask, -torch.inf).amax(-1)
    return clip_to(y, low.view(-1, 1, 1, 1), high.view(-1, 1, 1, 1))


def low_resolution_tables(side: int, shortest: int) -> tuple[np.ndarray, np.ndarray]:
    """Down to each of the lengths shortest, ..., side and back up, as `low_resolution` applies it.

    Returns:
        Operators, (R, side, side), float64, and the voxels that do not survive the way down, (R, side), bool.
    """
    operators, lost = zip(*(_down_and_up(side, length) for length in range(shortest, side + 1)), strict=True)
    return np.stack(operators), np.stack(lost)


def _down_and_up(side: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The operator for one length, (side, side), and the lost voxels, (side,): `zoom` of an identity matrix."""
    from scipy.ndimage import zoom  # slow to import

    if length == side:
        return np.eye(side), np.zeros(side, dtype=bool)
    down = zoom(np.eye(side), (length / side, 1), order=0, mode="nearest", grid_mode=True)  # (length, side)
    up = zoom(down, (side / length, 1), order=3, mode="nearest", grid_mode=True)
    return up, ~down.any(0)


def bias_field(x: torch.Tensor, centre: torch.Tensor, mode: str = "official", clip: bool = True) -> torch.Tensor:
    """Multiply by a smooth field that is 1 at the centre.

    With r2 the sum over axes of ((i - centre) / n)^2: "official" 1 - r2, which turns negative far from the centre (the
    clip makes that the darkest value of the volume), "exp" exp(-r2).

    Args:
        centre: (N, 3), voxels.
    """
    y = bias_values(x.shape[1:], centre, mode, x.dtype).mul_(x)
    return clip_to(y, *value_range(x)) if clip else y


def bias_values(
    shape: Sequence[int], centre: torch.Tensor, mode: str = "official", dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The field of `bias_field`: (N, X, Y, Z), built from three vectors per volume."""
    terms = []
    for axis, side in enumerate(shape):
        index = torch.arange(side, device=centre.device, dtype=torch.float64)
        term = ((index - centre[:, axis, None]) / side) ** 2  # (N, side)
        terms.append(term.view(-1, *(side if d == axis else 1 for d in range(3))))
    plane = terms[0] + terms[1]
    if mode == "exp":
        return (-plane).exp().to(dtype) * (-terms[2]).exp().to(dtype)
    return (1 - plane).to(dtype) - terms[2].to(dtype)


def gamma(x: torch.Tensor, value: torch.Tensor, inversion: torch.Tensor, clip: bool = True) -> torch.Tensor:
    """Power curve between the smallest and the largest value of each volume, which stay where they are.

    Args:
        value: exponent, (N,), > 0.
        inversion: (N,) bool; the curve of the negative image, negated back: bright and dark end change roles, the
            contrast does not.
    """
    low, high = value_range(x)
    span = high - low + 1e-7  # a constant volume stays as it is
    inversion = inversion.view(-1, 1, 1, 1)
    origin, signed = torch.where(inversion, high, low), torch.where(inversion, -span, span)
    y = ((x - origin) / signed).clamp_(min=0).pow_(column(value, x))
    y = torch.addcmul(origin, y, signed)
    return clip_to(y, low, high) if clip else y
