import re

import numpy as np
import pytest
import torch

from amaes import checkpoint
from amaes.models import ARCHITECTURES, build_autoencoder, build_encoder, build_segmenter
from amaes.models.swin_unetr import position_index
from amaes.published import FAMILIES, convert, recognise
from tests import formula, reference

OFFICIAL = {
    "amaes_unet_b_lw_dec": ("AMAES U-Net", lambda: build_autoencoder("unet_b")),
    "amaes_unet_xl_lw_dec": ("AMAES U-Net", lambda: build_autoencoder("unet_xl")),
    "amaes_mednext_m3_lw_dec": ("AMAES MedNeXt", lambda: build_autoencoder("mednext_m")),
    "amaes_mednext_l3_lw_dec": ("AMAES MedNeXt", lambda: build_autoencoder("mednext_l")),
    **{
        f"mednext_v1_{size}_k3": ("MedNeXt v1 or v2", lambda size=size: segmenter(f"mednext_{size}", "mednext", True))
        for size in "sbml"
    },
    "dna_resenc_s": ("residual encoder U-Net", lambda: build_segmenter("resenc_s", num_classes=1)),
    "dna_resenc_l": ("residual encoder U-Net", lambda: build_segmenter("resenc_l", num_classes=1)),
    "monai_swin_unetr_48": ("MONAI SwinUNETR", lambda: build_segmenter("swin_unetr", num_classes=1)),
}


def segmenter(arch, decoder, deep_supervision=False):
    return build_segmenter(arch, num_classes=3, decoder=decoder, deep_supervision=deep_supervision)


def tensors(name, **more):
    """A published file's tensors, on the meta device but for what is looked at."""
    made = {
        key: position_index((7, 7, 7)) if key.endswith("position_index") else torch.empty(shape, device="meta")
        for key, shape in reference.key_list(name).items()
    }
    return made | more


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("prefix", ["", "module.", "model._orig_mod."])
def test_every_tensor_of_an_official_network_has_its_place(name, prefix):
    family, build = OFFICIAL[name]
    with torch.device("meta"):
        state = build().state_dict()
    given = {prefix + key.removeprefix("model."): tensor for key, tensor in tensors(name).items()}
    imported = convert({"state_dict": given, "epoch": 3}, "file")
    assert imported.family == family
    assert set(imported.tensors) == set(state)
    assert all(imported.tensors[key].shape == state[key].shape for key in state)
    assert len(imported.tensors) + len(imported.dropped) == len(given)


@pytest.mark.parametrize(
    ("name", "merging", "heads"), [("released_model_swinvit", "legacy", 0), ("swin_ssl_head_48", None, 16)]
)
def test_self_supervised_swin_files_hold_the_whole_encoder(name, merging, heads):
    imported = convert({"state_dict": tensors(name)}, "file")
    encoder = {f"encoder.{key}" for key in build_encoder("swin_unetr").state_dict()}
    assert encoder <= set(imported.tensors)
    assert len(set(imported.tensors) - encoder) == heads
    assert imported.variant == {"merging": merging}
    assert len(imported.dropped) == 8


def test_asparagus_names_become_ours():
    with torch.device("meta"):
        state = build_segmenter("resenc_l", num_classes=1).state_dict()
    keys = {key: tensor for key, tensor in tensors("dna_resenc_l").items() if not _is_second_name(key)}
    given = {f"model.{k.replace('.convs.0.', '.conv1.').replace('.norm.', '.norm_op.')}": t for k, t in keys.items()}
    assert {"model.encoder.stem.conv1.norm_op.bias", "model.decoder.stages.4.conv1.conv.weight"} < set(given)
    imported = convert({"state_dict": given}, "file")
    assert {key: tensor.shape for key, tensor in imported.tensors.items()} == {k: t.shape for k, t in state.items()}


def _is_second_name(key):
    return "all_modules" in key or key.startswith("decoder.encoder.")


def test_monai_mednext_names_become_ours():
    names = {
        "stem.weight": "encoder.stem.weight",
        "enc_stages.3.1.conv1.weight": "encoder.stages.3.1.depthwise.weight",
        "down_blocks.2.res_conv.bias": "encoder.downs.2.shortcut.bias",
        "bottleneck.0.global_resp_gamma": "encoder.stages.4.0.grn.gamma",
        "up_blocks.0.conv2.weight": "decoder.ups.3.expand.weight",
        "dec_stages.0.1.norm.bias": "decoder.stages.3.1.norm.bias",
        "out_blocks.0.conv_out.weight": "decoder.heads.4.weight",
        "out_0.conv_out.weight": "decoder.heads.0.weight",
    }
    content = {key: torch.zeros(1) for key in [*names, "enc_stages.0.0.conv1.weight"]}
    imported = convert(content, "file")
    assert imported.family == "MONAI MedNeXt"
    assert set(names.values()) < set(imported.tensors)


