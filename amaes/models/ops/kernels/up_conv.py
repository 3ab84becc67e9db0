"""The 8 phases of an upsampling by 2 as one map, and back: rows (B, X + 1, Y + 1, Z + 1, 8 C) and (B, 2X, 2Y, 2Z, C).

Voxel o of an axis of the map is voxel (o + 1) // 2 of phase o % 2; the phase of a voxel is that of its three axes, X's
first. `border` (3, 3, 3, C), float32, is added: its first and last place along an axis belong to the first and last
voxel of the map, the middle ones to all others; the middle of all three axes is not read, and counts as 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from amaes.models.ops.kernels import TILE, channel_block, on_device_of

MOST_CHANNELS = 128  # of one program
MOST_CHUNKS = 32  # ranges of a face, whose partial sums are summed
MIDDLE = tl.constexpr(13)  # of the 27 places of the border

# X, Y and Z are the sides of the map. A program has TN voxels of a sample, or of its phases, and TC channels.


@triton.jit
def _channels(inside, C: tl.constexpr, TC: tl.constexpr):
    """Channels of a program, and which numbers of its voxels exist."""
    c = tl.program_id(1) * TC + tl.arange(0, TC)
    inside = inside[:, None]
    if C % TC != 0:
        inside = inside & (c < C)[None, :]
    return c[None, :], inside


@triton.jit
def _place(o, side):
    """Of a voxel on an axis: first, between, last."""
    return tl.where(o == 0, 0, tl.where(o == side - 1, 2, 1))


@triton.jit
def _interleave_kernel(phases, border, y, X, Y, Z, C: tl.constexpr, TN: tl.constexpr, TC: tl.constexpr):
    b, n = tl.program_id(2).to(tl.int64), tl.program_id(0) * TN + tl.arange(0, TN)
    c, inside = _channels(n < X * Y * Z, C, TC)
    ox, oy, oz = n // (Y * Z), n // Z % Y, n % Z
    phase = ox % 2 * 4 + oy % 2 * 2 + oz % 2
    source = (((ox + 1) // 2) * (Y // 2 + 1) + (oy + 1) // 2) * (Z // 2 + 1) + (oz + 1) // 2
    row = (b * ((X // 2 + 1) * (Y // 2 + 1) * (Z // 2 + 1)) + source) * 8 + phase
    value = tl.load(phases + row[:, None] * C + c, mask=inside, other=0.0).to(tl.float32)
    place = _place(ox, X) * 9 + _place(oy, Y) * 3 + _place(oz, Z)
    at_border = inside & (place != MIDDLE)[:, None]
    value += tl.load(border + place[:, None] * C + c, mask=at_border, other=0.0)
    tl.store(y + (b * (X * Y * Z) + n)[:, None] * C + c, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _phases_kernel(grad, grad_phases, X, Y, Z, C: tl.constexpr, TN: tl.constexpr, TC: tl.constexpr):
    """The gradient of each phase; 0 for its voxels that the map does not have."""
    MX, MY, MZ = X // 2 + 1, Y // 2 + 1, Z // 2 + 1
    b, row = tl.program_id(2).to(tl.int64), tl.program_id(0) * TN + tl.arange(0, TN)
    n, phase = row // 8, row % 8
    c, inside = _channels(n < MX * MY * MZ, C, TC)
    ox = n // (MY * MZ) * 2 - phase // 4
    oy = n // MZ % MY * 2 - phase // 2 % 2
    oz = n % MZ * 2 - phase % 2
    in_map = (ox >= 0) & (ox < X) & (oy >= 0) & (oy < Y) & (oz >= 0) & (oz < Z)
    source = b * (X * Y * Z) + (ox * Y + oy) * Z + oz
    value = tl.load(grad + source[:, None] * C + c, mask=inside & in_map[:, None], other=0.0)
    tl.store(grad_phases + (b * (MX * MY * MZ) * 8 + row)[:, None] * C + c, value, mask=inside)


@triton.jit
def _range(place, side):
    """First voxel of a place on an axis, and how many it has."""
    return tl.where(place == 2, side - 1, place), tl.where(place == 1, side - 2, 1)


@triton.jit
def _border_kernel(grad, partial, X, Y, Z, ROWS, C: tl.constexpr, TN: tl.constexpr, TC: tl.constexpr):
    """Sum of the gradient over ROWS voxels of one place of the border: partial (B, chunks, 27, C)."""
    place, chunk, b = tl.program_id(0) % 27, tl.program_id(0) // 27, tl.program_id(2)
    x0, nx = _range(place // 9, X)
    y0, ny = _range(place // 3 % 3, Y)
    z0, nz = _range(place % 3, Z)
    count = tl.where(place == MIDDLE, 0, nx * ny * nz)
    total = tl.zeros((TN, TC), tl.float32)
    for i in range(chunk * ROWS, tl.minimum(chunk * ROWS + ROWS, count), TN):
        n = i + tl.arange(0, TN)
        c, inside = _channels(n < count, C, TC)
        source = ((x0 + n // (ny * nz)) * Y + y0 + n // nz % ny) * Z + z0 + n % nz
        source = b.to(tl.int64) * (X * Y * Z) + source
        total += tl.load(grad + source[:, None] * C + c, mask=inside, other=0.0).to(tl.float32)
    c = tl.program_id(1) * TC + tl.arange(0, TC)
    row = (b * (tl.num_programs(0) // 27) + chunk) * 27 + place
    tl.store(partial + row * C + c, tl.sum(total, 0), mask=c < C)


def _tiles(channels: int) -> dict[str, int]:
    tc = channel_block(channels, MOST_CHANNELS)
    return {"C": channels, "TN": max(1, TILE // tc), "TC": tc, "num_warps": 4}


# Operators ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("amaes::interleave", mutates_args=())
def interleave(phases: torch.Tensor, border: torch.Tensor) -> torch.Tensor:
    """See the head of this file."""
    y = _empty_map(phases)
    b, *sides, channels = y.shape
    tiles = _tiles(channels)
    grid = (triton.cdiv(y[0].numel() // channels, tiles["TN"]), triton.cdiv(channels, tiles["TC"]), b)
    with on_device_of(y):
        _interleave_kernel[grid](phases, border, y, *sides, **tiles)
    return y


def _empty_map(phases: torch.Tensor) -> torch.Tensor:
    b, *sides, channels = phases.shape
    return phases.new_empty((b, *(2 * side - 2 for side in sides), channels // 8))


@interleave.register_fake
def _(phases, border):
    return _empty_map(phases)


@torch.library.custom_op("amaes::interleave_gradients", mutates_args=())
def gradients(grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `interleave` by the phases and by the border, whose middle gets 0."""
    b, *sides, channels = grad.shape
    grad_phases, tiles = _empty_phases(grad), _tiles(channels)
    blocks = triton.cdiv(channels, tiles["TC"])
    x, y, z = sides
    face = max(x * y, y * z, x * z)
    rows = triton.cdiv(triton.cdiv(face, MOST_CHUNKS), tiles["TN"]) * tiles["TN"]
    chunks = triton.cdiv(face, rows)
    partial = grad.new_empty((b * chunks, 27, channels), dtype=torch.float32)
    grid = triton.cdiv(grad_phases[0].numel() // channels, tiles["TN"]), blocks, b
    with on_device_of(grad):
        _phases_kernel[grid](grad, grad_phases, *sides, **tiles)
        _border_kernel[(27 * chunks, blocks, b)](grad, partial, *sides, rows, **tiles)
    return grad_phases, partial.sum(0).view(3, 3, 3, channels)


def _empty_phases(grad: torch.Tensor) -> torch.Tensor:
    b, *sides, channels = grad.shape
    return grad.new_empty((b, *(side // 2 + 1 for side in sides), 8 * channels))


@gradients.register_fake
def _(grad):
    return _empty_phases(grad), grad.new_empty((3, 3, 3, grad.shape[-1]), dtype=torch.float32)


interleave.register_autograd(lambda ctx, grad: gradients(grad.contiguous()))
