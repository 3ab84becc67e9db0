"""Files as they are published, mocked by their lists of names: each loads whole, and a wrong one says what it is."""

import json
import re

import pytest
import torch

from amaes import checkpoint
from amaes.models import build_segmenter
from amaes.models.swin_unetr import position_index
from tests import reference
from tests.weights.test_plan import PLAN, configured


def keys(name):
    return reference.key_list(name)


def tensors(shapes):
    """One stored number per tensor, so that the file of a large network is small."""
    made = {}
    for key, shape in shapes.items():
        number = torch.tensor(0.5).expand(shape)
        made[key] = position_index((7, 7, 7)) if key.endswith("position_index") else number
    return made


def asparagus():
    """The names of AMAES-300K: those of dynamic-network-architectures, but for two."""
    shapes = {k: shape for k, shape in keys("dna_resenc_s").items() if not k.startswith("decoder.encoder.")}
    return {f"model.{k.replace('.convs.0.', '.conv1.').replace('.norm.', '.norm_op.')}": v for k, v in shapes.items()}


def swin(name, channels, prefix="", blocks=(2, 2, 2, 2)):
    """Names of a Swin network with other input channels, or more blocks in a stage."""
    shapes = {}
    for key, shape in keys(name).items():
        if key.endswith(
            ("patch_embed.proj.weight", "encoder1.layer.conv1.conv.weight", "encoder1.layer.conv3.conv.weight")
        ):
            shape = (shape[0], channels, *shape[2:])
        shapes[prefix + key.removeprefix("module.")] = shape
        if match := re.search(r"layers(\d)\.0\.blocks\.0\.", key):
            for i in range(2, blocks[int(match[1]) - 1]):
                shapes[prefix + key.removeprefix("module.").replace("blocks.0.", f"blocks.{i}.")] = shape
    return shapes


LIGHTNING = {"epoch": 3, "pytorch-lightning_version": "2.5", "hyper_parameters": {"lr": 1e-4}}
NNFOUNDATION = configured(spacing=None, spacing_style="noresample")

# Layout: (architecture, the file's content, the kind that the table names). Most that are published as size L are
# mocked as S, which takes less time.
LAYOUTS = {
    "nnU-Net": (
        "resenc_s",
        lambda: {"network_weights": tensors(keys("dna_resenc_s")), "init_args": {"plans": {}}},
        "res",
    ),
    "OpenMind": (
        "resenc_l",
        lambda: {"network_weights": tensors(keys("dna_resenc_l")), "nnssl_adaptation_plan": PLAN, "trainer_name": "x"},
        "residual encoder U-Net",
    ),
    "nnFoundationCNN": (
        "resenc_s",
        lambda: {
            "network_weights": tensors(keys("dna_resenc_s")),
            "nnssl_adaptation_plan": NNFOUNDATION,
            "citations": [],
        },
        "residual encoder U-Net",
    ),
    "AMAES-300K": ("resenc_s", lambda: {"state_dict": tensors(asparagus()), **LIGHTNING}, "residual encoder U-Net"),
    "BrainSegFounder UKB-pretrain": (
        "swin_unetr",
        lambda: {"state_dict": tensors(swin("swin_ssl_head_48", 1, "module.")), "epoch": 1},
        "MONAI's self-supervised Swin",
    ),
    "BrainSegFounder ATLAS-pretrain": (
        "swin_unetr",
        lambda: {"state_dict": tensors(swin("swin_ssl_head_48", 2))},
        "MONAI's self-supervised Swin",
    ),
    "BrainSegFounder BRATS-finetune": (
        "swin_unetr",
        lambda: {"state_dict": tensors(swin("monai_swin_unetr_48", 4))},
        "MONAI SwinUNETR",
    ),
    "BrainSegFounder ATLAS-finetune, converted": (
        "swin_unetr",
        lambda: {"state_dict": tensors(swin("monai_swin_unetr_48", 1, "module.base_model."))},
        "MONAI SwinUNETR",
    ),
}


def network(arch, channels=1, **options):
    with torch.device("meta"):
        return build_segmenter(arch, channels, num_classes=3, **options)


