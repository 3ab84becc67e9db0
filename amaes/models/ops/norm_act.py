"""Instance norm and leaky ReLU, of which autograd keeps one tensor, and max pooling after them."""

from __future__ import annotations

from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from amaes.models.ops import dispatch
from amaes.models.ops.dispatch import from_rows, wide_dtype, without_autocast

SLOPE = 0.01  # of the leaky ReLU for negative numbers
MAX_SHIFT = 8.0  # largest |shift| / |scale| at which the norm's input is computed from its output: 3 bits are lost


def norm_act(x: torch.Tensor, norm: nn.InstanceNorm3d) -> torch.Tensor:
    """Instance norm, then leaky ReLU of slope 0.01; autograd keeps one tensor for both.

    Both functions can be inverted, so it is enough to keep the output, which the next convolution keeps anyway. Where
    the scale of a channel is so small that the inverse loses its digits, the input is kept: instead of the output in
    Triton, elsewhere beside it, which is as much as the norm and a leaky ReLU in place keep.

    Args:
        x: (B, C, X, Y, Z).
        norm: without running statistics. Statistics are in float32 (or float64) whatever autocast says.
    """
    if dispatch.use_triton(x):
        return _triton(x, norm, SLOPE)[0]
    if torch.compiler.is_compiling():  # one graph, in which the compiler decides what to keep
        return _plain(x, norm)
    return _NormAct.apply(x, *_scale_and_shift(x, norm), norm.eps)


