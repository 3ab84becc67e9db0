"""Instance norm and leaky ReLU of rows (B, X, Y, Z, C), and their gradients. A slope of 1 is the norm alone.

The kernel that writes the output can write its maxima over blocks of 2x2x2 voxels as well, and the kernels of the
gradient take in the gradient of these maxima.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from amaes.models.ops.kernels import TILE, channel_block, on_device_of

MOST_CHANNELS = 128  # of one program
PROGRAMS = 528  # of a sum over space: four on each multiprocessor of an H100 or H200

# A program has TN cells and TC channels at a time. A cell is a block of SIDE^3 voxels, of which those at the last faces
# may lie outside, and there are N of them in a sample: voxels where SIDE is 1, and where it is 2 what pooling makes one
# voxel of. `partial` is (B, chunks, 2, C), `stats` and `sums` are (B, 2, C), all float32.


@triton.jit
def _corner(first, corner, N, X, Y, Z, SIDE: tl.constexpr, TN: tl.constexpr):
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
def _pooled_voxel(first, N, X, Y, Z, TN: tl.constexpr):
    """The voxel of the pooled map that each of TN cells becomes; cells that are not whole become none."""
    n = first + tl.arange(0, TN)
    cells_y, cells_z = tl.cdiv(Y, 2), tl.cdiv(Z, 2)
    x, y, z = n // (cells_y * cells_z), n // cells_z % cells_y, n % cells_z
    return (x * (Y // 2) + y) * (Z // 2) + z, (n < N) & (x < X // 2) & (y < Y // 2) & (z < Z // 2)


@triton.jit
def _block(b, n, inside, voxels, C: tl.constexpr, TC: tl.constexpr):
    """Offsets of the channels of voxels n in a map of so many voxels per sample, and which of them exist."""
    c = tl.program_id(1) * TC + tl.arange(0, TC)
    inside = inside[:, None]
    if C % TC != 0:
        inside = inside & (c < C)[None, :]
    return (b.to(tl.int64) * voxels + n)[:, None] * C + c[None, :], inside


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
def _is_larger(value, largest):
    """As in `max_pool3d`: of equal numbers the first is the maximum, and what is not a number is larger than all."""
    return (value > largest) | (value != value)


@triton.jit
def _moments_kernel(x, partial, N, ROWS, C: tl.constexpr, TN: tl.constexpr, TC: tl.constexpr):
    """Mean, and sum of squared distances from it, of each channel over ROWS voxels (Welford 1962, Chan et al. 1979).

    Each of the TN lanes has a mean of its own, which takes in one voxel after another; at last they are merged.
    """
    chunk, b = tl.program_id(0), tl.program_id(2)
    count = tl.zeros((TN, 1), tl.float32)
    mean = tl.zeros((TN, TC), tl.float32)
    squares = tl.zeros((TN, TC), tl.float32)
    for i in range(0, ROWS, TN):
        n = chunk * ROWS + i + tl.arange(0, TN)
        offset, inside = _block(b, n, n < N, N, C, TC)
        value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        count += tl.where(n < N, 1.0, 0.0)[:, None]
        distance = tl.where(inside, value - mean, 0.0)
        mean += distance / tl.maximum(count, 1.0)
        squares += distance * (value - mean)
    merged = tl.sum(mean * count, 0) / tl.sum(count)
    distance = mean - merged[None, :]
    c = tl.program_id(1) * TC + tl.arange(0, TC)
    out = partial + (b * tl.num_programs(0) + chunk).to(tl.int64) * 2 * C + c
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
    x, y, pooled, stats, scale, shift, N, X, Y, Z,
    C: tl.constexpr, SLOPE: tl.constexpr, SIDE: tl.constexpr, TN: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    b, first = tl.program_id(2), tl.program_id(0) * TN
    mean, rstd, factor, constant = _channels(stats, scale, shift, b, C, TC)
    largest = tl.full((TN, TC), float("-inf"), tl.float32)
    for corner in tl.static_range(SIDE * SIDE * SIDE):
        n, inside = _corner(first, corner, N, X, Y, Z, SIDE, TN)
        offset, inside = _block(b, n, inside, X * Y * Z, C, TC)
        value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        value = _output(value, mean, rstd, factor, constant, SLOPE).to(y.dtype.element_ty)
        tl.store(y + offset, value, mask=inside)
        if SIDE > 1:
            value = value.to(tl.float32)
            largest = tl.where(_is_larger(value, largest), value, largest)
    if SIDE > 1:
        n, inside = _pooled_voxel(first, N, X, Y, Z, TN)
        offset, inside = _block(b, n, inside, (X // 2) * (Y // 2) * (Z // 2), C, TC)
        tl.store(pooled + offset, largest.to(pooled.dtype.element_ty), mask=inside)


@triton.jit
def _pooled_gradient(
    kept, grad_pooled, mean, rstd, factor, constant, b, first, N, X, Y, Z,
    C: tl.constexpr, SLOPE: tl.constexpr, INVERSE: tl.constexpr, TN: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """The gradient of the maximum of each cell, and the corner that it goes to: the first that has the maximum."""
    largest = tl.full((TN, TC), float("-inf"), tl.float32)
    which = tl.zeros((TN, TC), tl.int32)
    for corner in tl.static_range(8):
        n, inside = _corner(first, corner, N, X, Y, Z, 2, TN)
        offset, inside = _block(b, n, inside, X * Y * Z, C, TC)
        value = tl.load(kept + offset, mask=inside, other=0.0).to(tl.float32)
        if not INVERSE:  # rounded like the output, which decides what is equal
            value = _output(value, mean, rstd, factor, constant, SLOPE).to(kept.dtype.element_ty).to(tl.float32)
        larger = _is_larger(value, largest)
        which = tl.where(larger, corner, which)
        largest = tl.where(larger, value, largest)
    n, inside = _pooled_voxel(first, N, X, Y, Z, TN)
    offset, inside = _block(b, n, inside, (X // 2) * (Y // 2) * (Z // 2), C, TC)
    return which, tl.load(grad_pooled + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _normalised(
    kept, grad, offset, inside, mean, rstd, factor, constant, of_maximum,
    SLOPE: tl.constexpr, INVERSE: tl.constexpr, HAS_GRAD: tl.constexpr,
):  # fmt: skip
    """Normalised values and the gradient before the leaky ReLU, from the kept input, or (INVERSE) the kept output.

    of_maximum: what the pooled map adds to the gradient of the output.
    """
    value = tl.load(kept + offset, mask=inside, other=0.0).to(tl.float32)
    g = of_maximum
    if HAS_GRAD:
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
    kept, grad, grad_pooled, partial, stats, scale, shift, N, X, Y, Z, ROWS,
    C: tl.constexpr, SLOPE: tl.constexpr, SIDE: tl.constexpr, INVERSE: tl.constexpr, HAS_GRAD: tl.constexpr,
    TN: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """Sums over ROWS cells of the gradient before the leaky ReLU, and of its product with the normalised values."""
    chunk, b = tl.program_id(0), tl.program_id(2)
    mean, rstd, factor, constant = _channels(stats, scale, shift, b, C, TC)
    d_shift = tl.zeros((TN, TC), tl.float32)
    d_scale = tl.zeros((TN, TC), tl.float32)
    for i in range(0, ROWS, TN):
        first = chunk * ROWS + i
        if SIDE > 1:
            which, g_pooled = _pooled_gradient(
                kept, grad_pooled, mean, rstd, factor, constant, b, first, N, X, Y, Z, C, SLOPE, INVERSE, TN, TC
            )
        for corner in tl.static_range(SIDE * SIDE * SIDE):
            n, inside = _corner(first, corner, N, X, Y, Z, SIDE, TN)
            offset, inside = _block(b, n, inside, X * Y * Z, C, TC)
            of_maximum = tl.zeros((TN, TC), tl.float32)
            if SIDE > 1:
                of_maximum = tl.where(which == corner, g_pooled, 0.0)
            value, g = _normalised(
                kept, grad, offset, inside, mean, rstd, factor, constant, of_maximum, SLOPE, INVERSE, HAS_GRAD
            )
            d_shift += g  # 0 outside, where nothing was loaded
            d_scale += g * value
    c = tl.program_id(1) * TC + tl.arange(0, TC)
    out = partial + (b * tl.num_programs(0) + chunk).to(tl.int64) * 2 * C + c
    tl.store(out, tl.sum(d_shift, 0), mask=c < C)
    tl.store(out + C, tl.sum(d_scale, 0), mask=c < C)


@triton.jit
def _gradient_kernel(
    kept, grad, grad_pooled, grad_x, sums, stats, scale, shift, N, X, Y, Z,
    C: tl.constexpr, SLOPE: tl.constexpr, SIDE: tl.constexpr, INVERSE: tl.constexpr, HAS_GRAD: tl.constexpr,
    TN: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """The gradient by the input: without its mean and its part along the normalised values."""
    b, first = tl.program_id(2), tl.program_id(0) * TN
    mean, rstd, factor, constant = _channels(stats, scale, shift, b, C, TC)
    c = tl.program_id(1) * TC + tl.arange(0, TC)
    mean_g = tl.load(sums + b * 2 * C + c, mask=c < C, other=0.0)[None, :] / (X * Y * Z)
    along = tl.load(sums + b * 2 * C + C + c, mask=c < C, other=0.0)[None, :] / (X * Y * Z)
    if SIDE > 1:
        which, g_pooled = _pooled_gradient(
            kept, grad_pooled, mean, rstd, factor, constant, b, first, N, X, Y, Z, C, SLOPE, INVERSE, TN, TC
        )
    for corner in tl.static_range(SIDE * SIDE * SIDE):
        n, inside = _corner(first, corner, N, X, Y, Z, SIDE, TN)
        offset, inside = _block(b, n, inside, X * Y * Z, C, TC)
        of_maximum = tl.zeros((TN, TC), tl.float32)
        if SIDE > 1:
            of_maximum = tl.where(which == corner, g_pooled, 0.0)
        value, g = _normalised(
            kept, grad, offset, inside, mean, rstd, factor, constant, of_maximum, SLOPE, INVERSE, HAS_GRAD
        )
        g = rstd * factor * (g - mean_g - value * along)
        tl.store(grad_x + offset, g.to(grad_x.dtype.element_ty), mask=inside)


class _Grid:
    """Blocks of rows: those of a pass over all cells, and the longer chunks of a sum over them."""

    def __init__(self, rows: torch.Tensor, side: int = 1) -> None:
        self.batch, *self.sides, self.channels = rows.shape
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

    def over_cells(self) -> tuple[int, int, int]:
        return triton.cdiv(self.cells, self.tiles["TN"]), self.blocks, self.batch

    def partial(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.new_empty((self.batch, self.chunks, 2, self.channels), dtype=torch.float32)


def statistics(rows: torch.Tensor, eps: float) -> torch.Tensor:
    """Mean and 1 / standard deviation of each sample and channel, (B, 2, C), float32."""
    grid = _Grid(rows)
    partial = grid.partial(rows)
    stats = rows.new_empty((grid.batch, 2, grid.channels), dtype=torch.float32)
    lanes = {**grid.tiles, "TN": min(grid.tiles["TN"], 32)}
    with on_device_of(rows):
        _moments_kernel[grid.over_chunks()](rows, partial, grid.cells, grid.rows, **grid.tiles)
        _merge_kernel[(grid.batch, grid.blocks)](
            partial, stats, grid.cells, grid.rows, grid.chunks, eps, **lanes
        )  # fmt: skip
    return stats


# Operators ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("amaes::norm_act", mutates_args=())
def norm_act(
    rows: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, slope: float, keep_input: bool, pool: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows (B, X, Y, Z, C) to rows, to these pooled, and to the statistics (B, 2, C); autograd keeps in- or output.

    The pooled rows are `max_pool3d` of side 2; without `pool` they have no voxels.
    """
    stats, y, pooled = statistics(rows, eps), torch.empty_like(rows), _empty_pooled(rows, pool)
    side = 2 if pool else 1
    grid = _Grid(rows, side)
    with on_device_of(rows):
        _apply_kernel[grid.over_cells()](
            rows, y, pooled, stats, scale, shift, grid.cells, *grid.sides, SLOPE=slope, SIDE=side, **grid.tiles
        )  # fmt: skip
    return y, pooled, stats


