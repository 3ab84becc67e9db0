"""Operations with an implementation of their own: the same numbers as the plain modules, from less memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from amaes.models import LightDecoder, UNet, ops
from amaes.models.decoder import UNetDecoder
from amaes.models.mednext import Block
from amaes.models.ops import dispatch
from amaes.models.ops.conv import convolve
from amaes.models.ops.depthwise import _spread
from amaes.models.ops.norm_act import _NormAct
from amaes.models.unet import ConvUnit

SIDES = (4, 5, 6)


def plain(x, norm):
    return F.leaky_relu(norm(x), 0.01)


def instance_norm(channels, scale=None):
    torch.manual_seed(1)
    norm = nn.InstanceNorm3d(channels, affine=True)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2).mul_(torch.tensor([1.0, -1.0] * channels)[:channels])
        norm.bias.normal_()
        if scale is not None:
            norm.weight[0] = scale
    return norm


def gradients(function, x, *modules):
    """Of a sum with fixed weights: (x, parameters...)."""
    x = x.clone().requires_grad_()
    parameters = [p for module in modules for p in module.parameters()]
    y = function(x, *modules)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape).sin().to(y.dtype)
    return torch.autograd.grad((y * weights).sum(), [x, *parameters])


def assert_close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max())


def kept_bytes(function, *arguments):
    """Of different memory that autograd keeps, parameters aside."""
    kept = {}

    def count(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = function(*arguments)
    del output
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norm_act_is_bit_for_bit_the_norm_and_the_leaky_relu(dtype):
    norm, x = instance_norm(3), 3 + torch.randn(2, 3, *SIDES)
    norm = norm.double() if dtype == torch.float64 else norm
    ours = ops.norm_act(x.to(dtype), norm)
    assert ours.dtype == dtype
    assert torch.equal(ours, plain(x.to(dtype), norm))
    laid_out_otherwise = x.to(dtype).contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(ops.norm_act(laid_out_otherwise, norm), ours)


@pytest.mark.parametrize("scale", [None, 0.1, 1e-9, 0.0])
def test_gradients_of_norm_act_are_exact_whatever_the_scale(scale):
    norm, x = instance_norm(3, scale).double(), torch.randn(2, 3, *SIDES, dtype=torch.float64)
    assert_close(gradients(ops.norm_act, x, norm), gradients(plain, x, norm), 1e-12)

    def function(x, weight, bias):
        norm.weight, norm.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        return _NormAct.apply(x, weight, bias, norm.eps)

    inputs = [x[:, :, :2, :3, :2].clone(), norm.weight.detach().clone(), norm.bias.detach().clone()]
    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in inputs])


def test_gradients_in_bfloat16_are_as_near_the_exact_ones_as_those_of_the_plain_form():
    norm, x = instance_norm(4), torch.randn(2, 4, 12, 14, 10)
    exact = gradients(plain, x.double(), instance_norm(4).double())
    for ours, theirs, true in zip(
        gradients(ops.norm_act, x.bfloat16(), norm), gradients(plain, x.bfloat16(), norm), exact, strict=True
    ):
        assert (ours - true).norm() <= 1.5 * (theirs - true).norm() + 1e-3 * true.norm()


def test_norm_act_keeps_its_output_and_its_input_only_where_the_scale_is_too_small():
    x = torch.randn(1, 4, 16, 18, 20)
    size = x.numel() * x.element_size()
    assert kept_bytes(ops.norm_act, x, instance_norm(4)) < 1.01 * size
    assert 2 * size <= kept_bytes(ops.norm_act, x, instance_norm(4, scale=1e-4)) < 2.01 * size


def test_norm_act_pool_is_bit_for_bit_norm_act_and_max_pool3d():
    norm, x = instance_norm(3), torch.randn(2, 3, 4, 7, 6)
    results = []
    for function in (
        ops.norm_act_pool,
        lambda x, norm: (ops.norm_act(x, norm), F.max_pool3d(ops.norm_act(x, norm), 2)),
    ):
        y, pooled = function(x, norm)
        grads = gradients(lambda *inputs, function=function: function(*inputs)[1], x, norm)
        results.append([y, pooled, *grads])
    assert all(torch.equal(ours, plain) for ours, plain in zip(*results, strict=True))
    assert results[0][1].shape == (2, 3, 2, 3, 3)


def test_two_units_keep_half_of_what_the_plain_modules_keep():
    units = nn.Sequential(ConvUnit(4, 4), ConvUnit(4, 4))
    modules = nn.Sequential(*(m for unit in units for m in (unit.conv, unit.norm, nn.LeakyReLU(0.01))))
    x = torch.randn(1, 4, 16, 18, 20)
    size = x.numel() * x.element_size()
    assert kept_bytes(units, x) < 3.01 * size  # the input and two outputs
    assert kept_bytes(modules, x) > 5.99 * size  # inputs of six modules


def test_there_is_no_second_derivative():
    x = torch.randn(1, 2, *SIDES, requires_grad=True)
    (first,) = torch.autograd.grad(ops.norm_act(x, instance_norm(2)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    "build", [lambda: Block(4, 4, 2, grn="mean"), lambda: Block(4, 4, 2, kernel_size=5), lambda: ConvUnit(4, 4)]
)
def test_a_backward_pass_inside_autocast_gives_the_same_gradients(build):
    torch.manual_seed(0)
    module, x, results = build(), torch.randn(1, 4, 6, 8, 10), []
    for inside in (False, True):
        module.zero_grad()
        y = module(x).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            y.backward()
        results.append([p.grad.clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_of_few_channels_has_the_gradients_of_any_other(transposed, bias):
    torch.manual_seed(0)
    stride = (2, 2, 2) if transposed else (1, 1, 1)
    layer = (nn.ConvTranspose3d if transposed else nn.Conv3d)(4, 6, 3, stride, 1, bias=bias).double()
    x = torch.randn(2, 4, *SIDES, dtype=torch.double)

    def ours(x, layer):
        y = convolve(x, layer.weight, layer.bias, stride, (1, 1, 1), transposed)
        assert type(y.grad_fn).__name__ == "_FewChannelsBackward"
        return y

    assert_close(gradients(ours, x, layer), gradients(lambda x, layer: layer(x), x, layer), 1e-12)
    layer.requires_grad_(False)
    assert torch.autograd.grad(ours(x.requires_grad_(), layer).sum(), x)[0].any()


def test_shapes_alone_have_gradients_too():
    with torch.device("meta"):
        unit, x = ConvUnit(4, 4), torch.empty(2, 4, *SIDES, requires_grad=True)
        up = nn.ConvTranspose3d(4, 4, 2, 2)
    (unit(x).sum() + unit(x, up).sum()).backward()
    assert x.grad.shape == x.shape
    assert all(p.grad.shape == p.shape for p in (*unit.parameters(), *up.parameters()))


def test_statistics_of_a_mednext_block_write_no_normalised_copy(monkeypatch):
    monkeypatch.setattr(torch, "native_batch_norm", None)
    block, x = Block(4, 4, 2).double(), 5 + torch.randn(2, 4, *SIDES, dtype=torch.float64)
    y = ops.depthwise(x, block.depthwise.weight, block.depthwise.bias, "same")
    expected = x + block.project(F.gelu(block.expand(block.norm(y))))
    assert (block(x) - expected).abs().max() < 1e-12


def test_spreading_keeps_the_device():
    assert _spread(torch.empty(1, 2, 3, 4, 5, device="meta")).shape == (1, 2, 5, 7, 9)


class DepthwiseLayouts(TorchDispatchMode):
    """Whether the image of every depthwise convolution, and the gradient of its output, is contiguous."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if function == aten.convolution.default and args[-1] > 1:  # groups
            self.seen.append(args[0].is_contiguous())
        if function == aten.convolution_backward.default and args[-2] > 1:
            self.seen.append(args[0].is_contiguous() and args[1].is_contiguous())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("resample", ["same", "down", "up"])
