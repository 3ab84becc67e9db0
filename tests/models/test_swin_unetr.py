import pytest
import torch

from amaes.choices import MERGINGS
from amaes.models import LightDecoder, Network, SwinUNETR, SwinUNETRDecoder
from amaes.models.swin_unetr import (
    MERGING,
    PatchMerging,
    SwinBlock,
    SwinResidualBlock,
    SwinStage,
    WindowAttention,
    position_index,
)
from amaes.published import rename
from tests import formula, reference
from tests.reference import MODELS

RENAME = (
    ("relative_position_bias_table", "bias"),
    (r"\battn\.", "attention."),
    (r"mlp\.linear1", "expand"),
    (r"mlp\.linear2", "project"),
    ("downsample", "merge"),
    (r"conv3\.conv", "shortcut"),
    (r"(conv[12])\.conv", r"\1"),
    (r"^layer\.|^conv_block\.", ""),
)


def loaded(module, state, only=""):
    module.load_state_dict({rename(key, RENAME): value for key, value in state.items() if key.startswith(only)})
    return module


def test_relative_positions_are_those_of_the_reference():
    index = position_index((7, 7, 7))
    assert (index.shape, index.min(), index.max(), index.sum()) == ((343, 343), 0, 2196, 129_178_602)
    assert index[0, :8].tolist() == [1098, 1097, 1096, 1095, 1094, 1093, 1092, 1085]


def test_a_small_window_reads_the_corner_of_the_index():
    config, state, (x,), expected = reference.block_case("window_attention_small_n")
    attention = loaded(WindowAttention(config["dim"], config["heads"], config["window"]), state)
    assert (attention(x) - expected).abs().max() < 1e-5


def test_shifted_windows_with_filling_equal_the_reference():
    config, state, (x,), expected = reference.block_case("swin_block_shift_pad")  # 5 x 6 x 7 tokens, windows of 3
    block = loaded(SwinBlock(config["dim"], config["heads"], True, config["window"]), state)
    assert (block(x) - expected).abs().max() < 1e-5


def test_every_merging_order_can_be_chosen():
    assert tuple(MERGING) == MERGINGS


@pytest.mark.parametrize("merging", MERGING)
def test_each_merging_order_equals_the_reference(merging):
    config, state, (x,), expected = reference.block_case(f"basic_layer_{merging}_merge")
    stage = loaded(SwinStage(config["dim"], config["heads"], config["depth"], merging, config["window"]), state)
    output = stage(x.movedim(1, -1)).movedim(-1, 1)
    assert output.shape == expected.shape  # of 6 x 4 x 5: an odd side is filled up
    assert (output - expected).abs().max() < 1e-5


def test_legacy_merging_repeats_two_sub_grids():
    x = torch.arange(8.0).reshape(1, 2, 2, 2, 1)
    merge = PatchMerging(1, "legacy")
    merge.norm = merge.reduction = torch.nn.Identity()
    assert merge(x).flatten().tolist() == [0, 4, 2, 1, 5, 2, 1, 7]


def test_convolutional_blocks_equal_the_reference():
    config, state, (x,), expected = reference.block_case("res_block_same")
    assert (loaded(SwinResidualBlock(config["C_in"], config["C_out"]), state)(x) - expected).abs().max() < 1e-5
    config, state, (x, skip), expected = reference.block_case("up_block")
    decoder = SwinUNETRDecoder((1, 4, 8), (1, 2, 4), 1)
    up, stage = decoder.ups[1], SwinResidualBlock(8, 4)
    up.load_state_dict({"weight": state["transp_conv.conv.weight"]})
    loaded(stage, state, only="conv_block")
    assert (stage(torch.cat([up(x), skip], dim=1)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "width", "classes"), [("swin_unetr_12_fixed", 12, 2), ("swin_unetr_48_legacy", 48, 1)]
)
def test_full_size_networks_equal_the_reference(name, width, classes):
    encoder = SwinUNETR(1, width, merging=name.split("_")[-1])
    network = Network(encoder, SwinUNETRDecoder(encoder.channels, encoder.strides, classes), 1)
    reference.load_formula(network, list(reference.key_list("monai_swin_unetr_48")), half=False)
    with torch.no_grad():
        output = network(formula.image(1, 1, 64, 64, 64))
    step = int(MODELS[f"{name}/stride"])
    error = output[..., ::step, ::step, ::step] - torch.from_numpy(MODELS[f"{name}/output0"])
    assert error.abs().max() <= 1e-4 * float(MODELS[f"{name}/std"])


def test_sides_may_differ_and_the_image_is_the_finest_feature():
    encoder = SwinUNETR(2, 12)
    image = torch.rand(1, 2, 32, 64, 96)
    with torch.no_grad():
        features = encoder(image)
    assert features[0] is image
    shapes = [(1, c, 32 // s, 64 // s, 96 // s) for c, s in zip(encoder.channels, encoder.strides, strict=True)]
    assert [tuple(f.shape) for f in features] == shapes
    assert all(f.mean(1).abs().max() < 1e-4 for f in features[1:])  # layer-normalised over channels


def test_every_parameter_trains_with_a_decoder_without_skips():
    encoder = SwinUNETR(1, 12)
    network = Network(encoder, LightDecoder(encoder.channels, encoder.strides, 1), 1)
    network(torch.rand(1, 1, 32, 32, 64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_a_stage_is_one_graph():
    stage = SwinStage(6, 3, 2, "fixed", window=(3, 3, 3))
    x = torch.rand(1, 3, 5, 6, 6)  # shifted along two axes
    output = torch.compile(stage, backend="aot_eager", fullgraph=True)(x)
    assert (output - stage(x)).abs().max() < 1e-5
    output.sum().backward()
    assert all(p.grad is not None for p in stage.parameters())


def test_bfloat16_stays_near_float32():
    torch.manual_seed(0)
    stage = SwinStage(12, 3, 2, "fixed", window=(3, 3, 3))
    x = torch.rand(1, 4, 5, 6, 12)
    with torch.no_grad():
        expected = stage(x)
        with torch.autocast("cpu", torch.bfloat16):
            output = stage(x)
    assert (output.float() - expected).norm() / expected.norm() < 0.03


def test_unknown_merging_is_named():
    with pytest.raises(ValueError, match="`merging` 'old' is unknown; accepted: legacy, fixed, v2"):
        SwinUNETR(merging="old")
