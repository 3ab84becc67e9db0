import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F

from amaes.models import MedNeXt, MedNeXtDecoder, Network, build_autoencoder, build_segmenter, ops, upkern_
from amaes.models.decoder import LightDecoder, UNetDecoder
from amaes.models.mednext import Block, ResponseNorm
from amaes.models.ops import dispatch
from amaes.models.transfer import grow_kernel
from amaes.published import rename
from tests import formula, reference
from tests.reference import MODELS

DEPTHS, RATIOS = (1, 1, 1, 2, 1), (2, 3, 4, 4, 4)


def small(kernel_size=3, grn=None, decoder="mednext", num_classes=1, deep_supervision=False):
    encoder = MedNeXt(1, 4, DEPTHS, RATIOS, kernel_size, grn)
    publishes = (encoder.channels, encoder.strides, num_classes)
    if decoder == "mednext":
        depths = (1, 1, 1, 1)
        head = MedNeXtDecoder(*publishes, depths, RATIOS[:4], kernel_size, grn, deep_supervision=deep_supervision)
    else:
        head = {"light": LightDecoder, "unet": UNetDecoder}[decoder](*publishes)
    return Network(encoder, head, 1)


SMALL = {
    "amaes_mednext_c4_light_rec": {"decoder": "light"},
    "amaes_mednext_c4_std_skips": {"decoder": "unet"},
    "amaes_mednext_c4_meddec": {},
    "mednext_c4_k3_ds": {"num_classes": 2, "deep_supervision": True},
    "mednext_c4_k5": {"kernel_size": 5},
    "mednext_c4_v2": {"grn": "mean"},
    "mednext_c4_grn_v1code": {"grn": "mean"},  # without GRN in the first down block: there its parameters stay zero
}


def published(name):
    return [str(key) for key in MODELS[f"{name}/keys"]]


def difference(output, expected):
    step = output.shape[-1] // expected.shape[-1]
    return (output[..., ::step, ::step, ::step] - expected).abs().max()


@pytest.mark.parametrize("name", SMALL)
def test_outputs_and_gradients_equal_the_reference_in_double_precision(name):
    network = reference.load_formula(small(**SMALL[name]), published(name), half=True).double()
    image = formula.image(1, 1, 32, 32, 32).double().requires_grad_()
    outputs = network(image)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    assert f"{name}/output{len(outputs)}" not in MODELS
    for i, output in enumerate(outputs):
        expected = torch.from_numpy(MODELS[f"{name}/output{i}"])
        assert difference(output, expected) <= 1e-6 * max(1, expected.abs().max())

    loss = sum(output.square().mean() for output in outputs)
    loss.backward()
    assert loss.item() == pytest.approx(float(MODELS[f"{name}/loss"]), rel=1e-6)
    assert image.grad.norm().item() == pytest.approx(float(MODELS[f"{name}/input_grad_norm"]), rel=1e-6)
    norms = dict(zip(published(name), MODELS[f"{name}/grad_norms"].tolist(), strict=True))
    floor = 1e-3 * max(norm for norm in norms.values() if norm == norm)
    parameters = dict(network.named_parameters())
    for key, old in reference.own_names(published(name)).items():
        assert abs(parameters[key].grad.norm().item() - norms[old]) <= 1e-6 * max(norms[old], floor), key


def test_response_norm_by_the_sum_equals_the_reference():
    network = reference.load_formula(small(grn="sum"), published("mednext_c4_v2"), half=True).double()
    with torch.no_grad():
        output = network(formula.image(1, 1, 32, 32, 32).double())
    expected = torch.from_numpy(MODELS["mednext_c4_v2/output_sum"])
    assert difference(output, expected) <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "build", "keys"),
    [
        ("amaes_mednext_m3_light_rec", lambda: build_autoencoder("mednext_m"), "amaes_mednext_m3_lw_dec"),
        ("mednext_v1_s_k3", lambda: build_segmenter("mednext_s", 1, 1, "mednext"), "mednext_v1_s_k3"),
        ("mednext_v1_b_k3", lambda: build_segmenter("mednext_b", 1, 1, "mednext"), "mednext_v1_b_k3"),
        ("mednext_v2_base", lambda: build_segmenter("mednext_v2_base", 1, 1, "mednext"), "mednext_v1_l_k3"),
    ],
)
def test_full_size_networks_equal_the_reference(name, build, keys):
    keys = [key.removeprefix("model.") for key in reference.key_list(keys)]
    if "v2" in name:
        depthwise = [key.removesuffix("conv1.weight") for key in keys if key.endswith(".conv1.weight")]
        keys += [f"{key}grn_{part}" for key in depthwise for part in ("gamma", "beta")]
    network = reference.load_formula(build(), keys, half=False)
    with torch.no_grad():
        output = network(formula.image(1, 1, 32, 32, 32))
    assert difference(output, torch.from_numpy(MODELS[f"{name}/output0"])) <= 1e-4 * float(MODELS[f"{name}/std"])


