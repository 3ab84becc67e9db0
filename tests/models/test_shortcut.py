"""The shortcuts of MedNeXt blocks that change the resolution: values, gradients, and what is copied for them."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from amaes.models import ops
from amaes.models.mednext import Block
from amaes.models.ops import dispatch

SHORTCUT = sys.modules["amaes.models.ops.shortcut"]


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def down(x, weight, bias):
    y, second = ops.depthwise_down(x, weight, bias)
    return y * second


def plain_down(x, weight, bias):
    return F.conv3d(x, weight, bias, 2, 1, groups=len(weight)) * x[..., ::2, ::2, ::2]


@pytest.mark.parametrize(
    ("ours", "plain", "shapes"),
    [
        (down, plain_down, [(2, 3, 5, 4, 7), (3, 1, 3, 3, 3), (3,)]),
        (ops.add_upsampled, SHORTCUT._plain, [(2, 3, 5, 3, 7), (2, 3, 3, 2, 4), (3,)]),
    ],
)
def test_values_and_gradients(ours, plain, shapes):
    results = []
    for function in (ours, plain):
        tensors = [randn(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
        y = function(*tensors)
        results.append([y, *torch.autograd.grad((y * randn(*y.shape, seed=9)).sum(), tensors)])
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-12


@pytest.mark.parametrize("way", [True, False], ids=["CPU", "plain"])
def test_gradients_that_others_read_too_stay_what_they_are(way, monkeypatch):
    """The input is a sum, read twice: its gradient goes to both parts, to hooks, and is kept."""
    monkeypatch.setattr(dispatch, "use_cpu_path", lambda x: way)
    results = []
    for function in (down, plain_down):
        first, second = (randn(2, 3, 5, 4, 7, seed=seed).requires_grad_() for seed in (1, 2))
        x, seen = first + second, []
        x.retain_grad()
        x.register_hook(seen.append)
        other = x * 3
        other.register_hook(seen.append)
        y = function(x, randn(3, 1, 3, 3, 3), randn(3))
        ((y * y).sum() + other.sum()).backward()
        results.append([first.grad, second.grad, x.grad, *seen])
    assert len(results[0]) == 5
    for ours, plain in zip(*results, strict=True):
        assert (ours - plain).abs().max() <= 1e-12 * plain.abs().max()


def test_under_autocast_gradients_have_the_types_of_their_tensors():
    y, shortcut, bias = (tensor.float() for tensor in (randn(1, 2, 3, 5, 1), randn(1, 2, 2, 3, 1), randn(2)))
    leaves = [y.bfloat16().requires_grad_(), shortcut.requires_grad_(), bias.requires_grad_()]
    out = ops.add_upsampled(*leaves)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.bfloat16, torch.float32, torch.float32]
    assert bias.grad.tolist() == [15, 15]


class Fills(TorchDispatchMode):
    """Operators that fill up or zero a map of `size` numbers or more."""

    def __init__(self, size):
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out, name = operator(*args, **(kwargs or {})), operator.overloadpacket.__name__
        if (
            name in ("constant_pad_nd", "zeros", "new_zeros", "slice_backward", "zeros_like")
            and out.numel() >= self.size
        ):
            self.names.append(name)
        return out


@pytest.mark.parametrize("resample", ["down", "up"])
def test_a_block_pads_no_map_and_fills_no_gradient_with_zeros(resample):
    block = Block(4, 4, 2, resample=resample).to("meta")  # where the depthwise convolution fills in no zeros
    x = torch.empty(1, 4, 6, 8, 10, device="meta", requires_grad=True)
    with Fills(x.numel()) as fills:
        block(x).sum().backward()
    assert fills.names == []
