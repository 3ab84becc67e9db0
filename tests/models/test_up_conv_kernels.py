"""An upsampling and the convolution after it by 8 phases: their Triton kernels, and where they are used."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from amaes.models import ops
from tests.models.interpreter import (
    DEVICE,
    ROUNDING,
    assert_equal_to_plain,
    kernels_are_chosen,  # noqa: F401 (a fixture)
    need_triton,
    randn,
)

need_triton()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")  # of Triton's interpreter
KERNELS = sys.modules["amaes.models.ops.kernels.up_conv"]
CASES = [  # channels in, between and out, batch, sides
    (4, 3, 4, 3, (2, 3, 1)),
    (2, 2, 30, 1, (1, 2, 3)),
    (2, 3, 32, 3, (1, 1, 2)),
    (3, 2, 320, 1, (1, 2, 1)),
]


def given(channels, between, out, batch, sides):
    """Image, weight and bias of the upsampling, weight of the convolution."""
    shapes = [(batch, channels, *sides), (channels, between, 2, 2, 2), (between,), (out, between, 3, 3, 3)]
    return [randn(*shape, seed=i) for i, shape in enumerate(shapes)]


def by_phases(x, up_weight, up_bias, weight):
    up = SimpleNamespace(weight=up_weight, bias=up_bias, stride=(2, 2, 2))
    return ops.up_conv(x, up, SimpleNamespace(weight=weight, bias=None, kernel_size=(3, 3, 3)))


def in_two_steps(x, up_weight, up_bias, weight):
    """Without what the bias adds far from the faces: a constant, which the norm after it takes away."""
    y = F.conv3d(F.conv_transpose3d(x, up_weight, up_bias, stride=2), weight, padding=1)
    return y - (weight.sum((2, 3, 4)) @ up_bias).view(1, -1, 1, 1, 1)


@pytest.mark.parametrize(("channels", "between", "out", "batch", "sides"), CASES)
def test_phases_are_the_upsampling_and_the_convolution(channels, between, out, batch, sides):
    assert_equal_to_plain(by_phases, in_two_steps, given(channels, between, out, batch, sides))


def test_several_tiles_blocks_of_channels_and_chunks_of_a_face(monkeypatch):
    for name, value in (("TILE", 32), ("MOST_CHANNELS", 4), ("MOST_CHUNKS", 2)):
        monkeypatch.setattr(KERNELS, name, value)
    assert_equal_to_plain(by_phases, in_two_steps, given(2, 2, 6, 1, (2, 2, 3)))


def test_under_autocast_the_composed_weights_are_rounded_once():
    tensors = given(16, 8, 8, 1, (3, 2, 4))
    exact = in_two_steps(*(tensor.double() for tensor in tensors))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        one, two = by_phases(*tensors), in_two_steps(*tensors)
    assert one.dtype == torch.bfloat16
    assert one.movedim(1, -1).is_contiguous()
    assert (one - exact).norm() <= ROUNDING / 2 * (two - exact).norm()


def test_the_bias_of_the_convolution_has_a_gradient_of_zeros():
    up, conv = nn.ConvTranspose3d(4, 2, 2, 2, device=DEVICE), nn.Conv3d(2, 2, 3, padding=1, device=DEVICE)
    ops.up_conv(randn(1, 4, 1, 2, 1), up, conv).square().sum().backward()
    assert torch.equal(conv.bias.grad, torch.zeros_like(conv.bias))
    assert up.bias.grad.abs().max() > 0


def test_other_steps_and_kernels_have_no_phases():
    for step, kernel in ((3, 3), (2, 5)):
        up = nn.ConvTranspose3d(4, 2, step, step, device=DEVICE)
        conv = nn.Conv3d(2, 2, kernel, padding=kernel // 2, device=DEVICE)
        x = randn(1, 4, 2, 1, 3)
        assert (ops.up_conv(x, up, conv) - conv(up(x))).abs().max() < 1e-5


def test_interleaving_is_one_operator_for_the_compiler():
    phases, border = randn(1, 2, 3, 2, 8 * 4), randn(3, 3, 3, 4)
    torch.library.opcheck(
        torch.ops.amaes.interleave.default,
        (phases.requires_grad_(), border.requires_grad_()),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize(
    ("channels", "coarse_side", "batch", "cheaper"),
    [(64, 64, 1, True), (128, 32, 1, True), (256, 16, 4, False), (256, 16, 8, True), (512, 8, 16, False)],
)
def test_phases_are_used_where_composing_the_weights_costs_less_than_it_saves(channels, coarse_side, batch, cheaper):
    up = nn.ConvTranspose3d(2 * channels, channels, 2, 2, device="meta")
    conv = nn.Conv3d(channels, channels, 3, padding=1, device="meta")
    x = torch.empty(1, 1, 1, 1, 1, device=DEVICE).expand(batch, 2 * channels, *[coarse_side] * 3)
    assert ops.fused_is_cheaper(x, up, conv) == cheaper