@pytest.mark.parametrize("batch", [1, 3])
def test_off_the_cpu_a_depthwise_convolution_gets_contiguous_tensors(monkeypatch, resample, batch):
    torch.manual_seed(0)
    block = Block(4, 4, 2, resample=resample).double()
    x = torch.randn(batch, 4, *SIDES, dtype=torch.float64).contiguous(memory_format=torch.channels_last_3d)
    parameters = [block.depthwise.weight, block.depthwise.bias]
    expected, expected_gradients = block(x), gradients(lambda x, block: block(x), x, block)
    monkeypatch.setattr(dispatch, "use_cpu_path", lambda x: False)
    assert ops.depthwise(x, *parameters, resample).is_contiguous()  # as the group norm after it wants
    with DepthwiseLayouts() as layouts:
        y, grads = block(x), gradients(lambda x, block: block(x), x, block)
    assert layouts.seen == [True] * 3  # two forward passes and a backward pass
    assert_close([y, *grads], [expected, *expected_gradients], 1e-12)


# Upsampling and the convolution after it ------------------------------------------------------------------------------


def two_steps(x, up, conv):
    return conv(up(x))


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("sides", [(3, 4, 5), (1, 2, 3)])
def test_one_transposed_convolution_is_the_upsampling_and_the_convolution(step, sides):
    torch.manual_seed(0)
    up = nn.ConvTranspose3d(6, 3, step, step).double()
    conv = nn.Conv3d(3, 4, 3, padding=1).double()
    x = torch.randn(2, 6, *sides, dtype=torch.float64)
    assert (ops.up_conv(x, up, conv) - two_steps(x, up, conv)).abs().max() <= 1e-12
    assert_close(gradients(ops.up_conv, x, up, conv), gradients(two_steps, x, up, conv), 1e-12)


