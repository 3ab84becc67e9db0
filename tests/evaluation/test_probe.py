"""The linear probe of an encoder: what it reads, what it leaves out, and the command."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from amaes.data.store import Store
from amaes.evaluation import probe
from amaes.evaluation.linear_probe import _full_size, draw_voxels, fit, linear_probe
from tests.stores import make_store

IGNORED = 9


class Encoder(torch.nn.Linear):  # has a parameter, which says where it is
    """Features that hold the label finely, coarsely or not at all."""

    strides = (1, 2)

    def __init__(self, seen):
        super().__init__(1, 1)
        self.seen = seen

    def forward(self, image):
        held = torch.cat([image == 1, image == 2], 1).float()
        return [held * (self.seen == "label"), F.avg_pool3d(held, 2) * (self.seen != "nothing")]


@pytest.fixture
def store():
    """Three cases with an odd side, whose image is the label, and a block that is left out, where both are noise."""
    random = np.random.default_rng(0)
    labels = {case: np.zeros((17, 22, 14), np.uint8) for case in ("a", "b", "c")}
    images = {}
    for case, label in labels.items():
        corner = random.integers(2, 6, 3)
        label[tuple(slice(at, at + 5) for at in corner)] = 1
        label[tuple(slice(at + 5, at + 8) for at in corner)] = 2
        images[case] = label[None].astype(np.float32)
        images[case][0, 14:] = random.integers(0, 3, (3, 22, 14))
        label[14:] = IGNORED
    classes = {"1": (1,), "2": (2,)}
    store = {"image": images.get, "label": labels.get, "num_classes": 3, "ignored": IGNORED, "path": "store"}
    declared = np.isin(np.arange(256), [0, 1, 2, IGNORED])
    return SimpleNamespace(**store, scored=lambda count: classes, declared=lambda case: declared)


@pytest.mark.parametrize(("seen", "low", "high"), [("label", 0.99, 1), ("coarse", 0.3, 0.95), ("nothing", 0, 0.05)])
def test_a_probe_reads_what_the_features_hold(store, seen, low, high):
    encoder = Encoder(seen)
    score = linear_probe(encoder, store, ["a", "b"], ["c"], voxels=2000)
    assert low <= score <= high
    assert score == linear_probe(encoder, store, ["a", "b"], ["c"], voxels=2000)


def test_features_are_interpolated_between_the_centers_of_their_voxels():
    larger = _full_size(torch.tensor([0.0, 4.0]).view(1, 2, 1, 1), 2, (3, 1, 1))
    assert larger.tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("case", ["a", "c"])  # in training, in the test
def test_a_label_that_the_store_does_not_declare_is_named(store, case):
    store.label(case)[3, 4, 5] = 7
    with pytest.raises(ValueError, match=f"^store: {case}: label value 7, its store declares 0 1 2 9$"):
        linear_probe(Encoder("label"), store, ["a"], ["c"], voxels=100)


def test_regions_are_scored_as_one(store):
    store.scored = lambda count: {"whole": (1, 2)}
    for case, label in (("a", 1), ("b", 1), ("c", 2)):  # "c" is found, under the other number
        store.label(case)[store.image(case)[0] == 1] = label
        store.label(case)[14:] = IGNORED
    assert linear_probe(Encoder("label"), store, ["a", "b"], ["c"], voxels=2000) > 0.99


def test_without_anything_to_find_there_is_no_score(store):
    for case in ("a", "c"):
        store.label(case)[...] = 0
    assert np.isnan(linear_probe(Encoder("label"), store, ["a"], ["c"], voxels=100))


@pytest.mark.parametrize(("count", "kinds"), [(10, [5, 5]), (40, [7, 33]), (100, [7, 54])])
def test_voxels_stand_for_all_of_their_kind_and_none_that_is_ignored(count, kinds):
    label = torch.zeros(70, dtype=torch.long)
    label[::10], label[1::8] = 1, IGNORED  # 7 voxels of foreground, and 54 of background
    drawn, shares = draw_voxels(label, count, IGNORED, torch.Generator().manual_seed(0))
    assert len(drawn) == len(drawn.unique())
    hit = label[drawn] > 0
    assert not (label[drawn] == IGNORED).any()
    assert [int(hit.sum()), int((~hit).sum())] == kinds
    assert [float(shares[hit].sum()), float(shares[~hit].sum())] == pytest.approx([7, 54])


def test_a_fit_counts_each_voxel_as_often_as_it_stands_for():
    inputs = torch.randn(60, 2, generator=torch.Generator().manual_seed(0)) * 3 + 5
    targets = (inputs[:, 0] + torch.linspace(-6, 6, 20).repeat(3) > 5).long()
    weights, bias = fit(inputs, targets, torch.ones(60), 2)
    again = fit(inputs, targets, torch.full((60,), 7.0), 2)
    torch.testing.assert_close((weights, bias), again)
    wanted = [
        int((inputs @ w.T + b).argmax(1).sum())
        for w, b in (fit(inputs, targets, 1 + targets * share, 2) for share in (-0.9, 0, 9))
    ]
    assert wanted == sorted(set(wanted))  # the more a class counts, the more often it is the answer


@pytest.mark.parametrize("constant", [0.0, 0.1, 100.1])
def test_a_feature_that_is_constant_in_training_is_not_read(constant):
    inputs = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0)) * 3 + 5
    targets = (inputs[:, 0] > 8).long()
    inputs = torch.cat([inputs, torch.full((5000, 1), constant)], 1)
    weights, bias = fit(inputs, targets, torch.ones(5000), 2)
    inputs[:, 2] += 0.05
    assert ((inputs @ weights.T + bias).argmax(1) == targets).float().mean() > 0.97


def test_the_command_compares_encoders_on_the_same_cases(capsys, tmp_path):
    store, file = make_store(tmp_path / "store", count=4, labels=True), tmp_path / "rows.json"
    options = ["--arch", "unet_tiny", "--device", "cpu", "--train-cases", 2, "--test-cases", 1, "--folds", 1]
    words = ["--data", store, "--weights", "scratch", "scratch", "--json", file, *options]
    assert probe.main([*map(str, words)]) == 0
    first, second = json.loads(file.read_text())["encoders"]
    assert first == second
    assert len(first["folds"]) == 1
    drawn = [probe.load("unet_tiny", Store(store), "scratch", 0).state_dict() for _ in range(2)]
    torch.testing.assert_close(*drawn, rtol=0, atol=0)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_fold_without_anything_to_find_is_left_out_of_the_mean(monkeypatch, capsys, tmp_path):
    scores = iter([0.5, float("nan"), 0.7])
    monkeypatch.setattr("amaes.evaluation.linear_probe.linear_probe", lambda *args: next(scores))
    store, file = make_store(tmp_path / "store", count=4, labels=True), tmp_path / "rows.json"
    options = ["--arch", "unet_tiny", "--device", "cpu", "--train-cases", 1, "--folds", 3]
    assert probe.main([*map(str, ["--data", store, "--weights", "scratch", "--json", file, *options])]) == 0
    assert json.loads(file.read_text())["encoders"] == [
        {"weights": "scratch", "folds": [50.0, None, 70.0], "mean": pytest.approx(60)}
    ]
    assert capsys.readouterr().out == " 60.0  (50.0 nan 70.0)  scratch\n"


@pytest.mark.parametrize("wrong", ["json", "weights"])
def test_what_is_wrong_is_found_before_any_encoder_is_probed(monkeypatch, tmp_path, wrong):
    store = make_store(tmp_path / "store", count=4, labels=True)
    torch.save({"state_dict": {"a": torch.zeros(3)}}, tmp_path / "other.pt")
    monkeypatch.setattr("amaes.evaluation.linear_probe.linear_probe", lambda *args: pytest.fail("was probed"))
    weights, file = {"json": ([], "other.pt/rows.json"), "weights": (["other.pt"], "rows.json")}[wrong]
    options = ["--arch", "unet_tiny", "--device", "cpu", "--train-cases", 1, "--json", tmp_path / file]
    words = ["--data", store, "--weights", "scratch", *(tmp_path / name for name in weights), *options]
    with pytest.raises((ValueError, SystemExit)):
        probe.main([*map(str, words)])
