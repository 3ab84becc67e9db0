"""Norm, expand, GELU, response norm, project: the chain of a MedNeXt block after its depthwise convolution."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from amaes.models.ops import dispatch
from amaes.models.ops.dispatch import (
    SPACE,
    autocast_off,
    compute_dtype,
    from_rows,
    to_rows,
    wide_dtype,
    without_autocast,
)
from amaes.models.ops.norm_act import norm_only
from amaes.models.ops.pointwise import pointwise

PIECE = 2**20  # numbers of the hidden tensor that are computed at a time on the CPU, so that they stay in its cache
GRN_EPS = 1e-6
MOST_CHANNELS = 64  # of input and output in Triton; more go through cuBLAS, with the norm in Triton


def norm_mlp(
    x: torch.Tensor,
    norm: nn.GroupNorm,
    expand: nn.Conv3d,
    project: nn.Conv3d,
    grn: nn.Module | None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Instance norm, 1x1x1 convolution to the hidden width, exact GELU, GRN where there is one, 1x1x1 convolution.

    Args:
        x: (B, C, X, Y, Z).
        norm: one group per channel, affine.
        expand: C to H channels.
        project: H to O channels.
        grn: has `gamma` and `beta`, (1, H, 1, 1, 1), and `divisor` (see `response_norm`); None leaves it out.
        residual: (B, O, X, Y, Z), added at last; or None.

    Returns:
        (B, O, X, Y, Z), in channels-last memory. Statistics are in float32 (or float64) whatever autocast says.
    """
    if dispatch.use_triton(x) and max(expand.in_channels, project.out_channels) <= MOST_CHANNELS:
        return _triton(x, norm, expand, project, grn, residual)
    y = _without_residual(x, norm, expand, project, grn)
    return y if residual is None else residual + y


def _without_residual(
    x: torch.Tensor, norm: nn.GroupNorm, expand: nn.Conv3d, project: nn.Conv3d, grn: nn.Module | None
) -> torch.Tensor:
    if dispatch.use_cpu_path(x) and not torch.compiler.is_compiling():  # its loop would be unrolled in the graph
        return _cpu(x, norm, expand, project, grn)
    return _plain(x, norm, expand, project, grn)


def response_norm(h: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, divisor: str) -> torch.Tensor:
    """Global response normalisation (ConvNeXt V2, arXiv 2301.00808, Sec. 3.2), with the residual.

    g is the L2 norm over space of each sample and channel; h + gamma * h * g / (mean of g over channels + 1e-6) + beta.

    Args:
        h: (B, H, X, Y, Z).
        gamma, beta: (1, H, 1, 1, 1).
        divisor: "mean" over the channels (the code of the MedNeXt authors), or their "sum" (the formula of
            arXiv 2512.17774, Sec. 3.2).
    """
    g = torch.linalg.vector_norm(h, dim=SPACE, keepdim=True, dtype=wide_dtype(h.dtype))  # (B, H, 1, 1, 1)
    scale = 1 + gamma * g / (_over_channels(g, divisor, dim=1) + GRN_EPS)
    return torch.addcmul(beta.to(h.dtype), h, scale.to(h.dtype))


def _over_channels(g: torch.Tensor, divisor: str, dim: int) -> torch.Tensor:
    return g.mean(dim, keepdim=True) if divisor == "mean" else g.sum(dim, keepdim=True)


def _plain(
    x: torch.Tensor, norm: nn.GroupNorm, expand: nn.Conv3d, project: nn.Conv3d, grn: nn.Module | None
) -> torch.Tensor:
    h = pointwise(norm_only(x, norm), expand.weight, expand.bias)  # (B, H, X, Y, Z)
    h = F.gelu(h)
    if grn is not None:
        h = response_norm(h, grn.gamma, grn.beta, grn.divisor)
    return pointwise(h, project.weight, project.bias)


# In Triton ------------------------------------------------------------------------------------------------------------


