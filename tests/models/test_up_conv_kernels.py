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
    assert_equal_to_plain,
    kernels_are_chosen,  # noqa: F401 (a fixture)
    need_triton,
    randn,
)

need_triton()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")  # of Triton's interpreter
PHASES = sys.modules["amaes.models.ops.kernels.phases"]
UP_CONV = sys.modules["amaes.models.ops.up_conv"]
NORM_ACT = sys.modules["amaes.models.ops.kernels.norm_act"]
CASES = [  # channels in, between and out, batch, sides, scale of a channel
    (4, 3, 4, 3, (2, 3, 1), 1.0),
    (2, 2, 30, 1, (1, 2, 3), 0.01),
    (2, 3, 32, 3, (1, 2, 2), 1.0),
    (3, 2, 320, 1, (2, 2, 1), 1.0),
]


def given(channels, between, out, batch, sides, smallest=1.0):
    """Image, weight and bias of the upsampling, weight of the convolution, scale and shift of the norm."""
    shapes = [(batch, channels, *sides), (channels, between, 2, 2, 2), (between,), (out, between, 3, 3, 3)]
    scale = 1 + randn(out, seed=5).abs()
    scale[0] = smallest
    return [*(randn(*shape, seed=i) for i, shape in enumerate(shapes)), scale, randn(out, seed=6).clamp(-1, 1)]


def norm_of(scale, shift):
    norm = nn.InstanceNorm3d(len(scale), affine=True)
    del norm.weight, norm.bias
    norm.weight, norm.bias = scale, shift  # no parameters, so that gradients reach the tensors
    return norm


def by_phases(x, up_weight, up_bias, weight, scale, shift):
    up = SimpleNamespace(weight=up_weight, bias=up_bias, stride=(2, 2, 2))
    conv = SimpleNamespace(weight=weight, bias=None, kernel_size=(3, 3, 3))
    return ops.up_conv_norm_act(x, up, conv, norm_of(scale, shift))


def in_two_steps(x, up_weight, up_bias, weight, scale, shift):
    y = F.conv3d(F.conv_transpose3d(x, up_weight, up_bias, stride=2), weight, padding=1)
    return F.leaky_relu(F.instance_norm(y, weight=scale, bias=shift), 0.01)


@pytest.mark.parametrize(("channels", "between", "out", "batch", "sides", "smallest"), CASES)
def test_phases_are_the_upsampling_and_the_convolution(channels, between, out, batch, sides, smallest):
    assert_equal_to_plain(by_phases, in_two_steps, given(channels, between, out, batch, sides, smallest))


def test_several_tiles_blocks_of_channels_and_chunks_of_a_face(monkeypatch):
    for name, value in (("TILE", 32), ("MOST_CHANNELS", 4)):
        monkeypatch.setattr(PHASES, name, value)
        monkeypatch.setattr(NORM_ACT, name, value)
    monkeypatch.setattr(PHASES, "MOST_CHUNKS", 2)
    monkeypatch.setattr(NORM_ACT, "PROGRAMS", 4)
    assert_equal_to_plain(by_phases, in_two_steps, given(2, 2, 6, 1, (2, 2, 3)))


def test_under_autocast_the_composed_weights_are_rounded_once():
    x, up_weight, up_bias, weight, *_ = tensors = given(16, 8, 8, 1, (3, 2, 4))

    def phases(x, weight, *of_up):
        up = SimpleNamespace(weight=of_up[0], bias=of_up[1])
        return UP_CONV._phases(x, up, SimpleNamespace(weight=weight, bias=None))[0]

    def two_steps(x, weight, *of_up):
        return F.conv3d(F.conv_transpose3d(x, *of_up, stride=2), weight, padding=1)

    errors = []
    for function in (phases, two_steps):
        exact = function(*(tensor.double() for tensor in (x, weight, up_weight, up_bias)))
        with torch.autocast(DEVICE.type, torch.bfloat16):
            y = function(x, weight, up_weight, up_bias)
            assert y.dtype == by_phases(*tensors).dtype == torch.bfloat16
        errors.append((y - exact).norm() / exact.norm())
    assert errors[0] < errors[1] < 0.02


def test_the_bias_of_the_convolution_has_a_gradient_of_zeros():
    up, conv = nn.ConvTranspose3d(4, 2, 2, 2, device=DEVICE), nn.Conv3d(2, 2, 3, padding=1, device=DEVICE)
    norm = nn.InstanceNorm3d(2, affine=True, device=DEVICE)
    ops.up_conv_norm_act(randn(1, 4, 1, 2, 1), up, conv, norm).pow(3).sum().backward()
    assert torch.equal(conv.bias.grad, torch.zeros_like(conv.bias))
    assert up.bias.grad.abs().max() > 0


def test_other_steps_and_kernels_have_no_phases():
    for step, kernel in ((3, 3), (2, 5)):
        up = nn.ConvTranspose3d(4, 2, step, step, device=DEVICE)
        conv = nn.Conv3d(2, 2, kernel, padding=kernel // 2, device=DEVICE)
        norm, x = nn.InstanceNorm3d(2, affine=True, device=DEVICE), randn(1, 4, 2, 1, 3)
        y = ops.up_conv_norm_act(x, up, conv, norm)
        assert (y - F.leaky_relu(norm(conv(up(x))), 0.01)).abs().max() < 1e-5


@pytest.mark.parametrize("keep_input", [False, True])
def test_a_norm_of_phases_is_one_operator_for_the_compiler(keep_input):
    tensors = [randn(1, 2, 3, 2, 8 * 4), randn(3, 3, 3, 4), randn(4), randn(4)]
    torch.library.opcheck(
        torch.ops.amaes.norm_act.default,
        (*(tensor.requires_grad_() for tensor in tensors), 1e-5, 0.01, keep_input, False),
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