def saved(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_whole(tmp_path, layout):
    arch, content, kind = LAYOUTS[layout]
    report = checkpoint.load_encoder(network(arch), saved(tmp_path, content()))
    table = report.table()
    assert kind in table.splitlines()[0]
    assert "100.0 % of the encoder's parameters have weights from the file; the decoder is new" in table
    channels = 4 if "BRATS" in layout else 2 if "ATLAS-p" in layout else 1
    assert len(report.adapted) == (channels != 1)
    assert ("MONAI before 1.5 need legacy" in table) == (arch == "swin_unetr")


@pytest.mark.parametrize("layout", ["nnU-Net", "BrainSegFounder BRATS-finetune"])
def test_a_decoder_comes_along(tmp_path, layout):
    arch, content, _ = LAYOUTS[layout]
    report = checkpoint.load_encoder(network(arch), saved(tmp_path, content()), transfer="all")
    assert "the file's, except" in report.decoder  # heads of other classes


def test_other_strides_of_the_same_shapes_are_told(tmp_path):
    shapes = {
        key: (*shape[:2], 1, *shape[3:]) if ".transpconvs.4.weight" in key else shape
        for key, shape in keys("dna_resenc_s").items()
    }
    report = checkpoint.load_encoder(network("resenc_s"), saved(tmp_path, {"network_weights": tensors(shapes)}))
    assert "WARNING: trained with strides of 1x2x2" in report.table()


def test_a_plan_beside_the_file_is_taken(tmp_path):
    (tmp_path / "adaptation_plan.json").write_text(
        json.dumps(PLAN | {"key_to_encoder": "ssl.enc", "key_to_stem": None})
    )
    shapes = {key.replace("encoder.", "ssl.enc.", 1): shape for key, shape in keys("dna_resenc_s").items()}
    weights = {key: value for key, value in tensors(shapes).items() if not key.startswith("decoder.")}
    plan = json.loads((tmp_path / "adaptation_plan.json").read_text())
    plan["keys_to_in_proj"] = ["ssl.enc.stem.convs.0.conv"]
    (tmp_path / "adaptation_plan.json").write_text(json.dumps(plan))
    report = checkpoint.load_encoder(network("resenc_s"), saved(tmp_path, {"network_weights": weights}))
    assert report.coverage == 1.0


def without_depth(shapes):
    return {key: shape[:-1] if len(shape) == 5 else shape for key, shape in shapes.items()}


def flat_kernels(shapes):
    return {key: (*shape[:2], 1, 3, 3) if shape[2:] == (3, 3, 3) else shape for key, shape in shapes.items()}


def doubled(shapes):
    """Twice as wide, but for the image and the heads."""
    wide = {key: tuple(2 * n if i < 2 and n > 3 else n for i, n in enumerate(s)) for key, s in shapes.items()}
    return {key: shape for key, shape in wide.items() if not key.startswith("decoder.encoder.")}


RESENC_L = "stages of 1 3 4 6 6 6 blocks, widths 32 64 128 256 320 320, kernels 3x3x3"
WRONG = {
    "another depth": (
        "resenc_s",
        lambda: keys("dna_resenc_l"),
        rf"has {RESENC_L}, the network stages of 2 2 2 2 2 2 blocks, .*; it fits `arch` resenc_l \(",
    ),
    "another width": (
        "resenc_s",
        lambda: doubled(keys("dna_resenc_s")),
        r"blocks, widths 64 128 256 512 640 640, kernels 3x3x3, the network stages .*; it fits no architecture",
    ),
    "other kernels": (
        "resenc_l",
        lambda: flat_kernels(keys("dna_resenc_l")),
        rf"kernels 1x3x3, the network {RESENC_L}",
    ),
    "2D": ("resenc_l", lambda: without_depth(keys("dna_resenc_l")), r"residual encoder U-Net in 2D; .* are 3D"),
    "a deeper Swin": (
        "swin_unetr",
        lambda: swin("swin_ssl_head_48", 1, blocks=(2, 2, 6, 2)),
        r"another encoder: .*has stages of 2 2 6 2 blocks, widths 48 96 192 384, the network stages of 2 2 2 2 blocks",
    ),
    "another family": ("resenc_l", lambda: keys("monai_swin_unetr_48"), r"MONAI SwinUNETR.*fits `arch` swin_unetr \("),
    "this family in another": ("swin_unetr", lambda: keys("dna_resenc_s"), r"residual encoder .*fits `arch` resenc_s"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file_says_what_it_looks_like(tmp_path, what):
    arch, shapes, message = WRONG[what]
    path = saved(tmp_path, {"network_weights": tensors(shapes())})
    with pytest.raises(ValueError, match=rf"weights\.pt: .*{message}"):
        checkpoint.load_encoder(network(arch), path)
