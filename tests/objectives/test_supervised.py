import json

import numpy as np
import pytest
import torch

from amaes import checkpoint
from amaes.augment import FinetuneAugment
from amaes.data.loader import loader
from amaes.data.order import MixedBatches, Share
from amaes.data.patches import Patches
from amaes.data.several_stores import open_stores
from amaes.data.store import Store
from amaes.losses import dice_ce_loss, segmentation_loss
from amaes.models import build_autoencoder, build_network, build_segmenter
from amaes.objectives.supervised import SupervisedSegmentation
from tests.stores import make_store

PATCH = (16, 32, 16)
CPU = torch.device("cpu")


@pytest.fixture
def pool(tmp_path):
    """Two stores: background, one, two; and background, TWO, three."""
    paths = [make_store(tmp_path / name, count=2, labels=True) for name in ("first", "second")]
    content = json.loads((paths[1] / "dataset.json").read_text())
    content["labels"] = {"0": "background", "1": "TWO", "2": "three"}
    (paths[1] / "dataset.json").write_text(json.dumps(content))
    return open_stores(paths)


def read(store, cases, window=PATCH, epoch=0):
    patches = Patches(store, PATCH, window, labels=True, foreground=1.0)
    return next(loader(patches, [[(epoch, case) for case in cases]], workers=0, pin_memory=False))


def objective_of(store, preset="none", **options):
    objective = SupervisedSegmentation(FinetuneAugment(PATCH, preset, **options))
    objective.see(store)
    return objective


# Loss -----------------------------------------------------------------------------------------------------------------


