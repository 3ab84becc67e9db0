"""Mean squared error over all or hidden voxels, against a target that may be standardized, and its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from amaes.models.ops.kernels import TILE, on_device_of, power_of_two

PROGRAMS = 528  # of a sum: four on each multiprocessor of an H100 or H200

# A line is a channel of a sample: B * C of them, of N voxels. `target` is (B, C, N), `mask` (B, N), 1 = hidden,
# `prediction` (B, C, N) of strides (C * N, CHANNEL, VOXEL). A program has TN voxels at a time. `partial` is
# (lines, chunks, 3), `stats` (lines, 2): mean and standard deviation of the target's visible voxels; both float32.


@triton.jit
def _moments_kernel(target, mask, partial, N, ROWS, C: tl.constexpr, TN: tl.constexpr):
    """Number and mean of the visible voxels among ROWS, and the sum of their squared distances from it (Welford)."""
    chunk, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    count = tl.zeros((TN,), tl.float32)
    mean = tl.zeros((TN,), tl.float32)
    squares = tl.zeros((TN,), tl.float32)
    for i in range(0, ROWS, TN):
        n = chunk * ROWS + i + tl.arange(0, TN)
        visible = tl.load(mask + (line // C) * N + n, mask=n < N, other=1) == 0
        value = tl.load(target + line * N + n, mask=visible, other=0.0).to(tl.float32)
        count += tl.where(visible, 1.0, 0.0)
        distance = tl.where(visible, value - mean, 0.0)
        mean += distance / tl.maximum(count, 1.0)
        squares += distance * (value - mean)
    total = tl.sum(count, 0)
    merged = tl.sum(mean * count, 0) / tl.maximum(total, 1.0)
    distance = mean - merged
    out = partial + (line * tl.num_programs(0) + chunk) * 3
    tl.store(out, total)
    tl.store(out + 1, merged)
    tl.store(out + 2, tl.sum(squares + count * distance * distance, 0))


@triton.jit
def _merge_kernel(partial, stats, CHUNKS, smallest, TN: tl.constexpr):
    """Mean and standard deviation, at least `smallest`, of a line from the moments of its chunks."""
    line, chunk = tl.program_id(0).to(tl.int64), tl.arange(0, TN)
    start = partial + (line * CHUNKS + chunk) * 3
    count = tl.load(start, mask=chunk < CHUNKS, other=0.0)
    means = tl.load(start + 1, mask=chunk < CHUNKS, other=0.0)
    squares = tl.load(start + 2, mask=chunk < CHUNKS, other=0.0)
    total = tl.sum(count, 0)
    mean = tl.sum(count * means, 0) / total
    distance = means - mean
    variance = tl.sum(squares + count * distance * distance, 0) / total
    tl.store(stats + line * 2, mean)
    tl.store(stats + line * 2 + 1, tl.maximum(tl.sqrt(variance), smallest))


@triton.jit
def _difference(
    prediction, target, mask, stats, first, N, CHANNEL, VOXEL,
    C: tl.constexpr, HIDDEN: tl.constexpr, STANDARDIZE: tl.constexpr, TN: tl.constexpr,
):  # fmt: skip
    """Prediction less target of TN voxels, which of them exist and which count, and their offsets in `prediction`."""
    line = tl.program_id(1).to(tl.int64)
    n = first + tl.arange(0, TN)
    inside = n < N
    counts = inside
    if HIDDEN:
        counts = tl.load(mask + (line // C) * N + n, mask=inside, other=0) != 0
    offset = (line // C) * C * N + (line % C) * CHANNEL + n.to(tl.int64) * VOXEL
    wanted = tl.load(target + line * N + n, mask=counts, other=0.0).to(tl.float32)
    if STANDARDIZE:
        wanted = (wanted - tl.load(stats + line * 2)) / tl.load(stats + line * 2 + 1)
    value = tl.load(prediction + offset, mask=counts, other=0.0).to(tl.float32)
    return tl.where(counts, value - wanted, 0.0), inside, counts, offset


@triton.jit
def _error_kernel(
    prediction, target, mask, stats, partial, N, ROWS, CHANNEL, VOXEL,
    C: tl.constexpr, HIDDEN: tl.constexpr, STANDARDIZE: tl.constexpr, TN: tl.constexpr,
):  # fmt: skip
    """Over ROWS voxels: the sum of squared errors of those that count, and their number."""
    chunk, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    total = tl.zeros((TN,), tl.float32)
    count = tl.zeros((TN,), tl.float32)
    for i in range(0, ROWS, TN):
        error, _, counts, _ = _difference(
            prediction, target, mask, stats, chunk * ROWS + i, N, CHANNEL, VOXEL, C, HIDDEN, STANDARDIZE, TN
        )
        total += error * error
        count += tl.where(counts, 1.0, 0.0)
    out = partial + (line * tl.num_programs(0) + chunk) * 2
    tl.store(out, tl.sum(total, 0))
    tl.store(out + 1, tl.sum(count, 0))


@triton.jit
def _gradient_kernel(
    prediction, target, mask, stats, grad_loss, divisor, grad, N, CHANNEL, VOXEL,
    C: tl.constexpr, HIDDEN: tl.constexpr, STANDARDIZE: tl.constexpr, TN: tl.constexpr,
):  # fmt: skip
    error, inside, _, offset = _difference(
        prediction, target, mask, stats, tl.program_id(0) * TN, N, CHANNEL, VOXEL, C, HIDDEN, STANDARDIZE, TN
    )
    factor = 2.0 * tl.load(grad_loss).to(tl.float32) / tl.load(divisor)
    tl.store(grad + offset, (error * factor).to(grad.dtype.element_ty), mask=inside)


class _Lines:
    """Sizes of the grids over a prediction, and what all kernels are given."""

    def __init__(self, prediction: torch.Tensor, over: str, standardize: bool) -> None:
        batch, channels = prediction.shape[:2]
        self.lines, self.voxels = batch * channels, prediction[0, 0].numel()
        self.tile = min(TILE // 4, power_of_two(self.voxels))
        self.rows = triton.cdiv(triton.cdiv(self.voxels, max(1, PROGRAMS // self.lines)), self.tile) * self.tile
        self.chunks = triton.cdiv(self.voxels, self.rows)
        self.blocks = triton.cdiv(self.voxels, self.tile)
        self.strides = (self.voxels, 1) if prediction.is_contiguous() else (1, channels)
        self.form = {"C": channels, "HIDDEN": over != "all", "STANDARDIZE": standardize, "TN": self.tile}


def _as_it_lies(x: torch.Tensor) -> torch.Tensor:
    """`x`, contiguous or channels-last, else a contiguous copy."""
    return x if x.is_contiguous(memory_format=torch.channels_last_3d) else x.contiguous()


# Operators ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("amaes::masked_error", mutates_args=())
def masked_error(
    prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, over: str, smallest_sd: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The error, a scalar; the target's statistics, (B C, 2); and what the sum was divided by, a scalar; all float32.

    Args:
        prediction, target: (B, C, X, Y, Z).
        mask: (B, 1, X, Y, Z), bool, True = hidden.
        over: "all", "masked" or "masked-parity".
        smallest_sd: lower bound of the standard deviation; 0: the target is taken as it is.
    """
    prediction, target, hidden = _as_it_lies(prediction), target.contiguous(), mask.contiguous().view(torch.uint8)
    grid = _Lines(prediction, over, smallest_sd > 0)
    stats = prediction.new_empty((grid.lines, 2), dtype=torch.float32)
    partial = stats.new_empty((grid.lines, grid.chunks, 2))
    with on_device_of(prediction):
        if smallest_sd > 0:
            _visible_statistics(grid, target, hidden, stats, smallest_sd)
        _error_kernel[(grid.chunks, grid.lines)](
            prediction, target, hidden, stats, partial, grid.voxels, grid.rows, *grid.strides, **grid.form
        )  # fmt: skip
        total, divisor = partial.sum((0, 1)).unbind()
        divisor = torch.full_like(total, target.numel()) if over == "masked-parity" else divisor.clone()
    return total / divisor, stats, divisor