def block_of(config):
    widths = (config.get("C_in", config.get("C")), config.get("C_out", config.get("C")))
    resample = {"block": "same"}.get(config["cls"], config["cls"])
    return Block(*widths, config["r"], config["k"], "mean" if config["grn"] else None, resample)


@pytest.mark.parametrize("name", ["mednext_down_k3", "mednext_up_k3_grn", "mednext_up_k5", "mednext_block_k5_grn"])
def test_blocks_equal_the_reference_on_odd_sides_and_batches(name):
    config, state, (x,), expected = reference.block_case(name)
    block = block_of(config)
    names = {"conv1": "depthwise", "conv2": "expand", "conv3": "project", "res_conv": "shortcut", "norm": "norm"}
    renamed = {}
    for key, value in state.items():
        layer, _, last = key.partition(".")
        renamed[f"{names[layer]}.{last}" if last else rename(key, ((r"^grn_", "grn."),))] = value
    block.load_state_dict(renamed)
    x.requires_grad_()
    output = block(x)
    assert (output - expected).abs().max() <= 1e-5
    output.square().mean().backward()  # the loss of the reference
    gradient = torch.from_numpy(reference.BLOCKS[f"{name}/input_grad"])
    assert (x.grad - gradient).abs().max() <= 1e-5 * max(1, gradient.abs().max())