def _triton(
    x: torch.Tensor,
    norm: nn.GroupNorm,
    expand: nn.Conv3d,
    project: nn.Conv3d,
    grn: nn.Module | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """As rows of channels: without copies of channels-last tensors, and without a hidden row in memory."""
    from amaes.models.ops.kernels.norm_mlp import norm_mlp as rows_norm_mlp

    rows = to_rows(x)
    residual_rows = None if residual is None else residual.to(rows.dtype).movedim(1, -1).contiguous()
    weights = (expand.weight.flatten(1), expand.bias, project.weight.flatten(1), project.bias)
    gamma, beta, divisor = (None, None, "") if grn is None else (grn.gamma.flatten(), grn.beta.flatten(), grn.divisor)
    y, _, _ = rows_norm_mlp(
        rows, residual_rows, norm.weight, norm.bias, *weights, gamma, beta, norm.eps, divisor
    )  # fmt: skip
    return from_rows(y)


# On the CPU -----------------------------------------------------------------------------------------------------------


class _Weights(NamedTuple):
    """Weights of the chain, or their gradients; float32 or float64."""

    norm_scale: torch.Tensor  # (C,)
    norm_shift: torch.Tensor  # (C,)
    expand: torch.Tensor  # (H, C)
    expand_bias: torch.Tensor  # (H,)
    project: torch.Tensor  # (O, H)
    project_bias: torch.Tensor  # (O,)
    gamma: torch.Tensor | None = None  # (H,); None without response norm
    beta: torch.Tensor | None = None  # (H,)


class _Statistics(NamedTuple):
    """Of one sample, as in `_Weights`."""

    mean: torch.Tensor  # (C,), of the input
    rstd: torch.Tensor  # (C,), 1 / standard deviation of the input
    g: torch.Tensor | None = None  # (H,), L2 norms of the hidden channels; None without response norm


def _cpu(
    x: torch.Tensor, norm: nn.GroupNorm, expand: nn.Conv3d, project: nn.Conv3d, grn: nn.Module | None
) -> torch.Tensor:
    dtype = compute_dtype(x)
    weights = [norm.weight, norm.bias, expand.weight.flatten(1), expand.bias, project.weight.flatten(1), project.bias]
    if grn is not None:
        weights += [grn.gamma.flatten(), grn.beta.flatten()]
    weights = [weight.to(wide_dtype(dtype)) for weight in weights]
    divisor = None if grn is None else grn.divisor
    with autocast_off(x):
        rows = x.to(dtype).movedim(1, -1)  # (B, X, Y, Z, C)
        y = _NormMLP.apply(rows.flatten(1, 3), norm.eps, divisor, *weights)
    return y.unflatten(1, rows.shape[1:4]).movedim(-1, 1)


class _NormMLP(torch.autograd.Function):
    """`norm_mlp` on rows of channels, (B, N, C), piece by piece, so that the hidden tensor never leaves the cache.

    Per sample both norms are affine maps per channel, so they are folded into the matrices before which they stand: no
    response-normalised tensor is written. Only the input is kept; the backward pass computes the hidden rows again.
    Gradients of the statistics come from the small products of gradient and input that the weights need anyway.
    """

    @staticmethod
    def forward(ctx, rows, eps, divisor, *weights):
        weights = _Weights(*weights)
        out = rows.new_empty((*rows.shape[:2], len(weights.project)))  # (B, N, O)
        ctx.statistics = [_forward_sample(x, y, eps, divisor, weights) for x, y in zip(rows, out, strict=True)]
        ctx.save_for_backward(rows, *weights)
        ctx.divisor = divisor
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad):
        rows, *weights = ctx.saved_tensors
        weights = _Weights(*weights)
        grad_rows, sums = torch.empty_like(rows), None
        for x, grad_y, grad_x, statistics in zip(rows, grad, grad_rows, ctx.statistics, strict=True):
            gradients = _sample_gradients(x, grad_y.contiguous(), grad_x, statistics, ctx.divisor, weights)
            sums = gradients if sums is None else [a + b for a, b in zip(sums, gradients, strict=True)]
        return grad_rows, None, None, *sums


def _forward_sample(
    x: torch.Tensor, y: torch.Tensor, eps: float, divisor: str | None, weights: _Weights
) -> _Statistics:
    """Write the output of one sample's rows x (N, C) to y (N, O)."""
    no_running_values = weights.norm_scale.new_zeros(2, x.shape[1])
    mean, var = torch.batch_norm_update_stats(x, *no_running_values, 0.0)
    statistics = _Statistics(mean, (var + eps).rsqrt_())
    shift, matrix, bias = _fold_norm(statistics, weights, x.dtype)
    hidden = len(weights.expand)
    project, project_bias = weights.project, weights.project_bias
    if weights.gamma is not None:
        squares = mean.new_zeros(hidden)
        for (piece,) in _pieces(hidden, x):
            squares += F.gelu(torch.addmm(bias, piece - shift, matrix)).to(squares.dtype).square_().sum(0)
        g = squares.sqrt_()
        statistics = statistics._replace(g=g)
        project = project * (1 + weights.gamma * g / (_over_channels(g, divisor, 0) + GRN_EPS))
        project_bias = project_bias + weights.project @ weights.beta
    project, project_bias = project.to(x.dtype).t(), project_bias.to(x.dtype)
    for piece, out in _pieces(hidden, x, y):
        torch.addmm(project_bias, F.gelu(torch.addmm(bias, piece - shift, matrix)), project, out=out)
    return statistics


