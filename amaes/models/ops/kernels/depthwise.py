"""Depthwise 3D convolutions of rows (B, X, Y, Z, C), kernel k and padding k // 2, and their gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from amaes.models.ops.kernels import TILE, channel_block, on_device_of, power_of_two

MOST_CHANNELS = 64  # of one program
MOST_CHUNKS = 32  # ranges of planes per sample, whose partial weight gradients are summed

# A program has a tile of TY x TZ voxels of one plane of fixed x, and TC channels. Offsets within a plane are int32,
# those of planes int64. `weight` is (k, k, k, blocks of channels * TC), filled up with zeros.


@triton.jit
def _in_plane(y, z, Y, Z, c, C: tl.constexpr, TC: tl.constexpr):
    """Whether voxels (N,) lie in the plane and channels (TC,) exist: (N, TC), or (N, 1) where all channels do."""
    inside = ((y >= 0) & (y < Y) & (z >= 0) & (z < Z))[:, None]
    if C % TC != 0:
        inside = inside & (c < C)[None, :]
    return inside


@triton.jit
def _convolve_kernel(
    x, weight, bias, y, X, Y, Z, OX, OY, OZ,
    C: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, HAS_BIAS: tl.constexpr,
    TY: tl.constexpr, TZ: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """y[o] = bias + sum over k of x[STRIDE * o + k - K // 2] * weight[k]."""
    WIDTH: tl.constexpr = (C + TC - 1) // TC * TC
    tile, plane = tl.program_id(0), tl.program_id(2)
    b, ox = plane // OX, plane % OX
    t, tiles_z = tl.arange(0, TY * TZ), tl.cdiv(OZ, TZ)
    oy, oz = (tile // tiles_z) * TY + t // TZ, (tile % tiles_z) * TZ + t % TZ
    iy, iz = oy * STRIDE - K // 2, oz * STRIDE - K // 2
    c = tl.program_id(1) * TC + tl.arange(0, TC)
    offset = (iy * Z + iz)[:, None] * C + c[None, :]
    total = tl.zeros((TY * TZ, TC), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    for a in tl.static_range(K):
        ix = ox * STRIDE + (a - K // 2)
        x_plane = x + (b * X + ix).to(tl.int64) * Y * Z * C
        if (ix >= 0) & (ix < X):
            for d in tl.static_range(K):
                for e in tl.static_range(K):
                    inside = _in_plane(iy + d, iz + e, Y, Z, c, C, TC)
                    value = tl.load(x_plane + (d * Z + e) * C + offset, mask=inside, other=0.0)
                    tap = tl.load(weight + ((a * K + d) * K + e) * WIDTH + c)
                    total += value.to(tl.float32) * tap.to(tl.float32)[None, :]
    y_plane = y + plane.to(tl.int64) * OY * OZ * C
    inside = _in_plane(oy, oz, OY, OZ, c, C, TC)
    tl.store(y_plane + (oy * OZ + oz)[:, None] * C + c[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _transposed_kernel(
    x, weight, bias, y, X, Y, Z, OX, OY, OZ,
    C: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, TY: tl.constexpr, TZ: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """y[2 i + k - K // 2] = bias + sum over k of x[i] * weight[k]: of stride 2, gathered.

    Voxels of a program are all even or all odd along each axis, so that they have the same taps: every second one.
    """
    P: tl.constexpr = K // 2
    WIDTH: tl.constexpr = (C + TC - 1) // TC * TC
    program, plane = tl.program_id(0), tl.program_id(2)
    py, pz, tile = program % 4 // 2, program % 2, program // 4
    b, ox = plane // OX, plane % OX
    px, mx = ox % 2, ox // 2
    t, tiles_z = tl.arange(0, TY * TZ), tl.cdiv((OZ + 1) // 2, TZ)
    my, mz = (tile // tiles_z) * TY + t // TZ, (tile % tiles_z) * TZ + t % TZ
    c = tl.program_id(1) * TC + tl.arange(0, TC)
    offset = (my * Z + mz)[:, None] * C + c[None, :]
    total = tl.zeros((TY * TZ, TC), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    for i in tl.static_range((K + 1) // 2):
        a = (px + P) % 2 + 2 * i
        ix = mx + (px + P - a) // 2  # an even number is halved, here and below
        x_plane = x + (b * X + ix).to(tl.int64) * Y * Z * C
        for j in tl.static_range((K + 1) // 2):
            d = (py + P) % 2 + 2 * j
            sy = (py + P - d) // 2
            for k in tl.static_range((K + 1) // 2):
                e = (pz + P) % 2 + 2 * k
                sz = (pz + P - e) // 2
                if (a < K) & (d < K) & (e < K) & (ix >= 0) & (ix < X):
                    inside = _in_plane(my + sy, mz + sz, Y, Z, c, C, TC)
                    value = tl.load(x_plane + (sy * Z + sz) * C + offset, mask=inside, other=0.0)
                    tap = tl.load(weight + ((a * K + d) * K + e) * WIDTH + c)
                    total += value.to(tl.float32) * tap.to(tl.float32)[None, :]
    oy, oz = 2 * my + py, 2 * mz + pz
    y_plane = y + plane.to(tl.int64) * OY * OZ * C
    inside = _in_plane(oy, oz, OY, OZ, c, C, TC)
    tl.store(y_plane + (oy * OZ + oz)[:, None] * C + c[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _product(grad, x_row, offset, iy, iz, Y, Z, c, C: tl.constexpr, TC: tl.constexpr):
    inside = _in_plane(iy, iz, Y, Z, c, C, TC)
    return grad * tl.load(x_row + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _weight_kernel(
    x, grad, partial, X, Y, Z, OX, OY, OZ, PLANES, BLOCKS,
    C: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, TY: tl.constexpr, TZ: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """Sum over the voxels of PLANES planes of grad[o] * x[STRIDE * o + k - K // 2], for one row of K taps.

    partial: (B, chunks of planes, K * K, K, C). K is 3 or 5.
    """
    row, chunk, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    a, d, b = row // K - K // 2, row % K - K // 2, sample // BLOCKS
    t = tl.arange(0, TY * TZ)
    c = (sample % BLOCKS) * TC + tl.arange(0, TC)
    s0 = tl.zeros((TY * TZ, TC), tl.float32)
    s1 = tl.zeros((TY * TZ, TC), tl.float32)
    s2 = tl.zeros((TY * TZ, TC), tl.float32)
    s3 = tl.zeros((TY * TZ, TC), tl.float32)
    s4 = tl.zeros((TY * TZ, TC), tl.float32)
    for ox in range(chunk * PLANES, tl.minimum(chunk * PLANES + PLANES, OX)):
        ix = ox * STRIDE + a
        if (ix >= 0) & (ix < X):
            x_plane = x + (b * X + ix).to(tl.int64) * Y * Z * C
            grad_plane = grad + (b * OX + ox).to(tl.int64) * OY * OZ * C
            for y0 in range(0, OY, TY):
                oy = y0 + t // TZ
                iy = oy * STRIDE + d
                for z0 in range(0, OZ, TZ):
                    oz = z0 + t % TZ
                    iz = oz * STRIDE - K // 2
                    inside = _in_plane(oy, oz, OY, OZ, c, C, TC)
                    g = tl.load(grad_plane + (oy * OZ + oz)[:, None] * C + c[None, :], mask=inside, other=0.0)
                    g = g.to(tl.float32)  # 0 beyond the plane, whatever is read of x there
                    offset = (iy * Z + iz)[:, None] * C + c[None, :]
                    s0 += _product(g, x_plane, offset, iy, iz, Y, Z, c, C, TC)
                    s1 += _product(g, x_plane + C, offset, iy, iz + 1, Y, Z, c, C, TC)
                    s2 += _product(g, x_plane + 2 * C, offset, iy, iz + 2, Y, Z, c, C, TC)
                    if K == 5:
                        s3 += _product(g, x_plane + 3 * C, offset, iy, iz + 3, Y, Z, c, C, TC)
                        s4 += _product(g, x_plane + 4 * C, offset, iy, iz + 4, Y, Z, c, C, TC)
    out = partial + (((b * tl.num_programs(1) + chunk) * K * K + row) * K).to(tl.int64) * C + c
    in_c = c < C
    tl.store(out, tl.sum(s0, 0), mask=in_c)
    tl.store(out + C, tl.sum(s1, 0), mask=in_c)
    tl.store(out + 2 * C, tl.sum(s2, 0), mask=in_c)
    if K == 5:
        tl.store(out + 3 * C, tl.sum(s3, 0), mask=in_c)
        tl.store(out + 4 * C, tl.sum(s4, 0), mask=in_c)


def _tile(sides: torch.Size, channels: int, numbers: int) -> tuple[int, int, int, int]:
    """TY, TZ, TC, and the number of tiles of a plane (Y, Z)."""
    tc = channel_block(channels, MOST_CHANNELS)
    tz = min(power_of_two(sides[1]), numbers // tc, 32)
    ty = min(power_of_two(sides[0]), numbers // tc // tz)
    return ty, tz, tc, triton.cdiv(sides[0], ty) * triton.cdiv(sides[1], tz)


def _convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: int) -> torch.Tensor:
    b, *sides, channels = x.shape
    out_sides = [(side + stride - 1) // stride for side in sides]
    y = x.new_empty((b, *out_sides, channels))
    ty, tz, tc, tiles = _tile(out_sides[1:], channels, TILE)
    grid = (tiles, triton.cdiv(channels, tc), b * out_sides[0])
    with on_device_of(x):
        _convolve_kernel[grid](
            x, weight, weight if bias is None else bias, y, *sides, *out_sides,
            C=channels, K=weight.shape[0], STRIDE=stride, HAS_BIAS=bias is not None, TY=ty, TZ=tz, TC=tc, num_warps=4,
        )  # fmt: skip
    return y


def _transposed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_sides: list[int]) -> torch.Tensor:
    b, *sides, channels = x.shape
    y = x.new_empty((b, *out_sides, channels))
    ty, tz, tc, tiles = _tile([(side + 1) // 2 for side in out_sides[1:]], channels, TILE)
    grid = (4 * tiles, triton.cdiv(channels, tc), b * out_sides[0])
    with on_device_of(x):
        _transposed_kernel[grid](
            x, weight, weight if bias is None else bias, y, *sides, *out_sides,
            C=channels, K=weight.shape[0], HAS_BIAS=bias is not None, TY=ty, TZ=tz, TC=tc, num_warps=4,
        )  # fmt: skip
    return y


def _weight_sums(x: torch.Tensor, grad: torch.Tensor, k: int, stride: int) -> torch.Tensor:
    """Gradient by w of sum(grad * convolve(x, w, stride)): (C, 1, k, k, k), float32."""
    b, *sides, channels = x.shape
    out_sides = grad.shape[1:4]
    planes = triton.cdiv(out_sides[0], MOST_CHUNKS)
    chunks = triton.cdiv(out_sides[0], planes)
    ty, tz, tc, _ = _tile(out_sides[1:], channels, TILE if k == 3 else TILE // 2)  # five sums need more registers
    blocks = triton.cdiv(channels, tc)
    partial = x.new_empty((b * chunks, k * k * k, channels), dtype=torch.float32)
    with on_device_of(x):
        _weight_kernel[(k * k, chunks, b * blocks)](
            x, grad, partial, *sides, *out_sides, planes, blocks,
            C=channels, K=k, STRIDE=stride, TY=ty, TZ=tz, TC=tc, num_warps=4,
        )  # fmt: skip
    return partial.sum(0).t().contiguous().view(channels, 1, k, k, k)


def _taps(weight: torch.Tensor) -> torch.Tensor:
    """(C, 1, k, k, k) to (k, k, k, C), with zeros up to whole blocks of channels."""
    channels = weight.shape[0]
    block = channel_block(channels, MOST_CHANNELS)
    return F.pad(weight.squeeze(1).movedim(0, -1), (0, -channels % block)).contiguous()


# Operators ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("amaes::depthwise", mutates_args=())
def depthwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, resample: str) -> torch.Tensor:
    """Rows (B, X, Y, Z, C) to rows; weight (C, 1, k, k, k), k 3 or 5; `resample` as in `ops.depthwise`."""
    if resample == "up":
        return _transposed(x, _taps(weight), bias, [2 * side - 1 for side in x.shape[1:4]])
    return _convolve(x, _taps(weight), bias, stride=1 if resample == "same" else 2)


@depthwise.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, resample: str) -> torch.Tensor:
    sides = {"same": lambda n: n, "down": lambda n: (n + 1) // 2, "up": lambda n: 2 * n - 1}
    return x.new_empty((x.shape[0], *map(sides[resample], x.shape[1:4]), x.shape[4]))


@torch.library.custom_op("amaes::depthwise_input_gradient", mutates_args=())
def input_gradient(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, resample: str) -> torch.Tensor:
    """Gradient of `depthwise` by its rows x."""
    if resample == "up":
        return _convolve(grad, _taps(weight), None, stride=2)
    if resample == "down":
        return _transposed(grad, _taps(weight), None, list(x.shape[1:4]))
    return _convolve(grad, _taps(weight.flip(2, 3, 4)), None, stride=1)


@input_gradient.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, resample: str) -> torch.Tensor:
    return grad.new_empty(x.shape)


@torch.library.custom_op("amaes::depthwise_weight_gradient", mutates_args=())
def weight_gradient(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, resample: str) -> torch.Tensor:
    """Gradient of `depthwise` by its weight, in the weight's type."""
    k = weight.shape[-1]
    if resample == "up":
        return _weight_sums(grad, x, k, stride=2).to(weight.dtype)
    return _weight_sums(x, grad, k, stride=1 if resample == "same" else 2).to(weight.dtype)


@weight_gradient.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, resample: str) -> torch.Tensor:
    return weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.resample = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = bias.dtype


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    grad, needed = grad.contiguous(), ctx.needs_input_grad
    grad_x = input_gradient(x, weight, grad, ctx.resample) if needed[0] else None
    grad_weight = weight_gradient(x, weight, grad, ctx.resample) if needed[1] else None
    grad_bias = grad.sum((0, 1, 2, 3), dtype=torch.float32).to(ctx.bias_dtype) if needed[2] else None
    return grad_x, grad_weight, grad_bias, None


depthwise.register_autograd(_backward, setup_context=_setup_context)
