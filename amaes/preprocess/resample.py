"""Resampling of a volume to another shape: cubic B-spline with anti-aliasing for images, nearest for labels.

Along each axis, all steps together (Gaussian, spline prefilter, spline evaluation) are one linear operator, so a volume
needs three small sparse matrices instead of three passes of filters. The matrices are what SciPy's filters make of the
identity matrix, so the results are SciPy's up to rounding. Sparse products run in one thread and in a fixed order: the
bytes of the result depend neither on the number of cores nor on the number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import ndimage, sparse

TAP_TOLERANCE = 1e-9  # smaller weights are dropped; those of the spline fall by a factor of 0.27 per voxel
COLUMNS = 2048  # columns of one product along the first axis: (320, 2048) float64 = 5 MB, about a core's cache


def target_shape(shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> tuple[int, int, int]:
    """Shape at the target spacing (mm): round half to even of spacing * size / target, at least 1."""
    return tuple(max(1, round(s * n / t)) for n, s, t in zip(shape, spacing, target, strict=True))


def resample_image(image: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Cubic B-spline on the half-pixel grid, smoothed first where an axis shrinks, clipped to the input's range.

    With f = n_in / n_out per axis: a Gaussian of sigma max(0, (f - 1) / 2), then a spline of order 3, boundary
    "mirror" in both; the convention of `skimage.transform.resize`.

    Args:
        image: (X, Y, Z), real.
        shape: (X', Y', Z').

    Returns:
        (X', Y', Z') float32, C-contiguous; a copy of the input where the shape does not change.
    """
    image = np.asarray(image, dtype=np.float32)
    if tuple(image.shape) == tuple(shape):
        return np.array(image, order="C")
    result = _apply(image, [_cubic(n, m) for n, m in zip(image.shape, shape, strict=True)])
    return np.clip(result, image.min(), image.max(), out=result)


def resample_labels(labels: np.ndarray, shape: Sequence[int], method: str = "nearest") -> np.ndarray:
    """Labels on another shape.

    Args:
        labels: (X, Y, Z), integers.
        shape: (X', Y', Z').
        method: "nearest" takes the voxel floor((i + 0.5) * n_in / n_out); "onehot_linear" interpolates the map of
            each value linearly and takes the largest (the smaller value where two are equal).

    Returns:
        (X', Y', Z'), the input's type, values of the input only.

    Raises:
        ValueError: another method.
    """
    if method == "nearest":
        index = [_nearest(n, m) for n, m in zip(labels.shape, shape, strict=True)]
        return np.ascontiguousarray(labels[np.ix_(*index)])
    if method != "onehot_linear":
        raise ValueError(f"label resampling {method!r} is unknown; choose nearest or onehot_linear")
    operators = [_linear(n, m) for n, m in zip(labels.shape, shape, strict=True)]
    best, result = None, None
    for value in np.unique(labels):
        score = _apply((labels == value).astype(np.float32), operators)
        if best is None:
            best, result = score, np.full(tuple(shape), value, dtype=labels.dtype)
            continue
        better = score > best + 1e-6  # equal up to rounding counts as equal
        result[better], best[better] = value, score[better]
    return result


def _apply(image: np.ndarray, operators: Sequence[sparse.csr_array | None]) -> np.ndarray:
    """Apply one operator per axis (None = leave it); the first axis comes first where that makes the volume smaller."""
    first = operators[0]
    if first is not None and first.shape[0] <= first.shape[1]:
        return _along_slabs(_along_first(image, first), operators[1], operators[2])
    image = _along_slabs(image, operators[1], operators[2])
    return image if first is None else _along_first(image, first)


def _along_first(image: np.ndarray, operator: sparse.csr_array) -> np.ndarray:
    """Axis 0, some columns at a time."""
    flat = image.reshape(image.shape[0], -1)  # (X, Y * Z)
    result = np.empty((operator.shape[0], flat.shape[1]), dtype=np.float32)
    for start in range(0, flat.shape[1], COLUMNS):
        stop = start + COLUMNS
        result[:, start:stop] = operator @ flat[:, start:stop].astype(np.float64)
    return result.reshape(-1, *image.shape[1:])


def _along_slabs(image: np.ndarray, second: sparse.csr_array | None, third: sparse.csr_array | None) -> np.ndarray:
    """Axes 1 and 2, one (Y, Z) slab after the other: each stays in the cache, in float64, until both axes are done."""
    if second is None and third is None:
        return np.array(image, order="C")
    sides = [n if op is None else op.shape[0] for n, op in zip(image.shape[1:], (second, third), strict=True)]
    growth = [m / n for m, n in zip(sides, image.shape[1:], strict=True)]
    result = np.empty((image.shape[0], *sides), dtype=np.float32)
    for x, slab in enumerate(image):
        slab = slab.astype(np.float64)
        for axis in (0, 1) if growth[0] <= growth[1] else (1, 0):  # the axis that shrinks more comes first
            operator = (second, third)[axis]
            if operator is not None:
                slab = operator @ slab if axis == 0 else (operator @ slab.T).T
        result[x] = slab
    return result


@lru_cache(maxsize=512)
def _cubic(size: int, target: int) -> sparse.csr_array | None:
    """(target, size) float64: SciPy's smoothing and cubic zoom of every unit vector; None where nothing changes."""
    if size == target:
        return None
    unit = np.eye(size)
    if size > target:
        unit = ndimage.gaussian_filter1d(unit, (size / target - 1) / 2, axis=0, mode="mirror")
    return _sparse(ndimage.zoom(unit, (target / size, 1), order=3, mode="mirror", grid_mode=True))


@lru_cache(maxsize=512)
def _linear(size: int, target: int) -> sparse.csr_array | None:
    """(target, size) float64: linear interpolation on the half-pixel grid, edges repeated."""
    if size == target:
        return None
    return _sparse(ndimage.zoom(np.eye(size), (target / size, 1), order=1, mode="nearest", grid_mode=True))


def _sparse(matrix: np.ndarray) -> sparse.csr_array:
    return sparse.csr_array(np.where(np.abs(matrix) > TAP_TOLERANCE, matrix, 0.0))


def _nearest(size: int, target: int) -> np.ndarray:
    """(target,): for each new voxel, the old voxel under its centre."""
    return np.minimum(np.floor((np.arange(target) + 0.5) * (size / target)).astype(np.intp), size - 1)
