"""Instance norm and leaky ReLU of rows (B, X, Y, Z, C), and their gradients. A slope of 1 is the norm alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from amaes.models.ops.kernels import TILE, channel_block, on_device_of

MOST_CHANNELS = 128  # of one program
PROGRAMS = 528  # of a sum over space: four on each multiprocessor of an H100 or H200

# Space is one axis of N voxels here. A program has TN voxels and TC channels at a time. `partial` is (B, chunks, 2, C),
# `stats` and `sums` are (B, 2, C), all float32.


@triton.jit
def _block(b, first, N, C: tl.constexpr, TN: tl.constexpr, TC: tl.constexpr):
    """Channels, the offsets of a block of a sample, and which of its numbers exist."""
    c = tl.program_id(1) * TC + tl.arange(0, TC)
    n = first + tl.arange(0, TN)
    inside = (n < N)[:, None]
    if C % TC != 0:
        inside = inside & (c < C)[None, :]
    return c, (b.to(tl.int64) * N + n)[:, None] * C + c[None, :], inside


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
        c, offset, inside = _block(b, chunk * ROWS + i, N, C, TN, TC)
        value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        count += tl.where(chunk * ROWS + i + tl.arange(0, TN) < N, 1.0, 0.0)[:, None]
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
    x, y, stats, scale, shift, N,
    C: tl.constexpr, SLOPE: tl.constexpr, TN: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2)
    c, offset, inside = _block(b, tl.program_id(0) * TN, N, C, TN, TC)
    mean = tl.load(stats + b * 2 * C + c, mask=c < C, other=0.0)
    rstd = tl.load(stats + b * 2 * C + C + c, mask=c < C, other=0.0)
    factor = rstd * tl.load(scale + c, mask=c < C, other=0.0).to(tl.float32)
    constant = tl.load(shift + c, mask=c < C, other=0.0).to(tl.float32)
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    value = (value - mean[None, :]) * factor[None, :] + constant[None, :]
    value = tl.where(value > 0, value, value * SLOPE)
    tl.store(y + offset, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _normalised(
    kept, grad, stats, scale, shift, b, first, N,
    C: tl.constexpr, SLOPE: tl.constexpr, INVERSE: tl.constexpr, TN: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """Normalised values and the gradient before the leaky ReLU, from the kept input, or (INVERSE) the kept output."""
    c, offset, inside = _block(b, first, N, C, TN, TC)
    constant = tl.load(shift + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    factor = tl.load(scale + c, mask=c < C, other=1.0).to(tl.float32)[None, :]
    value = tl.load(kept + offset, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        positive = value > 0
        value = (tl.where(positive, value, value * (1.0 / SLOPE)) - constant) / factor
    else:
        mean = tl.load(stats + b * 2 * C + c, mask=c < C, other=0.0)[None, :]
        rstd = tl.load(stats + b * 2 * C + C + c, mask=c < C, other=0.0)[None, :]
        value = (value - mean) * rstd
        positive = value * factor + constant > 0
    return c, offset, inside, value, tl.where(positive, g, g * SLOPE)


@triton.jit
def _sums_kernel(
    kept, grad, partial, stats, scale, shift, N, ROWS,
    C: tl.constexpr, SLOPE: tl.constexpr, INVERSE: tl.constexpr, TN: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """Sums over ROWS voxels of the gradient before the leaky ReLU, and of its product with the normalised values."""
    chunk, b = tl.program_id(0), tl.program_id(2)
    d_shift = tl.zeros((TN, TC), tl.float32)
    d_scale = tl.zeros((TN, TC), tl.float32)
    for i in range(0, ROWS, TN):
        _, _, _, value, g = _normalised(
            kept, grad, stats, scale, shift, b, chunk * ROWS + i, N, C, SLOPE, INVERSE, TN, TC
        )
        d_shift += g  # 0 outside, where nothing was loaded
        d_scale += g * value
    c = tl.program_id(1) * TC + tl.arange(0, TC)
    out = partial + (b * tl.num_programs(0) + chunk).to(tl.int64) * 2 * C + c
    tl.store(out, tl.sum(d_shift, 0), mask=c < C)
    tl.store(out + C, tl.sum(d_scale, 0), mask=c < C)


@triton.jit
def _gradient_kernel(
    kept, grad, grad_x, sums, stats, scale, shift, N,
    C: tl.constexpr, SLOPE: tl.constexpr, INVERSE: tl.constexpr, TN: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """The gradient by the input: without its mean and its part along the normalised values."""
    b = tl.program_id(2)
    c, offset, inside, value, g = _normalised(
        kept, grad, stats, scale, shift, b, tl.program_id(0) * TN, N, C, SLOPE, INVERSE, TN, TC
    )
    in_c = c < C
    mean_g = tl.load(sums + b * 2 * C + c, mask=in_c, other=0.0) / N
    along = tl.load(sums + b * 2 * C + C + c, mask=in_c, other=0.0) / N
    rstd = tl.load(stats + b * 2 * C + C + c, mask=in_c, other=0.0)
    factor = rstd * tl.load(scale + c, mask=in_c, other=0.0).to(tl.float32)
    g = factor[None, :] * (g - mean_g[None, :] - value * along[None, :])
    tl.store(grad_x + offset, g.to(grad_x.dtype.element_ty), mask=inside)


class _Grid:
    """Blocks of rows: those of a pass over all voxels, and the longer chunks of a sum over them."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.batch, self.channels = rows.shape[0], rows.shape[-1]
        self.voxels = rows[0].numel() // self.channels
        tc = channel_block(self.channels, MOST_CHANNELS)
        self.blocks = triton.cdiv(self.channels, tc)
        tn = max(1, TILE // tc)
        self.tiles = {"C": self.channels, "TN": tn, "TC": tc, "num_warps": 4}
        most = max(1, PROGRAMS // (self.batch * self.blocks))
        self.rows = triton.cdiv(triton.cdiv(self.voxels, most), tn) * tn
        self.chunks = triton.cdiv(self.voxels, self.rows)

    def over_chunks(self) -> tuple[int, int, int]:
        return self.chunks, self.blocks, self.batch

    def over_voxels(self) -> tuple[int, int, int]:
        return triton.cdiv(self.voxels, self.tiles["TN"]), self.blocks, self.batch

    def partial(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.new_empty((self.batch, self.chunks, 2, self.channels), dtype=torch.float32)


def statistics(rows: torch.Tensor, eps: float) -> torch.Tensor:
    """Mean and 1 / standard deviation of each sample and channel, (B, 2, C), float32."""
    grid = _Grid(rows)
    partial = grid.partial(rows)
    stats = rows.new_empty((grid.batch, 2, grid.channels), dtype=torch.float32)
    lanes = {**grid.tiles, "TN": min(grid.tiles["TN"], 32)}
    with on_device_of(rows):
        _moments_kernel[grid.over_chunks()](rows, partial, grid.voxels, grid.rows, **grid.tiles)
        _merge_kernel[(grid.batch, grid.blocks)](
            partial, stats, grid.voxels, grid.rows, grid.chunks, eps, **lanes
        )  # fmt: skip
    return stats


# Operators ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("amaes::norm_act", mutates_args=())
def norm_act(
    rows: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, slope: float, keep_input: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (B, X, Y, Z, C) to rows, and their statistics (B, 2, C); autograd keeps the input or else the output."""
    stats, y, grid = statistics(rows, eps), torch.empty_like(rows), _Grid(rows)
    with on_device_of(rows):
        _apply_kernel[grid.over_voxels()](rows, y, stats, scale, shift, grid.voxels, SLOPE=slope, **grid.tiles)
    return y, stats


@norm_act.register_fake
def _(rows, scale, shift, eps, slope, keep_input):
    return torch.empty_like(rows), rows.new_empty((rows.shape[0], 2, rows.shape[-1]), dtype=torch.float32)


@torch.library.custom_op("amaes::norm_act_gradients", mutates_args=())
def gradients(
    kept: torch.Tensor,
    grad: torch.Tensor,
    stats: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    slope: float,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `norm_act` by rows, scale and shift; `kept` are its output rows where `inverse`, else its input."""
    grid, grad_x = _Grid(kept), torch.empty_like(kept)
    partial = grid.partial(kept)
    form = {"SLOPE": slope, "INVERSE": inverse, **grid.tiles}
    with on_device_of(kept):
        _sums_kernel[grid.over_chunks()](
            kept, grad, partial, stats, scale, shift, grid.voxels, grid.rows, **form
        )  # fmt: skip
        sums = partial.sum(1)
        _gradient_kernel[grid.over_voxels()](
            kept, grad, grad_x, sums, stats, scale, shift, grid.voxels, **form
        )  # fmt: skip
    d_shift, d_scale = sums.sum(0)
    return grad_x, d_scale.to(scale.dtype), d_shift.to(shift.dtype, copy=True)


@gradients.register_fake
def _(kept, grad, stats, scale, shift, slope, inverse):
    return torch.empty_like(kept), torch.empty_like(scale), torch.empty_like(shift)


def _setup_context(ctx, inputs, output):
    rows, scale, shift, _, ctx.slope, keep_input = inputs
    y, stats = output
    ctx.inverse = not keep_input
    ctx.save_for_backward(rows if keep_input else y, stats, scale, shift)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    kept, stats, scale, shift = ctx.saved_tensors
    grads = gradients(kept, grad.contiguous(), stats, scale, shift, ctx.slope, ctx.inverse)
    return *grads, None, None, None


norm_act.register_autograd(_backward, setup_context=_setup_context)
