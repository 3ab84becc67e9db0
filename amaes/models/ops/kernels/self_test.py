"""Whether the kernels compile here and give the plain forms' numbers: a first use of each, on a few voxels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from amaes.models.ops.depthwise import _plain as plain_depthwise
from amaes.models.ops.depthwise import _triton as triton_depthwise

TOLERANCE = 1e-3  # relative to the largest number
CHANNELS, SIDES = 8, (1, 3, 2)


def wrong_operators(device: torch.device) -> list[str]:
    """Operators whose output or gradients on `device`, in float32, are not those of the plain form on the CPU.

    Raises:
        Exception: of any kind, where a kernel does not compile or run.
    """
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=random) for shape in ((1, CHANNELS, *SIDES), (CHANNELS, 1, 3, 3, 3), (CHANNELS,))
    )
    tests = {
        f"depthwise ({resample})": (triton_depthwise, plain_depthwise, (x, weight, bias), (resample,))
        for resample in ("same", "down", "up")
    }
    return [name for name, test in tests.items() if not _agree(*test, device)]


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
