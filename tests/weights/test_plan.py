"""Plans of nnssl and nnU-Net: read, checked, used for names, compared with a store."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from amaes import checkpoint
from amaes.models import build_segmenter
from amaes.published import convert
from amaes.weights.plan import BESIDE, Plan, compare, find_plan, read_plan
from tests import reference

PLAN = {  # as in the files of OpenMind, but for three different sides
    "architecture_plans": {"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None},
    "pretrain_plan": {
        "transpose_backward": [0, 1, 2],
        "configurations": {
            "onemmiso": {
                "spacing_style": "onemmiso",
                "normalization_schemes": ["ZScoreNormalization"],
                "use_mask_for_norm": [False],
                "spacing": [1, 1, 1],
                "patch_size": [160, 160, 160],
            }
        },
    },
    "pretrain_num_input_channels": 1,
    "recommended_downstream_patchsize": [192, 160, 64],
    "key_to_encoder": "encoder.stages",
    "key_to_stem": "encoder.stem",
    "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
    "key_to_lpe": None,
}
EXPECTED = Plan(
    "ResEncL",
    1,
    (64, 160, 192),
    "encoder.stages",
    "encoder.stem",
    ("encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"),
    (1.0, 1.0, 1.0),
    True,
    "ZScoreNormalization",
)


def edited(**entries):
    return copy.deepcopy(PLAN) | entries


def configured(**entries):
    plan = copy.deepcopy(PLAN)
    plan["pretrain_plan"]["configurations"]["onemmiso"] |= entries
    return plan


def mock(prefix="", **more):
    """The tensors of ResEnc-L on the meta device, as nnssl writes them."""
    keys = reference.key_list("dna_resenc_l")
    return {prefix + key: torch.empty(shape, device="meta") for key, shape in keys.items()} | more


def encoder_state():
    with torch.device("meta"):
        return build_segmenter("resenc_l", num_classes=1).state_dict()


def test_a_plan_is_read():
    assert read_plan(PLAN, "plan") == EXPECTED
    assert read_plan({}, "plan") == Plan()
    named = {"arch_class_name": "ResEncL", "recommended_downstream_patchsize": (160.0, 160, 160)}
    assert read_plan(named, "plan") == Plan("ResEncL", patch_size=(160, 160, 160))
    own = read_plan(configured(spacing=None), "plan")
    assert (own.spacing, own.resampled) == (None, False)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([], "expected an object, found list"),
        (edited(architecture_plans=3), "architecture_plans should be of type Mapping, found 3"),
        (edited(architecture_plans={"arch_class_name": ["x"]}), "arch_class_name should be of type str"),
        (edited(pretrain_num_input_channels="1"), "pretrain_num_input_channels should be of type int, found '1'"),
        (edited(pretrain_num_input_channels=True), "of type int, found True"),
        (edited(recommended_downstream_patchsize=[160, 160]), "should be three whole numbers above 0, .* 4096"),
        (edited(recommended_downstream_patchsize=[160.5, 160, 160]), "three whole numbers"),
        (edited(recommended_downstream_patchsize=[10**30] * 3), "at most 4096"),
        (edited(recommended_downstream_patchsize="160"), "three whole numbers"),
        (edited(key_to_encoder=5), "key_to_encoder should be of type str"),
        (edited(keys_to_in_proj="encoder"), "keys_to_in_proj should be a list of names, found 'encoder'"),
        (edited(keys_to_in_proj=[1]), "keys_to_in_proj should be a list of names"),
        (edited(pretrain_plan=[]), "pretrain_plan should be of type Mapping"),
        (configured(spacing=[1, 1, float("nan")]), "spacing should be three numbers"),
        (configured(spacing=[0, 1, 1]), "three numbers above 0"),
        (configured(normalization_schemes={"0": "z"}), "normalization_schemes should be a list of names"),
    ],
)
def test_an_odd_plan_is_refused(plan, message):
    with pytest.raises(ValueError, match=f"plan.*: .*{message}"):
        read_plan(plan, "plan")


def test_axes_are_put_in_our_order():
    plan = configured(spacing=[3, 1, 2])
    assert read_plan(plan, "plan").spacing == (2.0, 1.0, 3.0)  # theirs is (Z, Y, X)
    plan["pretrain_plan"]["transpose_backward"] = [1, 0, 2]  # their first axis was Y of the file
    assert read_plan(plan, "plan").spacing == (2.0, 3.0, 1.0)


def test_which_plan_belongs_to_a_file(tmp_path):
    path = tmp_path / "checkpoint_final.pth"
    weights = {"network_weights": {"encoder.stem.w": 0, "encoder.stages.0.w": 0}}
    assert find_plan(weights, path) is None
    (tmp_path / BESIDE).write_text(json.dumps(PLAN))
    assert find_plan(weights, path) == EXPECTED
    assert find_plan({"state_dict": {}}, path) is None
    assert find_plan({"network_weights": {"eva.w": 0}}, path) is None  # the plan of another file
    inside = find_plan(weights | {"nnssl_adaptation_plan": edited(pretrain_num_input_channels=2)}, path)
    assert inside.in_channels == 2
    (tmp_path / BESIDE).write_text("{")
    with pytest.raises(ValueError, match=r"adaptation_plan\.json: not JSON"):
        find_plan(weights, path)


def test_the_plans_of_nnunet_say_the_same(tmp_path):
    plans = {"configurations": {"2d": {}, "3d_fullres": {"spacing": [3, 1, 2], "normalization_schemes": ["A", "A"]}}}
    content = {"init_args": {"plans": plans, "configuration": "3d_fullres"}, "network_weights": {}}
    plan = find_plan(content, tmp_path / "checkpoint_final.pth")
    assert plan == Plan(spacing=(2.0, 1.0, 3.0), resampled=True, normalization="A")
    content["init_args"]["configuration"] = "4d"
    assert find_plan(content, tmp_path / "checkpoint_final.pth") == Plan()


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "backbone.unet.", "module.ssl."])
def test_names_are_found_where_the_plan_says(prefix):
    given = {key: value for key, value in mock(prefix).items() if ".decoder." not in f".{key}"}
    names = {"key_to_encoder": f"{prefix}encoder.stages", "key_to_stem": f"{prefix}encoder.stem"}
    first = [f"{prefix}{key}" for key in PLAN["keys_to_in_proj"]]
    plan = read_plan(edited(**names, keys_to_in_proj=first), "plan")
    imported = convert({"network_weights": given}, "file", plan)
    expected = {key for key in encoder_state() if key.startswith("encoder.")}
    assert {key for key in imported.tensors if key.startswith("encoder.")} == expected


def test_a_first_convolution_of_another_name_is_the_first_convolution():
    given = mock(projection_weight=torch.empty(3))
    for i, name in enumerate(PLAN["keys_to_in_proj"]):
        given[f"input.{i}.weight"] = given.pop(f"{name}.weight")
    del given["encoder.stem.convs.0.conv.bias"]
    plan = read_plan(edited(keys_to_in_proj=["input.0", "input.1"]), "plan")
    assert convert(given, "file", plan).tensors["encoder.stem.conv.weight"].shape == (32, 1, 3, 3, 3)


def test_a_plan_for_the_whole_encoder():
    plan = read_plan(edited(key_to_encoder="net.enc", key_to_stem=None, keys_to_in_proj=None), "plan")
    given = {f"net.{k.replace('encoder', 'enc')}": v for k, v in mock().items() if k.startswith("encoder.")}
    tensors = convert({"network_weights": given}, "file", plan).tensors
    assert set(tensors) == {key for key in encoder_state() if key.startswith("encoder.")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_to_encoder": "enc"}, "its plan names enc, with which no tensor's name begins"),
        ({"keys_to_in_proj": ["stem.0"]}, r"first convolution is stem\.0, which is not in it"),
        ({"keys_to_in_proj": ["input"]}, r"would both become encoder\.stem\.convs\.0\.conv\.weight"),
        ({"pretrain_num_input_channels": 4}, r"its plan says 4 input channels, .*conv\.weight is \(32, 1, 3, 3, 3\)"),
    ],
)
def test_a_plan_that_contradicts_the_file_is_refused(change, message):
    given = mock(**{"input.weight": torch.empty(32, 1, 3, 3, 3, device="meta")})
    with pytest.raises(ValueError, match=f"file: .*{message}"):
        convert({"network_weights": given}, "file", read_plan(edited(**change), "plan"))


def test_another_network_is_named_as_the_plan_names_it():
    plan = read_plan(edited(architecture_plans={"arch_class_name": "PrimusM"}, key_to_encoder="eva"), "plan")
    with pytest.raises(ValueError, match="a vision transformer .*, no architecture of this library; .* says PrimusM"):
        convert({"network_weights": {"eva.blocks.0.norm.weight": torch.zeros(1)}}, "file", plan)


# A store --------------------------------------------------------------------------------------------------------------


def said(spacing=(1, 1, 1), normalization="zscore", plan=PLAN):
    config = {"spacing": list(spacing), "normalization": normalization}
    return compare(read_plan(plan, "plan"), config, "weights.pth", "STORE")


def test_what_weights_expect_is_compared_with_the_store():
    patch = "; it recommends patches of 64 x 160 x 192"
    saw = "weights.pth: pretrained on volumes with 1 x 1 x 1 mm, ZScoreNormalization"
    assert said() == f"{saw}, as those of STORE{patch}"
    assert said(normalization="unit") == (
        f"WARNING: {saw}; STORE has 1 x 1 x 1 mm, unit; preprocess with `normalization` zscore for the same{patch}"
    )
    assert "preprocess with `spacing` 1 1 1 `normalization` zscore for the same" in said((1, 1, 2), "none")
    assert "z has no counterpart here; preprocess with `spacing`" in said(
        (1, 1, 2), plan=configured(normalization_schemes=["z"])
    )
    assert said(plan=configured(spacing=None)).startswith(
        "weights.pth: pretrained on volumes with the spacing of each file, ZScoreNormalization, as those of STORE"
    )
    assert said(plan={}) == ""


def test_fine_tuning_asks_the_plan(tmp_path):
    store = SimpleNamespace(config={"spacing": [1.0, 1.0, 2.0], "normalization": "unit"}, path="STORE", channels=["a"])
    content = {"network_weights": {}, "nnssl_adaptation_plan": PLAN}
    line = checkpoint.check_preprocessing(tmp_path / "weights.pth", content, store)
    assert line.startswith("WARNING: ")
    assert checkpoint.check_preprocessing(tmp_path / "weights.pth", {"network_weights": {}}, store) == ""
