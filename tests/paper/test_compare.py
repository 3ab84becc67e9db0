"""The published numbers, and what the comparison says of a run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import train_finetune
import train_pretrain
from amaes.models import ARCHITECTURES, SEGMENTATION_DECODERS, build_segmenter
from amaes.paper.compare import compare_with_paper, comparison_text
from amaes.paper.numbers import ABLATIONS, TABLE_4, TESTED
from amaes.paper.protocols import EVALUATIONS, PROTOCOLS

GAINS = {  # printed differences to from scratch: BraTS21, ISLES22, WMH, WMH OOD
    "unet_xl": (2.98, 5.27, 2.08, 1.01),
    "unet_b": (1.92, 2.76, 2.93, 2.55),
    "mednext_m": (-1.57, -0.26, 1.64, 1.17),
    "mednext_l": (0.45, 1.43, 1.31, 1.11),
    "swin_unetr": (-0.46, 1.75, 2.32, 1.59),
}
TASKS = ("brats21", "isles22", "wmh", "wmh_ood")
AMAES = {"decoder": "light", "skips": False, "augment": "all", "epochs": 100, "steps": None, "data": "BRAINS"}


def options(**changed):
    """Of a run as the paper's."""
    given = {
        "protocol": "brats21",
        "allow_incomplete": False,
        "arch": "unet_xl",
        "decoder": "unet",
        "weights": "scratch",
        "augment": "all",
        "augment_options": [],
        "steps": 2500,
        "patch_size": [128, 128, 128],
        "foreground": 0.33,
        "deep_supervision": False,
        "preset": "appendix_r1",
        "lr": 5e-4,
        "batch_size": 8,
        "weight_decay": 3e-5,
        "amsgrad": True,
    }
    return given | changed


def pretrained(**changed):
    return options(weights="PRE/step-9.pt", augment="spatial") | changed


def summary(mean=0.57, cases=313, folds=6, failed=0, **settings):
    rows = [{"fold": k, "n_cases": cases, "n_failed": failed} for k in range(folds)]
    evaluation = {"space": "native", "tta": False, "overlap": 0.5, "empty": "nan"} | settings
    return {"folds": rows, "dice": {"mean": mean, "sd": 0.01, "folds": [mean] * folds}, "settings": evaluation}


def test_the_rows_of_the_table_are_networks_that_can_be_built():
    for arch, decoder, _ in TABLE_4:
        assert arch in ARCHITECTURES
        assert decoder in SEGMENTATION_DECODERS


def test_printed_gains_agree_but_for_those_that_are_no_targets():
    for arch, gains in GAINS.items():
        row = TABLE_4[arch, "unet", True]
        for task, gain in zip(TASKS, gains, strict=True):
            found = row.dice[task][0] - TABLE_4[arch, "unet", False].dice[task][0]
            agrees = abs(found - gain) < 0.06
            assert agrees == (task not in row.no_target), (arch, task, found)


def test_the_networks_are_of_the_size_in_the_table():
    for (arch, decoder, _), row in TABLE_4.items():
        with torch.device("meta"):
            network = build_segmenter(arch, decoder=decoder)
        millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        printed = int if arch == "unet_b" else round  # 22.6 million are printed as 22
        assert printed(millions) == row.parameters


def test_every_task_has_its_number_of_cases():
    assert set(TESTED) == {*PROTOCOLS, *EVALUATIONS}
    assert TESTED["wmh_ood"] == EVALUATIONS["wmh_ood"].cases


def test_a_run_as_the_papers_is_comparable():
    compared = compare_with_paper(options(), summary(mean=0.57))
    (row,) = compared["rows"]
    assert (row["row"], row["mean"], row["sd"]) == ("Table 4, U-Net XL, from scratch, BraTS21", 56.00, 2.55)
    assert row["difference"] == pytest.approx(1.0)
    assert row["within_one_sd"] is True
    assert compared["obstacles"] == []
    text = comparison_text("RUN", summary(mean=0.57), compared)
    assert "| Table 4, U-Net XL, from scratch, BraTS21 | 56.00 ± 2.55 | 57.00 ± 1.00 | +1.00 | yes |" in text
    assert "Comparable: " in text
    assert "1. Learning rate and batch size of fine-tuning" in text


@pytest.mark.parametrize(("mean", "within"), [(0.586, False), (0.585, True), (0.535, True), (0.534, False)])
def test_one_sd_of_the_paper_is_the_limit(mean, within):
    (row,) = compare_with_paper(options(), summary(mean))["rows"]  # 56.00 ± 2.55
    assert row["within_one_sd"] is within
    assert row["difference"] == pytest.approx(100 * mean - 56)


