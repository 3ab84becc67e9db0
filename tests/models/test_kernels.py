"""Triton kernels: values and gradients of the plain forms, on odd sides, in every way an input can be laid out."""

import copy
import pickle
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from amaes.models import ops
from amaes.models.ops import dispatch
from tests.models.interpreter import (
    DEVICE,
    assert_equal_to_plain,
    assert_no_worse_than_plain,
    kernels_are_chosen,  # noqa: F401 (a fixture)
    need_triton,
    randn,
    with_gradients,
)

need_triton()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")  # of Triton's interpreter
DEPTHWISE = sys.modules["amaes.models.ops.depthwise"]  # `ops.depthwise` is the function


# Depthwise convolution ------------------------------------------------------------------------------------------------

DEPTHWISE_CASES = [  # channels, kernel, resample, batch, sides
    (4, 3, "same", 1, (2, 3, 4)),
    (32, 3, "down", 3, (1, 3, 5)),
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


def test_depthwise_takes_other_sides_of_the_kernel_to_pytorch():
    tensors = depthwise_tensors(4, 7, 1, (2, 3, 4))
    assert_equal_to_plain(ops.depthwise, DEPTHWISE._plain, tensors, "same")


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


# Instance norm and leaky ReLU -----------------------------------------------------------------------------------------

NORM = sys.modules["amaes.models.ops.norm_act"]
NORM_CASES = [  # channels, batch, sides, smallest scale
    (4, 3, (5, 7, 6), 0.5),
    (30, 1, (5, 7, 6), 0.5),
    (32, 3, (3, 1, 2), 1e-9),
    (320, 1, (2, 3, 1), 0.5),
    (4, 1, (3, 5, 7), 0.0),
]


def norm_tensors(channels, batch, sides, smallest=0.5):
    scale = randn(channels, seed=1).sign() * torch.linspace(0.5, 2, channels, device=DEVICE)
    scale[0] *= smallest / 0.5
    return 5 + randn(batch, channels, *sides), scale, randn(channels, seed=2)


def norm_of(scale, shift):
    norm = nn.InstanceNorm3d(len(scale), affine=True, dtype=scale.dtype)
    norm.weight, norm.bias = nn.Parameter(scale.detach()), nn.Parameter(shift.detach())
    return norm


def through_norm(function):
    """`function(x, norm)` as one of x, scale and shift."""

    def run(x, scale, shift, *options):
        norm = norm_of(scale, shift)
        del norm.weight, norm.bias
        norm.weight, norm.bias = scale, shift  # no parameters, so that gradients reach the tensors
        return function(x, norm, *options)

    return run


@pytest.mark.parametrize(("channels", "batch", "sides", "smallest"), NORM_CASES)
def test_norm_act(channels, batch, sides, smallest):
    tensors = norm_tensors(channels, batch, sides, smallest)
    assert_equal_to_plain(through_norm(ops.norm_act), through_norm(NORM._plain), tensors)


def test_norm_only_takes_instance_and_group_norms():
    channels = 6
    tensors = norm_tensors(channels, 3, (2, 3, 5))
    group = nn.GroupNorm(channels, channels, device=DEVICE)
    assert_equal_to_plain(through_norm(ops.norm_only), through_norm(lambda x, norm: norm(x)), tensors)
    assert (ops.norm_only(tensors[0], group) - group(tensors[0])).abs().max() < 1e-5


def test_norm_act_in_bfloat16():
    assert_no_worse_than_plain(through_norm(ops.norm_act), through_norm(NORM._plain), norm_tensors(4, 1, (5, 7, 6)))


@pytest.mark.parametrize("mean", [1e3, 1e-3])
def test_statistics_of_norm_act_keep_their_digits_far_from_zero(mean):
    x = mean + randn(1, 4, 9, 10, 11)
    exact = x.double()
    stats = sys.modules["amaes.models.ops.kernels.norm_act"].statistics(x.movedim(1, -1).contiguous(), 1e-5)
    assert (stats[:, 0] - exact.mean((2, 3, 4))).abs().max() <= 1e-6 * mean + 1e-7
    rstd = (exact.var((2, 3, 4), correction=0) + 1e-5).rsqrt()
    assert (stats[:, 1] / rstd - 1).abs().max() <= 1e-6


def test_norm_act_sums_over_several_chunks_and_blocks(monkeypatch):
    kernels = sys.modules["amaes.models.ops.kernels.norm_act"]
    monkeypatch.setattr(kernels, "PROGRAMS", 6)
    monkeypatch.setattr(kernels, "TILE", 16)
    monkeypatch.setattr(kernels, "MOST_CHANNELS", 4)
    tensors = norm_tensors(6, 1, (3, 5, 7))
    assert_equal_to_plain(through_norm(ops.norm_act), through_norm(NORM._plain), tensors)


def test_norm_act_keeps_one_tensor_its_output_or_where_that_loses_digits_its_input():
    for smallest, of_input in ((0.5, False), (1e-9, True)):
        x, scale, shift = norm_tensors(4, 1, (3, 5, 7), smallest)
        rows, kept = x.requires_grad_().movedim(1, -1).contiguous(), []
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
            y = ops.norm_act(rows.movedim(-1, 1), norm_of(scale, shift))
        large = [tensor for tensor in kept if tensor.numel() >= x.numel()]
        assert [tensor.data_ptr() for tensor in large] == [(rows if of_input else y).data_ptr()]


def one_pass(norm, optimizer):
    """What two forward passes answer, as with activation checkpointing, before a backward pass and an update."""
    answers = {NORM._is_invertible(norm) for _ in range(2)}
    assert len(answers) == 1
    (norm.weight.sum() + norm.bias.sum()).backward()
    optimizer.step()
    return answers.pop()


@pytest.mark.parametrize("option", ["fused", "foreach"])
def test_norm_act_asks_the_device_every_16_passes_and_at_once_where_weights_were_loaded(option):
    norm = nn.InstanceNorm3d(2, affine=True, device=DEVICE)
    optimizer = torch.optim.AdamW(norm.parameters(), lr=0.0, **{option: True})
    network = nn.Sequential(norm)
    small, large = ({"0.weight": torch.full((2,), scale), "0.bias": torch.ones(2)} for scale in (1e-9, 1.0))
    network.load_state_dict(large)
    answers = []
    for step in range(40):
        norm.weight.data.fill_(1 if step < 8 else 1e-9)  # as by an update
        answers.append(one_pass(norm, optimizer))
    assert answers[:8] == 8 * [True]
    assert answers[-1] is False
    for content, answer in ((large, True), (small, False), (large, True)):
        network.load_state_dict(content)
        assert [one_pass(norm, optimizer) for _ in range(34)] == 34 * [answer]
    network.load_state_dict(small, assign=True)  # other tensors
    assert NORM._is_invertible(norm) is False
    pickle.dumps(copy.deepcopy(network))


@pytest.mark.parametrize("learns", [True, False])
def test_norm_act_sees_changes_without_a_backward_pass_and_hooks_once(learns):
    norm = nn.InstanceNorm3d(2, affine=True, device=DEVICE)
    for on in (not learns, learns, not learns, learns):
        norm.requires_grad_(on)
        assert NORM._is_invertible(norm)
    for _ in range(33):
        with torch.no_grad():
            norm.weight.fill_(1e-9)
            norm.bias.fill_(1)
        answer = NORM._is_invertible(norm)
    assert answer is False
    assert len(norm._load_state_dict_post_hooks) == 1
    assert len(norm.weight._post_accumulate_grad_hooks) == learns


def test_the_first_pass_of_a_norm_may_be_of_a_checkpointed_stage():
    norm, x = nn.InstanceNorm3d(2, affine=True, device=DEVICE), randn(1, 2, 2, 1, 3).requires_grad_()
    checkpoint(lambda x: ops.norm_act(x, norm), x, use_reentrant=False).square().sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(("keep_input", "pool"), [(False, False), (True, True)])
def test_norm_act_is_one_operator_for_the_compiler(keep_input, pool):
    x, scale, shift = norm_tensors(4, 1, (2, 3, 2))
    rows = x.movedim(1, -1).contiguous()
    torch.library.opcheck(
        torch.ops.amaes.norm_act.default,
        (rows.requires_grad_(), None, scale.requires_grad_(), shift.requires_grad_(), 1e-5, 0.01, keep_input, pool),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    outputs = torch.ops.amaes.norm_act(rows, None, scale, shift, 1e-5, 0.01, keep_input, pool)
    grads = torch.autograd.grad(sum(y.sum() for y in outputs[: 1 + pool]), (rows, scale, shift))
    assert all(grad.storage_offset() == 0 for grad in grads)  # as the compiler takes for granted


# Max pooling after them

POOL_CASES = [  # channels, batch, sides, smallest scale, which of the outputs is read
    (4, 3, (5, 7, 6), 0.5, "both"),
    (30, 1, (2, 3, 5), 0.01, "both"),
    (32, 1, (3, 4, 2), 0.5, "pooled"),
    (320, 1, (2, 2, 3), 0.5, "both"),
    (4, 1, (5, 2, 3), 0.0, "pooled"),
]


def plain_pool(x, norm):
    y = NORM._plain(x, norm)
    return y, F.max_pool3d(y, 2)


def joined(function, read="both"):
    """Map and pooled map of `function` as one tensor, or the pooled one alone."""

    def run(x, norm):
        y, pooled = function(x, norm)
        return torch.cat([y.flatten(), pooled.flatten()]) if read == "both" else pooled

    return through_norm(run)


@pytest.mark.parametrize(("channels", "batch", "sides", "smallest", "read"), POOL_CASES)
def test_norm_act_pool(channels, batch, sides, smallest, read):
    tensors = norm_tensors(channels, batch, sides, smallest)
    assert_equal_to_plain(joined(ops.norm_act_pool, read), joined(plain_pool, read), tensors)


def test_norm_act_pool_in_bfloat16():
    tensors = norm_tensors(4, 1, (4, 7, 6))
    assert_no_worse_than_plain(joined(ops.norm_act_pool), joined(plain_pool), tensors)


@pytest.mark.parametrize("smallest", [0.5, 1e-9])
def test_of_equal_numbers_the_first_is_the_maximum_as_in_max_pool3d(smallest):
    tensors = [randn(2, 4, 4, 5, 6).mul(1.5).round(), *norm_tensors(4, 1, (1, 1, 1), smallest)[1:]]  # few values
    tensors = [tensor.bfloat16() for tensor in tensors]

    def pooled_after(x, norm):
        y = ops.norm_act(x, norm)
        return y, F.max_pool3d(y, 2)

    y, *grads = with_gradients(joined(ops.norm_act_pool, "pooled"), tensors)
    expected, *expected_grads = with_gradients(joined(pooled_after, "pooled"), tensors)
    assert torch.equal(y, expected)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert (ours - theirs).abs().max() <= 0.02 * theirs.abs().max()  # a bfloat16 has 8 bits


def test_what_is_not_a_number_stays_in_the_pooled_map():
    x = randn(1, 2, 2, 4, 2)
    x[0, 0, 1, 1, 0] = float("nan")
    y, pooled = ops.norm_act_pool(x, norm_of(*norm_tensors(2, 1, (1, 1, 1))[1:]))
    assert pooled[:, 0].isnan().all()
    assert torch.equal(pooled[:, 1], F.max_pool3d(y, 2)[:, 1])


def test_norm_act_pool_sums_over_several_chunks_and_blocks(monkeypatch):
    kernels = sys.modules["amaes.models.ops.kernels.norm_act"]
    for name, value in (("PROGRAMS", 4), ("TILE", 64), ("MOST_CHANNELS", 4)):
        monkeypatch.setattr(kernels, name, value)
    assert_equal_to_plain(joined(ops.norm_act_pool), joined(plain_pool), norm_tensors(6, 1, (3, 4, 5)))


# Norm, expand, GELU, response norm, project ---------------------------------------------------------------------------

MLP = sys.modules["amaes.models.ops.norm_mlp"]
MLP_CASES = [  # channels in and out, ratio, response norm, residual, batch, sides
    (4, 4, 2, None, True, 3, (3, 5, 7)),
    (30, 60, 3, None, False, 1, (1, 5, 3)),
    (32, 32, 2, "mean", True, 1, (3, 5, 7)),
    (6, 3, 4, "sum", False, 3, (2, 3, 5)),
]


def chain(function):
    """`function` with its modules' parameters as tensors: x, norm, expand, project (weight and bias each), more."""

    def run(x, scale, shift, expand, expand_bias, project, project_bias, *others, divisor, residual):
        norm = SimpleNamespace(weight=scale, bias=shift, eps=1e-5)
        layers = [
            SimpleNamespace(weight=w[..., None, None, None], bias=b, in_channels=w.shape[1], out_channels=w.shape[0])
            for w, b in ((expand, expand_bias), (project, project_bias))
        ]
        grn = None
        if divisor is not None:
            gamma, beta, *others = others
            grn = SimpleNamespace(gamma=as_row(gamma), beta=as_row(beta), divisor=divisor)
        return function(x, norm, *layers, grn, others[0] if residual else None)

    return run


def as_row(tensor):
    return tensor.view(1, -1, 1, 1, 1)


def plain_chain(x, norm, expand, project, grn, residual):
    y = F.instance_norm(x, weight=norm.weight, bias=norm.bias, eps=norm.eps)
    h = F.gelu(F.conv3d(y, expand.weight, expand.bias))
    h = h if grn is None else ops.response_norm(h, grn.gamma, grn.beta, grn.divisor)
    y = F.conv3d(h, project.weight, project.bias)
    return y if residual is None else residual + y


def mlp_tensors(channels, out, ratio, divisor, residual, batch, sides):
    hidden = ratio * channels
    shapes = [(batch, channels, *sides), channels, channels, (hidden, channels), hidden, (out, hidden), out]
    shapes += [] if divisor is None else [hidden, hidden]
    shapes += [(batch, out, *sides)] if residual else []
    tensors = [randn(*(shape if isinstance(shape, tuple) else (shape,)), seed=i) for i, shape in enumerate(shapes)]
    tensors[3], tensors[5] = tensors[3] / channels**0.5, tensors[5] / hidden**0.5
    return tensors, {"divisor": divisor, "residual": residual}


@pytest.mark.parametrize(("channels", "out", "ratio", "divisor", "residual", "batch", "sides"), MLP_CASES)
def test_norm_mlp(channels, out, ratio, divisor, residual, batch, sides):
    tensors, form = mlp_tensors(channels, out, ratio, divisor, residual, batch, sides)
    ours, plain = (partial(chain(function), **form) for function in (ops.norm_mlp, plain_chain))
    assert_equal_to_plain(ours, plain, tensors)


def test_norm_mlp_in_a_short_type():
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # no bfloat16 matrices when interpreted
    tensors, form = mlp_tensors(4, 4, 2, "mean", True, 1, (3, 5, 4))
    ours, plain = (partial(chain(function), **form) for function in (ops.norm_mlp, plain_chain))
    assert_no_worse_than_plain(ours, plain, tensors, dtype=dtype)


def test_norm_mlp_sums_over_several_chunks_and_blocks_of_hidden_channels(monkeypatch):
    kernels = sys.modules["amaes.models.ops.kernels.norm_mlp"]
    for name, value in (("PROGRAMS", 6), ("ROWS", 32), ("HIDDEN", 16)):
        monkeypatch.setattr(kernels, name, value)
    tensors, form = mlp_tensors(4, 4, 5, "mean", False, 1, (3, 4, 5))
    ours, plain = (partial(chain(function), **form) for function in (ops.norm_mlp, plain_chain))
    assert_equal_to_plain(ours, plain, tensors)


@pytest.mark.parametrize(("channels", "fused"), [(64, True), (65, False)])
def test_norm_mlp_is_fused_where_channels_are_few(monkeypatch, channels, fused):
    calls = []
    monkeypatch.setattr(MLP, "_triton", lambda x, *others: calls.append(x))
    tensors, form = mlp_tensors(channels, 4, 1, None, False, 1, (1, 2, 2))
    chain(ops.norm_mlp)(*tensors, **form) if fused else None
    layer = nn.Conv3d(channels, channels, 1, device=DEVICE)
    ops.norm_mlp(tensors[0], nn.GroupNorm(channels, channels, device=DEVICE), layer, layer, None)
    assert (len(calls) == 2) == fused


# Whole networks -------------------------------------------------------------------------------------------------------


# The choice -----------------------------------------------------------------------------------------------------------
