"""Triton kernels: values and gradients of the plain forms, on odd sides, in every way an input can be laid out."""

import sys

import pytest
import torch

from amaes.models import ops
from amaes.models.ops import dispatch
from tests.models.interpreter import DEVICE, interpreted, need_triton, takes_kernels

need_triton()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")  # of Triton's interpreter
DEPTHWISE = sys.modules["amaes.models.ops.depthwise"]  # `ops.depthwise` is the function
ROUNDING = 1.2 if DEVICE.type == "cuda" else 2.2  # the interpreter cuts digits off where a GPU rounds: twice the error


@pytest.fixture(autouse=True)
def kernels_are_chosen(monkeypatch):
    monkeypatch.setattr(dispatch, "use_triton", takes_kernels)
    with interpreted():
        yield


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def with_gradients(function, tensors, *options):
    """Output, and the gradients of a sum with fixed weights by every tensor."""
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    y = function(*inputs, *options)
    weights = torch.linspace(-3, 3, y.numel(), device=DEVICE).sin().view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)]


def assert_equal_to_plain(kernel, plain, tensors, *options, tolerance=1e-5):
    ours = with_gradients(kernel, tensors, *options)
    exact = with_gradients(plain, [tensor.double() for tensor in tensors], *options)
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape
        assert a.dtype == torch.float32
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max())


def assert_no_worse_than_plain(kernel, plain, tensors, *options):
    """In bfloat16: as near to the exact numbers as the plain form."""
    low = [tensor.bfloat16() for tensor in tensors]
    exact = with_gradients(plain, [tensor.double() for tensor in low], *options)
    for a, b, true in zip(
        with_gradients(kernel, low, *options), with_gradients(plain, low, *options), exact, strict=True
    ):
        assert a.dtype == torch.bfloat16
        assert (a - true).norm() <= ROUNDING * (b - true).norm() + 1e-3 * true.norm()


# Depthwise convolution ------------------------------------------------------------------------------------------------

DEPTHWISE_CASES = [  # channels, kernel, resample, batch, sides
    (4, 3, "same", 1, (2, 5, 3)),
    (32, 3, "down", 3, (2, 3, 5)),
    (320, 3, "same", 1, (1, 3, 2)),
    (30, 3, "up", 1, (2, 1, 3)),
    (4, 5, "down", 1, (2, 5, 4)),
    (32, 5, "same", 1, (1, 3, 5)),
    (30, 5, "up", 1, (1, 2, 2)),
]


def depthwise_tensors(channels, kernel, batch, sides):
    return randn(batch, channels, *sides), randn(channels, 1, kernel, kernel, kernel, seed=1), randn(channels, seed=2)


@pytest.mark.parametrize(("channels", "kernel", "resample", "batch", "sides"), DEPTHWISE_CASES)
def test_depthwise(channels, kernel, resample, batch, sides):
    tensors = depthwise_tensors(channels, kernel, batch, sides)
    assert_equal_to_plain(ops.depthwise, DEPTHWISE._plain, tensors, resample)


@pytest.mark.parametrize("resample", ["same", "down", "up"])
def test_depthwise_in_bfloat16(resample):
    assert_no_worse_than_plain(ops.depthwise, DEPTHWISE._plain, depthwise_tensors(4, 3, 1, (1, 3, 4)), resample)


def test_depthwise_takes_planes_of_several_tiles_and_chunks_of_several_planes(monkeypatch):
    kernels = sys.modules["amaes.models.ops.kernels.depthwise"]
    monkeypatch.setattr(kernels, "MOST_CHUNKS", 2)
    monkeypatch.setattr(kernels, "TILE", 32)  # 2 x 4 voxels of 4 channels
    assert_equal_to_plain(ops.depthwise, DEPTHWISE._plain, depthwise_tensors(4, 3, 1, (3, 3, 5)), "same")


def test_depthwise_under_autocast_keeps_the_weights_digits():
    x, weight, bias = depthwise_tensors(4, 3, 1, (1, 3, 4))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = ops.depthwise(x, weight, bias, "same")
    assert y.dtype == torch.bfloat16
    exact = DEPTHWISE._plain(x.bfloat16().double(), weight.double(), bias.double(), "same")
    last_digit = 2**-8 if DEVICE.type == "cuda" else 2**-7
    assert ((y - exact).abs() <= last_digit * exact.abs()).all()


def test_depthwise_keeps_channels_last_memory_and_copies_no_tensor_that_has_it():
    x, weight, bias = depthwise_tensors(4, 3, 1, (2, 3, 4))
    last = x.contiguous(memory_format=torch.channels_last_3d)
    assert dispatch.to_rows(last).data_ptr() == last.data_ptr()
    y = ops.depthwise(x, weight, bias, "down")
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(y, ops.depthwise(last, weight, bias, "down"))


@pytest.mark.parametrize("resample", ["down", "up"])
def test_depthwise_is_one_operator_for_the_compiler(resample):
    x, weight, bias = depthwise_tensors(4, 3, 1, (1, 3, 2))
    torch.library.opcheck(
        torch.ops.amaes.depthwise.default,
        (x.movedim(1, -1).contiguous().requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), resample),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


# The choice -----------------------------------------------------------------------------------------------------------


def test_kernels_pass_their_own_test():
    assert dispatch.kernels_fault(DEVICE) is None


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