@pytest.mark.parametrize(
    ("changed", "measured", "message"),
    [
        ({"allow_incomplete": True}, {}, "`allow_incomplete`"),
        ({"steps": 300}, {}, "`steps` 300, the paper has 2500"),
        ({"lr": 1e-3}, {}, "`lr` 0.001, preset appendix_r1 has 0.0005"),
        ({"augment": "spatial"}, {}, "`augment` spatial, the paper has all"),
        ({"patch_size": [64, 64, 64]}, {}, "`patch_size` [64, 64, 64]"),
        ({"deep_supervision": True}, {}, "`deep_supervision` True"),
        ({"decoder_warmup": 100}, {}, "`decoder_warmup` 100, the paper has 0"),
        ({"freeze": "encoder"}, {}, "`freeze` encoder"),
        ({}, {"folds": 4}, "4 folds are finished, the paper has 6"),
        ({}, {"cases": 312}, "a fold has 312 measured cases and 0 that failed, expected 313 and 0"),
        ({}, {"failed": 1}, "313 measured cases and 1 that failed"),
        ({}, {"space": "store"}, "evaluated with space store, the paper has native"),
        ({}, {"tta": True}, "evaluated with tta True"),
    ],
)
def test_what_differs_from_the_paper_is_an_obstacle(changed, measured, message):
    compared = compare_with_paper(options(**changed), summary(**measured))
    assert [message in line for line in compared["obstacles"]] == [True]
    text = comparison_text("RUN", summary(**measured), compared)
    assert "Not comparable:\n- " in text
    assert message.split()[0].replace("`", "--", 1).replace("`", "").replace("_", "-") in text  # the option
    assert "`" not in text


def test_without_a_protocol_nothing_is_comparable():
    compared = compare_with_paper({"steps": 5}, summary())
    assert compared["rows"] == []
    text = comparison_text("RUN", summary(), compared)
    assert "Not comparable:\n- the run was made without --protocol" in text
    assert "±" not in text


def test_a_network_that_the_paper_has_not():
    for given in (options(arch="unet_tiny"), pretrained(arch="mednext_l", decoder="mednext")):
        compared = compare_with_paper(given, summary())
        assert compared["rows"] == []
        assert compared["obstacles"][0].startswith("the paper has no row for")


@pytest.mark.parametrize("task", ["isles22", "wmh_ood"])
def test_numbers_of_swin_unetr_that_contradict_themselves_are_no_target(task):
    given = pretrained(arch="swin_unetr", protocol="isles22" if task == "isles22" else "wmh", lr=1e-4, batch_size=4)
    (row,) = compare_with_paper(given, summary(cases=TESTED[task]), task)["rows"]
    assert row["within_one_sd"] is None
    assert "do not use as a target" in row["remark"]
    (row,) = compare_with_paper(given | {"protocol": "wmh"}, summary(cases=40))["rows"]
    assert (row["within_one_sd"], row["remark"]) == (False, "")


def test_other_cases_have_their_own_column():
    (row,) = compare_with_paper(pretrained(protocol="wmh"), summary(cases=110), "wmh_ood")["rows"]
    assert (row["row"], row["mean"]) == ("Table 4, U-Net XL, pretrained, WMH OOD", 68.22)


@pytest.mark.parametrize(
    ("task", "weights", "words", "absent"),
    [
        ("brats21", "scratch", ["20 cases", "two ways"], ["Label 2", "866", "ADNI", "Leakage"]),
        ("brats21", "W", ["ADNI", "MSD BrainTumour", "Weights: W"], ["Label 2", "866"]),
        ("brats21_cv", "W", ["866"], ["Label 2"]),
        ("isles22", "W", ["Leakage: BRAINS-45K holds the images"], ["MSD BrainTumour", "Label 2"]),
        ("wmh", "scratch", ["Label 2"], ["90 of the 110", "Leakage"]),
        ("wmh_ood", "scratch", ["Label 2", "90 of the 110"], ["ADNI"]),
    ],
)
def test_open_points_are_those_of_the_task(task, weights, words, absent):
    evaluation = task if task in EVALUATIONS else None
    given = options(protocol="wmh" if evaluation else task, weights=weights)
    notes = "\n".join(compare_with_paper(given, summary(), evaluation)["notes"])
    assert all(word in notes for word in words)
    assert not any(word in notes for word in absent)


