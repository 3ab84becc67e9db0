"""Random numbers as a function of (seed, epoch, sample, purpose), never of a generator that has been running.

Two forms: `stream` gives a NumPy generator on the host (crops, order, augmentation parameters), `keys` with `bits`,
`uniform` and `normal` give whole fields on any device, the same on each of them (masks, voxel noise).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15, SplitMix64 (Steele et al. 2014), as a signed 64-bit integer
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def stream(seed: int, epoch: int, sample: int, purpose: str) -> np.random.Generator:
    """A host generator that depends on its four arguments alone.

    Args:
        seed: the run's seed, >= 0.
        epoch: pass over the data, >= 0.
        sample: index of the case in the sorted list of cases, >= 0.
        purpose: what the numbers are for ("crop", "augment", ...); different purposes are independent.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(_entropy(seed, epoch, sample, purpose))))


def keys(seed: int, epochs: Sequence[int], samples: Sequence[int], purpose: str) -> torch.Tensor:
    """One 64-bit key per sample for `bits`, `uniform` and `normal`: (B,), int64, on the CPU."""
    words = [
        np.random.SeedSequence(_entropy(seed, int(epoch), int(sample), purpose)).generate_state(1, np.uint64)
        for epoch, sample in zip(epochs, samples, strict=True)
    ]
    return torch.from_numpy(np.concatenate(words).view(np.int64))


def bits(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Pseudo-random 64-bit integers by counter (SplitMix64): element i of row b depends on keys[b] and i alone.

    Args:
        keys: (B,), int64.
        count: numbers per key.

    Returns:
        (B, count), int64 over its whole range, on the device of the keys; no synchronisation.
    """
    index = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64)
    z = keys[:, None] + index * _GAMMA  # wraps around, as intended
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    return z ^ _shift(z, 31)


def uniform(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), float32 with 24 random bits: (B, count)."""
    return _shift(bits(keys, count), 40).to(torch.float32) * 2.0**-24


def normal(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Standard normal numbers, float32: (B, count). Box-Muller, two numbers from each 64-bit integer."""
    pairs = -(-count // 2)
    z = bits(keys, pairs)
    radius = ((_shift(z, 40).to(torch.float32) + 0.5) * 2.0**-24).log_().mul_(-2.0).sqrt_()
    angle = (z & 0xFFFFFF).to(torch.float32) * (2.0 * math.pi * 2.0**-24)
    return torch.cat([radius * angle.cos(), radius * angle.sin_()], dim=1)[:, :count]


def _entropy(seed: int, epoch: int, sample: int, purpose: str) -> list[int]:
    return [seed, epoch, sample, zlib.crc32(purpose.encode())]


def _shift(z: torch.Tensor, places: int) -> torch.Tensor:
    """Logical right shift; `>>` on int64 repeats the sign bit."""
    return (z >> places) & ((1 << (64 - places)) - 1)
