"""Foreground box and intensity scaling of one volume, before it is resampled."""

from __future__ import annotations

import numpy as np

UPPER_QUANTILE = 0.99  # of the foreground; the upper tail is clipped there
ZERO_BACKGROUND = 0.01  # with negative values, zeros are background where at least this fraction of voxels is 0


class Unusable(ValueError):
    """A volume without usable intensities; `code` is the reason."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def foreground_box(volume: np.ndarray) -> list[list[int]]:
    """Half-open bounding box of the foreground, [[start, stop], ...] per axis.

    Foreground is what is > 0. In a volume with negative values it is what is != 0 if at least 1 % of the voxels are
    exactly 0, else what is above the minimum.

    Raises:
        Unusable: "empty_volume", all voxels are 0 or all are equal.
    """
    low, high = volume.min(), volume.max()
    if low == high:
        raise Unusable("empty_volume", f"expected an image, found {low:g} in every voxel")
    if low >= 0:
        mask = volume > 0
    elif np.count_nonzero(volume == 0) >= ZERO_BACKGROUND * volume.size:
        mask = volume != 0
    else:
        mask = volume > low
    plane = mask.any(axis=0)  # (Y, Z)
    lines = (mask.any(axis=(1, 2)), plane.any(axis=1), plane.any(axis=0))  # (X,), (Y,), (Z,)
    return [[int(line.argmax()), int(line.size - line[::-1].argmax())] for line in lines]


def normalize(volume: np.ndarray, mode: str = "unit") -> tuple[np.ndarray, dict]:
    """Clip the upper tail at the 99th percentile of the foreground, then scale.

    With m = min(x), F = voxels other than m, q = 0.99-quantile of F (linear between order statistics):
    "unit" gives (min(x, q) - m) / (q - m), so the background is 0 and the top is 1; "zscore" gives
    (min(x, q) - mean) / std over F after clipping (population std); "none" leaves x. Clipping, z-scoring and then
    scaling to [0, 1] (Munk et al. 2024, Sec. 3) is "unit": the z-score is cancelled by the scaling.

    Args:
        volume: (X, Y, Z) float32, finite, cropped to its foreground.
        mode: "unit", "zscore" or "none".

    Returns:
        (X, Y, Z) float32 and {"min", "q99", "mean", "std", "n_foreground"} of the input, mean and std after clipping.

    Raises:
        Unusable: "constant_foreground" or "degenerate_range".
    """
    low = volume.min()
    values = volume[volume != low]
    if values.size == 0 or values.min() == values.max():
        value = low if values.size == 0 else values[0]
        raise Unusable("constant_foreground", f"expected an image, found {value:g} in all of the foreground (a mask?)")
    top = np.float32(_quantile(values, UPPER_QUANTILE))
    scale = top - low
    with np.errstate(over="ignore", divide="ignore"):
        if not (top > low and np.isfinite(scale) and np.isfinite(np.float32(1) / scale)):
            text = f"expected the 99th percentile ({top:g}) above the minimum ({low:g}), by a number float32 can hold"
            raise Unusable("degenerate_range", text)
    np.minimum(values, top, out=values)
    mean, std = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    statistics = {"min": float(low), "q99": float(top), "mean": mean, "std": std, "n_foreground": int(values.size)}
    if mode == "none":
        return np.array(volume, order="C"), statistics
    result = np.minimum(volume, top, order="C")
    result -= low if mode == "unit" else np.float32(mean)
    result /= scale if mode == "unit" else np.float32(std)
    return result, statistics


def most_frequent(volume: np.ndarray) -> np.floating:
    """The value that most voxels have (the smallest of several), which is likely the background."""
    values, counts = np.unique(volume, return_counts=True)
    return values[counts.argmax()]


def _quantile(values: np.ndarray, q: float) -> float:
    """np.quantile, from two order statistics and with the rank in float64; reorders `values`."""
    rank = q * (values.size - 1)
    k = int(rank)
    values.partition(k)
    lower = float(values[k])
    upper = float(values[k + 1 :].min()) if k + 1 < values.size else lower
    return lower + (upper - lower) * (rank - k)