def _empty_pooled(rows: torch.Tensor, pool: bool) -> torch.Tensor:
    b, *sides, channels = rows.shape
    return rows.new_empty((b, *(side // 2 if pool else 0 for side in sides), channels))


@norm_act.register_fake
def _(rows, scale, shift, eps, slope, keep_input, pool):
    stats = rows.new_empty((rows.shape[0], 2, rows.shape[-1]), dtype=torch.float32)
    return torch.empty_like(rows), _empty_pooled(rows, pool), stats


@torch.library.custom_op("amaes::norm_act_gradients", mutates_args=())
def gradients(
    kept: torch.Tensor,
    grad: torch.Tensor | None,
    grad_pooled: torch.Tensor | None,
    stats: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    slope: float,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `norm_act` by rows, scale and shift; `kept` are its output rows where `inverse`, else its input.

    grad, grad_pooled: of the output rows and of the pooled ones; None where they have none.
    """
    side = 1 if grad_pooled is None else 2
    grid, grad_x = _Grid(kept, side), torch.empty_like(kept)
    partial = grid.partial(kept)
    form = {"SLOPE": slope, "SIDE": side, "INVERSE": inverse, "HAS_GRAD": grad is not None, **grid.tiles}
    grads = [kept if g is None else g for g in (grad, grad_pooled)]  # of None nothing is read
    with on_device_of(kept):
        _sums_kernel[grid.over_chunks()](
            kept, *grads, partial, stats, scale, shift, grid.cells, *grid.sides, grid.rows, **form
        )  # fmt: skip
        sums = partial.sum(1)
        _gradient_kernel[grid.over_cells()](
            kept, *grads, grad_x, sums, stats, scale, shift, grid.cells, *grid.sides, **form
        )  # fmt: skip
    d_shift, d_scale = sums.sum(0)
    return grad_x, d_scale.to(scale.dtype), d_shift.to(shift.dtype, copy=True)


@gradients.register_fake
def _(kept, grad, grad_pooled, stats, scale, shift, slope, inverse):
    return torch.empty_like(kept), torch.empty_like(scale), torch.empty_like(shift)


def _setup_context(ctx, inputs, output):
    rows, scale, shift, _, ctx.slope, keep_input, ctx.pool = inputs
    y, _, stats = output
    ctx.inverse = not keep_input
    ctx.save_for_backward(rows if keep_input else y, stats, scale, shift)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_pooled, _):
    kept, stats, scale, shift = ctx.saved_tensors
    grads = [None if g is None else g.contiguous() for g in (grad, grad_pooled if ctx.pool else None)]
    return *gradients(kept, *grads, stats, scale, shift, ctx.slope, ctx.inverse), None, None, None, None


norm_act.register_autograd(_backward, setup_context=_setup_context)
