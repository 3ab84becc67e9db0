"""Instance norm and leaky ReLU of rows (B, X, Y, Z, C), and their gradients. A slope of 1 is the norm alone.

The kernel that writes the output can write its maxima over blocks of 2x2x2 voxels as well, and the kernels of the
gradient take in the gradient of these maxima. The input can be a map in 8 phases (`kernels.phases`), which is put
together while it is read, as its gradient is taken apart while it is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from amaes.models.ops.kernels import TILE, channel_block, on_device_of
from amaes.models.ops.kernels.cells import is_larger, pooled_voxel, voxel_of_cell
from amaes.models.ops.kernels.phases import (
    border_at,
    border_sums,
    map_sides,
    row_of_voxel,
    rows_per_sample,
    voxel_of_row,
)

MOST_CHANNELS = 128  # of one program
PROGRAMS = 528  # of a sum over space: four on each multiprocessor of an H100 or H200

# A program has TN cells (`kernels.cells`) and TC channels at a time; a sample has N cells. All float32: `partial`
# (B, chunks, 2, C), `stats` and `sums` (B, 2, C). `border` is read with PHASES.


@triton.jit
def _block(row, inside, C: tl.constexpr, TC: tl.constexpr):
    """Offsets of the channels of rows, and which of them exist."""
    c = tl.program_id(1) * TC + tl.arange(0, TC)
    inside = inside[:, None]
    if C % TC != 0:
        inside = inside & (c < C)[None, :]
    return row[:, None] * C + c[None, :], inside


@triton.jit
def _input(x, border, b, n, inside, X, Y, Z, C: tl.constexpr, PHASES: tl.constexpr, TC: tl.constexpr):
    """The input at voxels n of sample b, float32."""
    row = b * rows_per_sample(X, Y, Z) + row_of_voxel(n, X, Y, Z) if PHASES else b * (X * Y * Z) + n
    offset, inside = _block(row, inside, C, TC)
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    if PHASES:
        c = tl.program_id(1) * TC + tl.arange(0, TC)
        value += border_at(border, n, c, inside, X, Y, Z, C)
    return value


@triton.jit
def _channels(stats, scale, shift, b, C: tl.constexpr, TC: tl.constexpr):
    """Mean, 1 / standard deviation, scale and shift of each channel: (1, TC), float32."""
    c = tl.program_id(1) * TC + tl.arange(0, TC)
    mean = tl.load(stats + b * 2 * C + c, mask=c < C, other=0.0)
    rstd = tl.load(stats + b * 2 * C + C + c, mask=c < C, other=0.0)
    factor = tl.load(scale + c, mask=c < C, other=1.0).to(tl.float32)
    constant = tl.load(shift + c, mask=c < C, other=0.0).to(tl.float32)
    return mean[None, :], rstd[None, :], factor[None, :], constant[None, :]


@triton.jit
def _output(value, mean, rstd, factor, constant, SLOPE: tl.constexpr):
    value = (value - mean) * (rstd * factor) + constant
    return tl.where(value > 0, value, value * SLOPE)


@triton.jit
def _moments_kernel(
    x, border, partial, X, Y, Z, ROWS,
    C: tl.constexpr, PHASES: tl.constexpr, TN: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """Mean, and sum of squared distances from it, of each channel over ROWS voxels (Welford 1962, Chan et al. 1979).

    Each of the TN lanes has a mean of its own, which takes in one voxel after another; at last they are merged.
    """
    chunk, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    count = tl.zeros((TN, 1), tl.float32)
    mean = tl.zeros((TN, TC), tl.float32)
    squares = tl.zeros((TN, TC), tl.float32)
    for i in range(0, ROWS, TN):
        n = chunk * ROWS + i + tl.arange(0, TN)
        inside = n < X * Y * Z
        value = _input(x, border, b, n, inside, X, Y, Z, C, PHASES, TC)
        count += tl.where(inside, 1.0, 0.0)[:, None]
        distance = tl.where(inside[:, None], value - mean, 0.0)
        mean += distance / tl.maximum(count, 1.0)
        squares += distance * (value - mean)
    merged = tl.sum(mean * count, 0) / tl.sum(count)
    distance = mean - merged[None, :]
    c = tl.program_id(1) * TC + tl.arange(0, TC)
    out = partial + (b * tl.num_programs(0) + chunk) * 2 * C + c
    tl.store(out, merged, mask=c < C)
    tl.store(out + C, tl.sum(squares + count * distance * distance, 0), mask=c < C)


@triton.jit
def _merge_kernel(partial, stats, N, ROWS, CHUNKS, eps, C: tl.constexpr, TN: tl.constexpr, TC: tl.constexpr):
    """Mean and 1 / standard deviation of each channel from those of its CHUNKS ranges of ROWS voxels."""
    b, c = tl.program_id(0), tl.program_id(1) * TC + tl.arange(0, TC)
    lane = tl.arange(0, TN)
    start = partial + b.to(tl.int64) * CHUNKS * 2 * C + c[None, :]
    total = tl.zeros((TN, TC), tl.float32)
    for i in range(0, CHUNKS, TN):
        chunk = i + lane
        inside = (chunk < CHUNKS)[:, None] & (c < C)[None, :]
        count = tl.minimum(N - chunk * ROWS, ROWS).to(tl.float32)[:, None]
        total += count * tl.load(start + chunk[:, None] * 2 * C, mask=inside, other=0.0)
    mean = tl.sum(total, 0) / N
    squares = tl.zeros((TN, TC), tl.float32)
    for i in range(0, CHUNKS, TN):
        chunk = i + lane
        inside = (chunk < CHUNKS)[:, None] & (c < C)[None, :]
        count = tl.minimum(N - chunk * ROWS, ROWS).to(tl.float32)[:, None]
        distance = tl.load(start + chunk[:, None] * 2 * C, mask=inside, other=0.0) - mean[None, :]
        squares += tl.load(start + chunk[:, None] * 2 * C + C, mask=inside, other=0.0)
        squares += tl.where(inside, count * distance * distance, 0.0)
    out = stats + b * 2 * C + c
    tl.store(out, mean, mask=c < C)
    tl.store(out + C, 1.0 / tl.sqrt(tl.sum(squares, 0) / N + eps), mask=c < C)


@triton.jit
def _apply_kernel(
    x, border, y, pooled, stats, scale, shift, N, X, Y, Z,
    C: tl.constexpr, SLOPE: tl.constexpr, SIDE: tl.constexpr, PHASES: tl.constexpr,
    TN: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    b, first = tl.program_id(2).to(tl.int64), tl.program_id(0) * TN
    mean, rstd, factor, constant = _channels(stats, scale, shift, b, C, TC)
    largest = tl.full((TN, TC), float("-inf"), tl.float32)
    for corner in tl.static_range(SIDE * SIDE * SIDE):
        n, inside = voxel_of_cell(first, corner, N, X, Y, Z, SIDE, TN)
        value = _input(x, border, b, n, inside, X, Y, Z, C, PHASES, TC)
        offset, inside = _block(b * (X * Y * Z) + n, inside, C, TC)
        value = _output(value, mean, rstd, factor, constant, SLOPE).to(y.dtype.element_ty)
        tl.store(y + offset, value, mask=inside)
        if SIDE > 1:
            value = value.to(tl.float32)
            largest = tl.where(is_larger(value, largest), value, largest)
    if SIDE > 1:
        n, inside = pooled_voxel(first, N, X, Y, Z, TN)
        offset, inside = _block(b * ((X // 2) * (Y // 2) * (Z // 2)) + n, inside, C, TC)
        tl.store(pooled + offset, largest.to(pooled.dtype.element_ty), mask=inside)


@triton.jit
def _pooled_gradient(
    kept, grad_pooled, mean, rstd, factor, constant, b, first, N, X, Y, Z,
    C: tl.constexpr, SLOPE: tl.constexpr, SIDE: tl.constexpr, INVERSE: tl.constexpr, TN: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """The corner that has the maximum of each cell, the first of equal ones, and the maximum's gradient; 0 unpooled."""
    largest = tl.full((TN, TC), float("-inf"), tl.float32)
    which = tl.zeros((TN, TC), tl.int32)
    gradient = tl.zeros((TN, TC), tl.float32)
    if SIDE > 1:
        for corner in tl.static_range(SIDE * SIDE * SIDE):
            n, inside = voxel_of_cell(first, corner, N, X, Y, Z, SIDE, TN)
            offset, inside = _block(b * (X * Y * Z) + n, inside, C, TC)
            value = tl.load(kept + offset, mask=inside, other=0.0).to(tl.float32)
            if not INVERSE:  # rounded like the output, which decides what is equal
                value = _output(value, mean, rstd, factor, constant, SLOPE).to(kept.dtype.element_ty).to(tl.float32)
            larger = is_larger(value, largest)
            which = tl.where(larger, corner, which)
            largest = tl.where(larger, value, largest)
        n, inside = pooled_voxel(first, N, X, Y, Z, TN)
        offset, inside = _block(b * ((X // 2) * (Y // 2) * (Z // 2)) + n, inside, C, TC)
        gradient = tl.load(grad_pooled + offset, mask=inside, other=0.0).to(tl.float32)
    return which, gradient


@triton.jit
def _normalised(
    kept, border, grad, b, n, inside, mean, rstd, factor, constant, of_maximum, X, Y, Z,
    C: tl.constexpr, SLOPE: tl.constexpr, PHASES: tl.constexpr, INVERSE: tl.constexpr, HAS_GRAD: tl.constexpr,
    TC: tl.constexpr,
):  # fmt: skip
    """Normalised values and the gradient before the leaky ReLU, from the kept input, or (INVERSE) the kept output.

    of_maximum: what the pooled map adds to the gradient of the output.
    """
    value = _input(kept, border, b, n, inside, X, Y, Z, C, PHASES and not INVERSE, TC)
    g = of_maximum
    if HAS_GRAD:
        offset, inside = _block(b * (X * Y * Z) + n, inside, C, TC)
        g += tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        positive = value > 0
        value = (tl.where(positive, value, value * (1.0 / SLOPE)) - constant) / factor
    else:
        value = (value - mean) * rstd
        positive = value * factor + constant > 0
    return value, tl.where(positive, g, g * SLOPE)


@triton.jit
def _sums_kernel(
    kept, border, grad, grad_pooled, partial, stats, scale, shift, N, X, Y, Z, ROWS,
    C: tl.constexpr, SLOPE: tl.constexpr, SIDE: tl.constexpr, PHASES: tl.constexpr, INVERSE: tl.constexpr,
    HAS_GRAD: tl.constexpr, TN: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """Sums over ROWS cells of the gradient before the leaky ReLU, and of its product with the normalised values."""
    chunk, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    mean, rstd, factor, constant = _channels(stats, scale, shift, b, C, TC)
    d_shift = tl.zeros((TN, TC), tl.float32)
    d_scale = tl.zeros((TN, TC), tl.float32)
    for i in range(0, ROWS, TN):
        first = chunk * ROWS + i
        which, g_pooled = _pooled_gradient(
            kept, grad_pooled, mean, rstd, factor, constant, b, first, N, X, Y, Z, C, SLOPE, SIDE, INVERSE, TN, TC
        )
        for corner in tl.static_range(SIDE * SIDE * SIDE):
            n, inside = voxel_of_cell(first, corner, N, X, Y, Z, SIDE, TN)
            of_maximum = tl.where(which == corner, g_pooled, 0.0)
            value, g = _normalised(
                kept, border, grad, b, n, inside, mean, rstd, factor, constant, of_maximum, X, Y, Z,
                C, SLOPE, PHASES, INVERSE, HAS_GRAD, TC,
            )  # fmt: skip
            d_shift += g  # 0 outside, where nothing was loaded
            d_scale += g * value
    c = tl.program_id(1) * TC + tl.arange(0, TC)
    out = partial + (b * tl.num_programs(0) + chunk) * 2 * C + c
    tl.store(out, tl.sum(d_shift, 0), mask=c < C)
    tl.store(out + C, tl.sum(d_scale, 0), mask=c < C)


@triton.jit
def _gradient_kernel(
    kept, border, grad, grad_pooled, grad_x, sums, stats, scale, shift, N, X, Y, Z,
    C: tl.constexpr, SLOPE: tl.constexpr, SIDE: tl.constexpr, PHASES: tl.constexpr, INVERSE: tl.constexpr,
    HAS_GRAD: tl.constexpr, TN: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """The gradient by the input: without its mean and its part along the normalised values.

    With PHASES the N cells are the rows of the phases, of which those that are no voxels of the map get zeros.
    """
    b, first = tl.program_id(2).to(tl.int64), tl.program_id(0) * TN
    mean, rstd, factor, constant = _channels(stats, scale, shift, b, C, TC)
    c = tl.program_id(1) * TC + tl.arange(0, TC)
    mean_g = tl.load(sums + b * 2 * C + c, mask=c < C, other=0.0)[None, :] / (X * Y * Z)
    along = tl.load(sums + b * 2 * C + C + c, mask=c < C, other=0.0)[None, :] / (X * Y * Z)
    which, g_pooled = _pooled_gradient(
        kept, grad_pooled, mean, rstd, factor, constant, b, first, N, X, Y, Z, C, SLOPE, SIDE, INVERSE, TN, TC
    )
    for corner in tl.static_range(SIDE * SIDE * SIDE):
        n, inside = voxel_of_cell(first, corner, N, X, Y, Z, SIDE, TN)
        offset, to_write = _block(b * (X * Y * Z) + n, inside, C, TC)
        if PHASES:
            offset, to_write = _block(b * N + n, inside, C, TC)
            n, in_map = voxel_of_row(n, X, Y, Z)
            inside = inside & in_map
        of_maximum = tl.where(which == corner, g_pooled, 0.0)
        value, g = _normalised(
            kept, border, grad, b, n, inside, mean, rstd, factor, constant, of_maximum, X, Y, Z,
            C, SLOPE, PHASES, INVERSE, HAS_GRAD, TC,
        )  # fmt: skip
        g = tl.where(inside[:, None], rstd * factor * (g - mean_g - value * along), 0.0)
        tl.store(grad_x + offset, g.to(grad_x.dtype.element_ty), mask=to_write)


class _Grid:
    """Blocks of rows: those of a pass over all cells, and the longer chunks of a sum over them."""

    def __init__(self, shape: Sequence[int], side: int = 1) -> None:
        self.batch, *self.sides, self.channels = shape
        self.cells = math.prod(triton.cdiv(voxels, side) for voxels in self.sides)
        tc = channel_block(self.channels, MOST_CHANNELS)
        self.blocks = triton.cdiv(self.channels, tc)
        tn = max(1, TILE // tc // (1 if side == 1 else 4))
        self.tiles = {"C": self.channels, "TN": tn, "TC": tc, "num_warps": 4}
        most = max(1, PROGRAMS // (self.batch * self.blocks))
        self.rows = triton.cdiv(triton.cdiv(self.cells, most), tn) * tn
        self.chunks = triton.cdiv(self.cells, self.rows)

    def over_chunks(self) -> tuple[int, int, int]:
        return self.chunks, self.blocks, self.batch

    def over_cells(self, cells: int | None = None) -> tuple[int, int, int]:
        return triton.cdiv(cells or self.cells, self.tiles["TN"]), self.blocks, self.batch

    def partial(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.new_empty((self.batch, self.chunks, 2, self.channels), dtype=torch.float32)


def statistics(rows: torch.Tensor, eps: float, border: torch.Tensor | None = None) -> torch.Tensor:
    """Mean and 1 / standard deviation of each sample and channel, (B, 2, C), float32."""
    grid = _Grid(_map_shape(rows, border))
    partial = grid.partial(rows)
    stats = rows.new_empty((grid.batch, 2, grid.channels), dtype=torch.float32)
    lanes = {**grid.tiles, "TN": min(grid.tiles["TN"], 32)}
    with on_device_of(rows):
        _moments_kernel[grid.over_chunks()](
            rows, rows if border is None else border, partial, *grid.sides, grid.rows,
            PHASES=border is not None, **grid.tiles,
        )  # fmt: skip
        _merge_kernel[(grid.batch, grid.blocks)](
            partial, stats, grid.cells, grid.rows, grid.chunks, eps, **lanes
        )  # fmt: skip
    return stats


def _map_shape(rows: torch.Tensor, border: torch.Tensor | None) -> tuple[int, ...]:
    """Of the output (B, X, Y, Z, C), from the input, which are phases where there is a border."""
    return tuple(rows.shape) if border is None else (len(rows), *map_sides(rows), border.shape[-1])


# Operators ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("amaes::norm_act", mutates_args=())
def norm_act(
    rows: torch.Tensor,
    border: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    slope: float,
    keep_input: bool,
    pool: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows (B, X, Y, Z, C) to rows, to these pooled, and to the statistics (B, 2, C); autograd keeps in- or output.

    With a border the input are phases, see `kernels.phases`. The pooled rows are `max_pool3d` of side 2; without `pool`
    they have no voxels.
    """
    stats, (y, pooled) = statistics(rows, eps, border), _empty_outputs(rows, border, pool)
    form = {"SLOPE": slope, "SIDE": 2 if pool else 1, "PHASES": border is not None}
    grid = _Grid(y.shape, form["SIDE"])
    with on_device_of(rows):
        _apply_kernel[grid.over_cells()](
            rows, rows if border is None else border, y, pooled, stats, scale, shift, grid.cells, *grid.sides,
            **form, **grid.tiles,
        )  # fmt: skip
    return y, pooled, stats


def _empty_outputs(rows: torch.Tensor, border: torch.Tensor | None, pool: bool) -> tuple[torch.Tensor, torch.Tensor]:
    b, *sides, channels = shape = _map_shape(rows, border)
    return rows.new_empty(shape), rows.new_empty((b, *(side // 2 if pool else 0 for side in sides), channels))


@norm_act.register_fake
def _(rows, border, scale, shift, eps, slope, keep_input, pool):
    y, pooled = _empty_outputs(rows, border, pool)
    return y, pooled, rows.new_empty((y.shape[0], 2, y.shape[-1]), dtype=torch.float32)


@torch.library.custom_op("amaes::norm_act_gradients", mutates_args=())
def gradients(
    kept: torch.Tensor,
    border: torch.Tensor | None,
    grad: torch.Tensor | None,
    grad_pooled: torch.Tensor | None,
    stats: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    slope: float,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `norm_act` by rows, border, scale and shift; `kept` are its output where `inverse`, else its input.

    grad, grad_pooled: of the output rows and of the pooled ones; None where they have none.
    """
    side = 1 if grad_pooled is None else 2
    grid = _Grid(kept.shape if inverse else _map_shape(kept, border), side)
    grad_x, partial = _empty_gradient(kept, border, inverse), grid.partial(kept)
    form = {
        "SLOPE": slope,
        "SIDE": side,
        "PHASES": border is not None,
        "INVERSE": inverse,
        "HAS_GRAD": grad is not None,
    }
    given = [kept if part is None else part for part in (border, grad, grad_pooled)]  # of None nothing is read
    cells = grid.cells if border is None else grad_x[0].numel() // grid.channels
    with on_device_of(kept):
        _sums_kernel[grid.over_chunks()](
            kept, *given, partial, stats, scale, shift, grid.cells, *grid.sides, grid.rows, **form, **grid.tiles
        )  # fmt: skip
        sums = partial.sum(1)
        _gradient_kernel[grid.over_cells(cells)](
            kept, *given, grad_x, sums, stats, scale, shift, cells, *grid.sides, **form, **grid.tiles
        )  # fmt: skip
    d_shift, d_scale = sums.sum(0)
    d_border = sums.new_empty(0) if border is None else border_sums(grad_x)
    return grad_x, d_border, d_scale.to(scale.dtype, copy=True), d_shift.to(shift.dtype, copy=True)


def _empty_gradient(kept: torch.Tensor, border: torch.Tensor | None, inverse: bool) -> torch.Tensor:
    if border is None or not inverse:
        return torch.empty_like(kept)
    b, *sides, channels = kept.shape
    return kept.new_empty((b, *(side // 2 + 1 for side in sides), 8 * channels))


@gradients.register_fake
def _(kept, border, grad, grad_pooled, stats, scale, shift, slope, inverse):
    d_border = stats.new_empty(0) if border is None else torch.empty_like(border)
    return _empty_gradient(kept, border, inverse), d_border, torch.empty_like(scale), torch.empty_like(shift)


def _setup_context(ctx, inputs, output):
    rows, border, scale, shift, _, ctx.slope, keep_input, ctx.pool = inputs
    y, _, stats = output
    ctx.inverse = not keep_input
    ctx.save_for_backward(rows if keep_input else y, border, stats, scale, shift)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_pooled, _):
    kept, border, stats, scale, shift = ctx.saved_tensors
    grads = [None if g is None else g.contiguous() for g in (grad, grad_pooled if ctx.pool else None)]
    d_rows, d_border, *others = gradients(kept, border, *grads, stats, scale, shift, ctx.slope, ctx.inverse)
    return d_rows, None if border is None else d_border, *others, None, None, None, None


norm_act.register_autograd(_backward, setup_context=_setup_context)