def _visible_statistics(
    grid: _Lines, target: torch.Tensor, hidden: torch.Tensor, stats: torch.Tensor, smallest: float
) -> None:
    moments = stats.new_empty((grid.lines, grid.chunks, 3))
    sizes = {"C": grid.form["C"], "TN": grid.tile}
    _moments_kernel[(grid.chunks, grid.lines)](target, hidden, moments, grid.voxels, grid.rows, **sizes)
    _merge_kernel[(grid.lines,)](moments, stats, grid.chunks, smallest, TN=power_of_two(grid.chunks))


@masked_error.register_fake
def _(prediction, target, mask, over, smallest_sd):
    loss = prediction.new_empty((), dtype=torch.float32)
    return loss, loss.new_empty((prediction.shape[0] * prediction.shape[1], 2)), torch.empty_like(loss)


@torch.library.custom_op("amaes::masked_error_gradient", mutates_args=())
def gradient(
    prediction: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor,
    stats: torch.Tensor,
    grad_loss: torch.Tensor,
    divisor: torch.Tensor,
    over: str,
    standardize: bool,
) -> torch.Tensor:
    """Gradient of `masked_error` by the prediction, in its type and memory layout."""
    prediction, target, hidden = _as_it_lies(prediction), target.contiguous(), mask.contiguous().view(torch.uint8)
    grid = _Lines(prediction, over, standardize)
    grad = torch.empty_like(prediction)
    with on_device_of(prediction):
        _gradient_kernel[(grid.blocks, grid.lines)](
            prediction, target, hidden, stats, grad_loss, divisor, grad, grid.voxels, *grid.strides, **grid.form
        )  # fmt: skip
    return grad


@gradient.register_fake
def _(prediction, target, mask, stats, grad_loss, divisor, over, standardize):
    return torch.empty_like(_as_it_lies(prediction))


def _setup_context(ctx, inputs, output):
    prediction, target, mask, ctx.over, smallest_sd = inputs
    _, stats, divisor = output
    ctx.standardize = smallest_sd > 0
    ctx.save_for_backward(prediction, target, mask, stats, divisor)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    prediction, target, mask, stats, divisor = ctx.saved_tensors
    return gradient(prediction, target, mask, stats, grad, divisor, ctx.over, ctx.standardize), None, None, None, None


masked_error.register_autograd(_backward, setup_context=_setup_context)
