"""Instance norm, expand, GELU, response norm, project and residual of rows, for few channels, and their gradients.

No hidden row is written: the backward pass computes them again. `w1` is (C, H), `w2` (H, OUT), in the type of the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from amaes.models.ops.dispatch import autocast_off
from amaes.models.ops.kernels import on_device_of, power_of_two
from amaes.models.ops.kernels.norm_act import statistics

MOST_CHANNELS = 64  # in and out, so that the weights of a block of hidden channels fit beside the rows
GRN_EPS = 1e-6  # as in `ops.norm_mlp`
ROWS, HIDDEN = 64, 64  # of a block
PROGRAMS = 528  # of a sum over space: four on each multiprocessor of an H100 or H200

# C, H and OUT are numbers of channels; TC, TH and TO powers of two, at least 16, which a block has. Weights beyond C, H
# and OUT are zero. N voxels are the space of a sample. `factor` (B, H) is what the response norm multiplies by, `slope`
# (B, H) its gradient's part along the hidden value.


@triton.jit
def _normalised(x, stats, b, n, N, C: tl.constexpr, TC: tl.constexpr):
    """Rows of a block, normalised, float32 (TN, TC)."""
    c = tl.arange(0, TC)
    mean = tl.load(stats + b * 2 * C + c, mask=c < C, other=0.0)
    rstd = tl.load(stats + b * 2 * C + C + c, mask=c < C, other=0.0)
    inside = (n < N)[:, None] & (c < C)[None, :]
    value = tl.load(x + (b.to(tl.int64) * N + n)[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
    return (value - mean[None, :]) * rstd[None, :]


@triton.jit
def _scaled(value, scale, shift, C: tl.constexpr, TC: tl.constexpr):
    c = tl.arange(0, TC)
    factor = tl.load(scale + c, mask=c < C, other=0.0).to(tl.float32)
    constant = tl.load(shift + c, mask=c < C, other=0.0).to(tl.float32)
    return value * factor[None, :] + constant[None, :]


@triton.jit
def _matrix(w, i, j, rows, columns):
    """Block (i, j) of a matrix (rows, columns)."""
    return tl.load(w + i[:, None] * columns + j[None, :], mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0)


@triton.jit
def _gelu(z):
    return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _gelu_slope(z):
    return 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)


@triton.jit
def _squares_kernel(
    x, partial, stats, scale, shift, w1, b1, N, CHUNK,
    C: tl.constexpr, H: tl.constexpr, TC: tl.constexpr, TH: tl.constexpr, TN: tl.constexpr,
):  # fmt: skip
    """Sums over CHUNK voxels of the squares of the hidden values: partial (B, chunks, H)."""
    chunk, b = tl.program_id(0), tl.program_id(2)
    c, h = tl.arange(0, TC), tl.program_id(1) * TH + tl.arange(0, TH)
    w = _matrix(w1, c, h, C, H)
    bias = tl.load(b1 + h, mask=h < H, other=0.0).to(tl.float32)
    total = tl.zeros((TN, TH), tl.float32)
    for i in range(0, CHUNK, TN):
        n = chunk * CHUNK + i + tl.arange(0, TN)
        value = _scaled(_normalised(x, stats, b, n, N, C, TC), scale, shift, C, TC).to(w.dtype)
        hidden = _gelu(tl.dot(value, w, input_precision="ieee") + bias[None, :])
        total += tl.where((n < N)[:, None], hidden * hidden, 0.0)
    tl.store(partial + (b * tl.num_programs(0) + chunk) * H + h, tl.sum(total, 0), mask=h < H)


@triton.jit
def _forward_kernel(
    x, residual, y, stats, scale, shift, w1, b1, w2, b2, factor, N,
    C: tl.constexpr, H: tl.constexpr, OUT: tl.constexpr, TC: tl.constexpr, TH: tl.constexpr, TO: tl.constexpr,
    TN: tl.constexpr, HAS_GRN: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1)
    n, c, o = tl.program_id(0) * TN + tl.arange(0, TN), tl.arange(0, TC), tl.arange(0, TO)
    value = _scaled(_normalised(x, stats, b, n, N, C, TC), scale, shift, C, TC).to(w1.dtype.element_ty)
    total = tl.zeros((TN, TO), tl.float32) + tl.load(b2 + o, mask=o < OUT, other=0.0).to(tl.float32)[None, :]
    for first in tl.static_range(0, H, TH):
        h = first + tl.arange(0, TH)
        bias = tl.load(b1 + h, mask=h < H, other=0.0).to(tl.float32)
        hidden = _gelu(tl.dot(value, _matrix(w1, c, h, C, H), input_precision="ieee") + bias[None, :])
        if HAS_GRN:
            hidden = hidden * tl.load(factor + b * H + h, mask=h < H, other=0.0)[None, :]
        total += tl.dot(hidden.to(value.dtype), _matrix(w2, h, o, H, OUT), input_precision="ieee")
    offset = (b.to(tl.int64) * N + n)[:, None] * OUT + o[None, :]
    inside = (n < N)[:, None] & (o < OUT)[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + offset, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _hidden_gradient(
    value, g, w1_block, w2_block, b1, factor, slope, b, n, h, N, H: tl.constexpr, HAS_GRN: tl.constexpr
):  # fmt: skip
    """Hidden values, and the gradient before the GELU, (TN, TH), of rows `value` with gradient `g`."""
    bias = tl.load(b1 + h, mask=h < H, other=0.0).to(tl.float32)
    z = tl.dot(value, w1_block, input_precision="ieee") + bias[None, :]
    hidden = _gelu(z)
    d_hidden = tl.dot(g, tl.trans(w2_block), input_precision="ieee")
    if HAS_GRN:
        d_hidden = d_hidden * tl.load(factor + b * H + h, mask=h < H, other=0.0)[None, :]
        d_hidden += hidden * tl.load(slope + b * H + h, mask=h < H, other=0.0)[None, :]
    return hidden.to(value.dtype), tl.where((n < N)[:, None], d_hidden * _gelu_slope(z), 0.0).to(value.dtype)


@triton.jit
def _weights_kernel(
    x, grad, d_expand, d_bias, d_project, stats, scale, shift, w1, b1, w2, factor, slope, N, CHUNK,
    C: tl.constexpr, H: tl.constexpr, OUT: tl.constexpr, TC: tl.constexpr, TH: tl.constexpr, TO: tl.constexpr,
    TN: tl.constexpr, HAS_GRN: tl.constexpr, EXPAND: tl.constexpr, PROJECT: tl.constexpr,
):  # fmt: skip
    """Sums over CHUNK voxels: normalised rows x gradient before the GELU, that gradient, hidden rows x gradient.

    d_expand (B, chunks, C, H) and d_bias (B, chunks, H) where EXPAND; d_project (B, chunks, H, OUT) where PROJECT.
    """
    chunk, b = tl.program_id(0), tl.program_id(2)
    c, h, o = tl.arange(0, TC), tl.program_id(1) * TH + tl.arange(0, TH), tl.arange(0, TO)
    w1_block, w2_block = _matrix(w1, c, h, C, H), _matrix(w2, h, o, H, OUT)
    expand = tl.zeros((TC, TH), tl.float32)
    bias = tl.zeros((TN, TH), tl.float32)
    project = tl.zeros((TH, TO), tl.float32)
    for i in range(0, CHUNK, TN):
        n = chunk * CHUNK + i + tl.arange(0, TN)
        inside = (n < N)[:, None] & (o < OUT)[None, :]
        g = tl.load(grad + (b.to(tl.int64) * N + n)[:, None] * OUT + o[None, :], mask=inside, other=0.0)
        normalised = _normalised(x, stats, b, n, N, C, TC)
        value = _scaled(normalised, scale, shift, C, TC).to(w1_block.dtype)
        hidden, d_z = _hidden_gradient(
            value, g, w1_block, w2_block, b1, factor, slope, b, n, h, N, H, HAS_GRN
        )  # fmt: skip
        if EXPAND:
            expand += tl.dot(tl.trans(normalised.to(value.dtype)), d_z, input_precision="ieee")
            bias += d_z.to(tl.float32)
        if PROJECT:
            project += tl.dot(tl.trans(hidden), g, input_precision="ieee")
    part = (b * tl.num_programs(0) + chunk).to(tl.int64)
    if EXPAND:
        in_block = (c < C)[:, None] & (h < H)[None, :]
        tl.store(d_expand + part * C * H + c[:, None] * H + h[None, :], expand, mask=in_block)
        tl.store(d_bias + part * H + h, tl.sum(bias, 0), mask=h < H)
    if PROJECT:
        in_block = (h < H)[:, None] & (o < OUT)[None, :]
        tl.store(d_project + part * H * OUT + h[:, None] * OUT + o[None, :], project, mask=in_block)


@triton.jit
def _rows_kernel(
    x, grad, grad_x, sums, stats, scale, shift, w1, b1, w2, factor, slope, N,
    C: tl.constexpr, H: tl.constexpr, OUT: tl.constexpr, TC: tl.constexpr, TH: tl.constexpr, TO: tl.constexpr,
    TN: tl.constexpr, HAS_GRN: tl.constexpr,
):  # fmt: skip
    """Gradient by the input rows.

    sums: (B, 2, C), of the gradient by the norm's output, and of its product with the normalised rows.
    """
    b = tl.program_id(1)
    n, c, o = tl.program_id(0) * TN + tl.arange(0, TN), tl.arange(0, TC), tl.arange(0, TO)
    inside = (n < N)[:, None] & (o < OUT)[None, :]
    g = tl.load(grad + (b.to(tl.int64) * N + n)[:, None] * OUT + o[None, :], mask=inside, other=0.0)
    normalised = _normalised(x, stats, b, n, N, C, TC)
    value = _scaled(normalised, scale, shift, C, TC).to(w1.dtype.element_ty)
    total = tl.zeros((TN, TC), tl.float32)
    for first in tl.static_range(0, H, TH):
        h = first + tl.arange(0, TH)
        w1_block, w2_block = _matrix(w1, c, h, C, H), _matrix(w2, h, o, H, OUT)
        _, d_z = _hidden_gradient(value, g, w1_block, w2_block, b1, factor, slope, b, n, h, N, H, HAS_GRN)
        total += tl.dot(d_z, tl.trans(w1_block), input_precision="ieee")
    in_c = c < C
    mean = tl.load(sums + b * 2 * C + c, mask=in_c, other=0.0) / N
    along = tl.load(sums + b * 2 * C + C + c, mask=in_c, other=0.0) / N
    outer = tl.load(stats + b * 2 * C + C + c, mask=in_c, other=0.0)
    outer = outer * tl.load(scale + c, mask=in_c, other=0.0).to(tl.float32)
    total = outer[None, :] * (total - mean[None, :] - normalised * along[None, :])
    inside = (n < N)[:, None] & in_c[None, :]
    offset = (b.to(tl.int64) * N + n)[:, None] * C + c[None, :]
    tl.store(grad_x + offset, total.to(grad_x.dtype.element_ty), mask=inside)


class _Shapes:
    """Numbers of channels and blocks of one call."""

    def __init__(self, rows: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> None:
        self.batch, self.voxels = rows.shape[0], rows[0].numel() // rows.shape[-1]
        self.hidden = w1.shape[1]
        th = min(HIDDEN, max(16, power_of_two(self.hidden)))
        self.blocks = triton.cdiv(self.hidden, th)
        tc = max(16, power_of_two(w1.shape[0]))
        self.narrow = {"C": w1.shape[0], "H": self.hidden, "TC": tc, "TH": th, "TN": ROWS}
        self.wide = {**self.narrow, "OUT": w2.shape[1], "TO": max(16, power_of_two(w2.shape[1]))}
        self.sums = {**self.wide, "TN": ROWS // 2}  # sums of the weights' gradients need registers: so none is spilled
        most = max(1, PROGRAMS // (self.batch * self.blocks))
        self.chunk = triton.cdiv(triton.cdiv(self.voxels, most), ROWS) * ROWS  # voxels
        self.chunks = triton.cdiv(self.voxels, self.chunk)
        self.over_chunks = (self.chunks, self.blocks, self.batch)
        self.over_voxels = (triton.cdiv(self.voxels, ROWS), self.batch)


def _response(norms: torch.Tensor, gamma: torch.Tensor, divisor: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor of each hidden channel (B, H), and what its norm is divided by (B, 1); `norms` are (B, H)."""
    divided_by = (norms.mean(1, keepdim=True) if divisor == "mean" else norms.sum(1, keepdim=True)) + GRN_EPS
    return 1 + gamma * norms / divided_by, divided_by


