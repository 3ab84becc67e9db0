import math
import pathlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from amaes import checkpoint
from amaes.losses import contrastive_loss
from amaes.models import SwinHeads, build_network, build_segmenter, build_swin_ssl
from amaes.models.swin_heads import deconv_stages
from amaes.objectives.swin import SwinSelfSupervision, ViewTargets, _cover
from amaes.published import recognise, rename
from tests import formula, reference

REFERENCE = np.load(pathlib.Path(__file__).parent.parent / "fixtures" / "swin_ssl_reference.npz", allow_pickle=False)
HEADS = (
    (r"^rotation_head\.", "decoder.rotation."),
    (r"^contrastive_head\.", "decoder.embedding."),
    (r"^conv\.20\.", "decoder.stages.5."),
    (r"^conv\.(\d+)\.", lambda m: f"decoder.stages.{int(m[1]) // 4}.0."),
)
PATCH = (64, 32, 32)


def stored(name):
    return torch.from_numpy(REFERENCE[name])


def batch(count=3, sides=PATCH, epoch=0):
    image = torch.stack([formula.image(1, *sides) * (i + 1) / count for i in range(count)])
    return {"image": image, "epoch": [epoch] * count, "case": list(range(count))}


def prepare(objective, batch, **options):
    return objective.prepare(batch, torch.device("cpu"), **options)


# Network --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merging", ["fixed", "legacy"])
def test_the_network_equals_the_published_at_full_size(merging):
    network = build_swin_ssl(merging=merging).double()
    published = [key for key in reference.key_list("swin_ssl_head_48") if not key.endswith("position_index")]
    names = {rename(key, (*HEADS, *recognise(published).rules)): key for key in published}
    own = network.state_dict()
    assert set(names) == set(own)
    network.load_state_dict({key: formula.value(names[key], tuple(tensor.shape)) for key, tensor in own.items()})
    with torch.no_grad():
        rotation, embedding, reconstruction = network(formula.image(1, 1, 64, 64, 64).double())
    outputs = {"rotation": rotation, "embedding": embedding, "reconstruction": reconstruction[..., ::4, ::4, ::4]}
    for name, output in outputs.items():
        expected = stored(f"{merging}/{name}")
        assert (output - expected).abs().max() <= 1e-6 * max(1, expected.abs().max()), name


@pytest.mark.parametrize(
    ("reconstruction", "count"), [("vae", 10_638_385), ("deconv", 3_134_545), ("large_kernel_deconv", 25_165_825)]
)
def test_parameter_counts_and_shapes_equal_the_published(reconstruction, count):
    with torch.device("meta"):
        network = build_swin_ssl(in_channels=1, reconstruction=reconstruction)
        outputs = network(torch.rand(2, 1, 64, 32, 96))
    assert sum(p.numel() for p in network.decoder.stages.parameters()) == count
    assert sum(p.numel() for p in network.parameters()) == count + 8_062_002 + 396_804
    assert [tuple(output.shape) for output in outputs] == [(2, 4), (2, 512), (2, 1, 64, 32, 96)]


def test_rotation_and_embedding_are_read_off_the_first_two_tokens():
    heads = SwinHeads((1, 4, 8))
    x = torch.zeros(1, 8, 2, 2, 2)
    x[0, :, 0, 0, 0], x[0, :, 0, 0, 1] = torch.arange(8.0), torch.ones(8)
    rotation, embedding, _ = heads([x])
    assert torch.allclose(rotation[0], heads.rotation(torch.arange(8.0)))
    assert torch.allclose(embedding[0], heads.embedding(torch.ones(8)))


def test_the_tiny_network_has_the_published_count_at_its_width():
    with torch.device("meta"):
        assert sum(p.numel() for p in build_segmenter("swin_tiny", num_classes=1).parameters()) == 4_078_051


def test_other_encoders_and_heads_are_named():
    with pytest.raises(ValueError, match=r"`arch` 'unet_b': these heads read a Swin encoder; accepted: swin_unetr"):
        build_swin_ssl("unet_b")
    with pytest.raises(ValueError, match="`reconstruction` 'vit' is unknown; accepted: vae, deconv, large_kernel"):
        build_swin_ssl("swin_tiny", reconstruction="vit")
    with pytest.raises(ValueError, match="at least one must be 64 or more"):
        build_swin_ssl("swin_tiny")(torch.rand(1, 1, 32, 32, 32))  # a single token: there is no second one


