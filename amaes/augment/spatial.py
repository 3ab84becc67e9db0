"""Spatial transforms: rotation, scaling and elastic deformation in one resampling; exact crop and mirror.

Conventions, for a patch with P and a window with W voxels along an axis:

    p(i) = i - (P - 1) / 2           position in the patch, voxels from its centre
    offset(p) = s R^T (p + d(p))     where to look in the window, voxels from its centre
    out(p) = window(offset(p) + (W - 1) / 2)

with the rotation R = Rx Ry Rz (right-handed, x = axis 0), the scale s of the sampling coordinates (s < 1 magnifies) and
the elastic displacement d in voxels. Matrix products run in float64, so that TF32 and other shortcuts that a program
may allow for float32 products do not concern them, and no setting of the process is read or changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

BORDER = 1e-3  # voxels beyond the last voxel centre that still count as inside; absorbs float32 rounding
RANK_TOLERANCE = 1e-7  # relative error of the covariance of the low-rank elastic field, per axis


def window_size(patch_size: Sequence[int], window: str = "parity") -> tuple[int, int, int]:
    """Sides of the crop to load, so that a rotated patch finds most of its voxels inside.

    Args:
        patch_size: (X, Y, Z), voxels.
        window: "official" (published code): the diagonal of the largest face that holds the axis, rounded down;
            "parity" (default): one more where needed to be even or odd like the patch, so that an unmoved patch falls
            on voxels; "none": the patch itself.

    Returns:
        (X, Y, Z), voxels; (182, 182, 182) for a patch of 128.
    """
    if window == "none":
        return tuple(patch_size)
    sides = []
    for axis, side in enumerate(patch_size):
        others = [other for index, other in enumerate(patch_size) if index != axis]
        diagonal = max(math.isqrt(side * side + other * other) for other in others)
        sides.append(diagonal + ((diagonal - side) % 2 if window == "parity" else 0))
    return tuple(sides)


def centre_crop(x: torch.Tensor, patch_size: Sequence[int]) -> torch.Tensor:
    """View of the central patch: (..., X, Y, Z) -> (..., *patch_size). Exact where the margins are even."""
    for axis, side in enumerate(patch_size, start=x.ndim - 3):
        x = x.narrow(axis, (x.shape[axis] - side) // 2, side)
    return x


def coordinate_matrices(degrees: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """s R^T for each sample.

    Args:
        degrees: angles about axes 0, 1, 2, (B, 3); 0 where an axis was not chosen.
        scale: factor of the sampling coordinates, (B,).

    Returns:
        (B, 3, 3), float64.
    """
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    rotation = np.broadcast_to(np.eye(3), (len(degrees), 3, 3))
    for axis in range(3):
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn = np.zeros((len(degrees), 3, 3))
        turn[:, axis, axis] = 1.0
        turn[:, first, first] = turn[:, second, second] = cos[:, axis]
        turn[:, first, second], turn[:, second, first] = -sin[:, axis], sin[:, axis]
        rotation = rotation @ turn
    return np.asarray(scale, dtype=np.float64)[:, None, None] * rotation.transpose(0, 2, 1)


def sampling_offsets(
    matrix: torch.Tensor, patch_size: Sequence[int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Where each voxel of the patch looks in the window without elastic deformation: s R^T p.

    Args:
        matrix: s R^T, (B, 3, 3), float64.
        patch_size: (X, Y, Z).

    Returns:
        (B, 3, X, Y, Z), voxels from the centre of the window, component order = axis order.
    """
    plane, line = _affine_terms(matrix, patch_size)
    return plane[..., None].to(dtype) + line[:, :, None, None].to(dtype)


