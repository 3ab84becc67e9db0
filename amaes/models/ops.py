"""The operations that take the networks' time, each one function with one call site.

Of the U-Nets, `norm_act` is instance norm and leaky ReLU (`unet.ConvUnit`), `up_conv` an upsampling and the convolution
after it (`decoder.UNetDecoder`). Of MedNeXt, `depthwise` is the depthwise convolution, `norm_mlp` the chain norm,
expand, GELU, response normalisation, project (`mednext.Block`). All are plain mathematics with a plain implementation;
in eager mode, or on the CPU, each has a second one that computes the same numbers from less memory or in less time. A
faster implementation for another device goes here and changes no model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import product

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

GRN_DIVISORS = ("mean", "sum")
PIECE = 2**20  # numbers of the hidden tensor that are computed at a time on the CPU, so that they stay in its cache
_GRN_EPS = 1e-6
_SPACE = (2, 3, 4)


def use_cpu_path(x: torch.Tensor) -> bool:
    """Whether `x` is computed by the CPU's own implementations."""
    return x.device.type == "cpu"


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The type autocast asks for where it is on, that of `x` where not."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if _autocast_applies(x) else x.dtype


def _autocast_applies(x: torch.Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def _autocast_off(x: torch.Tensor) -> AbstractContextManager:
    """Where the type of `x` is the type it is computed in; the meta device has no autocast to turn off."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def _without_autocast(backward: Callable) -> Callable:
    """Backward passes compute in the types of the forward pass, also where they are called inside autocast."""

    def run(ctx, grad: torch.Tensor):
        with _autocast_off(grad):
            return backward(ctx, grad)

    return run


def pointwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Convolution 1x1x1 as a matrix product over channels: (B, C, X, Y, Z) to (B, O, X, Y, Z) in channels-last memory.

    Args:
        x: input.
        weight: (O, C, 1, 1, 1).
        bias: (O,), or None.
    """
    return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)


# Instance norm and leaky ReLU -----------------------------------------------------------------------------------------

_SLOPE = 0.01  # of the leaky ReLU
_LARGEST_SHIFT = 8.0  # |shift| / |scale| of a norm up to which its input is found again from its output: 3 bits lost


def norm_act(x: torch.Tensor, norm: nn.InstanceNorm3d) -> torch.Tensor:
    """Instance norm, then leaky ReLU of slope 0.01; in eager mode autograd keeps one tensor for both.

    The output is kept, which the next convolution keeps anyway: both functions can be inverted. Where the scale of a
    channel is so small that its digits are lost, and on a GPU, which would have to be waited for to know, the input is
    kept as well; then it is as much as a leaky ReLU in place keeps.

    Args:
        x: (B, C, X, Y, Z).
        norm: affine, without running statistics. Statistics are in float32 (or float64) whatever autocast says.
    """
    if torch.compiler.is_compiling():  # one graph, in which the compiler decides what to keep
        return F.leaky_relu(norm(x), _SLOPE)
    return _NormAct.apply(x, norm.weight, norm.bias, norm.eps)


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, shift, eps):
        rows = x.contiguous().flatten(0, 1)[None]  # (1, B C, X, Y, Z): statistics per sample and channel
        scales, shifts = scale.repeat(len(x)), shift.repeat(len(x))
        y, mean, rstd = torch.native_batch_norm(rows, scales, shifts, None, None, True, 0.0, eps)
        y = F.leaky_relu_(y, _SLOPE).view(x.shape)
        again = x.device.type == "meta" or (
            x.device.type == "cpu" and bool((shift.abs() < _LARGEST_SHIFT * scale.abs()).all())
        )
        ctx.save_for_backward(y, None if again else rows, scales, shifts, mean, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx, grad):
        y, rows, scales, shifts, mean, rstd = ctx.saved_tensors
        grad = torch.ops.aten.leaky_relu_backward(grad.contiguous(), y, _SLOPE, True).view(1, -1, *y.shape[2:])
        if rows is None:  # the norm's output has the same normalised values as its input, with another mean and spread
            rows = F.leaky_relu(y, 1 / _SLOPE).view_as(grad)
            scales, mean, rstd = rstd * scales.square(), shifts.to(mean.dtype), scales.to(rstd.dtype).reciprocal()
        grad_x, *grads = torch.ops.aten.native_batch_norm_backward(
            grad, rows, scales, None, None, mean, rstd, True, ctx.eps, [True] * 3
        )
        grad_scale, grad_shift = (part.view(len(y), -1).sum(0) for part in grads)
        return grad_x.view_as(y), grad_scale, grad_shift, None