# Checkpoint -----------------------------------------------------------------------------------------------------------


def saved(folder, **build):
    build = {"arch": "swin_tiny", "in_channels": 1, "reconstruction": "vae", **build}
    network = build_network("swin", build)
    content = {"format": checkpoint.FORMAT, "task": "swin", "build": build, "model": network.state_dict()}
    torch.save(content, folder / "ssl.pt")
    return network, folder / "ssl.pt"


def test_fine_tuning_takes_the_whole_encoder_and_says_that_the_decoder_is_new(tmp_path):
    source, path = saved(tmp_path)
    target = build_segmenter("swin_tiny", in_channels=2, num_classes=3)
    before = {name: tensor.clone() for name, tensor in target.decoder.state_dict().items()}
    report = checkpoint.load_encoder(target, path)
    assert (report.coverage, report.new, report.adapted) == (1.0, [], ["patch_embed.weight"])
    own, given = target.encoder.state_dict(), source.encoder.state_dict()
    assert all(torch.equal(own[name], given[name]) for name in report.loaded)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.decoder.state_dict().items())
    assert report.ignored == [f"decoder.{name}" for name in source.decoder.state_dict()]
    assert "100.0 % of the encoder's parameters have weights from the file; the decoder is new" in report.table()
    with pytest.raises(
        ValueError, match=r"`transfer` all: its decoder is of another kind: \d+ tensors of it have no p"
    ):
        checkpoint.load_encoder(target, path, transfer="all")


def test_the_merging_travels_in_the_checkpoint(tmp_path):
    _, path = saved(tmp_path, merging="legacy")
    with pytest.raises(ValueError, match="made with `merging` legacy, the network has fixed"):
        checkpoint.load_encoder(build_segmenter("swin_tiny"), path)


def test_it_is_no_segmentation_network(tmp_path):
    _, path = saved(tmp_path)
    with pytest.raises(ValueError, match=r"ssl\.pt: a checkpoint of task 'swin'; fine-tune it first"):
        checkpoint.load_segmenter(path)


# Losses ---------------------------------------------------------------------------------------------------------------


def test_the_losses_equal_the_published():
    first, second = stored("z_i"), stored("z_j")
    contrastive = contrastive_loss(first, second, float(REFERENCE["temperature"]))
    assert contrastive.item() == pytest.approx(float(REFERENCE["contrastive_loss"]), abs=1e-6)
    objective = SwinSelfSupervision(PATCH, weights=(1, 0, 2))
    targets = ViewTargets(stored("rot_target"), stored("rec_target"))
    terms = objective.losses((stored("rot_logits"), torch.cat([first, second]), stored("rec")), targets)
    assert terms["rotation"].item() == pytest.approx(float(REFERENCE["rotation_loss"]), abs=1e-6)
    assert terms["contrastive"].item() == 0
    assert terms["reconstruction"].item() == pytest.approx(2 * float(REFERENCE["reconstruction_loss"]), abs=1e-6)
    equal = SwinSelfSupervision(PATCH).losses(
        (stored("rot_logits"), torch.cat([first, second]), stored("rec")), targets
    )
    assert sum(equal.values()).item() == pytest.approx(float(REFERENCE["total"]), abs=1e-6)