def _response_slope(
    norms: torch.Tensor, gamma: torch.Tensor, divided_by: torch.Tensor, d_factor: torch.Tensor, divisor: str
) -> torch.Tensor:
    """Gradient through the norm of a hidden channel, per hidden value, (B, H)."""
    d_ratio = d_factor * gamma
    d_divided_by = -(d_ratio * norms).sum(1, keepdim=True) / divided_by.square()
    slope = d_ratio / divided_by + d_divided_by / (norms.shape[1] if divisor == "mean" else 1)
    return torch.where(norms > 0, slope / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0)


# Operators ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("amaes::norm_mlp", mutates_args=())
def norm_mlp(
    rows: torch.Tensor,
    residual: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    expand: torch.Tensor,
    expand_bias: torch.Tensor,
    project: torch.Tensor,
    project_bias: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    eps: float,
    divisor: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `ops.norm_mlp`: rows (B, X, Y, Z, C) to rows of OUT channels, with what the backward pass needs.

    Args:
        rows, residual: of the same type.
        scale, shift: of the norm, (C,).
        expand, project: (H, C) and (OUT, H), in any type.
        gamma, beta: (H,), or None without response norm.
        divisor: of the response norm.

    Returns:
        Rows; statistics of the norm, (B, 2, C); norms of the hidden channels, (B, H), or nothing in (B, 0).
    """
    w1, w2 = expand.t().to(rows.dtype).contiguous(), project.t().to(rows.dtype).contiguous()
    shapes, stats = _Shapes(rows, w1, w2), statistics(rows, eps)
    norms = rows.new_empty((shapes.batch, 0), dtype=torch.float32)
    factor, y = stats, rows.new_empty((*rows.shape[:-1], w2.shape[1]))
    with on_device_of(rows), autocast_off(rows):
        if gamma is not None:
            partial = stats.new_empty((shapes.batch, shapes.chunks, shapes.hidden))
            _squares_kernel[shapes.over_chunks](
                rows, partial, stats, scale, shift, w1, expand_bias, shapes.voxels, shapes.chunk,
                **shapes.narrow, num_warps=4, num_stages=2,
            )  # fmt: skip
            norms = partial.sum(1).sqrt()
            factor, _ = _response(norms, gamma.float(), divisor)
            project_bias = project_bias.float() + project.float() @ beta.float()
        _forward_kernel[shapes.over_voxels](
            rows, rows if residual is None else residual, y, stats, scale, shift, w1, expand_bias, w2, project_bias,
            factor, shapes.voxels, **shapes.wide, HAS_GRN=gamma is not None, HAS_RESIDUAL=residual is not None,
            num_warps=4, num_stages=2,
        )  # fmt: skip
    return y, stats, norms


@norm_mlp.register_fake
def _(rows, residual, scale, shift, expand, expand_bias, project, project_bias, gamma, beta, eps, divisor):
    y = rows.new_empty((*rows.shape[:-1], project.shape[0]))
    stats = rows.new_empty((rows.shape[0], 2, rows.shape[-1]), dtype=torch.float32)
    return y, stats, stats.new_empty((rows.shape[0], 0 if gamma is None else expand.shape[0]))


@torch.library.custom_op("amaes::norm_mlp_gradients", mutates_args=())
def gradients(
    rows: torch.Tensor,
    grad: torch.Tensor,
    stats: torch.Tensor,
    norms: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    expand: torch.Tensor,
    expand_bias: torch.Tensor,
    project: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    divisor: str,
) -> list[torch.Tensor]:
    """Gradients of `norm_mlp` by rows and by its weights in their order, float32 but for the rows."""
    w1, w2 = expand.t().to(rows.dtype).contiguous(), project.t().to(rows.dtype).contiguous()
    shapes, has_grn = _Shapes(rows, w1, w2), gamma is not None
    d_expand = stats.new_empty((shapes.batch, shapes.chunks, *w1.shape))
    d_bias = stats.new_empty((shapes.batch, shapes.chunks, shapes.hidden))
    d_project = stats.new_empty((shapes.batch, shapes.chunks, *w2.shape))
    factor = slope = stats
    weights = (stats, scale, shift, w1, expand_bias, w2)

    def sum_up(**form: bool) -> None:
        _weights_kernel[shapes.over_chunks](
            rows, grad, d_expand, d_bias, d_project, *weights, factor, slope, shapes.voxels, shapes.chunk,
            **shapes.sums, **form, num_warps=4, num_stages=2,
        )  # fmt: skip

    with on_device_of(rows), autocast_off(rows):
        d_project_bias = grad.sum((0, 1, 2, 3), dtype=torch.float32)
        if has_grn:
            sum_up(HAS_GRN=False, EXPAND=False, PROJECT=True)
            per_sample = d_project.sum(1)  # (B, H, OUT)
            factor, divided_by = _response(norms, gamma.float(), divisor)
            d_factor = (per_sample * w2.float()).sum(2)
            slope = _response_slope(norms, gamma.float(), divided_by, d_factor, divisor)
            d_w2 = (per_sample * factor[..., None]).sum(0) + torch.outer(beta.float(), d_project_bias)
            of_grn = [(d_factor * norms / divided_by).sum(0), project.float().t() @ d_project_bias]
            sum_up(HAS_GRN=True, EXPAND=True, PROJECT=False)
        else:
            sum_up(HAS_GRN=False, EXPAND=True, PROJECT=True)
            d_w2, of_grn = d_project.sum((0, 1)), []
        d_w1, d_z = d_expand.sum(1), d_bias.sum(1)  # (B, C, H) for normalised rows without scale and shift, (B, H)
        sums = torch.stack([d_z @ w1.float().t(), (d_w1 * w1.float()).sum(2)], 1)  # (B, 2, C)
        grad_x = torch.empty_like(rows)
        _rows_kernel[shapes.over_voxels](
            rows, grad, grad_x, sums, *weights, factor, slope, shapes.voxels,
            **shapes.wide, HAS_GRN=has_grn, num_warps=4, num_stages=2,
        )  # fmt: skip
    d_expand_bias = d_z.sum(0)
    d_w1 = d_w1.sum(0) * scale.float()[:, None] + torch.outer(shift.float(), d_expand_bias)
    d_shift, d_scale = (part.clone() for part in sums.sum(0))
    d_expand, d_project = d_w1.t().contiguous(), d_w2.t().contiguous()
    return [grad_x, d_scale, d_shift, d_expand, d_expand_bias, d_project, d_project_bias, *of_grn]


@gradients.register_fake
def _(rows, grad, stats, norms, scale, shift, expand, expand_bias, project, gamma, beta, divisor):
    hidden = [] if gamma is None else [gamma, beta]
    like = [scale, shift, expand, expand_bias, project, project[:, 0], *hidden]
    return [torch.empty_like(rows), *(stats.new_empty(tensor.shape) for tensor in like)]


def _setup_context(ctx, inputs, output):
    rows, residual, scale, shift, expand, expand_bias, project, _, gamma, beta, _, ctx.divisor = inputs
    _, stats, norms = output
    ctx.save_for_backward(rows, stats, norms, scale, shift, expand, expand_bias, project, gamma, beta)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[2:10]]
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    rows, *saved = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x, *of_weights = gradients(rows, grad, *saved, ctx.divisor)
    of_weights += [None] * (8 - len(of_weights))
    of_weights = [None if g is None else g.to(dtype) for g, dtype in zip(of_weights, ctx.dtypes, strict=True)]
    return grad_x, grad if ctx.has_residual else None, *of_weights, None, None


norm_mlp.register_autograd(_backward, setup_context=_setup_context)