def test_under_autocast_the_composed_kernel_is_rounded_once():
    torch.manual_seed(0)
    up, conv, x = nn.ConvTranspose3d(16, 8, 2, 2), nn.Conv3d(8, 8, 3, padding=1), torch.randn(1, 16, 6, 7, 8)
    exact = two_steps(x, up, conv)
    with torch.autocast("cpu", torch.bfloat16):
        one, two = ops.up_conv(x, up, conv), two_steps(x, up, conv)
    assert one.dtype == torch.bfloat16
    assert (one - exact).norm() < (two - exact).norm() < 0.02 * exact.norm()


def test_one_convolution_where_it_is_less_arithmetic():
    def layers(channels):
        up = nn.ConvTranspose3d(2 * channels, channels, 2, 2, device="meta")
        return up, nn.Conv3d(channels, channels, 3, padding=1, device="meta")

    def image(channels, side):
        return torch.empty(1, 1, 1, 1, 1).expand(1, channels, side, side, side)

    assert ops.fused_is_cheaper(image(128, 64), *layers(64))  # the finest stage of U-Net XL at 128^3
    assert not ops.fused_is_cheaper(image(1024, 8), *layers(512))  # its deepest: the kernels are larger than the maps
    assert not ops.fused_is_cheaper(image(128, 64).to("meta"), *layers(64))  # not measured there


def test_the_light_decoder_does_less_arithmetic_and_its_upsampled_maps_are_not_kept():
    torch.manual_seed(0)
    encoder = UNet(1, 4)
    light = LightDecoder(encoder.channels[:2], encoder.strides[:2], 1)
    features = [torch.empty(0), torch.randn(1, 8, 16, 12, 20)]
    with FlopCounterMode(display=False) as counter:
        light(features)
    fine = 16 * 12 * 20 * 8
    head, composing, bias = 2 * 4 * fine, 2 * 8 * 4 * 4 * 27 * 64, 2 * 4 * 4 * 27 * 27
    assert counter.get_total_flops() == 2 * 8 * 4 * 8 * fine + head + composing + bias
    size = 4 * 4 * fine
    assert kept_bytes(light, features) < 1.6 * size  # the unit's output, and the map below at a quarter


@pytest.mark.parametrize("convs", [1, 2])
def test_a_decoder_without_skips_is_the_same_in_one_and_in_two_steps(convs, monkeypatch):
    torch.manual_seed(0)
    decoder = UNetDecoder((4, 8, 16), (1, 2, 4), 2, convs, skips=False).double()
    x = torch.randn(2, 16, 6, 5, 4, dtype=torch.float64)
    kept_keys = list(decoder.state_dict())

    def run(x, decoder):
        return decoder([None, None, x])

    results = []
    for less in (True, False):
        monkeypatch.setattr("amaes.models.decoder.fused_is_cheaper", lambda *layers, less=less: less)
        for on in (False, True):
            decoder.checkpoint_activations = on
            results.append([run(x, decoder), *gradients(run, x, decoder)])
    for other in results[1:]:
        assert_close(other, results[0], 1e-10)
    assert list(decoder.state_dict()) == kept_keys
    assert kept_keys[:2] == ["ups.0.weight", "ups.0.bias"]