def test_the_contrastive_loss_by_hand():
    first, second = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    others = math.log(1 + 2 * math.exp(-2))  # partner at similarity 1 / 0.5, two others at 0
    assert contrastive_loss(first, second, 0.5).item() == pytest.approx(others, rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert contrastive_loss(first, second, 0.5).item() == pytest.approx(others, rel=1e-6)
    assert contrastive_loss(first[:1], second[:1]).item() == 0


def test_the_baseline_is_that_of_knowing_nothing():
    objective = SwinSelfSupervision(PATCH)
    _, targets = prepare(objective, batch(3))
    deviation = sum((x - x.mean()).abs().mean().item() for x in targets.clean) / 6
    expected = math.log(4) + math.log(5) + deviation
    assert objective.baseline(targets).item() == pytest.approx(expected, rel=1e-5)


def test_panels_show_the_first_views():
    objective = SwinSelfSupervision(PATCH)
    inputs, targets = prepare(objective, batch(2))
    panels = objective.panels(inputs, (None, None, 1 - targets.clean), targets)
    assert torch.equal(panels["seen"], inputs[:2])
    assert torch.equal(panels["rebuilt"], 1 - panels["target"])
    assert torch.equal(panels["target"], targets.clean[:2])


# Views ----------------------------------------------------------------------------------------------------------------


def test_views_are_exact_turns_of_the_patch_in_the_plane_of_the_last_two_axes():
    given = batch(8)
    inputs, targets = prepare(SwinSelfSupervision(PATCH), given)
    assert inputs.shape == targets.clean.shape == (16, 1, *PATCH)
    assert targets.turns.shape == (16,)
    assert set(targets.turns.tolist()) == {0, 1, 2, 3}
    for i in range(16):
        image = given["image"][i % 8]
        ways = [
            image,
            image.transpose(2, 3).flip(2),  # (y, z) of the turned image is (z, Z - 1 - y) of the image
            image.flip(2, 3),
            image.transpose(2, 3).flip(3),
        ]
        assert torch.equal(targets.clean[i], ways[targets.turns[i]])


def test_damage_is_of_the_size_asked_for_and_stays_in_range():
    inputs, targets = prepare(SwinSelfSupervision(PATCH), batch(8))
    share = (inputs != targets.clean).float().mean(dim=(1, 2, 3, 4))
    assert 0.15 < share.mean() < 0.3  # two rounds of 0.15 each, some of it twice
    assert 0 < share.min() < share.max() < 0.6 + 2 * 0.25**3
    assert inputs.min() >= 0
    assert inputs.max() <= 1
    whole, untouched = prepare(SwinSelfSupervision(PATCH, corruption=0.0), batch(2))
    assert torch.equal(whole, untouched.clean)


def test_boxes_have_the_published_sizes_and_stop_once_they_are_enough():
    objective = SwinSelfSupervision((40, 80, 80))
    for sample in range(20):
        stream = np.random.default_rng(sample)
        boxes = objective._boxes(stream).astype(int)
        wanted = np.random.default_rng(sample).uniform(0, 0.3) * 40 * 80 * 80
        volumes = (boxes[:, :, 1] - boxes[:, :, 0]).prod(axis=1)
        assert volumes[:-1].sum() < wanted <= volumes.sum()
        edges = boxes[:, :, 1] - boxes[:, :, 0]
        assert (boxes >= 0).all()
        assert (edges.min(axis=0) >= (2, 4, 4)).all()  # 5 % of the side, whole at the border, too
        assert (edges.max(axis=0) < (10, 20, 20)).all()
        assert (boxes[:, :, 1] <= (40, 80, 80)).all()


def test_covered_voxels_are_those_in_any_box():
    boxes = np.zeros((2, 3, 3, 2), np.int16)
    boxes[0, 0] = [[1, 3], [0, 2], [4, 6]]
    boxes[0, 1] = [[2, 4], [1, 5], [5, 6]]
    boxes[1, 2] = [[0, 4], [0, 5], [0, 6]]
    expected = torch.zeros(2, 4, 5, 6, dtype=torch.bool)
    expected[0, 1:3, 0:2, 4:6] = expected[0, 2:4, 1:5, 5:6] = expected[1] = True
    assert torch.equal(_cover(torch.from_numpy(boxes), (4, 5, 6)), expected)


def test_the_second_round_shows_the_partner_as_it_is_by_then():
    objective = SwinSelfSupervision(PATCH)
    given = batch(2)
    draws = objective.draw(given["epoch"], given["case"])
    box = np.zeros((2, 2, 1, 3, 2), np.int16)
    noise, swap = box.copy(), box.copy()
    noise[0] = [[0, 8], [0, 32], [0, 32]]  # the first sample alone has noise
    swap[:] = [[4, 12], [0, 32], [0, 32]]
    partner = np.array([[0.9, 0.9], [0.1, 0.1]])  # each is the other's
    fixed = type(draws)(np.zeros((2, 2), int), noise, partner, swap, draws.noise_key)
    objective.draw = lambda *_, **__: fixed
    inputs, targets = prepare(objective, given)
    first, second = inputs[0, 0], inputs[1, 0]
    clean = targets.clean[:, 0]
    assert not (first[:4] == clean[0, :4]).any()  # noise
    assert torch.equal(first[4:12], clean[1, 4:12])  # of the second sample, which was whole then
    assert torch.equal(first[12:], clean[0, 12:])
    assert torch.equal(second[4:12], first[4:12])  # of the first sample, which holds the second by then
    assert torch.equal(second[:4], clean[1, :4])


def test_views_follow_from_seed_epoch_and_case():
    objective = SwinSelfSupervision(PATCH, seed=3)
    draws = objective.draw([0, 0, 1], [4, 5, 4])
    again = SwinSelfSupervision(PATCH, seed=3).draw([0], [5])
    for name, value in vars(again).items():
        boxes = getattr(draws, name)[1]
        if name.endswith("boxes"):  # rows end in empty boxes
            boxes = boxes[:, : value.shape[2]]
            assert getattr(draws, name)[1, :, value.shape[2] :].sum() == 0
        assert np.array_equal(boxes, value[0]), name
    assert len(np.unique(draws.noise_key)) == 6
    other = SwinSelfSupervision(PATCH, seed=4).draw([0], [5])
    assert not np.array_equal(other.noise_key, again.noise_key)
    a, b = (prepare(SwinSelfSupervision(PATCH, seed=3), batch(2, epoch=7)) for _ in range(2))
    assert torch.equal(a[0], b[0])
    validation, _ = prepare(SwinSelfSupervision(PATCH, seed=3), batch(2, epoch=7), training=False)
    assert not torch.equal(a[0], validation)


def test_what_cannot_be_trained_on_is_named():
    with pytest.raises(ValueError, match="`patch_size` 32 48 64: views are turned in the plane of the last two axes"):
        SwinSelfSupervision((32, 48, 64))
    with pytest.raises(ValueError, match=r"`corruption` 1\.5 is outside"):
        SwinSelfSupervision(PATCH, corruption=1.5)


def test_a_single_patch_has_nothing_to_be_told_from():
    network, objective = build_swin_ssl("swin_tiny"), SwinSelfSupervision(PATCH)
    inputs, targets = prepare(objective, batch(1))
    assert objective.losses(network(inputs), targets)["contrastive"] == 0


def test_every_parameter_of_the_network_trains_on_the_three_losses():
    network, objective = build_swin_ssl("swin_tiny"), SwinSelfSupervision(PATCH)
    inputs, targets = prepare(objective, batch(2))
    sum(objective.losses(network(inputs), targets).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in network.encoder.parameters())
    heads = network.decoder.named_parameters()  # a bias before an instance norm changes nothing
    assert all(p.grad.any() for name, p in heads if not name.endswith("0.bias"))


class OneConvolution(nn.Module):
    """Stands in for the encoder: tokens of 32^3 voxels, layer-normalised."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv3d(1, 64, kernel_size=32, stride=32)

    def forward(self, x):
        return [F.layer_norm(self.convolution(x).movedim(1, -1), (64,)).movedim(-1, 1)]


def test_the_three_losses_are_learnt_on_one_batch():
    torch.manual_seed(0)
    objective = SwinSelfSupervision(PATCH)
    network = nn.Sequential(OneConvolution(), SwinHeads((1, 8, 8, 16, 32, 64), deconv_stages))
    ramps = torch.linspace(0, 1, 64)[:, None, None] * torch.linspace(0.2, 1, 32)  # (X, 1, Z)
    image = ramps.expand(2, 1, *PATCH) * torch.tensor([0.5, 1.0]).view(2, 1, 1, 1, 1)
    inputs, targets = prepare(objective, batch(2) | {"image": image})
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(60):
        terms = objective.losses(network(inputs), targets)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    assert terms["rotation"] < 0.1 * math.log(4)
    assert terms["contrastive"] < 0.1 * math.log(3)
    assert terms["reconstruction"] < 0.6 * (targets.clean - targets.clean.mean()).abs().mean()
    assert sum(terms.values()) < 0.2 * objective.baseline(targets)
