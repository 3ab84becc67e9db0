"""What a run says at its end, and the Dice of training patches that it is judged by."""

import json
import math

import pytest
import torch

from amaes import cli
from amaes.training import verdict

CPU = torch.device("cpu")
NAMES = {0: "background", 1: "front", 2: "back"}


def metrics(folder, *lines):
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "val_')  # cut short
    return path


def logits(label, classes):
    return torch.nn.functional.one_hot(label, classes).movedim(-1, 1).float()


def test_dice_of_training_patches_by_hand():
    label = torch.zeros(1, 2, 3, 4, dtype=torch.long)
    label[0, 0, 0], label[0, 1, 0, :2] = 1, 2  # 4 voxels of class 1, 2 of class 2
    predicted = label.clone()
    predicted[0, 0, 0, :2] = 0  # 2 of 4 found
    predicted[0, 1, 2, 3] = 2  # 2 of 2, and one too many
    dice = verdict.TrainingDice(4, CPU)
    dice.add(logits(predicted, 4), label.byte())
    found = dice.read()
    assert found["dice_1"] == pytest.approx(4 / 6)
    assert found["dice_2"] == pytest.approx(4 / 5)
    assert math.isnan(found["dice_3"])
    assert found["dice"] == pytest.approx((4 / 6 + 4 / 5) / 2)
    left_out = label.clone()
    left_out[0, 1, 2] = 255
    dice.add([logits(label, 4), None], left_out)  # deep supervision: the finest
    dice.add(logits(torch.where(left_out == 255, 3, label), 4), left_out)
    assert dice.read()["dice"] == 1  # what was read does not count again, nor do voxels that are left out
    assert math.isnan(dice.read()["dice"])


def test_one_class_has_one_dice():
    dice = verdict.TrainingDice(2, CPU)
    dice.add(torch.zeros(1, 2, 2, 2, 3), torch.ones(1, 2, 2, 3))
    assert dice.read() == {"dice": 0.0}


@pytest.mark.parametrize(
    ("lines", "begin", "also"),
    [
        ([(0.02, 0.02, 0.02), (0.05, 0.1, 0.0)], "WARNING: training Dice never rose above 5.0 %", "more `steps`"),
        ([(0.05, 0.1, 0.0), (0.45, 0.85, 0.04)], "WARNING: training Dice 45.0 % at the end, but", "for back (4.0 %)"),
        ([(0.2, 0.3, 0.1), (0.8, 0.9, 0.7), (None, None, None)], "training Dice 80.0 % at the end", ""),
        ([], "no verdict", ""),
    ],
)
def test_fine_tuning_says_whether_training_dice_rose(tmp_path, lines, begin, also):
    named = [dict(zip(("dice", "dice_1", "dice_2"), line, strict=True)) for line in lines]
    said = verdict.of_finetuning(metrics(tmp_path, *named), NAMES)
    assert said.startswith(begin)
    assert also in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("loss", "baseline", "volumes", "begin", "also"),
    [
        (0.25, 0.5, 5, "validation is 50 % below the trivial prediction, 0.25 against 0.5 of predicting air", ""),
        (0.49, 0.5, 5, "WARNING: validation is only 2.0 % below", "try --target standardized, --crop patch, more"),
        (0.6, 0.5, 9, "WARNING: validation is NOT below", "try --target standardized, --crop patch, more --steps"),
        (-0.4, 0.8, 5, "validation is below the trivial prediction, -0.4 against 0.8", ""),
        (0.25, 0.5, 4, "validation is 50 % below", "; but 4 validation volumes are too few to tell, at least 5"),
        (0.25, 0.5, 1, "validation is 50 % below", "; but 1 validation volume is too few to tell, at least 5"),
    ],
)
def test_pretraining_says_how_far_validation_fell(tmp_path, loss, baseline, volumes, begin, also):
    first = {"step": 1, "val_loss": 9.0, "val_baseline": baseline}
    last = {"step": 2, "val_loss": loss, "val_baseline": baseline, "val_volumes": volumes}
    path = metrics(tmp_path, first, {"loss": 1.0}, last)
    said = cli.as_options(verdict.of_pretraining(path, "air", {"target": "absolute", "crop": "window", "skips": None}))
    assert said.startswith(begin)
    assert also in said


def test_without_validation_there_is_no_verdict(tmp_path):
    assert "larger `val_fraction`" in verdict.of_pretraining(metrics(tmp_path), "air", {})


@pytest.mark.parametrize(("count", "warns"), [(0, False), (1, True), (4, True), (5, False)])
def test_fewer_than_five_validation_volumes_are_too_few(count, warns):
    assert bool(verdict.few_volumes(count)) == warns
