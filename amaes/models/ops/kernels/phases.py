"""An upsampled map of even sides X, Y, Z in its 8 phases, as `ops.up_conv` computes them.

Phases are rows (B, X / 2 + 1, Y / 2 + 1, Z / 2 + 1, 8, C). Along an axis, voxel o of the map is voxel (o + 1) // 2 of
phase o % 2; the phase of a voxel has a digit for each axis, X's first. The first voxel of phase 1 and the last of phase
0 are none of the map's.

To the map belongs a border (3, 3, 3, C), float32, which is added to it: its first and last place along an axis are the
first and last voxel of the map, the middle ones all others. The middle of all three axes is not read, and counts as 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from amaes.models.ops.kernels import TILE, channel_block, on_device_of

MOST_CHANNELS = 128  # of one program
MOST_CHUNKS = 32  # ranges of a face, whose partial sums are summed
MIDDLE = tl.constexpr(13)  # of the 27 places of the border


@triton.jit
def row_of_voxel(n, X, Y, Z):
    """Row of the phases that holds voxel n of the map, both numbered within the sample."""
    x, y, z = n // (Y * Z), n // Z % Y, n % Z
    coarse = (((x + 1) // 2) * (Y // 2 + 1) + (y + 1) // 2) * (Z // 2 + 1) + (z + 1) // 2
    return coarse * 8 + x % 2 * 4 + y % 2 * 2 + z % 2


@triton.jit
def voxel_of_row(row, X, Y, Z):
    """Voxel of the map that a row of the phases holds, and whether there is one."""
    coarse, phase = row // 8, row % 8
    MY, MZ = Y // 2 + 1, Z // 2 + 1
    x = coarse // (MY * MZ) * 2 - phase // 4
    y = coarse // MZ % MY * 2 - phase // 2 % 2
    z = coarse % MZ * 2 - phase % 2
    return (x * Y + y) * Z + z, (x >= 0) & (x < X) & (y >= 0) & (y < Y) & (z >= 0) & (z < Z)


@triton.jit
def rows_per_sample(X, Y, Z):
    """Number of rows of the phases of a map of X x Y x Z voxels; some of them are no voxels of it."""
    return 8 * (X // 2 + 1) * (Y // 2 + 1) * (Z // 2 + 1)


@triton.jit
def border_at(border, n, c, inside, X, Y, Z, C: tl.constexpr):
    """What is added to channels c of voxels n of the map."""
    x, y, z = n // (Y * Z), n // Z % Y, n % Z
    place = _place(x, X) * 9 + _place(y, Y) * 3 + _place(z, Z)
    return tl.load(border + place[:, None] * C + c[None, :], mask=inside & (place != MIDDLE)[:, None], other=0.0)


@triton.jit
def _place(o, side):
    """Of a voxel on an axis: first, between, last."""
    return tl.where(o == 0, 0, tl.where(o == side - 1, 2, 1))


@triton.jit
def _range(place, side):
    """First voxel of a place on an axis, and how many it has."""
    return tl.where(place == 2, side - 1, place), tl.where(place == 1, side - 2, 1)


@triton.jit
def _border_kernel(phases, partial, X, Y, Z, ROWS, C: tl.constexpr, TN: tl.constexpr, TC: tl.constexpr):
    """Sum over ROWS voxels of one place of the border: partial (B, chunks, 27, C)."""
    place, chunk, b = tl.program_id(0) % 27, tl.program_id(0) // 27, tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * TC + tl.arange(0, TC)
    x0, nx = _range(place // 9, X)
    y0, ny = _range(place // 3 % 3, Y)
    z0, nz = _range(place % 3, Z)
    count = tl.where(place == MIDDLE, 0, nx * ny * nz)
    total = tl.zeros((TN, TC), tl.float32)
    for i in range(chunk * ROWS, tl.minimum(chunk * ROWS + ROWS, count), TN):
        n = i + tl.arange(0, TN)
        inside = (n < count)[:, None] & (c < C)[None, :]
        voxel = ((x0 + n // (ny * nz)) * Y + y0 + n // nz % ny) * Z + z0 + n % nz
        row = b * rows_per_sample(X, Y, Z) + row_of_voxel(voxel, X, Y, Z)
        total += tl.load(phases + row[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
    out = partial + ((b * (tl.num_programs(0) // 27) + chunk) * 27 + place) * C + c
    tl.store(out, tl.sum(total, 0), mask=c < C)


def border_sums(phases: torch.Tensor) -> torch.Tensor:
    """The gradient of the border from that of the phases: (3, 3, 3, C), float32."""
    x, y, z = map_sides(phases)
    b, channels = phases.shape[0], phases.shape[-1] // 8
    tc = channel_block(channels, MOST_CHANNELS)
    tn, blocks = max(1, TILE // tc), triton.cdiv(channels, tc)
    face = max(x * y, y * z, x * z)
    rows = triton.cdiv(triton.cdiv(face, MOST_CHUNKS), tn) * tn
    chunks = triton.cdiv(face, rows)
    partial = phases.new_empty((b * chunks, 27, channels), dtype=torch.float32)
    with on_device_of(phases):
        _border_kernel[(27 * chunks, blocks, b)](
            phases, partial, x, y, z, rows, C=channels, TN=tn, TC=tc, num_warps=4
        )  # fmt: skip
    return partial.sum(0).view(3, 3, 3, channels)


def map_sides(phases: torch.Tensor) -> tuple[int, ...]:
    """Sides of the map of these phases, (B, X / 2 + 1, Y / 2 + 1, Z / 2 + 1, 8 C)."""
    return tuple(2 * side - 2 for side in phases.shape[1:4])