def norm_act_pool(x: torch.Tensor, norm: nn.InstanceNorm3d) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm_act(x, norm)`, and its maxima over blocks of 2x2x2 voxels, as of `max_pool3d`."""
    if dispatch.use_triton(x):
        return _triton(x, norm, SLOPE, pool=True)
    y = norm_act(x, norm)
    return y, F.max_pool3d(y, 2)


def norm_act_of_phases(phases: torch.Tensor, border: torch.Tensor, norm: nn.InstanceNorm3d) -> torch.Tensor:
    """`norm_act` of a map that is given in its 8 phases and a border (`kernels.phases`), where `use_triton` says so.

    Args:
        phases: (B, 8 C, X / 2 + 1, Y / 2 + 1, Z / 2 + 1).
        border: (3, 3, 3, C), float32.
        norm: see `norm_act`.
    """
    return _triton(phases, norm, SLOPE, border=border)[0]


def norm_only(x: torch.Tensor, norm: nn.InstanceNorm3d | nn.GroupNorm) -> torch.Tensor:
    """Instance norm, or a group norm of one channel per group: (B, C, X, Y, Z) to the same."""
    return _triton(x, norm, slope=1.0)[0] if dispatch.use_triton(x) else norm(x)


def _plain(x: torch.Tensor, norm: nn.InstanceNorm3d) -> torch.Tensor:
    return F.leaky_relu(norm(x), SLOPE)


def _scale_and_shift(x: torch.Tensor, norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the norm of `x`, (C,) each; 1 and 0 where it has no parameters."""
    if norm.weight is not None:
        return norm.weight, norm.bias
    ones = x.new_ones(x.shape[1], dtype=wide_dtype(x.dtype))
    return ones, torch.zeros_like(ones)


# In Triton ------------------------------------------------------------------------------------------------------------


def _triton(
    x: torch.Tensor,
    norm: nn.InstanceNorm3d | nn.GroupNorm,
    slope: float,
    pool: bool = False,
    border: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As rows of channels: without a copy where `x` is in channels-last memory, in which the outputs are as well.

    The second output is the first pooled; without `pool` it has no voxels.
    """
    from amaes.models.ops.kernels.norm_act import norm_act as rows_norm_act

    rows = x.movedim(1, -1).contiguous()
    # A graph cannot hold the answer of `_is_invertible`, which may change.
    keep_input = torch.compiler.is_compiling() or (torch.is_grad_enabled() and not _is_invertible(norm))
    y, pooled, _ = rows_norm_act(rows, border, *_scale_and_shift(x, norm), norm.eps, slope, keep_input, pool)
    return from_rows(y), from_rows(pooled)


def _is_invertible(norm: nn.Module) -> bool:
    """Whether the norm's input can be computed from its output. Waits for the device at first and after loading."""
    if norm.weight is None:
        return True
    answer = _answers.get(norm)
    if answer is None:
        answer = _answers[norm] = _Answer(norm)
    elif answer.weight() is not norm.weight or answer.learns != norm.weight.requires_grad:
        answer.watch(norm.weight)
    return answer.of_this_pass(norm)


class _Answer:
    """Whether a norm can be inverted, asked anew every 16 backward passes; the answer is read 16 passes later.

    From one backward pass to the next it stays the same, also for a stage that activation checkpointing runs twice.
    A change of the weights in place counts as one: fused optimizers make none that is seen, and gradients that are not
    kept in the weights have no such pass. After `load_state_dict` the device is waited for.
    """

    every = 16

    def __init__(self, norm: nn.Module) -> None:
        norm.register_load_state_dict_post_hook(_forget)
        self.hook = None
        self.watch(norm.weight)

    def watch(self, weight: torch.Tensor) -> None:
        """From now on; the tensor watched before is let go."""
        if self.hook is not None:
            self.hook.remove()
        self.weight, self.learns, self.version = ref(weight), weight.requires_grad, _version(weight)
        self.passes, self.ended, self.unknown = 0, False, True
        self.arriving = torch.empty((), dtype=torch.bool, pin_memory=weight.is_cuda)
        seen = weight.is_leaf and self.learns
        self.hook = weight.register_post_accumulate_grad_hook(self._after_backward) if seen else None

    def _after_backward(self, weight: torch.Tensor) -> None:
        self.ended = True

    def of_this_pass(self, norm: nn.Module) -> bool:
        version = _version(norm.weight)
        ended = self.ended or version != self.version
        self.ended, self.version = False, version
        self.passes += ended
        if self.unknown:
            self.unknown, self.answer = False, bool(_scales_are_large(norm.weight, norm.bias))
            self.arriving.fill_(self.answer)
        elif ended and self.passes % self.every == 0:
            self.answer = bool(self.arriving)
            self.arriving.copy_(_scales_are_large(norm.weight, norm.bias), non_blocking=True)
        return self.answer


def _version(weight: torch.Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _forget(norm: nn.Module, _: object) -> None:
    """Called by `load_state_dict`."""
    if norm in _answers:
        _answers[norm].unknown = True


_answers: WeakKeyDictionary[nn.Module, _Answer] = WeakKeyDictionary()


# Elsewhere, in eager mode ---------------------------------------------------------------------------------------


class _NormAct(torch.autograd.Function):
    """The backward pass computes the norm's input from the output where it can."""

    @staticmethod
    def forward(ctx, x, scale, shift, eps):
        rows = x.contiguous().flatten(0, 1)[None]  # (1, B C, X, Y, Z): statistics per sample and channel
        scales, shifts = scale.repeat(len(x)), shift.repeat(len(x))
        y, mean, rstd = torch.native_batch_norm(rows, scales, shifts, None, None, True, 0.0, eps)
        y = F.leaky_relu_(y, SLOPE).view(x.shape)
        ctx.save_for_backward(y, None if _keeps_output_only(scale, shift) else rows, scales, shifts, mean, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, grad):
        y, rows, scales, shifts, mean, rstd = ctx.saved_tensors
        grad = torch.ops.aten.leaky_relu_backward(grad.contiguous(), y, SLOPE, True).view(1, -1, *y.shape[2:])
        if rows is None:  # the norm's output has the same normalised values as its input, with another mean and spread
            rows = F.leaky_relu(y, 1 / SLOPE).view_as(grad)
            scales, mean, rstd = rstd * scales.square(), shifts.to(mean.dtype), scales.to(rstd.dtype).reciprocal()
        grad_x, *grads = torch.ops.aten.native_batch_norm_backward(
            grad, rows, scales, None, None, mean, rstd, True, ctx.eps, [True] * 3
        )
        grad_scale, grad_shift = (part.view(len(y), -1).sum(0) for part in grads)
        return grad_x.view_as(y), grad_scale, grad_shift, None


@torch.no_grad()  # activation checkpointing counts what autograd keeps
def _scales_are_large(scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return (shift.abs() < MAX_SHIFT * scale.abs()).all()


def _keeps_output_only(scale: torch.Tensor, shift: torch.Tensor) -> bool:
    """Whether the norm's input can be computed from its output; False on a GPU, which is not waited for."""
    if scale.device.type == "cpu":
        return bool(_scales_are_large(scale, shift))
    return scale.device.type == "meta"
