"""Masking of random cubes ("tokens"). True = hidden, everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from amaes import rng


def token_mask(
    x: torch.Tensor,
    token_size: int = 4,
    mask_ratio: float = 0.6,
    keys: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Hide random cubes of each sample (He et al. 2022, Sec. 3; arXiv 2408.00640, Sec. 3.1).

    Every sample hides the same number of cubes, `L - int(L * (1 - mask_ratio))` of its L; all channels share the mask.

    Args:
        x: patches, (B, C, X, Y, Z); only shape and device are read.
        token_size: side of a cube, voxels.
        mask_ratio: fraction of cubes hidden, in [0, 1).
        keys: (B,), one key per sample (`amaes.rng.keys`): the mask depends on it alone, on any device, in any batch.
        generator: source of the draw where no keys are given.

    Returns:
        Boolean mask, (B, 1, X, Y, Z), True = hidden.

    Raises:
        ValueError: a side of x is not a multiple of token_size, or mask_ratio is outside [0, 1).
    """
    sides = x.shape[2:]
    if token_size < 1 or any(side % token_size for side in sides):
        raise ValueError(f"`token_size` {token_size}: the sides of the patch {tuple(sides)} must be multiples of it")
    grid = [side // token_size for side in sides]
    count = grid[0] * grid[1] * grid[2]
    if keys is None:
        noise = torch.rand(x.shape[0], count, device=x.device, generator=generator)
    else:
        noise = rng.bits(keys.to(x.device, non_blocking=True), count)
    tokens = hide_tokens(noise, mask_ratio).view(-1, 1, *grid)  # (B, 1, X/t, Y/t, Z/t)
    for axis in (2, 3, 4):
        tokens = tokens.repeat_interleave(token_size, dim=axis, output_size=sides[axis - 2])
    return tokens  # (B, 1, X, Y, Z)


def hide_tokens(noise: torch.Tensor, mask_ratio: float) -> torch.Tensor:
    """Keep the `int(L * (1 - mask_ratio))` tokens of smallest noise in each row, hide the others: (B, L), bool."""
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"`mask_ratio` {mask_ratio} is outside [0, 1)")
    keep = int(noise.shape[1] * (1 - mask_ratio))
    kept = noise.argsort(dim=1, stable=True)[:, :keep]
    return torch.ones_like(noise, dtype=torch.bool).scatter_(1, kept, False)


def check_mask_ratio(patch_size: Sequence[int], token_size: int, mask_ratio: float, loss_over: str = "all") -> None:
    """Refuse a mask that hides every token, or none where only hidden voxels count.

    Args:
        patch_size: (X, Y, Z), voxels, multiples of `token_size`.
        token_size, mask_ratio: see `token_mask`.
        loss_over: voxels of the loss, see `amaes.losses.reconstruction_loss`.

    Raises:
        ValueError: see above.
    """
    tokens = math.prod(side // token_size for side in patch_size)
    kept = int(tokens * (1 - mask_ratio))
    if kept == 0 or (kept == tokens and loss_over != "all"):
        raise ValueError(
            f"`mask_ratio` {mask_ratio}: keeps {kept} of {tokens} tokens of {token_size} voxels; at least one must be "
            "kept, and with `loss_over` masked at least one hidden"
        )


def apply_mask(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Set hidden voxels to 0, the background's value: x (B, C, X, Y, Z), mask (B, 1, X, Y, Z), True = hidden."""
    return x.masked_fill(mask, 0)