def test_disruptive_autoencoder_names_become_ours():
    names = ["patch_embed.proj.weight", "layers2.0.0.blocks.1.mlp.linear1.weight", "layers1.0.0.downsample.norm.bias"]
    content = {"model": {f"module.encoder.{name}": torch.zeros(1) for name in names} | {"out.weight": torch.zeros(1)}}
    imported = convert(content, "file")
    assert (imported.family, imported.variant) == ("disruptive autoencoder (Swin)", {"merging": "legacy"})
    assert set(imported.tensors) == {
        "encoder.patch_embed.weight",
        "encoder.stages.1.blocks.1.expand.weight",
        "encoder.stages.0.merge.norm.bias",
        "out.weight",
    }


def test_no_two_families_claim_an_official_file():
    for name in [*OFFICIAL, "released_model_swinvit", "swin_ssl_head_48"]:
        keys = [key.removeprefix("model.").removeprefix("module.") for key in reference.key_list(name)]
        first = recognise(keys)
        assert first is not None
        claims = [f for f in FAMILIES if all(any(re.search(m, k) for k in keys) for m in f.marks)]
        assert first in claims
        assert all(f.rules == first.rules and f.variant == first.variant for f in claims)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["encoder.stages.0.0.convs.0.conv.weight"], "file: a plain U-Net of nnU-Net, no architecture"),
        (["eva.blocks.0.norm.weight", "pos_embed"], "a vision transformer"),
        (["layer.weight"], r"names of no file that is known here \(layer.weight, ...\); accepted: our check.*Swin"),
    ],
)
def test_other_networks_are_refused_by_name(keys, message):
    with pytest.raises(ValueError, match=message):
        convert({key: torch.zeros(1) for key in keys}, "file")