def test_classes_that_are_not_allowed_take_no_part():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 3, 4, 5, requires_grad=True)
    label = torch.randint(0, 2, (2, 3, 4, 5)) * 2  # 0 and 2
    allowed = torch.tensor([[True, False, True, False], [True, True, True, True]])
    loss = dice_ce_loss(logits, label, allowed)
    loss.backward()
    assert torch.equal(logits.grad[0, [1, 3]], torch.zeros(2, 3, 4, 5))
    assert logits.grad[0, [0, 2]].abs().min() > 0
    assert logits.grad[1].abs().min() > 0
    alone = dice_ce_loss(logits[:1, [0, 2]], label[:1] // 2)  # a network of these two classes
    both = (alone + dice_ce_loss(logits[1:], label[1:])) / 2
    assert loss.item() == pytest.approx(both.item(), rel=1e-6)


def test_allowing_all_is_the_loss_without_a_choice():
    logits, label = torch.randn(2, 3, 4, 6, 8), torch.randint(0, 3, (2, 4, 6, 8))
    coarse, everything = torch.randn(2, 3, 2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    given = segmentation_loss([logits, coarse], label, everything)
    assert given.item() == pytest.approx(segmentation_loss([logits, coarse], label).item(), rel=1e-6)


def test_deep_supervision_excludes_classes_at_every_stage():
    outputs = [torch.randn(1, 3, 4, 6, 8, requires_grad=True), torch.randn(1, 3, 2, 3, 4, requires_grad=True)]
    segmentation_loss(outputs, torch.zeros(1, 4, 6, 8), torch.tensor([[True, False, True]])).backward()
    for output in outputs:
        assert not output.grad[:, 1].any()
        assert output.grad[:, [0, 2]].all()


# Objective ------------------------------------------------------------------------------------------------------------


def test_labels_become_classes_of_all_stores(pool):
    batch = read(pool, [0, 2])  # of the first and of the second store, with the same label files
    image, (label, allowed) = objective_of(pool).prepare(batch, CPU)
    assert torch.equal(image, batch["image"])
    stored = batch["label"].long()
    assert set(stored.unique().tolist()) >= {0, 1}
    assert torch.equal(label[0], stored[0])
    assert torch.equal(label[1], torch.tensor([0, 2, 3])[stored[1]])
    assert allowed.tolist() == [[True, True, True, False], [True, False, True, True]]


def test_what_a_store_leaves_out_is_no_class_and_no_target(pool):
    index = pool.stores[1].path / "dataset.json"
    content = json.loads(index.read_text())
    content["config"]["label_map"] = {"2": 255}
    content["labels"] = {"0": "background", "1": "TWO"}
    index.write_text(json.dumps(content))
    for case in ("case00", "case01"):
        path = index.parent / "cases" / f"{case}_label.npy"
        label = np.load(path)
        np.save(path, np.where(label == 2, 255, label).astype(np.uint8))
    both = open_stores([store.path for store in pool.stores])
    objective = objective_of(both)
    assert objective.classes.names == {0: "background", 1: "one", 2: "two"}
    batch = read(both, [0, 2], window=(40, 52, 36))
    _, targets = objective.prepare(batch, CPU, training=False)
    stored = batch["label"].long()
    assert torch.equal(targets[0][0], stored[0])
    assert torch.equal(targets[0][1], torch.where(stored[1] == 1, 2, stored[1]))
    assert (targets[0][1] == 255).sum() > 0
    logits = torch.randn(2, 3, 40, 52, 36)
    loss = objective.losses(logits, targets)["segmentation"]
    logits.masked_fill_((targets[0] == 255)[:, None], 9.0)
    assert torch.equal(objective.losses(logits, targets)["segmentation"], loss)
    assert objective.panels(torch.zeros(2, 1, 40, 52, 36), logits, targets)["label"].max() == 1
    alone = objective_of(both.stores[1])
    assert (alone.build["num_classes"], alone.classes.ignored) == (2, 255)


def test_a_case_that_stands_in_for_another_keeps_the_classes_of_its_own_store(pool):
    batch = read(pool, [0, 2]) | {"case": [0, 1], "read": [0, 2]}  # asked for: both of the first store
    _, (_, allowed) = objective_of(pool).prepare(batch, CPU)
    assert allowed.tolist() == [[True, True, True, False], [True, False, True, True]]


def test_panels_show_the_allowed_class_of_highest_logit(pool):
    objective = objective_of(pool)
    inputs, targets = objective.prepare(read(pool, [0, 2]), CPU)
    logits = torch.zeros(2, 4, *PATCH)
    logits[:, 1], logits[:, 3] = 1.0, 2.0
    panels = objective.panels(inputs, logits, targets)
    assert {name: image.shape for name, image in panels.items()} == dict.fromkeys(
        ("seen", "predicted", "label"), (2, 1, *PATCH)
    )
    assert panels["predicted"].flatten(1).unique(dim=1).flatten().tolist() == pytest.approx([1 / 3, 1])
    assert torch.equal(panels["label"][:, 0], targets[0] / 3)


def test_image_and_label_are_augmented_together_and_not_in_validation(pool):
    objective = objective_of(pool, "spatial", seed=2, rotation=1.0, scale=1.0, window="parity")
    assert objective.window_size > PATCH
    batch = read(pool, [1, 3], objective.window_size)
    image, (label, _) = objective.prepare(batch, CPU)
    assert image.shape == (2, 1, *PATCH)
    assert label.shape == (2, *PATCH)
    again, _ = objective.prepare(batch, CPU)
    assert torch.equal(image, again)
    other, _ = objective.prepare(batch | {"epoch": [1, 1]}, CPU)
    assert not torch.equal(image, other)
    plain = read(pool, [1, 3])
    untouched, (label, _) = objective.prepare(plain, CPU, training=False)
    assert torch.equal(untouched, plain["image"])
    assert torch.equal(label[0], plain["label"][0].long())


def test_the_baseline_is_that_of_equal_chances(pool):
    objective = objective_of(pool)
    _, targets = objective.prepare(read(pool, [0, 3]), CPU)
    losses = objective.losses(torch.zeros(2, 4, *PATCH), targets)
    assert objective.baseline(targets).item() == pytest.approx(losses["segmentation"].item(), rel=1e-6)


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_one_network_learns_two_stores_of_other_labels(pool, deep_supervision):
    torch.manual_seed(0)
    objective = objective_of(pool)
    network = build_segmenter("unet_tiny", 1, objective.classes.count, deep_supervision=deep_supervision)
    batch = read(pool, [0, 2])
    seen = 0.2 + 0.3 * batch["label"][:, None] + 0.05 * torch.rand_like(batch["image"])  # what can be told apart
    inputs, targets = objective.prepare(batch | {"image": seen}, CPU)
    outputs = network(inputs)
    finest = outputs[0] if deep_supervision else outputs
    finest.retain_grad()
    sum(objective.losses(outputs, targets).values()).backward()
    assert not finest.grad[0, 3].any()  # three: not of the first store
    assert not finest.grad[1, 1].any()  # one: not of the second
    assert finest.grad[0, :3].any()
    assert finest.grad[1, [0, 2, 3]].any()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(60):
        loss = sum(objective.losses(network(inputs), targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3 * objective.baseline(targets)
    label, allowed = targets
    with torch.no_grad():
        best = network.eval()(inputs).masked_fill(~allowed[:, :, None, None, None], -torch.inf).argmax(dim=1)
    found = [(best == k)[label == k].float().mean() for k in label.unique()]
    assert min(found) > 0.5


def test_a_whole_step_reads_mixed_batches(pool):
    objective = objective_of(pool, "spatial")
    order = MixedBatches(pool.groups(range(4)), Share(4, accumulate=2), seed=0, start=0, stop=2)
    patches = Patches(pool, PATCH, objective.window_size, labels=True, foreground=0.33)
    batches = list(loader(patches, order, workers=0, pin_memory=False))
    assert [batch["epoch"] for batch in batches] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    for batch in batches:
        image, (label, allowed) = objective.prepare(batch, CPU)
        assert image.shape[0] == label.shape[0] == allowed.shape[0] == 2
        assert allowed.gather(1, label.flatten(1)).all()  # every voxel's class is one of its store


def test_one_store_is_trained_as_in_fine_tuning(tmp_path):
    store = Store(make_store(tmp_path / "alone", labels=True))
    objective = objective_of(store)
    batch = read(store, [0, 1])
    _, targets = objective.prepare(batch, CPU)
    logits = torch.randn(2, 3, *PATCH)
    expected = segmentation_loss(logits, batch["label"].long())
    assert objective.losses(logits, targets)["segmentation"].item() == pytest.approx(expected.item(), rel=1e-6)


# Transfer of the decoder ----------------------------------------------------------------------------------------------


def saved(tmp_path, task="segment", **build):
    build = {"arch": "unet_tiny", "in_channels": 1, **build}
    network = build_network(task, build)
    content = {"format": checkpoint.FORMAT, "task": task, "build": build, "model": network.state_dict()}
    torch.save(content, tmp_path / "given.pt")
    return network, tmp_path / "given.pt"


def test_all_but_heads_of_other_classes_is_taken(tmp_path):
    source, path = saved(tmp_path, num_classes=5, deep_supervision=True)
    target = build_segmenter("unet_tiny", num_classes=3, deep_supervision=True)
    report = checkpoint.load_encoder(target, path, transfer="all")
    heads = [f"decoder.heads.{i}.{kind}" for i in range(5) for kind in ("weight", "bias")]
    assert report.new == heads
    assert report.ignored == heads
    given = source.state_dict()
    same = [name for name, tensor in target.state_dict().items() if name not in heads]
    assert all(torch.equal(target.state_dict()[name], given[name]) for name in same)
    assert len(report.loaded) == len(same)
    assert "the decoder is the file's, except 10 tensors" in report.table()
    equal = build_segmenter("unet_tiny", num_classes=5, deep_supervision=True)
    report = checkpoint.load_encoder(equal, path, transfer="all")
    assert (report.new, report.ignored) == ([], [])
    assert all(torch.equal(tensor, given[name]) for name, tensor in equal.state_dict().items())
    plain = build_segmenter("unet_tiny", num_classes=5)
    report = checkpoint.load_encoder(plain, path, transfer="all")
    assert report.ignored == heads[2:]  # of the coarser stages


@pytest.mark.parametrize(
    ("task", "build", "decoder"),
    [
        ("pretrain", {"decoder": "light"}, "unet"),
        ("pretrain", {"decoder": "standard"}, "unet"),  # without skips: other input channels
        ("segment", {"decoder": "mednext"}, "unet"),
        ("segment", {"decoder": "unet"}, "mednext"),
    ],
)
def test_a_decoder_of_another_kind_is_refused_and_changes_nothing(tmp_path, task, build, decoder):
    _, path = saved(tmp_path, task, **build)
    target = build_segmenter("unet_tiny", decoder=decoder)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(ValueError, match=r"given\.pt: `transfer` all: its decoder is of another kind: .*take the `dec"):
        checkpoint.load_encoder(target, path, transfer="all")
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    assert checkpoint.load_encoder(target, path).coverage == 1.0


def test_the_standard_decoder_with_skips_of_pretraining_fits(tmp_path):
    _, path = saved(tmp_path, "pretrain", decoder="standard", skips=True)
    target = build_segmenter("unet_tiny", num_classes=2)
    assert checkpoint.load_encoder(target, path, transfer="all").new == [
        "decoder.heads.0.weight",
        "decoder.heads.0.bias",
    ]


def test_the_swin_decoder_takes_other_input_channels(tmp_path):
    source, path = saved(tmp_path, arch="swin_tiny", num_classes=2)
    target = build_segmenter("swin_tiny", in_channels=2, num_classes=2)
    report = checkpoint.load_encoder(target, path, transfer="all")
    names = ["laterals.0.conv1.weight", "laterals.0.shortcut.weight"]
    assert report.adapted == ["patch_embed.weight", *(f"decoder.{name}" for name in names)]
    assert report.new == []
    for name in names:
        wide, narrow = (network.decoder.get_parameter(name) for network in (target, source))
        assert torch.allclose(wide.sum(dim=1), narrow.sum(dim=1))
    report = checkpoint.load_encoder(target, path, stem="random", transfer="all")
    assert report.new == ["patch_embed.weight", *(f"decoder.{name}" for name in names)]


def test_a_file_without_a_decoder_and_an_unknown_choice_are_named(tmp_path):
    encoder = {k: v for k, v in build_autoencoder("unet_tiny").state_dict().items() if k.startswith("encoder.")}
    build = {"arch": "unet_tiny"}
    torch.save(
        {"format": checkpoint.FORMAT, "task": "pretrain", "build": build, "model": encoder}, tmp_path / "encoder.pt"
    )
    target = build_segmenter("unet_tiny")
    with pytest.raises(
        ValueError, match=r"encoder\.pt: `transfer` all: it \(checkpoint of unet_tiny\) holds no decoder"
    ):
        checkpoint.load_encoder(target, tmp_path / "encoder.pt", transfer="all")
    with pytest.raises(ValueError, match="`transfer` 'some' is unknown; accepted: encoder, all"):
        checkpoint.load_encoder(target, tmp_path / "encoder.pt", transfer="some")
