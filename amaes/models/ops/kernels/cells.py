"""Cells: blocks of SIDE^3 voxels of a sample of sides X, Y, Z, of which those at the last faces may lie outside.

SIDE is 1, where cells are voxels, or 2, where they are what max pooling makes one voxel of.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def voxel_of_cell(first, corner, N, X, Y, Z, SIDE: tl.constexpr, TN: tl.constexpr):
    """One voxel of each of TN cells: its number in the sample, and whether there is one."""
    n = first + tl.arange(0, TN)
    inside = n < N
    if SIDE > 1:
        cells_y, cells_z = tl.cdiv(Y, 2), tl.cdiv(Z, 2)
        x = n // (cells_y * cells_z) * 2 + corner // 4
        y = n // cells_z % cells_y * 2 + corner // 2 % 2
        z = n % cells_z * 2 + corner % 2
        inside = inside & (x < X) & (y < Y) & (z < Z)
        n = (x * Y + y) * Z + z
    return n, inside


@triton.jit
def pooled_voxel(first, N, X, Y, Z, TN: tl.constexpr):
    """The voxel of the pooled map that each of TN cells becomes; cells that are not whole become none."""
    n = first + tl.arange(0, TN)
    cells_y, cells_z = tl.cdiv(Y, 2), tl.cdiv(Z, 2)
    x, y, z = n // (cells_y * cells_z), n // cells_z % cells_y, n % cells_z
    return (x * (Y // 2) + y) * (Z // 2) + z, (n < N) & (x < X // 2) & (y < Y // 2) & (z < Z // 2)


@triton.jit
def is_larger(value, largest):
    """As in `max_pool3d`: of equal numbers the first is the maximum, and what is not a number is larger than all."""
    return (value > largest) | (value != value)
