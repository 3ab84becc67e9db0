"""Weights that anyone can recompute, hashed from the parameter's name: reference outputs need no stored weights."""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch


def uniform(name: str, count: int) -> np.ndarray:
    """Numbers in [0, 1): a 32-bit multiply-xor hash of the index, seeded by the CRC of the name."""
    h = np.arange(count, dtype=np.uint32)
    h *= np.uint32(1664525)
    h += np.uint32(zlib.crc32(name.encode()))
    h ^= h >> np.uint32(16)
    h *= np.uint32(1540483477)
    h ^= h >> np.uint32(13)
    h *= np.uint32(1540483477)
    h ^= h >> np.uint32(15)
    return h / 2.0**32


def value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The weight of the parameter with this (published) name, float32."""
    v = uniform(name, math.prod(shape))
    v *= 2
    v -= 1
    last = name.split(".")[-1]
    if last == "relative_position_bias_table":
        v = 0.5 * v
    elif last in ("grn_gamma", "grn_beta"):
        v = (0.5 if last == "grn_gamma" else 0.1) * v
    elif len(shape) >= 2:
        v *= math.sqrt(3 / math.prod(shape[1:]))
    else:
        v = 1 + 0.2 * v if last == "weight" else 0.1 * v
    return torch.from_numpy(v.reshape(shape).astype(np.float32))


def image(*shape: int) -> torch.Tensor:
    """The input of the reference runs."""
    return torch.from_numpy(uniform("input", math.prod(shape)).reshape(shape).astype(np.float32))
