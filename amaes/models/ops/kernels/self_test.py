"""Whether the kernels compile here and give the plain forms' numbers: a first use of each, on a few voxels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from amaes.models.ops.depthwise import _plain as plain_depthwise
from amaes.models.ops.depthwise import _triton as triton_depthwise
from amaes.models.ops.kernels.norm_act import norm_act as rows_norm_act
from amaes.models.ops.norm_act import SLOPE

TOLERANCE = 1e-3  # relative to the largest number
CHANNELS, SIDES = 8, (1, 3, 2)
EPS = 1e-5


def wrong_operators(device: torch.device) -> list[str]:
    """Operators whose output or gradients on `device`, in float32, are not those of the plain form on the CPU.

    Raises:
        Exception: of any kind, where a kernel does not compile or run.
    """
    random = torch.Generator().manual_seed(0)
    shapes = (1, CHANNELS, *SIDES), (CHANNELS, 1, 3, 3, 3), (CHANNELS,), (CHANNELS,)
    x, weight, scale, bias = (torch.randn(shape, generator=random) for shape in shapes)
    tests = {
        f"depthwise ({resample})": (triton_depthwise, plain_depthwise, (x, weight, bias), (resample,))
        for resample in ("same", "down", "up")
    }
    for name, keep_input in (("norm_act", True), ("norm_act (inverse)", False)):
        tests[name] = (_triton_norm_act, _plain_norm_act, (x, scale, bias), (keep_input,))
    return [name for name, test in tests.items() if not _agree(*test, device)]


def _triton_norm_act(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, keep_input: bool) -> torch.Tensor:
    y, _ = rows_norm_act(x.movedim(1, -1).contiguous(), scale, bias, EPS, SLOPE, keep_input)
    return y.movedim(-1, 1)


def _plain_norm_act(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, keep_input: bool) -> torch.Tensor:
    return F.leaky_relu(F.instance_norm(x, weight=scale, bias=bias, eps=EPS), SLOPE)


def _agree(
    kernel: Callable, plain: Callable, tensors: tuple[torch.Tensor, ...], options: tuple, device: torch.device
) -> bool:
    results = []
    for function, place in ((kernel, device), (plain, torch.device("cpu"))):
        with torch.enable_grad(), torch.autocast(place.type, enabled=False):
            inputs = [tensor.to(place).requires_grad_() for tensor in tensors]
            y = function(*inputs, *options)
            weights = torch.linspace(-1, 1, y.numel()).sin().view(y.shape).to(place)
            results.append([part.cpu() for part in (y, *torch.autograd.grad(y, inputs, weights))])
    return all(
        (ours - right).abs().max() <= TOLERANCE * right.abs().max() for ours, right in zip(*results, strict=True)
    )
