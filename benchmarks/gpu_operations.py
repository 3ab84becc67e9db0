"""The operations of amaes/models/ops at the sizes of the networks: ours, the plain form, and the least work of each.

The floor of a pass is the larger of two times: the numbers it must read and write in bf16 by the measured bandwidth,
and its arithmetic by the measured rate of matrix products. It is that of the best way known, in which no hidden or
upsampled tensor is written: no form can be faster than the floor, and the plain one may do more work than it counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from models import plain_response_norm
from torch import nn

from amaes.losses import reconstruction_loss, visible_mean_sd
from amaes.models import ops
from amaes.models.mednext import Block
from amaes.training.benchmark import seconds_per_step

PASSES = ("forward", "backward", "weight")  # the last: the gradients of the weights alone


class Clock:
    """Milliseconds of a call on the device, and what the device can do at most.

    On a GPU the calls are queued behind long products of matrices, so that the time of the host, which launches them,
    does not count.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        side = 8192 if device.type == "cuda" else 128
        self.matrix = torch.full((side, side), 0.01, dtype=torch.bfloat16, device=device)

    def limits(self) -> dict[str, float]:
        """Bytes that a copy reads and writes, and operations of a bf16 matrix product, per second, in 10^12."""
        numbers = 2**30 if self.device.type == "cuda" else 2**20
        source = torch.zeros(numbers, dtype=torch.bfloat16, device=self.device)
        target = torch.empty_like(source)
        copy = self.milliseconds(lambda: target.copy_(source))
        product = self.milliseconds(lambda: self.matrix @ self.matrix)
        return {
            "copy_tb_per_s": 2 * numbers * 2 / copy / 1e9,
            "matrix_tflops": 2 * len(self.matrix) ** 3 / product / 1e9,
        }

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Mean of a few calls, after two to warm up."""
        if self.device.type != "cuda":
            return 1000 * seconds_per_step(call, self.repeats, self.device)
        for _ in range(2):
            call()
        torch.cuda.synchronize(self.device)
        for _ in range(8):
            self.matrix @ self.matrix
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(self.repeats):
            call()
        last.record()
        torch.cuda.synchronize(self.device)
        return first.elapsed_time(last) / self.repeats


class Work(NamedTuple):
    """Of one pass: numbers that are read or written, and floating-point operations of matrix products."""

    numbers: float
    flop: float = 0.0

    def milliseconds(self, copy_bytes_per_s: float, flop_per_s: float) -> float:
        """The floor."""
        return 1000 * max(2 * self.numbers / copy_bytes_per_s, self.flop / flop_per_s)


class Operation(NamedTuple):
    """What is timed.

    Attributes:
        x: shape of the input, (B, C, X, Y, Z).
        module: holds the weights.
        ours, plain: functions of the input, to one tensor or several.
        work: by pass, some of PASSES.
        image: the input is an image, float32, and gets no gradient.
    """

    x: tuple[int, ...]
    module: nn.Module
    ours: Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, ...]]
    plain: Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, ...]]
    work: dict[str, Work]
    image: bool = False


def _cube(batch: int, channels: int, side: int) -> tuple[tuple[int, ...], int]:
    """Shape of a tensor, and its voxels."""
    return (batch, channels, side, side, side), batch * side**3


def _norm_act(device: torch.device, channels: int, side: int, batch: int, activation: bool = True) -> Operation:
    """Forward: read for the statistics, read and written; backward: output and gradient read twice, one written."""
    shape, voxels = _cube(batch, channels, side)
    norm = nn.InstanceNorm3d(channels, affine=True, device=device)
    work = {"forward": Work(3 * voxels * channels), "backward": Work(5 * voxels * channels)}
    if not activation:
        return Operation(shape, norm, lambda x: ops.norm_only(x, norm), norm, work)
    return Operation(
        shape, norm, lambda x: ops.norm_act(x, norm), lambda x: F.leaky_relu(norm(x), 0.01, inplace=True), work
    )


def _norm_act_pool(device: torch.device, channels: int, side: int, batch: int) -> Operation:
    """As `_norm_act`, with the pooled map, and without a gradient of the map itself."""
    shape, voxels = _cube(batch, channels, side)
    norm = nn.InstanceNorm3d(channels, affine=True, device=device)
    work = {"forward": Work(3.125 * voxels * channels), "backward": Work(3.25 * voxels * channels)}

    def plain(x: torch.Tensor) -> torch.Tensor:
        return F.max_pool3d(F.leaky_relu(norm(x), 0.01, inplace=True), 2)

    return Operation(shape, norm, lambda x: ops.norm_act_pool(x, norm)[1], plain, work)


def _norm_only(device: torch.device, channels: int, side: int, batch: int) -> Operation:
    return _norm_act(device, channels, side, batch, activation=False)


def _product(inputs: int, outputs: int, flop: float, image: bool) -> dict[str, Work]:
    """Work of a linear map, from numbers in its input and output and operations of its forward pass."""
    weight = Work(inputs + outputs, flop)
    backward = weight if image else Work(2 * (inputs + outputs), 2 * flop)
    return {"forward": weight, "backward": backward, "weight": weight}


def _conv(device: torch.device, channels: int, outputs: int, side: int, batch: int) -> Operation:
    """A 3x3x3 convolution before a norm."""
    shape, voxels = _cube(batch, channels, side)
    conv, image = nn.Conv3d(channels, outputs, 3, padding=1, device=device), channels == 1
    work = _product(voxels * channels, voxels * outputs, 2 * 27 * channels * outputs * voxels, image)
    return Operation(shape, conv, lambda x: ops.conv_before_norm(x, conv), conv, work, image)


def _up_conv(device: torch.device, channels: int, side: int, batch: int) -> Operation:
    """An upsampling to half the channels, a 3x3x3 convolution, norm and leaky ReLU; `side` is that before them.

    The floor is that of the convolution alone.
    """
    shape, voxels = _cube(batch, channels, side)
    half = channels // 2
    up = nn.ConvTranspose3d(channels, half, 2, stride=2, device=device)
    conv = nn.Conv3d(half, half, 3, padding=1, device=device)
    work = _product(voxels * channels, 8 * voxels * half, 2 * 64 * channels * half * voxels, image=False)
    norm = nn.InstanceNorm3d(half, affine=True, device=device)

    def plain(x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(norm(conv(up(x))), 0.01, inplace=True)

    module = nn.ModuleList([up, conv, norm])
    return Operation(shape, module, lambda x: ops.up_conv_norm_act(x, up, conv, norm), plain, work)


def _depthwise(device: torch.device, channels: int, side: int, batch: int, kernel: int, resample: str) -> Operation:
    shape, voxels = _cube(batch, channels, side)
    layer = nn.ConvTranspose3d if resample == "up" else nn.Conv3d
    stride = 1 if resample == "same" else 2
    plain = layer(channels, channels, kernel, stride, kernel // 2, groups=channels, device=device)
    after = {"same": side, "down": (side + 1) // 2, "up": 2 * side - 1}[resample]
    work = _product(channels * voxels, channels * batch * after**3, flop=0, image=False)
    return Operation(shape, plain, lambda x: ops.depthwise(x, plain.weight, plain.bias, resample), plain, work)


def _norm_mlp(device: torch.device, channels: int, ratio: int, side: int, batch: int, grn: str | None) -> Operation:
    """Norm, expand, GELU, (response norm,) project, and a residual connection, of a MedNeXt block."""
    shape, voxels = _cube(batch, channels, side)
    block = Block(channels, channels, ratio, grn=grn).to(device)
    parts = (block.norm, block.expand, block.project, block.grn)
    residual = torch.randn(shape, device=device).bfloat16()
    layouts = {"ours": residual.contiguous(memory_format=torch.channels_last_3d), "plain": residual}
    numbers, product = voxels * channels, 2 * voxels * channels**2 * ratio
    more = 0 if grn is None else 1  # one more pass for the norms of the hidden channels, and for their gradients
    work = {
        "forward": Work((4 + more) * numbers, (2 + more) * product),
        "backward": Work((5 + 2 * more) * numbers, (5 + more) * product),
    }
    del block.depthwise

    def plain(x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(block.expand(block.norm(x)))
        if grn is not None:
            h = plain_response_norm(h, block.grn)
        return layouts["plain"] + block.project(h)

    return Operation(shape, block, lambda x: ops.norm_mlp(x, *parts, layouts["ours"]), plain, work)


def _pointwise(device: torch.device, channels: int, outputs: int, side: int, batch: int) -> Operation:
    shape, voxels = _cube(batch, channels, side)
    conv, image = nn.Conv3d(channels, outputs, 1, device=device), channels == 1
    work = _product(voxels * channels, voxels * outputs, 2 * channels * outputs * voxels, image)
    return Operation(shape, conv, lambda x: ops.pointwise(x, conv.weight, conv.bias), conv, work, image)


def _depthwise_down(device: torch.device, channels: int, side: int, batch: int) -> Operation:
    """A MedNeXt block's convolution of stride 2, and its shortcut: a 1x1x1 convolution of every second voxel."""
    shape, voxels = _cube(batch, channels, side)
    layer = nn.Conv3d(channels, channels, 3, stride=2, padding=1, groups=channels, device=device)
    conv = nn.Conv3d(channels, 2 * channels, 1, stride=2, device=device)
    work = _product(voxels * channels, voxels // 8 * 3 * channels, 2 * channels * 2 * channels * voxels / 8, False)

    def ours(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, second = ops.depthwise_down(x, layer.weight, layer.bias)
        return y, ops.pointwise(second, conv.weight, conv.bias)

    return Operation(shape, nn.ModuleList([layer, conv]), ours, lambda x: (layer(x), conv(x)), work)


def _add_upsampled(device: torch.device, channels: int, side: int, batch: int) -> Operation:
    """The shortcut of a MedNeXt block that doubles the sides, added to the block's output."""
    shape, voxels = _cube(batch, channels, side)
    half = channels // 2
    conv = nn.ConvTranspose3d(channels, half, 1, stride=2, device=device)
    y = torch.randn(batch, half, *[2 * side - 1] * 3, device=device).bfloat16()
    last, front = y.contiguous(memory_format=torch.channels_last_3d), (1, 0, 1, 0, 1, 0)
    product, after = 2 * voxels * channels * half, 8 * voxels * half
    work = {
        "forward": Work(voxels * channels + 2 * after, product),
        "backward": Work(2 * voxels * channels + after, 2 * product),
    }

    def ours(x: torch.Tensor) -> torch.Tensor:
        return ops.add_upsampled(last, ops.pointwise(x, conv.weight.transpose(0, 1)), conv.bias)

    return Operation(shape, conv, ours, lambda x: F.pad(y, front) + F.pad(conv(x), front), work)


def _head(device: torch.device, channels: int, side: int, batch: int) -> Operation:
    """To one channel, as that of a pretraining decoder."""
    shape, voxels = _cube(batch, channels, side)
    conv = nn.Conv3d(channels, 1, 1, device=device)
    work = _product(voxels * channels, voxels, 2 * channels * voxels, image=False)
    return Operation(shape, conv, lambda x: ops.head(x, conv), conv, work)


def _masked_error(device: torch.device, side: int, batch: int) -> Operation:
    """Of a bf16 prediction; the float32 target is standardised by its visible voxels."""
    shape, voxels = _cube(batch, 1, side)
    target, mask = torch.rand(shape, device=device), torch.rand(shape, device=device) < 0.6

    def plain(x: torch.Tensor) -> torch.Tensor:
        mean, sd = visible_mean_sd(target, mask)
        return reconstruction_loss(x, (target - mean) / sd)

    work = {"forward": Work(voxels * (4 + 1 + 4 + 2) / 2), "backward": Work(voxels * (2 + 4 + 2) / 2)}  # bytes / 2
    return Operation(shape, nn.Identity(), lambda x: ops.masked_error(x, target, mask, "all", True), plain, work)


OPERATIONS: dict[str, Callable[..., Operation]] = {
    "norm_act": _norm_act,
    "norm_act_pool": _norm_act_pool,
    "norm_only": _norm_only,
    "conv_before_norm": _conv,
    "up_conv_norm_act": _up_conv,
    "depthwise": _depthwise,
    "norm_mlp": _norm_mlp,
    "pointwise": _pointwise,
    "head": _head,
    "depthwise_down": _depthwise_down,
    "add_upsampled": _add_upsampled,
    "masked_error": _masked_error,
}

NOT_MEASURED = {  # the other functions of amaes/models/ops, and why
    "are_fused": "computes nothing",
    "describe": "computes nothing",
    "fused_is_cheaper": "computes nothing",
    "response_norm": "a part of norm_mlp",
    "up_conv": "a part of up_conv_norm_act",
}

# The layers of U-Net XL at 128^3, then those of MedNeXt: (operation, its sizes).
_CONVS = ((1, 64, 128), (64, 64, 128), (64, 128, 64), (128, 128, 64), (128, 256, 32), (256, 256, 32))
_CONVS += ((256, 512, 16), (512, 512, 16), (512, 1024, 8), (1024, 1024, 8))
SIZES: tuple[tuple[str, dict], ...] = (
    *(("norm_act", {"channels": c, "side": side, "batch": 4}) for c, side in ((64, 128), (128, 64), (32, 128))),
    ("norm_act_pool", {"channels": 64, "side": 128, "batch": 4}),
    *(("conv_before_norm", {"channels": c, "outputs": o, "side": side, "batch": 4}) for c, o, side in _CONVS),
    *(("up_conv_norm_act", {"channels": c, "side": 8192 // c, "batch": 4}) for c in (128, 256, 512, 1024)),
    *(
        ("depthwise", {"channels": c, "side": side, "batch": b, "kernel": k, "resample": r})
        for c, side, b, k, r in (
            *((32, 128, 1, 3, "same"), (64, 64, 2, 3, "same"), (32, 128, 1, 5, "same")),
            *((32, 128, 1, 3, "down"), (64, 64, 2, 3, "up")),
        )
    ),
    *(
        ("norm_mlp", {"channels": c, "ratio": ratio, "side": side, "batch": b, "grn": grn})
        for c, ratio, side, b, grn in (
            *((32, 2, 128, 1, None), (32, 3, 128, 1, "mean"), (64, 4, 64, 2, None), (64, 4, 64, 2, "mean")),
            *((128, 4, 32, 2, None), (128, 8, 32, 2, "mean")),
        )
    ),
    ("norm_only", {"channels": 128, "side": 32, "batch": 2}),
    ("pointwise", {"channels": 1, "outputs": 32, "side": 128, "batch": 1}),
    ("depthwise_down", {"channels": 32, "side": 128, "batch": 1}),
    ("add_upsampled", {"channels": 64, "side": 64, "batch": 1}),
    ("head", {"channels": 64, "side": 128, "batch": 4}),
    ("masked_error", {"side": 128, "batch": 8}),
)


def tiny(sizes: dict) -> dict:
    """The same operation of a few channels and voxels; many become the same."""
    less = {"side": 3, "batch": 1, "ratio": 2, "channels": min(4, sizes.get("channels", 4)), "outputs": 4}
    return sizes | {name: value for name, value in less.items() if name in sizes}


def measure(
    build: Callable[..., Operation],
    sizes: dict,
    form: str,
    device: torch.device,
    milliseconds: Callable[[Callable[[], object]], float],
) -> tuple[dict[str, float], dict[str, Work]]:
    """Milliseconds by pass, under bf16 autocast, and the work of each.

    Ours gets channels-last tensors where the operations are fused, as in the network; the plain form contiguous ones.

    Args:
        build: of OPERATIONS.
        sizes: its arguments.
        form: "ours" or "plain".
        device: where it runs.
        milliseconds: times a call.
    """
    torch.manual_seed(0)
    operation = build(device, **sizes)
    run = operation.ours if form == "ours" else operation.plain
    last = form == "ours" and ops.are_fused(device)
    x = torch.randn(operation.x, device=device)
    x = x if operation.image else x.bfloat16()
    x = x.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)
    weights = [p for p in operation.module.parameters() if p.requires_grad]

    def forward() -> torch.Tensor | tuple[torch.Tensor, ...]:
        with torch.autocast(device.type, torch.bfloat16):
            return run(x)

    result = {}
    if "weight" in operation.work:
        result["weight"] = milliseconds(_backward(forward(), weights))
    x.requires_grad_(not operation.image)
    result["forward"] = milliseconds(forward)
    result["backward"] = milliseconds(_backward(forward(), weights if operation.image else [x, *weights]))
    return {name: result[name] for name in PASSES if name in result}, operation.work


def _backward(y: torch.Tensor | tuple[torch.Tensor, ...], inputs: list[torch.Tensor]) -> Callable[[], object]:
    outputs = [output for output in (y if isinstance(y, tuple) else (y,)) if output.requires_grad]
    grads = [torch.randn_like(output) for output in outputs]  # in the memory layout of each
    return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True, allow_unused=True)