def _sample_gradients(
    x: torch.Tensor,
    grad_y: torch.Tensor,
    grad_x: torch.Tensor,
    statistics: _Statistics,
    divisor: str | None,
    weights: _Weights,
) -> list[torch.Tensor]:
    """Write the gradient by one sample's rows to `grad_x` (N, C) and return those by the weights, in their order."""
    mean, rstd, g = statistics
    shift, matrix, bias = _fold_norm(statistics, weights, x.dtype)
    hidden = len(weights.expand)
    d_project_bias = grad_y.sum(0, dtype=mean.dtype)
    d_project = torch.zeros_like(
        weights.project
    )  # until it is scaled, the product of gradient and unscaled hidden rows
    project, grn_slope, d_gamma_beta = weights.project.to(x.dtype), None, []
    if g is not None:
        for piece, grad_piece in _pieces(hidden, x, grad_y):
            d_project += grad_piece.t() @ F.gelu(torch.addmm(bias, piece - shift, matrix))
        scale, grn_slope, d_gamma = _response_norm_gradients(g, d_project, divisor, weights)
        d_gamma_beta = [d_gamma, d_project_bias @ weights.project]
        project, grn_slope = (weights.project * scale).to(x.dtype), grn_slope.to(x.dtype)
        d_project = d_project * scale + torch.outer(d_project_bias, weights.beta)
    d_z = mean.new_zeros(hidden)  # sum over rows of the gradient by the expanded rows z
    d_expand = torch.zeros_like(weights.expand)  # product of that gradient with the centred input
    for piece, grad_piece, out in _pieces(hidden, x, grad_y, grad_x):
        centred = piece - shift
        z = torch.addmm(bias, centred, matrix)
        h = F.gelu(z)
        d_h = grad_piece @ project
        if grn_slope is None:
            d_project += grad_piece.t() @ h
        else:
            d_h.addcmul_(h, grn_slope)
        d_h = torch.ops.aten.gelu_backward(d_h, z)
        d_z += d_h.sum(0)
        d_expand += d_h.t() @ centred
        torch.mm(d_h, matrix.t(), out=out)
    d_expand.addr_(d_z, mean - shift, alpha=-1)
    d_norm_scale, d_norm_shift = (weights.expand * d_expand).sum(0) * rstd, d_z @ weights.expand
    # Instance norm: the gradient loses its mean and its part along the normalised input.
    slope = rstd * weights.norm_scale
    along = slope * rstd * d_norm_scale / len(x)
    constant = -slope * d_norm_shift / len(x) + along * mean
    for piece, out in _pieces(len(mean), x, grad_x):
        out.sub_(torch.addcmul(-constant, piece, along).to(out.dtype))
    d_expand = (d_expand * slope).addr_(d_z, weights.norm_shift)
    return [d_norm_scale, d_norm_shift, d_expand, d_z, d_project, d_project_bias, *d_gamma_beta]


def _response_norm_gradients(
    g: torch.Tensor, d_project: torch.Tensor, divisor: str, weights: _Weights
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the backward pass needs of the response norm, each (H,).

    Args:
        g: L2 norms of the hidden channels, (H,).
        d_project: product of gradient and hidden rows before the response norm, (O, H).
        divisor, weights: see `norm_mlp`, `_Weights`.

    Returns:
        The factor of each hidden channel; the gradient through its norm g, per hidden value; the gradient by gamma.
    """
    divided_by = _over_channels(g, divisor, 0) + GRN_EPS
    scale = 1 + weights.gamma * g / divided_by
    d_scale = (weights.project * d_project).sum(0)
    d_ratio = d_scale * weights.gamma
    d_divided_by = -(d_ratio * g).sum() / divided_by.square() / (len(g) if divisor == "mean" else 1)
    slope = (d_ratio / divided_by + d_divided_by) / g.clamp_min(torch.finfo(g.dtype).tiny)  # d g = h / g
    slope = torch.where(g > 0, slope, 0)  # a channel that is zero everywhere has no direction
    return scale, slope, d_scale * g / divided_by


def _fold_norm(
    statistics: _Statistics, weights: _Weights, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Instance norm and expansion of rows x as one affine map of x - shift: shift (C,), matrix (C, H), bias (H,).

    The shift is the mean, rounded to `dtype`: without it, a mean far from zero would cost the digits of the result.
    """
    shift = statistics.mean.to(dtype)
    matrix = (weights.expand * (statistics.rstd * weights.norm_scale)).to(dtype)  # (H, C)
    bias = weights.expand_bias + weights.expand @ weights.norm_shift
    bias = bias - matrix.to(statistics.mean.dtype) @ (statistics.mean - shift)
    return shift, matrix.t(), bias.to(dtype)


def _pieces(width: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Ranges of rows, the same of each of `tensors`: a range of `width` columns has about PIECE numbers."""
    return zip(*(tensor.split(max(256, PIECE // width)) for tensor in tensors), strict=True)
