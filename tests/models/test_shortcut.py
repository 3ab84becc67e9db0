"""The shortcuts of MedNeXt blocks that change the resolution: values, gradients, and what is copied for them."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from amaes.models import ops
from amaes.models.mednext import Block

SHORTCUT = sys.modules["amaes.models.ops.shortcut"]


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def down(every_second, x, weight):
    """A convolution of the whole map, and every second voxel: as a block reads them."""
    x, second = every_second(x)
    return F.conv3d(x, weight, padding=1)[..., ::2, ::2, ::2] * second


@pytest.mark.parametrize(
    ("ours", "plain", "shapes"),
    [
        (
            lambda *tensors: down(ops.every_second, *tensors),
            lambda *tensors: down(lambda x: (x, x[..., ::2, ::2, ::2]), *tensors),
            [(2, 3, 5, 4, 7), (3, 3, 3, 3, 3)],
        ),
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