def _affine_terms(matrix: torch.Tensor, patch_size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """s R^T p as the sum of what axes 0 and 1 give, (B, 3, X, Y), and what axis 2 gives, (B, 3, Z)."""
    x, y, z = (_positions(side, matrix.device) for side in patch_size)
    plane = matrix[:, :, 0, None, None] * x[:, None] + matrix[:, :, 1, None, None] * y
    return plane, matrix[:, :, 2, None] * z


def _positions(side: int, device: torch.device) -> torch.Tensor:
    """Voxels of an axis, counted from its middle: (side,), float64."""
    return torch.arange(side, device=device, dtype=torch.float64) - (side - 1) / 2


def transform_displacement(matrix: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
    """s R^T d: (B, 3, 3), (B, 3, ...) -> (B, 3, ...). Linear, so it may act on the coefficients of a field instead."""
    columns = matrix[(..., *(None,) * (displacement.ndim - 2))].unbind(2)
    return sum(column * displacement[:, axis, None] for axis, column in enumerate(columns))


def smoothing_matrix(sigma: torch.Tensor, side: int, largest: int) -> torch.Tensor:
    """The Gaussian filter of the elastic field along one axis, zeros outside the patch.

    The kernel ends at floor(4 sigma + 0.5) voxels and sums to 1 before it is cut by the border.

    Args:
        sigma: (B,), voxels, float64.
        largest: radius of the widest kernel in use, voxels.

    Returns:
        (B, side, side), float64.
    """
    radius = (4 * sigma + 0.5).floor()[:, None]
    exponent = -0.5 / sigma.clamp(min=1e-6)[:, None] ** 2
    lag = torch.arange(-largest, largest + 1, device=sigma.device, dtype=torch.float64)
    total = torch.where(lag.abs() <= radius, (exponent * lag**2).exp(), 0.0).sum(1)  # (B,)
    index = torch.arange(side, device=sigma.device, dtype=torch.float64)
    distance = (index[:, None] - index).abs().view(1, -1)
    weights = torch.where(distance <= radius, (exponent * distance**2).exp(), 0.0) / total[:, None]
    return weights.view(-1, side, side)


def smoothing_basis(sigma: float, side: int) -> np.ndarray:
    """Orthonormal vectors that span nearly everything a Gaussian filter of width `sigma` or more lets pass.

    White noise has independent coefficients of the same variance in any orthonormal basis, so filtering
    basis @ coefficients gives the field of filtered white noise; the covariance is off by less than `RANK_TOLERANCE`
    (relative) at this width, by less than 3e-6 at 1.5 times it. Ten vectors do for sigma = 20 voxels and side 128.

    Returns:
        (side, rank), float64.
    """
    radius = math.floor(4 * sigma + 0.5)
    filters = smoothing_matrix(torch.tensor([sigma], dtype=torch.float64), side, radius)[0].numpy()
    _, strength, basis = np.linalg.svd(filters)
    tail = np.sqrt(np.cumsum(strength[::-1] ** 4)[::-1] / np.sum(strength**4))  # error when cut before each vector
    rank = int(np.count_nonzero(tail > RANK_TOLERANCE))
    return np.ascontiguousarray(basis[: max(rank, 1)].T)


def elastic_offsets(
    matrix: torch.Tensor,
    coefficients: torch.Tensor,
    factors: Sequence[torch.Tensor],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Where each voxel of the patch looks in the window with elastic deformation: s R^T (p + d).

    The displacement is a tensor product, d = coefficients x factors[0] x factors[1] x factors[2]; the affine part joins
    its last product as two more columns, so that the field is written once.

    Args:
        matrix: s R^T, (B, 3, 3), float64.
        coefficients: (B, 3, r0, r1, r2), float64, voxels.
        factors: three of (B, side, r), float64.

    Returns:
        (B, 3, X, Y, Z), voxels from the centre of the window.
    """
    sides = [factor.shape[1] for factor in factors]
    ranks = coefficients.shape[3:]
    coefficients = transform_displacement(matrix, coefficients)
    field = factors[0][:, None] @ coefficients.flatten(3)  # (B, 3, X, r1 r2)
    field = factors[1][:, None, None] @ field.unflatten(-1, ranks)  # (B, 3, X, Y, r2)
    plane, _ = _affine_terms(matrix, sides)
    slope = matrix[:, :, 2, None, None].expand_as(plane)
    field = torch.cat([field, plane[..., None], slope[..., None]], dim=-1)  # (B, 3, X, Y, r2 + 2)
    position = _positions(sides[2], matrix.device)
    line = torch.stack([torch.ones_like(position), position], dim=1).expand(len(matrix), -1, -1)
    last = torch.cat([factors[2], line], dim=2)  # (B, Z, r2 + 2)
    return (field.flatten(1, 3) @ last.mT).to(dtype).view(-1, 3, *sides)


def elastic_bound(coefficients: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """A bound of every component of the displacement, voxels: (B, 3, r0, r1, r2), (B,) -> (B,).

    Cauchy-Schwarz: per axis, a voxel weighs the coefficients with one row of the filter, whose norm is at most that of
    the kernel.
    """
    sigma = np.asarray(sigma, dtype=np.float64)[:, None]
    radius = np.floor(4 * sigma + 0.5)
    lag = np.arange(-radius.max(), radius.max() + 1)
    kernel = np.where(np.abs(lag) <= radius, np.exp(-0.5 * (lag / sigma) ** 2), 0.0)
    length = np.linalg.norm(kernel, axis=1) / kernel.sum(1)
    return length**3 * np.sqrt((coefficients**2).sum((2, 3, 4)).max(1))


def leaves_window(matrix: np.ndarray, bound: np.ndarray, patch: Sequence[int], window: Sequence[int]) -> np.ndarray:
    """Whether a sample may look outside its window, (B,) bool; computed on the host from the corners of the patch.

    Args:
        matrix: s R^T, (B, 3, 3).
        bound: largest elastic displacement, voxels, (B,).
    """
    half_patch, half_window = (np.asarray(patch) - 1) / 2, (np.asarray(window) - 1) / 2
    reach = (np.abs(matrix) * (half_patch + np.asarray(bound)[:, None])[:, None, :]).sum(2)  # (B, 3)
    return (reach > half_window + BORDER / 2).any(1)


def resample(
    window: torch.Tensor,
    offsets: torch.Tensor,
    fill: float | str = "min",
    clip: bool = True,
    filters: Sequence[torch.Tensor] | None = None,
    border: bool = True,
) -> torch.Tensor:
    """Interpolate a window; what lies outside becomes the fill value, without blending.

    Args:
        window: (B, C, W...).
        offsets: (B, 3, P...), voxels from the centre of the window.
        fill: "min" of the sample's window over all channels, or a number.
        clip: to the range of the sample's window over all channels.
        filters: None for trilinear interpolation; for the cubic B-spline the matrix of `spline_filter`, per axis.
        border: False if no coordinate lies outside, to save the test.

    Returns:
        (B, C, P...).
    """
    if filters is None:
        patch = sample_linear(window, offsets)
    else:
        patch = sample_cubic(spline_coefficients(window, filters), offsets)
    low, high = (bound.view(-1, 1, 1, 1, 1) for bound in torch.aminmax(window.flatten(1), dim=1))
    if border:
        patch = torch.where(outside(offsets, window.shape[2:]), low if fill == "min" else float(fill), patch)
    # Cubic splines overshoot; trilinear weights, rounded, add up to a little more than 1.
    return torch.clamp(patch, low, high) if clip else patch


def outside(offsets: torch.Tensor, window: Sequence[int]) -> torch.Tensor:
    """True where any coordinate lies outside the window: (B, 3, X, Y, Z) -> (B, 1, X, Y, Z)."""
    beyond = [offsets[:, axis].abs() > (side - 1) / 2 + BORDER for axis, side in enumerate(window)]
    return (beyond[0] | beyond[1] | beyond[2])[:, None]


def sample_linear(window: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Trilinear interpolation, border voxels repeated outside: (B, C, W...), (B, 3, P...) -> (B, C, P...)."""
    half = [max(side - 1, 1) / 2 for side in window.shape[2:]]  # an axis of one voxel has nothing to normalise
    grid = torch.stack([offsets[:, axis] / half[axis] for axis in (2, 1, 0)], dim=1).movedim(1, -1)
    return F.grid_sample(window, grid, mode="bilinear", padding_mode="border", align_corners=True)


def spline_filter(side: int) -> np.ndarray:
    """Voxels to coefficients of the interpolating cubic B-spline along one axis: (side, side), float64.

    The image continues as its mirror about the first and last voxel centre (... 2 1 | 0 1 2 ...).
    """
    from scipy.ndimage import spline_filter1d  # slow to import

    return spline_filter1d(np.eye(side), order=3, axis=0, mode="mirror")


def spline_coefficients(window: torch.Tensor, filters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Coefficients for `sample_cubic`: (B, C, X, Y, Z) -> the same shape; `filters` of `spline_filter`, per axis."""
    first, second, third = (matrix.double() for matrix in filters)
    x = window.double()
    x = (first @ x.flatten(3)).view_as(x)
    x = second @ x
    return (x @ third.mT).to(window.dtype)


def sample_cubic(coefficients: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Cubic B-spline interpolation as eight trilinear ones (Sigg and Hadwiger 2005, GPU Gems 2, ch. 20).

    Args:
        coefficients: of `spline_coefficients`, (B, C, W...).
        offsets: (B, 3, P...), voxels from the centre of the window.
    """
    sizes = coefficients.shape[2:]
    for axis, side in enumerate(sizes, start=2):  # two more voxels on both sides, mirrored
        coefficients = coefficients.index_select(axis, _mirror_index(side, 2, coefficients.device))
    weights, places = [], []
    for axis, side in enumerate(sizes):
        position = offsets[:, axis] + (side - 1) / 2
        position = position.clamp(0, side - 1)  # what lies outside is filled afterwards
        base = position.floor()
        t = position - base
        w0, w1, w3 = (1 - t) ** 3 / 6, (4 - 6 * t**2 + 3 * t**3) / 6, t**3 / 6
        low = w0 + w1
        high = 1 - low
        weights.append((low, high))
        places.append((base - 1 + w1 / low - (side - 1) / 2, base + 1 + w3 / high - (side - 1) / 2))
    total = 0.0
    for corner in range(8):
        choice = [(corner >> axis) & 1 for axis in range(3)]
        weight = weights[0][choice[0]] * weights[1][choice[1]] * weights[2][choice[2]]
        place = torch.stack([places[axis][choice[axis]] for axis in range(3)], dim=1)
        total = total + weight[:, None] * sample_linear(coefficients, place)
    return total


def sample_label(label: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Nearest voxel, halves rounded up, 0 outside the window; never interpolated.

    Args:
        label: (B, W...), integer.
        offsets: (B, 3, P...), voxels from the centre of the window.

    Returns:
        (B, P...), dtype of the label.
    """
    index = None
    for axis, side in enumerate(label.shape[1:]):
        place = (offsets[:, axis] + ((side - 1) / 2 + 0.5)).floor().clamp(0, side - 1).long()
        index = place if index is None else index * side + place
    values = label.flatten(1).gather(1, index.flatten(1)).view_as(index)
    return values.masked_fill(outside(offsets, label.shape[1:])[:, 0], 0)


def _mirror_index(side: int, pad: int, device: torch.device) -> torch.Tensor:
    """Index of the mirrored voxels -pad ... side + pad - 1, edge voxel not repeated: (side + 2 pad,)."""
    period = max(2 * (side - 1), 1)
    index = torch.arange(-pad, side + pad, device=device).remainder(period)
    return torch.minimum(index, period - index).clamp(max=side - 1)