# Upsampling and the convolution after it ------------------------------------------------------------------------------


def one_is_less(x: torch.Tensor, up: nn.ConvTranspose3d, conv: nn.Conv3d) -> bool:
    """Whether `up_conv` takes less arithmetic than its two convolutions, the composition of their weights included.

    On the CPU only, where it was measured.
    """
    step, kernel = up.stride[0], conv.kernel_size[0]
    fine = x[:, 0].numel() * step**3  # voxels
    each = up.in_channels * up.out_channels + kernel**3 * up.out_channels * conv.out_channels
    composed = up.in_channels * conv.out_channels * (step + kernel - 1) ** 3
    return use_cpu_path(x) and composed * (fine / step**3 + kernel**3 * up.out_channels) < each * fine


def up_conv(x: torch.Tensor, up: nn.ConvTranspose3d, conv: nn.Conv3d) -> torch.Tensor:
    """`conv(up(x))` as one transposed convolution; the upsampled map is not written, nor kept for the backward pass.

    Both are linear, so their composition is one linear map, whose kernel is the convolution of theirs. It needs 32
    instead of 58 multiply-adds per voxel and pair of channels for halved sides and channels and kernel 3.

    Args:
        x: (B, C, X, Y, Z).
        up: kernel equal to its stride, with bias.
        conv: odd kernel k, padding k // 2, with bias.
    """
    with _autocast_off(x):  # the composed kernel is rounded once
        kernel = F.conv3d(up.weight, conv.weight, padding=conv.kernel_size[0] - 1)
    y = F.conv_transpose3d(x, kernel, None, up.stride, conv.padding)
    with _autocast_off(x):
        return y.add_(_bias_map(up.bias, conv, y.shape[2:]).to(y.dtype))


def _bias_map(bias: torch.Tensor, conv: nn.Conv3d, shape: torch.Size) -> torch.Tensor:
    """Convolution of constant channels, (1, O, *shape): constant but where the kernel reaches over a face."""
    reach = conv.padding[0]
    image = bias.view(1, -1, 1, 1, 1).expand(1, -1, *(min(side, 2 * reach + 1) for side in shape))
    y = F.conv3d(image, conv.weight, conv.bias, padding=reach)
    for axis, side in enumerate(shape, start=2):
        if side > y.shape[axis]:
            first, middle, last = y.split((reach, 1, reach), axis)
            between = [-1] * axis + [side - 2 * reach] + [-1] * (4 - axis)
            y = torch.cat([first, middle.expand(between), last], axis)
    return y


# Depthwise convolution ------------------------------------------------------------------------------------------------


def depthwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, resample: str) -> torch.Tensor:
    """Depthwise convolution of odd kernel k, padding k // 2.

    Args:
        x: (B, C, X, Y, Z).
        weight: (C, 1, k, k, k).
        bias: (C,).
        resample: "same" (stride 1), "down" (stride 2, side n to ceil(n / 2)), or "up" (transposed, stride 2 without
            output padding, side n to 2n - 1).
    """
    if use_cpu_path(x):
        dtype = compute_dtype(x)
        with _autocast_off(x):
            return _Depthwise.apply(x.to(dtype), weight.to(dtype), bias.to(dtype), resample)
    options = {"stride": 1 if resample == "same" else 2, "padding": weight.shape[-1] // 2, "groups": x.shape[1]}
    convolve = F.conv_transpose3d if resample == "up" else F.conv3d
    return convolve(x, weight, bias, **options)


class _Depthwise(torch.autograd.Function):
    """On the CPU every pass is a forward convolution in channels-last memory, or a sum of 2D weight gradients.

    oneDNN has fast code for depthwise 3D convolutions in the forward direction only, and for 2D ones in all. The input
    gradient is a convolution with the mirrored kernel; strides are zeros put between the voxels.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, resample):
        ctx.save_for_backward(x, weight)
        ctx.resample = resample
        if resample == "up":
            return _convolve(_spread(x), weight.flip(_SPACE), bias)
        return _convolve(x, weight, bias, stride=1 if resample == "same" else 2)

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.resample == "up":
            grad_x = _convolve(grad, weight, None, stride=2)
            grad_weight = _weight_gradient(grad, x, weight, stride=2)
        else:
            spread = grad if ctx.resample == "same" else _spread(grad, x.shape[2:])
            grad_x = _convolve(spread, weight.flip(_SPACE), None)
            grad_weight = _weight_gradient(x, grad, weight, stride=1 if ctx.resample == "same" else 2)
        return grad_x, grad_weight, grad.sum((0, *_SPACE)), None


def _convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int = 1) -> torch.Tensor:
    x = x.contiguous(memory_format=torch.channels_last_3d)
    return F.conv3d(x, weight, bias, stride, weight.shape[-1] // 2, groups=x.shape[1])


def _spread(x: torch.Tensor, shape: torch.Size | None = None) -> torch.Tensor:
    """Zeros between the voxels: side n to 2n - 1, or to `shape`."""
    shape = shape or [2 * side - 1 for side in x.shape[2:]]
    wide = x.new_zeros((*x.shape[:2], *shape)).contiguous(memory_format=torch.channels_last_3d)
    wide[..., ::2, ::2, ::2] = x
    return wide


def _weight_gradient(x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
    """d/dw of sum(grad * convolve(x, w, stride)), from 2D weight gradients over all slices.

    oneDNN's 2D code is fast up to kernel 3, so a larger kernel is put together from overlapping squares of 3 x 3.
    """
    k, pad, side = weight.shape[-1], weight.shape[-1] // 2, min(3, weight.shape[-1])
    total = torch.zeros_like(weight)
    for b, c in product(range(0, k - side + 1, 2), repeat=2):
        part, margin = x, pad
        if k > side:
            ends = [start + stride * (n - 1) + side for start, n in zip((b, c), grad.shape[3:], strict=True)]
            part, margin = F.pad(x, (pad, pad, pad, pad))[..., b : ends[0], c : ends[1]], 0
        part = part.contiguous(memory_format=torch.channels_last_3d)
        for a in range(k):
            plane = _plane_gradient(part, grad, weight[:, :, a, :side, :side], a - pad, stride, margin)
            total[:, :, a, b : b + side, c : c + side] = plane
    return total


def _plane_gradient(x, grad, weight, offset: int, stride: int, margin: int) -> torch.Tensor:
    """Weight gradient of one plane of a kernel, which reads slice stride * i + offset of x for slice i of grad."""
    first = max(0, -(offset // stride))
    last = min(grad.shape[2], (x.shape[2] - 1 - offset) // stride + 1)
    begin = stride * first + offset
    total = torch.zeros_like(weight)
    for x_one, grad_one in zip(x, grad, strict=True) if last > first else ():  # (C, X, Y, Z), one sample
        x_slices = x_one[:, begin : begin + stride * (last - first - 1) + 1 : stride].movedim(1, 0)
        grad_slices = grad_one[:, first:last].movedim(1, 0)  # (slices, C, Y, Z)
        total = (
            total
            + torch.ops.aten.convolution_backward(
                grad_slices.contiguous(memory_format=torch.channels_last),
                x_slices.contiguous(memory_format=torch.channels_last),
                weight,
                None,
                [stride] * 2,
                [margin] * 2,
                [1, 1],
                False,
                [0, 0],
                len(weight),
                [False, True, False],
            )[1]
        )
    return total


# Norm, expand, GELU, response normalisation, project ------------------------------------------------------------------


def norm_mlp(
    x: torch.Tensor, norm: nn.GroupNorm, expand: nn.Conv3d, project: nn.Conv3d, grn: nn.Module | None
) -> torch.Tensor:
    """Instance norm, 1x1x1 convolution to the hidden width, exact GELU, GRN where there is one, 1x1x1 convolution.

    Args:
        x: (B, C, X, Y, Z).
        norm: one group per channel, affine.
        expand: C to H channels.
        project: H to O channels.
        grn: has `gamma` and `beta`, (1, H, 1, 1, 1), and `divisor` (see `response_norm`); None leaves it out.

    Returns:
        (B, O, X, Y, Z), in channels-last memory. Statistics are in float32 (or float64) whatever autocast says.
    """
    if use_cpu_path(x) and not torch.compiler.is_compiling():  # a loop over pieces would become part of the graph
        dtype = compute_dtype(x)
        wide = torch.promote_types(dtype, torch.float32)
        weights = [norm.weight, norm.bias, expand.weight.flatten(1), expand.bias]
        weights += [project.weight.flatten(1), project.bias]
        weights += [] if grn is None else [grn.gamma.flatten(), grn.beta.flatten()]
        weights = [weight.to(wide) for weight in weights]
        with _autocast_off(x):
            rows = x.to(dtype).movedim(1, -1)  # (B, X, Y, Z, C)
            divisor = None if grn is None else grn.divisor
            y = _NormMLP.apply(rows.flatten(1, 3), norm.eps, divisor, *weights)
        return y.unflatten(1, rows.shape[1:4]).movedim(-1, 1)
    h = pointwise(norm(x), expand.weight, expand.bias)
    h = F.gelu(h)
    if grn is not None:
        h = response_norm(h, grn.gamma, grn.beta, grn.divisor)
    return pointwise(h, project.weight, project.bias)


def response_norm(h: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, divisor: str) -> torch.Tensor:
    """Global response normalisation (ConvNeXt V2, arXiv 2301.00808, Sec. 3.2), with the residual.

    g is the L2 norm over space of each sample and channel; h + gamma * h * g / (mean of g over channels + 1e-6) + beta.

    Args:
        h: (B, H, X, Y, Z).
        gamma, beta: (1, H, 1, 1, 1).
        divisor: "mean" over the channels (the code of the MedNeXt authors), or their "sum" (the formula of
            arXiv 2512.17774, Sec. 3.2).
    """
    wide = torch.promote_types(h.dtype, torch.float32)
    g = torch.linalg.vector_norm(h, dim=_SPACE, keepdim=True, dtype=wide)  # (B, H, 1, 1, 1)
    scale = 1 + gamma * g / (_over_channels(g, divisor, dim=1) + _GRN_EPS)
    return torch.addcmul(beta.to(h.dtype), h, scale.to(h.dtype))


def _over_channels(g: torch.Tensor, divisor: str, dim: int) -> torch.Tensor:
    return g.mean(dim, keepdim=True) if divisor == "mean" else g.sum(dim, keepdim=True)


class _NormMLP(torch.autograd.Function):
    """`norm_mlp` on rows of channels, piece by piece, so that the hidden tensor never leaves the cache.

    Per sample both norms are affine maps per channel, so they are folded into the matrices they stand before: no
    response-normalised tensor is written. Only the input is kept; the backward pass computes the hidden rows again.
    Gradients of the statistics come from the small products of gradient and input that the weights need anyway.
    """

    @staticmethod
    def forward(ctx, rows, eps, divisor, norm_w, norm_b, w1, b1, w2, b2, gamma=None, beta=None):
        ctx.save_for_backward(rows, norm_w, norm_b, w1, b1, w2, gamma, beta)
        ctx.eps, ctx.divisor, ctx.statistics = eps, divisor, []
        out = rows.new_empty((*rows.shape[:2], len(w2)))  # (B, N, O)
        for x, y in zip(rows, out, strict=True):
            mean, var = torch.batch_norm_update_stats(x, *norm_w.new_zeros(2, len(norm_w)), 0.0)  # no running ones
            rstd = (var + eps).rsqrt_()
            shift, w_in, b_in = _fold_norm(mean, rstd, norm_w, norm_b, w1, b1, x.dtype)
            g, w_out, b_out = None, w2.to(x.dtype), b2
            if gamma is not None:
                g = mean.new_zeros(len(w1))
                for (x_,) in _pieces(len(w1), x):
                    g += F.gelu(torch.addmm(b_in, x_ - shift, w_in)).to(g.dtype).square_().sum(0)
                g = g.sqrt_()
                scale = 1 + gamma * g / (_over_channels(g, divisor, 0) + _GRN_EPS)
                w_out, b_out = (w2 * scale).to(x.dtype), b2 + w2 @ beta
            b_out = b_out.to(x.dtype)
            for x_, y_ in _pieces(len(w1), x, y):
                torch.addmm(b_out, F.gelu(torch.addmm(b_in, x_ - shift, w_in)), w_out.t(), out=y_)
            ctx.statistics.append((mean, rstd, g))
        return out

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx, grad):
        rows, norm_w, norm_b, w1, b1, w2, gamma, beta = ctx.saved_tensors
        grad_rows, sums = torch.empty_like(rows), None
        for x, y_grad, x_grad, statistics in zip(rows, grad, grad_rows, ctx.statistics, strict=True):
            parts = _sample_gradients(
                x, y_grad.contiguous(), x_grad, statistics, ctx.divisor, norm_w, norm_b, w1, b1, w2, gamma, beta
            )
            sums = parts if sums is None else [total + part for total, part in zip(sums, parts, strict=True)]
        return grad_rows, None, None, *sums


def _sample_gradients(x, y_grad, x_grad, statistics, divisor, norm_w, norm_b, w1, b1, w2, gamma, beta):
    """Write the gradient of one sample's rows to `x_grad` (N, C) and return those of the weights."""
    mean, rstd, g = statistics
    shift, w_in, b_in = _fold_norm(mean, rstd, norm_w, norm_b, w1, b1, x.dtype)
    hidden, wide = len(w1), mean.dtype
    d_b2 = y_grad.sum(0, dtype=wide)
    d_w2 = torch.zeros_like(w2)  # until it is scaled, the product of gradient and unscaled hidden rows
    w_out, pull = w2.to(x.dtype), None
    if gamma is not None:
        for x_, y_ in _pieces(hidden, x, y_grad):
            d_w2 += y_.t() @ F.gelu(torch.addmm(b_in, x_ - shift, w_in))
        divided = _over_channels(g, divisor, 0) + _GRN_EPS
        scale = 1 + gamma * g / divided
        d_scale = (w2 * d_w2).sum(0)
        d_gamma, d_beta = d_scale * g / divided, d_b2 @ w2
        d_ratio = d_scale * gamma
        d_divided = -(d_ratio * g).sum() / divided.square() / (hidden if divisor == "mean" else 1)
        per_norm = (d_ratio / divided + d_divided) / g.clamp_min(torch.finfo(wide).tiny)  # d g = h / g
        pull = torch.where(g > 0, per_norm, 0).to(x.dtype)  # a channel that is zero everywhere has no direction
        w_out = (w2 * scale).to(x.dtype)
        d_w2 = d_w2 * scale + torch.outer(d_b2, beta)
    d_z = mean.new_zeros(hidden)  # sum over rows of the gradient of the expanded rows
    d_in = torch.zeros_like(w1)  # its product with the centred input
    for x_, y_, out_ in _pieces(hidden, x, y_grad, x_grad):
        centred = x_ - shift
        z = torch.addmm(b_in, centred, w_in)
        h = F.gelu(z)
        d_h = y_ @ w_out
        if pull is None:
            d_w2 += y_.t() @ h
        else:
            d_h.addcmul_(h, pull)
        d_h = torch.ops.aten.gelu_backward(d_h, z)
        d_z += d_h.sum(0)
        d_in += d_h.t() @ centred
        torch.mm(d_h, w_in.t(), out=out_)
    slope = rstd * norm_w
    d_in.addr_(d_z, mean - shift, alpha=-1)
    d_norm_w, d_norm_b = (w1 * d_in).sum(0) * rstd, d_z @ w1
    # Instance norm: the gradient loses its mean and its part along the normalised input.
    along = slope * rstd * d_norm_w / len(x)
    constant = -slope * d_norm_b / len(x) + along * mean
    for x_, out_ in _pieces(len(mean), x, x_grad):
        out_.sub_(torch.addcmul(-constant, x_, along).to(out_.dtype))
    d_w1 = (d_in * slope).addr_(d_z, norm_b)
    return [d_norm_w, d_norm_b, d_w1, d_z, d_w2, d_b2, *([] if gamma is None else [d_gamma, d_beta])]


def _fold_norm(mean, rstd, norm_w, norm_b, w1, b1, dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Instance norm and expansion of rows x as one affine map of x - shift: shift (C,), matrix (C, H), bias (H,).

    Without the shift, the mean rounded to `dtype`, a mean far from zero would cost the digits of the result.
    """
    shift = mean.to(dtype)
    w_in = (w1 * (rstd * norm_w)).to(dtype)
    return shift, w_in.t(), (b1 + w1 @ norm_b - w_in.to(mean.dtype) @ (mean - shift)).to(dtype)


def _pieces(width: int, *tensors: torch.Tensor):
    """Tuples of row ranges of `tensors`, such that a piece `width` wide has about PIECE numbers."""
    return zip(*(tensor.split(max(256, PIECE // width)) for tensor in tensors), strict=True)