# Pretraining ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pretrained_with", "mean"),
    [
        (("standard", False, "none"), 56.65),
        (("standard", True, "none"), 56.22),
        (("light", False, "none"), 58.61),
        (("light", False, "all"), 59.85),
    ],
)
def test_the_row_of_an_ablation_follows_from_what_the_weights_say(pretrained_with, mean):
    assert len(ABLATIONS) == 4
    provenance = AMAES | dict(zip(("decoder", "skips", "augment"), pretrained_with, strict=True))
    compared = compare_with_paper(pretrained(protocol="brats21_cv"), summary(cases=918), pretraining=provenance)
    (row,) = compared["rows"]
    assert row["mean"] == mean
    assert compared["obstacles"] == []
    assert (row["within_one_sd"] is None) == (row["sd"] is None) == (pretrained_with == ("standard", True, "none"))
    unknown_weights = compare_with_paper(pretrained(protocol="brats21_cv"), summary(cases=918))
    assert unknown_weights["rows"] == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"decoder": "standard"}, "pretrained with decoder standard, no skip connections, augmentation all"),
        ({"augment": "none"}, "augmentation none"),
        ({"epochs": 20}, "pretrained for 20 epochs"),
        ({"steps": 500}, "pretrained for 500 steps"),
        ({"data": "demo"}, "pretrained on synthetic heads"),
        ({"objective": "supervised"}, "pretrained with `objective` supervised"),
        ({"objective": "swin"}, "pretrained with `objective` swin"),
        ({"objective": "amaes", "target": "standardized"}, "`target` standardized, the paper has absolute"),
        ({"objective": "amaes", "crop": "patch"}, "`crop` patch, the paper has window"),
    ],
)
def test_other_pretraining_than_the_rows_is_an_obstacle(changed, message):
    assert compare_with_paper(pretrained(), summary(), pretraining=AMAES)["obstacles"] == []
    (obstacle,) = compare_with_paper(pretrained(), summary(), pretraining=AMAES | changed)["obstacles"]
    assert message in obstacle


def test_swin_unetr_is_pretrained_with_its_own_losses():
    given = pretrained(arch="swin_unetr", lr=1e-4, batch_size=4)
    (obstacle,) = compare_with_paper(given, summary(), pretraining=AMAES)["obstacles"]
    assert "the paper's swin_unetr with SwinUNETR's own losses" in obstacle
    assert compare_with_paper(given, summary(), pretraining=AMAES | {"objective": "swin"})["obstacles"] == []


# docs/reproduce.md ----------------------------------------------------------------------------------------------------


DOCS = (Path(__file__).parent.parent.parent / "docs" / "reproduce.md").read_text()


def parsed(monkeypatch, script, words):
    monkeypatch.setattr(sys, "argv", ["script", *words.split()])
    return script.parse_options()


def cell(mean, sd):
    return f"{mean:.2f}" + ("" if sd is None else f" ± {sd:.2f}")


def test_the_documented_commands_of_table_4_train_the_networks_of_their_rows(monkeypatch):
    commands = re.findall(r"^(.*)`row \S+ (\S+) (.*)` \|$", DOCS, flags=re.MULTILINE)
    assert len(commands) == len(TABLE_4)
    seen = set()
    for line, weights, words in commands:
        args = parsed(monkeypatch, train_finetune, f"--protocol wmh --data S --weights {weights} {words}")
        key = (args.arch, args.decoder, weights != "scratch")
        cells = [part.strip().removesuffix(" (*)") for part in line.split("|")][2:6]
        assert cells == [cell(*TABLE_4[key].dice[task]) for task in TASKS]
        starred = [task for task, part in zip(TASKS, line.split("|")[2:6], strict=True) if "(*)" in part]
        assert tuple(starred) == TABLE_4[key].no_target
        seen.add(key)
    assert seen == set(TABLE_4)


def test_the_documented_commands_of_the_ablations_pretrain_for_their_rows(monkeypatch):
    commands = re.findall(
        r"^\| [^|]* \| ([^|]*) \| `pretrain (\S+) ([^`]*)`, `ablation (\S+)` \|$", DOCS, flags=re.MULTILINE
    )
    found = {}
    for number, name, words, used in commands:
        args = parsed(monkeypatch, train_pretrain, words)
        assert (args.arch, args.epochs, args.steps, name) == ("unet_xl", 100, None, used)
        found[args.decoder, args.skips, args.augment] = number.strip()
    assert found == {how: cell(mean, sd) for how, (_, mean, sd) in ABLATIONS.items()}


def test_the_documented_stores_are_those_of_the_protocols():
    folders = {"brats21": '"$BRATS21"', "isles22": '"$ISLES"', "wmh": '"$WMH/training"'}
    for key, folder in folders.items():
        assert PROTOCOLS[key].command.replace("DIR", folder).replace("STORE", f"stores/{key}") in DOCS
    test = PROTOCOLS["wmh"].command.replace("DIR", '"$WMH/test"').replace("STORE", "stores/wmh_ood")
    assert test in DOCS
