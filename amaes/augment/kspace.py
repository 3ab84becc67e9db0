"""Transforms in k-space: motion ghosting and Gibbs ringing along one axis.

Both weight the lines of the spectrum along a single axis, so 1-D Fourier transforms along that axis give the same as
3-D ones. The weights are real but need not be symmetric in frequency; then the image turns complex and its modulus is
taken. For a real image x with spectrum X and weights w, split into an even and an odd part, the real part of the result
is the inverse transform of w_even X and the imaginary part that of -i w_odd X: three real transforms.
"""

from __future__ import annotations

import torch

from amaes.augment.intensity import clip_to, value_range


def ghosting(
    x: torch.Tensor, alpha: torch.Tensor, repetitions: torch.Tensor, axis: int, clip: bool = True
) -> torch.Tensor:
    """Periodic motion: lines 0, N, 2N, ... of k-space times alpha, which adds N - 1 faint negative copies.

    Args:
        x: (N, X, Y, Z).
        alpha: (N,).
        repetitions: (N,), integer.
        axis: spatial axis, 0 to 2.
    """
    return _weight_lines(x, ghosting_weights(alpha, repetitions, x.shape[axis + 1]), axis, clip)


def ghosting_weights(alpha: torch.Tensor, repetitions: torch.Tensor, side: int) -> torch.Tensor:
    """Weight of each line: (N, side), float64. Line side - 1 is never touched (published code)."""
    line = torch.arange(side, device=alpha.device)
    hit = (line.remainder(repetitions[:, None]) == 0) & (line < side - 1)
    return torch.where(hit, alpha.double()[:, None], 1.0)


def gibbs_ringing(x: torch.Tensor, lines: torch.Tensor, axis: int, clip: bool = True) -> torch.Tensor:
    """Truncated k-space: only the central lines along one axis are kept.

    Args:
        x: (N, X, Y, Z).
        lines: number of lines kept, (N,), integer.
        axis: spatial axis, 0 to 2, of the array (the published code swaps the names of axes 0 and 1).
    """
    return _weight_lines(x, gibbs_weights(lines, x.shape[axis + 1]), axis, clip)


def gibbs_weights(lines: torch.Tensor, side: int) -> torch.Tensor:
    """Weight of each line, 0 or 1: (N, side), float64; order of the transform, zero frequency first.

    The band is half-open, [centre - h, centre + h) with h = ceil(lines / 2) after shifting the zero frequency to the
    middle, so the line -h is kept and +h is not; for an odd side it sits one line towards positive frequencies.
    """
    shifted = (torch.arange(side, device=lines.device) + side // 2).remainder(side)
    half, centre = ((lines + 1) // 2)[:, None], (side + 1) // 2
    return ((shifted >= centre - half) & (shifted < centre + half)).double()


def _weight_lines(x: torch.Tensor, weights: torch.Tensor, axis: int, clip: bool) -> torch.Tensor:
    """|IFFT(weights FFT(x + m))| - m with m = max(0, -min x): (N, X, Y, Z), (N, n) -> (N, X, Y, Z)."""
    low, high = value_range(x)
    shift = low.neg().clamp(min=0)
    side, dim = x.shape[axis + 1], axis + 1
    mirrored = weights.flip(1).roll(1, 1)  # weight of the line -k at k
    shape = [len(x), 1, 1, 1]
    shape[dim] = side // 2 + 1
    even, odd = (
        (half[:, : side // 2 + 1] / 2).to(x.dtype).reshape(shape) for half in (weights + mirrored, weights - mirrored)
    )
    spectrum = torch.fft.rfft(x + shift, dim=dim)
    real = torch.fft.irfft(spectrum * even, n=side, dim=dim)
    imaginary = torch.fft.irfft(spectrum * (odd * -1j), n=side, dim=dim)
    y = torch.hypot(real, imaginary).sub_(shift)
    return clip_to(y, low, high) if clip else y
