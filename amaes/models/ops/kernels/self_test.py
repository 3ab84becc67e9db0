"""Whether the kernels compile here and give the plain forms' numbers: a first use of each, on a few voxels."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F

from amaes.choices import RECONSTRUCTION_MEANS
from amaes.losses import SMALLEST_SD
from amaes.models.ops.depthwise import _plain as plain_depthwise
from amaes.models.ops.depthwise import _triton as triton_depthwise
from amaes.models.ops.kernels.masked_error import masked_error as fused_masked_error
from amaes.models.ops.kernels.norm_act import norm_act as rows_norm_act
from amaes.models.ops.kernels.norm_mlp import norm_mlp as rows_norm_mlp
from amaes.models.ops.masked_error import _plain as plain_masked_error
from amaes.models.ops.norm_act import SLOPE
from amaes.models.ops.norm_mlp import response_norm

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # relative to the largest number
CHANNELS, SIDES = 8, (1, 3, 2)
EPS = 1e-5


@torch.inference_mode(False)  # a prediction may be the first to ask
def wrong_operators(device: torch.device) -> list[str]:
    """Operators whose output or gradients on `device` are not those of the plain form on the CPU in float32.

    Raises:
        Exception: of any kind, where a kernel does not compile or run.
    """
    random = torch.Generator().manual_seed(0)
    shapes = [(1, CHANNELS, *SIDES), CHANNELS, CHANNELS, (CHANNELS, CHANNELS), CHANNELS, (CHANNELS, CHANNELS), CHANNELS]
    shapes += [CHANNELS, CHANNELS, (CHANNELS, 1, 3, 3, 3), (1, CHANNELS, 2, 3, 4)]
    shapes += [(1, 3, 4, 3, 8 * CHANNELS), (3, 3, 3, CHANNELS)]
    tensors = [torch.randn(shape, generator=random) for shape in shapes]
    x, scale, shift = tensors[:3]
    tests = {
        f"depthwise ({resample})": (triton_depthwise, plain_depthwise, (x, tensors[9], shift), (resample,))
        for resample in ("same", "down", "up")
    }
    for name, keep_input in (("norm_act", True), ("norm_act (inverse)", False)):
        tests[name] = (_triton_norm_act, _plain_norm_act, (x, scale, shift), (keep_input,))
        options = (keep_input, True)
        tests[f"{name} with pooling"] = (_triton_norm_act, _plain_norm_act, (tensors[10], scale, shift), options)
        of_phases = (tensors[11], scale, shift, tensors[12])
        tests[f"{name} of phases"] = (_triton_norm_act_of_phases, _plain_norm_act_of_phases, of_phases, (keep_input,))
    for name, count in (("norm_mlp", 7), ("norm_mlp (response norm)", 9)):
        tests[name] = (_triton_norm_mlp, _plain_norm_mlp, tensors[:count], ())
    for over in RECONSTRUCTION_MEANS:
        tests[f"masked_error ({over})"] = (_triton_masked_error, _plain_masked_error, (x,), (over,))
    wrong = [name for name, test in tests.items() if not _agree(*test, device, torch.float32)]
    if device.type == "cuda":  # products of matrices have kernels of their own
        wrong += [
            f"{name} in bf16" for name in tests if "mlp" in name and not _agree(*tests[name], device, torch.bfloat16)
        ]
    return wrong


def _triton_norm_act(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, keep_input: bool, pool: bool = False
) -> torch.Tensor:
    rows = x.movedim(1, -1).contiguous()
    y, pooled, _ = rows_norm_act(rows, None, scale, shift, EPS, SLOPE, keep_input, pool)
    return _joined(y.movedim(-1, 1), pooled.movedim(-1, 1)) if pool else y.movedim(-1, 1)


def _plain_norm_act(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, keep_input: bool, pool: bool = False
) -> torch.Tensor:
    y = F.leaky_relu(F.instance_norm(x, weight=scale, bias=shift, eps=EPS), SLOPE)
    return _joined(y, F.max_pool3d(y, 2)) if pool else y


def _triton_norm_act_of_phases(
    phases: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, border: torch.Tensor, keep_input: bool
) -> torch.Tensor:
    y, _, _ = rows_norm_act(phases, border, scale, shift, EPS, SLOPE, keep_input, False)
    return y.movedim(-1, 1)


def _plain_norm_act_of_phases(
    phases: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, border: torch.Tensor, keep_input: bool
) -> torch.Tensor:
    """By slices; the middle of the border is not added."""
    sides = [side - 1 for side in phases.shape[1:4]]
    y = phases.new_empty((len(phases), *(2 * side for side in sides), border.shape[-1]))
    for phase, (a, b, c) in zip(phases.chunk(8, -1), product((0, 1), repeat=3), strict=True):
        y[:, a::2, b::2, c::2] = phase[:, a : a + sides[0], b : b + sides[1], c : c + sides[2]]
    for axis, side in enumerate(sides):
        index = torch.tensor([0, *[1] * (2 * side - 2), 2], device=border.device)
        border = border.index_select(axis, index)
    middle = F.pad(border[1:-1, 1:-1, 1:-1], (0, 0, 1, 1, 1, 1, 1, 1))
    return _plain_norm_act((y + border - middle).movedim(-1, 1), scale, shift, keep_input)


def _joined(*maps: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.flatten() for part in maps])


def _triton_norm_mlp(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    rows, of_grn = x.movedim(1, -1).contiguous(), weights[6:] or (None, None)
    y, _, _ = rows_norm_mlp(rows, rows, *weights[:6], *of_grn, EPS, "mean")
    return y.movedim(-1, 1)


def _plain_norm_mlp(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    scale, shift, expand, expand_bias, project, project_bias, *of_grn = weights
    h = F.instance_norm(x, weight=scale, bias=shift, eps=EPS).movedim(1, -1)
    h = F.gelu(F.linear(h, expand, expand_bias))
    if of_grn:
        gamma, beta = (tensor.view(1, -1, 1, 1, 1) for tensor in of_grn)
        h = response_norm(h.movedim(-1, 1), gamma, beta, "mean").movedim(1, -1)
    return x + F.linear(h, project, project_bias).movedim(-1, 1)


def _triton_masked_error(x: torch.Tensor, over: str) -> torch.Tensor:
    return fused_masked_error(x, *_target_and_mask(x), over, SMALLEST_SD)[0]


def _plain_masked_error(x: torch.Tensor, over: str) -> torch.Tensor:
    return plain_masked_error(x, *_target_and_mask(x), over, True)


def _target_and_mask(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A clean image for the prediction `x`, and every third voxel hidden."""
    voxels = torch.arange(x[0, 0].numel(), device=x.device).view(1, 1, *x.shape[2:])
    return x.detach().flip(1), voxels % 3 == 1


def _agree(
    kernel: Callable,
    plain: Callable,
    tensors: tuple[torch.Tensor, ...],
    options: tuple,
    device: torch.device,
    dtype: torch.dtype,
) -> bool:
    results = []
    for function, place, own_dtype in ((kernel, device, dtype), (plain, torch.device("cpu"), torch.float32)):
        unseen = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)  # by activation checkpointing
        with torch.enable_grad(), torch.autocast(place.type, enabled=False), unseen:
            inputs = [tensor.to(dtype).to(place, own_dtype).requires_grad_() for tensor in tensors]
            y = function(*inputs, *options)
            weights = torch.linspace(-1, 1, y.numel()).sin().view(y.shape).to(y)
            results.append([part.float().cpu() for part in (y.detach(), *torch.autograd.grad(y, inputs, weights))])
    return all((a - b).abs().max() <= TOLERANCES[dtype] * b.abs().max() for a, b in zip(*results, strict=True))