def test_contradictory_files_are_refused():
    content = tensors("monai_swin_unetr_48")
    key = "swinViT.layers1.0.blocks.0.attn.relative_position_index"
    with pytest.raises(ValueError, match="is not that of windows of 7 tokens"):
        convert(content | {key: content[key] + 1}, "file")
    twice = tensors("amaes_unet_b_lw_dec") | {"encoder.in_conv.conv1.conv.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="two tensors would both become encoder.in_conv.conv1.conv.weight"):
        convert(twice, "file")
    key = "encoder.stages.0.blocks.0.conv1.norm.bias"
    names = ["encoder.stem.convs.0.conv.bias", key, key.replace("norm", "all_modules.1"), f"decoder.{key}"]
    content = {name: torch.zeros(2) for name in names}
    assert convert(content, "file").dropped == names[2:]
    with pytest.raises(ValueError, match="file: decoder.encoder.stages.* should be a second name of a tensor"):
        convert(content | {names[3]: torch.ones(2)}, "file")


# Files ----------------------------------------------------------------------------------------------------------------


def swin_file(tmp_path, name, **more):
    """A published Swin file of formula weights."""
    content = {
        key: position_index((7, 7, 7)) if key.endswith("position_index") else formula.value(key, shape)
        for key, shape in reference.key_list(name).items()
    }
    torch.save({"state_dict": content | more}, tmp_path / f"{name}.pt")
    return tmp_path / f"{name}.pt"


def test_model_swinvit_loads_whole_and_asks_for_its_merging(tmp_path):
    path = swin_file(tmp_path, "released_model_swinvit")
    with torch.device("meta"):
        other = build_segmenter("swin_unetr")
    with pytest.raises(ValueError, match="made with `merging` legacy, the network has fixed; take `merging` legacy"):
        checkpoint.load_encoder(other, path)
    network = build_segmenter("swin_unetr", in_channels=4, merging="legacy")
    report = checkpoint.load_encoder(network, path)
    assert (report.coverage, report.new, report.adapted, report.notes) == (1.0, [], ["patch_embed.weight"], [])
    expected = formula.value("module.layers4.0.downsample.reduction.weight", (768, 3072))
    assert torch.equal(network.encoder.stages[3].merge.reduction.weight, expected)
    with pytest.raises(ValueError, match=r"does not hold the encoder of mednext_s; it fits `arch` swin_unetr"):
        checkpoint.import_weights(path, "mednext_s")
    assert set(checkpoint.import_weights(path, "swin_unetr")) == {f"encoder.{k}" for k in network.encoder.state_dict()}


def test_a_file_that_does_not_tell_its_merging_is_loaded_with_a_note(tmp_path):
    report = checkpoint.load_encoder(build_segmenter("swin_unetr"), swin_file(tmp_path, "swin_ssl_head_48"))
    assert report.coverage == 1.0
    (note,) = report.notes
    assert note == "`merging` fixed is assumed, the file does not tell; weights made with MONAI before 1.5 need legacy"
    assert len(report.ignored) == 16
    assert "MONAI's self-supervised Swin" in report.table()


@pytest.mark.parametrize("channels", [1, 2])
def test_a_checkpoint_of_nnunet_loads_whole(tmp_path, channels):
    weights = {}
    for key, shape in reference.key_list("dna_resenc_s").items():
        first = key.removeprefix("decoder.") if key.startswith("decoder.encoder.") else key
        first = first.replace("all_modules.0", "conv").replace("all_modules.1", "norm")
        weights[key] = weights[first] if first in weights else torch.full(shape, 0.5)
    torch.save({"network_weights": weights, "trainer_name": "nnUNetTrainer"}, tmp_path / "checkpoint_final.pth")
    with torch.device("cpu" if channels > 1 else "meta"):
        network = build_segmenter("resenc_s", channels, num_classes=3)
    report = checkpoint.load_encoder(network, tmp_path / "checkpoint_final.pth", transfer="all")
    assert (report.coverage, report.decoder) == (1.0, "the file's, except 10 tensors")  # five heads of other classes
    assert report.source == "residual encoder U-Net"
    assert report.adapted == (["stem.conv.weight"] if channels > 1 else [])
    if channels > 1:
        assert network.encoder.stem.conv.weight.unique().tolist() == [0.25]
        assert network.decoder.stages[0][0].conv.weight.unique().tolist() == [0.5]


def mednext_file(tmp_path, **more):
    content = {key: formula.value(key, shape) for key, shape in reference.key_list("mednext_v1_s_k3").items()}
    torch.save({"state_dict": content, **more}, tmp_path / "model_final.model")
    return tmp_path / "model_final.model"


def test_an_old_checkpoint_with_numpy_numbers_is_read(tmp_path):
    extra = {"plot_stuff": ([0.5], np.float64(0.25), np.arange(3), np.dtype("float32")), "epoch": np.int64(7)}
    report = checkpoint.load_encoder(build_segmenter("mednext_s"), mednext_file(tmp_path, **extra))
    assert (report.coverage, report.new) == (1.0, [])


def test_kernels_grow_while_loading(tmp_path):
    network = build_segmenter("mednext_s_k5", decoder="mednext")
    report = checkpoint.load_encoder(network, mednext_file(tmp_path))
    assert len(report.adapted) == 14  # blocks of five stages, four down blocks
    assert report.coverage == 1.0
    given = formula.value("down_0.conv1.weight", (32, 1, 3, 3, 3))
    grown = network.encoder.downs[0].depthwise.weight
    assert torch.equal(grown[..., 0, 0, 0], given[..., 0, 0, 0])  # corners stay


def test_the_message_tells_which_architecture_fits(tmp_path):
    with pytest.raises(
        ValueError, match=r"gives 0\.5 % of .*\(MedNeXt v1 or v2\) .*; it fits `arch` mednext_s \(`allow"
    ):
        checkpoint.load_encoder(build_segmenter("mednext_l"), mednext_file(tmp_path))


def test_our_own_variants_travel_in_the_checkpoint(tmp_path):
    build = {"arch": "swin_unetr", "in_channels": 1, "decoder": "light", "skips": False, "merging": "v2"}
    network = build_autoencoder(**build)
    content = {"format": checkpoint.FORMAT, "task": "pretrain", "build": build, "model": network.state_dict()}
    torch.save(content, tmp_path / "ours.pt")
    with pytest.raises(ValueError, match="made with `merging` v2, the network has fixed"):
        checkpoint.load_encoder(build_segmenter("swin_unetr"), tmp_path / "ours.pt")
    report = checkpoint.load_encoder(build_segmenter("swin_unetr", merging="v2"), tmp_path / "ours.pt")
    assert (report.coverage, report.source) == (1.0, "checkpoint of swin_unetr")


def test_a_bare_state_dict_of_ours_is_recognised(tmp_path):
    torch.save(build_autoencoder("unet_tiny").state_dict(), tmp_path / "bare.pt")
    assert set(checkpoint.import_weights(tmp_path / "bare.pt", "unet_tiny")) == set(
        build_autoencoder("unet_tiny").state_dict()
    )


def test_every_architecture_is_known_to_its_own_names():
    with torch.device("meta"):
        states = {arch: build_autoencoder(arch).state_dict() for arch in ARCHITECTURES}
    assert all(convert(state, arch).family == "our own names" for arch, state in states.items())
