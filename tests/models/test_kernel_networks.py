"""Whole networks by Triton kernels, and the choice of kernels."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from amaes.models import LightDecoder, MedNeXt, Network, SwinUNETR, SwinUNETRDecoder, UNet, UNetDecoder, ops
from amaes.models.ops import dispatch
from amaes.models.swin_unetr import SwinResidualBlock
from amaes.models.unet import ConvBlock
from tests import formula, reference
from tests.models.interpreter import DEVICE, kernels_are_chosen, need_triton, randn, takes_kernels  # noqa: F401
from tests.models.test_mednext import SMALL, published
from tests.models.test_mednext import small as small_mednext
from tests.models.test_models import small_reference
from tests.models.test_resenc import reference_network

need_triton()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")  # of Triton's interpreter
CONV = sys.modules["amaes.models.ops.conv"]
UP_CONV = sys.modules["amaes.models.ops.up_conv"]  # `ops.up_conv` is the function
DEPTHWISE = sys.modules["amaes.models.ops.depthwise"]  # `ops.depthwise` is the function


def network(family):
    torch.manual_seed(0)
    if family == "swin block":
        return SwinResidualBlock(2, 4).to(DEVICE), randn(1, 2, 3, 4, 5)
    if family in ("unet", "light"):
        encoder = UNet(2 if family == "light" else 1, 4)
        encoder.stages = nn.ModuleList([*encoder.stages[:2], ConvBlock(8, 16, 2)])
        encoder.channels, encoder.strides = (4, 8, 16), (1, 2, 4)
        build = LightDecoder if family == "light" else UNetDecoder
    else:
        encoder = MedNeXt(1, 4, (1, 1), (2, 2), kernel_size=5 if family == "mednext_k5" else 3)
        build = encoder.decoders["mednext"]
    decoder = build(encoder.channels, encoder.strides, 2)
    net = Network(encoder, decoder, 2 if family == "light" else 1).to(DEVICE)
    with torch.no_grad():
        for parameter in net.parameters():  # as after training: no zeros, no ones
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net, randn(1, net.in_channels, *((2, 2, 4) if "mednext" in family else (4, 8, 12)))


FAMILIES = ("light", "mednext_k5", "swin block")


@pytest.fixture
def composing_is_free(monkeypatch):
    """Upsamplings are computed by phases also in networks of few voxels."""
    monkeypatch.setattr(UP_CONV, "FLOAT32_COST", 0)


@pytest.mark.usefixtures("composing_is_free")
@pytest.mark.parametrize("family", FAMILIES)
def test_networks_by_kernels_are_the_networks(family, monkeypatch):
    net, x = network(family)
    results = []
    for way in (takes_kernels, lambda x: False):
        monkeypatch.setattr(dispatch, "use_triton", way)
        net.zero_grad()
        y = net(x)
        (y * randn(*y.shape, seed=9)).sum().backward()
        results.append([y.detach(), *(p.grad for p in net.parameters() if p.requires_grad)])
    for ours, plain in zip(*results, strict=True):
        assert (ours - plain).abs().max() <= 1e-4 * max(1, plain.abs().max())


class CoarseMedNeXt(nn.Module):
    """The encoder of a stored network, and two stages of its decoder; at full resolution it takes half a minute."""

    def __init__(self):
        super().__init__()
        name = "mednext_c4_v2"
        network = reference.load_formula(small_mednext(**SMALL[name]), published(name), half=True)
        self.encoder, self.decoder = network.encoder, network.decoder

    def forward(self, x):
        features = self.encoder(x)
        return [*features, self.decoder.stage(2, self.decoder.stage(3, features[-1], None), None)]


def swin():
    encoder = SwinUNETR(1, 12, merging="fixed")
    network = Network(encoder, SwinUNETRDecoder(encoder.channels, encoder.strides, 2), 1)
    return reference.load_formula(network, list(reference.key_list("monai_swin_unetr_48")), half=False)


# Of the reference: the sides of an image, the numbers that a program holds, and what gradients may be off: a share, and
# how many times the error of the plain form (a norm over two voxels leaves two digits).
NETWORKS = {
    "unet": (lambda: small_reference("unet_f4_std_skips_ds"), (16, 32, 32), 2**15, 1e-3, 0),
    "resenc": (reference_network, (8, 16, 24), 2**15, 1e-3, 0),
    "mednext": (CoarseMedNeXt, (4, 6, 32), 2**13, 1e-3, 0),
    "swin": (swin, (32, 32, 64), 2**17, 5e-3, 1.5),  # rounding turns slopes at 0
}


@pytest.mark.usefixtures("composing_is_free")
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_the_reference_by_kernels_are_the_networks(name, monkeypatch):
    build, sides, numbers, tolerance, times = NETWORKS[name]
    if DEVICE.type == "cpu":  # large programs, of which the interpreter runs few
        for attribute, value in {"norm_act.PROGRAMS": 1, "norm_act.TILE": numbers, "depthwise.TILE": numbers}.items():
            monkeypatch.setattr(f"amaes.models.ops.kernels.{attribute}", value)
    net, x, outputs, gradients = build().to(DEVICE), formula.image(1, 1, *sides).to(DEVICE), [], []
    for way, dtype in (
        (takes_kernels, torch.float32),
        (lambda x: False, torch.float32),
        (lambda x: False, torch.double),
    ):
        monkeypatch.setattr(dispatch, "use_triton", way)
        net.zero_grad()
        y = net.to(dtype)(x.to(dtype))
        outputs.append(y if isinstance(y, list) else [y])
        sum(output.square().mean() for output in outputs[-1]).backward()
        gradients.append([p.grad for p in net.parameters() if p.grad is not None])
    for ours, _, exact in zip(*outputs, strict=True):
        assert (ours - exact).abs().max() <= 1e-5 * max(1, exact.abs().max())
    floor = 1e-3 * max(exact.norm() for exact in gradients[-1])
    for ours, plain, exact in zip(*gradients, strict=True):
        assert (ours - exact).norm() <= tolerance * max(exact.norm(), floor) + times * (plain - exact).norm()


class Layouts(TorchDispatchMode):
    """Copies of 5-dimensional tensors of a batch of 2 from one memory layout to another."""

    def __init__(self):
        super().__init__()
        self.copies = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() == 5 and len(out) == 2:
            sources = [tensor for tensor in args if isinstance(tensor, torch.Tensor) and tensor.shape == out.shape]
            if any(is_dense(tensor) and tensor.stride() != out.stride() for tensor in sources) and is_dense(out):
                self.copies.append((function, *(tensor.stride() for tensor in (*sources, out))))
        return out


def is_dense(tensor):
    return tensor.is_contiguous() or tensor.movedim(1, -1).is_contiguous()


def test_mednext_by_kernels_copies_nothing_into_another_layout():
    net, _ = network("mednext")
    image = randn(2, 1, 2, 2, 4)
    with Layouts() as layouts:
        y = net(image)
        y.backward(torch.ones_like(y))
    assert layouts.copies == []
    assert y.movedim(1, -1).is_contiguous()


@pytest.mark.usefixtures("composing_is_free")
@pytest.mark.parametrize("family", ["unet", "light"])
def test_a_unet_by_kernels_copies_nothing_into_another_layout(family):
    net, _ = network(family)
    image = randn(2, net.in_channels, 8, 4, 4)
    with Layouts() as layouts:
        fine, middle, coarse = net.encoder(image)
        skips = (middle, fine) if net.decoder.skips else (None, None)
        y = net.decoder.stage(0, net.decoder.stage(1, coarse, skips[0]), skips[1])
        y.backward(torch.ones_like(y))
    assert layouts.copies == []
    assert y.movedim(1, -1).is_contiguous()


@pytest.mark.usefixtures("composing_is_free")
def test_networks_by_kernels_are_one_graph_of_the_same_numbers():
    net, x = network("light")
    results = []
    for run in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
        net.zero_grad()
        y = run(x)
        (y * randn(*y.shape, seed=9)).sum().backward()
        results.append([y.detach(), *(p.grad for p in net.parameters())])
    torch.compiler.reset()
    for ours, plain in zip(*results, strict=True):
        assert (ours - plain).abs().max() <= 1e-4 * max(1, plain.abs().max())


@pytest.mark.parametrize(("channels", "kernel", "copied"), [(1, 3, True), (4, 1, True), (8, 1, False), (96, 1, False)])
def test_also_in_prediction_only_the_neighbourhoods_of_an_image_are_copied(monkeypatch, channels, kernel, copied):
    conv, copies = nn.Conv3d(channels, 2, kernel, padding=kernel // 2, device=DEVICE), []
    original, x = CONV._neighbourhoods, randn(1, channels, 2, 3, 4)
    monkeypatch.setattr(CONV, "_neighbourhoods", lambda *given: copies.append(given) or original(*given))
    with torch.inference_mode():
        y = ops.conv_before_norm(x, conv)
        assert (y + conv.bias.view(-1, 1, 1, 1) - conv(x)).abs().max() < 1e-5
    assert bool(copies) == copied


class OperatorsAsPromised(TorchDispatchMode):
    """Whether outputs of our operators lie in memory as those of their fake forms: compiled graphs end where not."""

    def __init__(self):
        super().__init__()
        self.wrong = {}  # of each operator that ran: (what it gave, what its fake form gives)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace == "amaes":
            with FakeTensorMode() as mode:
                fake = function(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
            wrong = self.wrong.setdefault(function.name().removeprefix("amaes::"), [])
            for ours, promised in zip(tree_leaves(out), tree_leaves(fake), strict=True):
                both = [(t.shape, t.stride(), t.storage_offset(), t.dtype) for t in (ours, promised)]
                wrong += [both] if both[0] != both[1] else []
        return out


def test_kernels_pass_their_own_test_where_a_prediction_or_a_checkpointed_stage_asks_first():
    kept = []  # tensors that activation checkpointing would count
    stage = torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x)
    with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16), OperatorsAsPromised() as operators, stage:
        assert dispatch.kernels_fault(DEVICE) is None
    assert not kept
    registered = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("amaes::")]
    assert operators.wrong == {name.removeprefix("amaes::"): [] for name in registered}


def test_kernels_with_wrong_numbers_are_named(monkeypatch):
    self_test = sys.modules["amaes.models.ops.kernels.self_test"]
    monkeypatch.setattr(self_test, "triton_depthwise", lambda x, *others: 1.01 * DEPTHWISE._plain(x, *others))
    assert dispatch.kernels_fault(DEVICE) == "wrong numbers of depthwise (same), depthwise (down), depthwise (up)"


def test_kernels_that_do_not_compile_are_a_reason_not_a_crash(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no C compiler\nmore")

    self_test = sys.modules["amaes.models.ops.kernels.self_test"]
    monkeypatch.setattr(self_test, "triton_depthwise", broken)
    assert dispatch.kernels_fault(DEVICE) == "RuntimeError: no C compiler"


@pytest.mark.parametrize(
    ("fault", "line"),
    [(None, "operations in Triton"), ("no luck", "operations of PyTorch (no Triton kernels: no luck)")],
)
def test_the_log_says_which_kernels_a_gpu_has(monkeypatch, fault, line):
    monkeypatch.setattr(dispatch, "_faults", {0: fault})
    assert ops.describe(torch.device("cuda", 0)) == line
    assert ops.are_fused(torch.device("cuda", 0)) == (fault is None)
    assert ops.describe(torch.device("cpu")) == "operations of the CPU"
    assert not ops.are_fused(torch.device("cpu"))


@pytest.mark.parametrize(
    ("capability", "reason"), [((7, 5), "the GPU's compute capability is below 8.0"), ((8, 0), "")]
)
def test_kernels_need_a_gpu_with_bfloat16(monkeypatch, capability, reason):
    monkeypatch.setattr(dispatch, "_faults", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(dispatch, "kernels_fault", lambda device: "")
    assert dispatch.triton_fault(0) == reason
    assert dispatch._faults == {0: reason}  # not tested again
