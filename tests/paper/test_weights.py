"""What a comparison with the paper says of weights whose origin is not known, and of folders that are no run."""

import json

import pytest

from amaes.evaluation.folds import find_folds
from amaes.paper.compare import compare_with_paper
from tests.paper.test_compare import AMAES, pretrained, summary


def test_weights_that_tell_nothing_are_said_to_be_unchecked():
    (note,) = (text for text in compare_with_paper(pretrained(), summary())["notes"] if text.startswith("Weights"))
    assert note.startswith("Weights: PRE/step-9.pt.")
    assert note.endswith("NOT checked: the file is gone or does not say how it was made.")
    (note,) = (
        text for text in compare_with_paper(pretrained(), summary(), pretraining=AMAES)["notes"] if "Weights" in text
    )
    assert note.endswith("only what the file says of its options was compared.")


def test_the_ablation_of_weights_that_tell_nothing_is_not_known():
    given = pretrained(protocol="brats21_cv")
    (obstacle,) = compare_with_paper(given, summary(cases=918))["obstacles"]
    assert "unet_xl with decoder unet, pretrained in a way that the weights do not tell" in obstacle
    (obstacle,) = compare_with_paper(given, summary(cases=918), pretraining=AMAES | {"augment": "spatial"})["obstacles"]
    assert "do not tell" not in obstacle


MADE = AMAES | {
    "objective": "amaes",
    "data": ["stores/brains"],
    "preset": "appendix_r1",
    "lr": 1e-4,
    "batch_size": 16,
    "weight_decay": 3e-5,
    "amsgrad": True,
    "patch_size": [128] * 3,
    "augment_options": [],
    "warmup": 0.05,
    "mask_ratio": 0.6,
    "token_size": 4,
    "loss_over": "all",
}


@pytest.mark.parametrize("task", ["brats21", "brats21_cv"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": ["demo"]}, "pretrained on synthetic heads"),
        ({"epochs": 20}, "pretrained for 20 epochs"),
        ({"mask_ratio": 0.3}, "pretrained with `mask_ratio` 0.3, the paper has 0.6"),
        ({"token_size": 8}, "`token_size` 8, the paper has 4"),
        ({"batch_size": 4}, "`batch_size` 4, the paper has 16"),
        ({"patch_size": [64] * 3}, "`patch_size` [64, 64, 64], the paper has [128, 128, 128]"),
    ],
)
def test_what_the_weights_say_they_were_made_with_is_compared(task, changed, message):
    given, measured = pretrained(protocol=task), summary(cases={"brats21": 313, "brats21_cv": 918}[task])
    assert compare_with_paper(given, measured, pretraining=MADE)["obstacles"] == []
    (obstacle,) = compare_with_paper(given, measured, pretraining=MADE | changed)["obstacles"]
    assert message in obstacle


def test_swin_unetr_has_no_masks():
    given = pretrained(arch="swin_unetr", lr=1e-4, batch_size=4)
    made = MADE | {"objective": "swin", "batch_size": 8, "mask_ratio": None, "token_size": None, "loss_over": None}
    assert compare_with_paper(given, summary(), pretraining=made)["obstacles"] == []


@pytest.mark.parametrize("content", ["[]", "{}", '{"options": []}', '{"options": {"model": "bert"}}', "{"])
def test_the_configuration_of_something_else_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json: not"):
        find_folds(tmp_path)


def test_the_configuration_of_a_run_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"options": {"steps": 5, "data": "store"}}))
    with pytest.raises(ValueError, match="no finished fold"):
        find_folds(tmp_path)
