"""Transforms in k-space: motion ghosting and Gibbs ringing along one axis.

Both weight the lines of the spectrum along a single axis, so 1-D Fourier transforms along that axis give the same as
3-D ones. The weights are real but need not be symmetric in frequency; then the image turns complex and its modulus is
taken. For a real image x with spectrum X and weights w, split into an even and an odd part, the real part of the result
is the inverse transform of w_even X and the imaginary part that of -i w_odd X: three real transforms. The weights are
made on the host, of a few numbers.
"""

from __future__ import annotations

import numpy as np
import torch

from amaes.augment.intensity import clip_to, value_range


def ghosting_weights(alpha: np.ndarray, repetitions: np.ndarray, side: int) -> np.ndarray:
    """Periodic motion: lines 0, N, 2N, ... of k-space times alpha, which adds N - 1 faint negative copies.

    Args:
        alpha: (N,).
        repetitions: (N,), integer.
        side: of the axis, voxels.

    Returns:
        Weight of each line, (N, side), float64. Line side - 1 is never touched (published code).
    """
    line = np.arange(side)
    hit = (line % repetitions[:, None] == 0) & (line < side - 1)
    return np.where(hit, alpha[:, None], 1.0)


def gibbs_weights(lines: np.ndarray, side: int) -> np.ndarray:
    """Truncated k-space: only the central lines along one axis are kept.

    The band is half-open, [centre - h, centre + h) with h = ceil(lines / 2) after shifting the zero frequency to the
    middle, so the line -h is kept and +h is not; for an odd side it sits one line towards positive frequencies.

    Args:
        lines: number of lines kept, (N,), integer.
        side: of the axis, voxels.

    Returns:
        Weight of each line, 0 or 1: (N, side), float64; order of the transform, zero frequency first.
    """
    shifted = (np.arange(side) + side // 2) % side
    half, centre = ((lines + 1) // 2)[:, None], (side + 1) // 2
    return ((shifted >= centre - half) & (shifted < centre + half)).astype(np.float64)


def even_and_odd(weights: np.ndarray) -> np.ndarray:
    """Both parts of the weights of lines, at frequencies from zero up: (N, side) -> (N, 2, side // 2 + 1)."""
    mirrored = np.roll(weights[:, ::-1], 1, axis=1)  # weight of the line -k at k
    return np.stack([weights + mirrored, weights - mirrored], axis=1)[..., : weights.shape[1] // 2 + 1] / 2


def weight_lines(x: torch.Tensor, weights: torch.Tensor, axis: int, clip: bool = True) -> torch.Tensor:
    """|IFFT(weights FFT(x + m))| - m with m = max(0, -min x).

    Args:
        x: (N, X, Y, Z).
        weights: of `even_and_odd`, (N, 2, side // 2 + 1).
        axis: spatial axis, 0 to 2, of the array (the published code swaps the names of axes 0 and 1 in Gibbs ringing).
    """
    low, high = value_range(x)
    shift = low.neg().clamp(min=0)
    side, dim = x.shape[axis + 1], axis + 1
    shape = [len(x), 1, 1, 1]
    shape[dim] = side // 2 + 1
    even, odd = (part.reshape(shape) for part in weights.to(x.dtype).unbind(1))
    spectrum = torch.fft.rfft(x + shift, dim=dim)
    real = torch.fft.irfft(spectrum * even, n=side, dim=dim)
    imaginary = torch.fft.irfft(spectrum * (odd * -1j), n=side, dim=dim)
    y = torch.hypot(real, imaginary).sub_(shift)
    return clip_to(y, low, high) if clip else y