def results(block, x):
    x = x.clone().requires_grad_()
    block.zero_grad()
    y = block(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    return [y, x.grad, *(p.grad.clone() for p in block.parameters())]


@pytest.mark.parametrize(
    ("resample", "grn", "kernel_size"), list(itertools.product(["same", "down", "up"], [None, "mean", "sum"], [3, 5]))
)
def test_both_implementations_compute_the_same_numbers_and_gradients(resample, grn, kernel_size, monkeypatch):
    torch.manual_seed(0)
    block = Block(6, {"same": 6, "down": 12, "up": 3}[resample], 3, kernel_size, grn, resample).double()
    if grn:
        torch.nn.init.normal_(block.grn.gamma)
        torch.nn.init.normal_(block.grn.beta)
    x = torch.randn(2, 6, 5, 6, 7, dtype=torch.float64) + 2
    monkeypatch.setattr(dispatch, "use_cpu_path", lambda x: False)
    expected = results(block, x)
    monkeypatch.undo()
    for ours, plain in zip(results(block, x), expected, strict=True):
        assert (ours - plain).abs().max() <= 1e-10 * max(1, plain.abs().max())


def test_more_rows_than_a_piece_and_more_samples_change_nothing(monkeypatch):
    module = importlib.import_module("amaes.models.ops.norm_mlp")  # the package has a function of that name
    monkeypatch.setattr(module, "PIECE", 4096)
    torch.manual_seed(0)
    block = Block(4, 4, 2, grn="mean").double()
    torch.nn.init.normal_(block.grn.gamma)
    x = torch.randn(2, 4, 10, 11, 12, dtype=torch.float64)  # 1 320 rows, pieces of 512
    with torch.no_grad():
        together = block(x)
        assert torch.equal(together, torch.cat([block(sample[None]) for sample in x]))
        y = ops.depthwise(x, block.depthwise.weight, block.depthwise.bias, "same")
        h = F.gelu(block.expand(block.norm(y)))
        y = block.project(ops.response_norm(h, block.grn.gamma, block.grn.beta, "mean"))
    assert (together - x - y).abs().max() < 1e-10


def test_statistics_are_in_float32_under_autocast():
    torch.manual_seed(0)
    block = Block(8, 8, 2, grn="mean")
    torch.nn.init.normal_(block.grn.gamma)
    x = 0.5 * torch.randn(1, 8, 24, 32, 40) + 3  # 30 720 voxels: their sum in bfloat16 would stop growing
    with torch.no_grad():
        expected = block.double()(x.double()) - x
        with torch.autocast("cpu", torch.bfloat16):
            y = block.float()(x) - x
    assert y.dtype == torch.float32  # the sum with the input, which is float32
    assert (y - expected).norm() / expected.norm() < 0.02


def test_a_fresh_response_norm_changes_nothing():
    v1, v2 = Block(4, 4, 2), Block(4, 4, 2, grn="mean")
    missing = v2.load_state_dict(v1.state_dict(), strict=False).missing_keys
    assert missing == ["grn.gamma", "grn.beta"]
    x = torch.rand(1, 4, 6, 7, 8)
    assert (v1(x) - v2(x)).abs().max() < 1e-6


def test_gamma_converts_between_mean_and_sum():
    h = torch.rand(2, 6, 3, 4, 5, dtype=torch.float64) - 0.5
    gamma, beta = torch.randn(1, 6, 1, 1, 1, dtype=torch.float64), torch.randn(1, 6, 1, 1, 1, dtype=torch.float64)
    by_mean, by_sum = ops.response_norm(h, gamma, beta, "mean"), ops.response_norm(h, 6 * gamma, beta, "sum")
    assert (by_mean - by_sum).abs().max() < 1e-4
    one = ops.response_norm(
        torch.ones(1, 2, 2, 2, 2), torch.tensor([3.0, 0]).view(1, 2, 1, 1, 1), torch.zeros(1), "sum"
    )
    assert one[0, 0].unique().item() == pytest.approx(1 + 3 * 0.5, abs=1e-6)  # both norms sqrt(8): a half each
    assert one[0, 1].unique().item() == 1


def test_the_first_planes_of_an_up_block_are_zero():
    y = Block(4, 2, 2, resample="up")(torch.rand(1, 4, 3, 4, 5))
    assert y.shape == (1, 2, 6, 8, 10)
    for axis in (2, 3, 4):
        assert y.select(axis, 0).abs().max() == 0
    assert (y[:, :, 1:, 1:, 1:] != 0).all()


def test_larger_kernels_from_smaller_ones_equal_the_reference():
    name = "mednext_c4_upkern"
    source = reference.load_formula(small(grn="mean"), published(name), half=True).double()
    target = small(kernel_size=5, grn="mean").double()
    assert upkern_(target, source.state_dict()) == []
    assert target.encoder.downs[0].depthwise.weight.shape[-1] == 5
    expected = torch.from_numpy(MODELS[f"{name}/output0"])
    with torch.no_grad():
        output = target(formula.image(1, 1, 32, 32, 32).double())
    assert difference(output, expected) <= 1e-6 * max(1, expected.abs().max())


def test_a_grown_kernel_interpolates_and_leaves_other_heads():
    ramp = torch.arange(3.0).expand(1, 1, 3, 3, 3)
    assert torch.allclose(grow_kernel(ramp, 5)[0, 0, 2, 2], torch.tensor([0, 0.4, 1, 1.6, 2]))
    target = small(kernel_size=5, num_classes=3)
    kept = upkern_(target, small(num_classes=2).state_dict())
    assert kept == ["decoder.heads.0.weight", "decoder.heads.0.bias"]
    with pytest.raises(ValueError, match="none of 1 tensors fits the network, e.g. other"):
        upkern_(target, {"other": torch.zeros(1)})


def test_a_network_is_one_graph_and_compiles_to_the_same_numbers():
    encoder = MedNeXt(1, 4, (1, 1), (2, 2), grn="mean")
    network = Network(encoder, encoder.decoders["mednext"](encoder.channels, encoder.strides, 2), 1)
    image = torch.rand(1, 1, 8, 12, 16)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    expected, output = network(image), compiled(image)
    assert (output - expected).abs().max() < 1e-4
    output.square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_unknown_divisor_is_named():
    with pytest.raises(ValueError, match="`grn` 'max' is unknown; accepted: mean, sum, None"):
        ResponseNorm(4, "max")


def test_a_hidden_channel_that_is_zero_everywhere_has_finite_gradients():
    torch.manual_seed(0)
    block = Block(4, 4, 2, grn="mean")
    with torch.no_grad():
        block.expand.bias[0] = -60.0  # GELU gives 0 for every voxel
        block.grn.gamma.fill_(0.5)
    x = torch.randn(1, 4, 5, 6, 7, requires_grad=True)
    (1e3 * block(x).sum()).backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in block.parameters())
