"""What contradicts itself is refused before any work: patch and batch sizes; `compile` on where it does not work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from amaes import hardware
from amaes.data.order import Share
from amaes.models import build_encoder, ops

MOSTLY_INSIDE = 0.75  # of a patch; where less of it lies inside of the median case, a smaller one is advised


def check_patch_size(patch_size: Sequence[int], arch: str, token_size: int = 1) -> None:
    """Refuse a patch that the network or the mask cannot divide, or of which the coarsest stage keeps too few voxels.

    Args:
        patch_size: (X, Y, Z), voxels.
        arch: a key of `amaes.models.ARCHITECTURES`.
        token_size: side of a token, voxels; 1 where nothing is masked.

    Raises:
        ValueError: names sizes that are accepted.
    """
    with torch.device("meta"):
        encoder = build_encoder(arch)
    stride, fewest = encoder.strides[-1], encoder.min_bottleneck_voxels
    unit = math.lcm(stride, token_size)
    sides = " ".join(map(str, patch_size))
    tokens = f" with tokens of {token_size}" if token_size > 1 else ""
    accepted = f"{arch}{tokens} takes multiples of {unit}"
    for side in patch_size:
        if side % unit or side < unit:
            below = max(side // unit, -(-2 * stride // unit)) * unit
            raise ValueError(
                f"`patch_size` {sides}: {side} is not accepted; {accepted}, e.g. {below} or {below + unit}"
            )
    left = math.prod(side // stride for side in patch_size)
    if left < fewest:
        raise ValueError(
            f"`patch_size` {sides}: leaves {left} voxels at the coarsest stage, too few for its norms; {accepted} that "
            f"leave {fewest} or more, one for {stride} x {stride} x {stride}"
        )


def notes_on_patch(
    patch_size: Sequence[int], shapes: Sequence[Sequence[int]], arch: str, token_size: int = 1
) -> list[str]:
    """A line where much of a patch lies outside of the median case, with the patch to take instead.

    Args:
        patch_size, arch, token_size: see `check_patch_size`, which accepts them.
        shapes: of the cases.
    """
    with torch.device("meta"):
        unit = math.lcm(build_encoder(arch).strides[-1], token_size)
    median = [int(side) for side in np.median(shapes, axis=0)]
    inside = math.prod(map(min, patch_size, median)) / math.prod(patch_size)
    better = [min(side, max(2, of_case // unit) * unit) for side, of_case in zip(patch_size, median, strict=True)]
    if inside >= MOSTLY_INSIDE or better == list(patch_size):
        return []
    try:
        check_patch_size(better, arch, token_size)
    except ValueError:  # too few voxels at the coarsest stage
        return []
    sides, case, instead = (" ".join(map(str, numbers)) for numbers in (patch_size, median, better))
    text = (
        f"{1 - inside:.0%} of a patch of {sides} lies outside of the median case ({case}), and takes time all the same"
    )
    return [f"note: {text}; `patch_size` {instead} fits"]


def check_batch(batch_size: int, world: int, accumulate: int | str) -> None:
    """Refuse a global batch that ranks and micro-steps cannot share out evenly.

    Args:
        batch_size: patches per step over all ranks.
        world: number of ranks.
        accumulate: micro-steps per step, or "auto".

    Raises:
        ValueError: names sizes that are accepted.
    """
    pieces = world * (1 if accumulate == "auto" else accumulate)
    if batch_size % pieces:
        shares = f"{world} ranks" + ("" if accumulate == "auto" else f" x `accumulate` {accumulate}")
        raise ValueError(
            f"`batch_size` {batch_size}: cannot be split over {shares}; accepted: multiples of {pieces}, "
            f"e.g. {max(1, batch_size // pieces) * pieces}"
        )


def settle_compilation(
    device: torch.device, choice: str, finished: bool
) -> tuple[Callable[[nn.Module], nn.Module], str]:
    """The function that compiles the network, and one line: whether it does, and which operations are used.

    Args:
        device, choice: see `amaes.hardware.compiler`.
        finished: nothing is left to train; then nothing is compiled, and no kernel is tested.

    Raises:
        ValueError: see `amaes.hardware.compiler`.
    """
    if finished:
        return hardware.compiler(device, "off")[0], "nothing is left to train, nothing is compiled"
    compiler, line = hardware.compiler(device, choice, ops.are_fused(device))
    return compiler, f"{line}, {ops.describe(device)}"


def describe_batch(share: Share, device: torch.device, steps: int) -> str:
    """One line: how the global batch is cut."""
    return (
        f"{steps} steps of {share.batch_size} patches = {share.world} ranks x {share.accumulate} micro-steps x "
        f"{share.of_micro_step} on {device.type}"
    )
