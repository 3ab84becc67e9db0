"""The published numbers, and what a run beside them is told."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import train_finetune
import train_pretrain
from amaes.models import ARCHITECTURES, SEGMENTATION_DECODERS, build_segmenter
from amaes.paper.compare import ABLATIONS, TABLE_4, compare, comparison_text
from amaes.paper.numbers import TESTED
from amaes.paper.protocols import EVALUATIONS, PROTOCOLS, folds_of

TABLE = """
unet_xl unet scratch 90 56.00 2.55 48.30 2.94 68.32 1.75 67.22 1.59
unet_b unet scratch 22 55.28 1.75 45.66 2.40 66.18 2.28 64.96 2.52
mednext_m unet scratch 21 58.38 1.44 56.15 2.77 70.01 1.48 67.64 1.74
mednext_l unet scratch 55 58.28 1.23 55.40 1.88 70.32 1.77 67.57 1.48
mednext_l mednext scratch 62 55.42 2.25 53.88 1.52 68.75 2.18 67.14 1.28
swin_unetr unet scratch 62 50.00 2.59 42.55 2.49 64.96 3.90 65.02 2.86
unet_xl unet pretrained 90 58.98 0.88 53.58 0.76 70.40 1.46 68.22 1.16
unet_b unet pretrained 22 57.20 1.75 48.42 1.32 69.11 2.28 67.51 1.56
mednext_m unet pretrained 21 56.81 2.40 55.89 2.17 71.70 1.62 68.80 0.79
mednext_l unet pretrained 55 58.73 1.33 56.83 1.39 71.63 1.67 68.68 0.97
swin_unetr unet pretrained 62 49.54 0.94 48.42 3.14 67.28 2.67 68.14 1.43
"""
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
    how = {"space": "native", "tta": False, "overlap": 0.5, "empty": "nan"} | settings
    return {"folds": rows, "dice": {"mean": mean, "sd": 0.01, "folds": [mean] * folds}, "settings": how}


def test_the_table_is_that_of_the_paper():
    lines = [line.split() for line in TABLE.strip().splitlines()]
    assert len(lines) == len(TABLE_4)
    for arch, decoder, start, parameters, *numbers in lines:
        row = TABLE_4[arch, decoder, start == "pretrained"]
        values = [float(number) for number in numbers]
        assert row.parameters == int(parameters)
        assert row.dice == dict(zip(TASKS, zip(values[::2], values[1::2], strict=True), strict=True))
        assert arch in ARCHITECTURES
        assert decoder in SEGMENTATION_DECODERS


def test_printed_gains_agree_but_for_those_that_are_no_targets():
    for arch, gains in GAINS.items():
        row = TABLE_4[arch, "unet", True]
        for task, gain in zip(TASKS, gains, strict=True):
            found = row.dice[task][0] - TABLE_4[arch, "unet", False].dice[task][0]
            agrees = abs(found - gain) < 0.06
            assert agrees == (task not in row.no_target), (arch, task, found)


@pytest.mark.parametrize(("arch", "decoder"), [("unet_xl", "unet"), ("mednext_m", "unet"), ("mednext_l", "mednext")])
def test_the_networks_are_of_the_size_in_the_table(arch, decoder):
    count = sum(parameter.numel() for parameter in build_segmenter(arch, decoder=decoder).parameters())
    assert round(count / 1e6) == TABLE_4[arch, decoder, False].parameters


def test_the_numbers_of_cases_are_those_of_the_protocols():
    assert set(TESTED) == {*PROTOCOLS, *EVALUATIONS}
    for key, protocol in PROTOCOLS.items():
        names = [f"{i:04d}" for i in range(protocol.cases)]
        assert {len(fold["test"]) for fold in folds_of(names, key)} == {TESTED[key]}
    assert TESTED["wmh_ood"] == EVALUATIONS["wmh_ood"].cases


def test_a_run_as_the_papers_is_comparable():
    found = compare(options(), summary(mean=0.57))
    (row,) = found["rows"]
    assert (row["row"], row["mean"], row["sd"]) == ("Table 4, U-Net XL, from scratch, BraTS21", 56.00, 2.55)
    assert row["difference"] == pytest.approx(1.0)
    assert row["within_one_sd"] is True
    assert found["obstacles"] == []
    text = comparison_text("RUN", summary(mean=0.57), found)
    assert "| Table 4, U-Net XL, from scratch, BraTS21 | 56.00 ± 2.55 | 57.00 ± 1.00 | +1.00 | yes |" in text
    assert "Comparable: " in text
    assert "1. Learning rate and batch size of fine-tuning" in text


@pytest.mark.parametrize(("mean", "within"), [(0.586, False), (0.585, True), (0.535, True), (0.534, False)])
def test_one_sd_of_the_paper_is_the_limit(mean, within):
    (row,) = compare(options(), summary(mean))["rows"]  # 56.00 ± 2.55
    assert row["within_one_sd"] is within
    assert row["difference"] == pytest.approx(100 * mean - 56)


@pytest.mark.parametrize(
    ("changed", "measured", "message"),
    [
        ({"allow_incomplete": True}, {}, "--allow-incomplete"),
        ({"steps": 300}, {}, "--steps 300, the paper has 2500"),
        ({"lr": 1e-3}, {}, "--lr 0.001, preset appendix_r1 has 0.0005"),
        ({"augment": "spatial"}, {}, "--augment spatial, the paper has all"),
        ({"patch_size": [64, 64, 64]}, {}, "--patch-size [64, 64, 64]"),
        ({"deep_supervision": True}, {}, "--deep-supervision True"),
        ({}, {"folds": 4}, "4 folds are finished, the paper has 6"),
        ({}, {"cases": 312}, "a fold has 312 measured cases and 0 that failed, expected 313 and 0"),
        ({}, {"failed": 1}, "313 measured cases and 1 that failed"),
        ({}, {"space": "store"}, "evaluated with space store, the paper has native"),
        ({}, {"tta": True}, "evaluated with tta True"),
    ],
)
def test_what_differs_from_the_paper_is_an_obstacle(changed, measured, message):
    found = compare(options(**changed), summary(**measured))
    assert [message in line for line in found["obstacles"]] == [True]
    assert "Not comparable:\n- " in comparison_text("RUN", summary(**measured), found)


def test_without_a_protocol_nothing_is_comparable():
    found = compare({"steps": 5}, summary())
    assert found["rows"] == []
    text = comparison_text("RUN", summary(), found)
    assert "Not comparable:\n- the run was made without --protocol" in text
    assert "±" not in text


def test_a_network_that_the_paper_has_not():
    for given in (options(arch="unet_tiny"), pretrained(arch="mednext_l", decoder="mednext")):
        found = compare(given, summary())
        assert found["rows"] == []
        assert found["obstacles"][0].startswith("the paper has no row for")


@pytest.mark.parametrize("task", ["isles22", "wmh_ood"])
def test_numbers_of_swin_unetr_that_contradict_themselves_are_no_target(task):
    given = pretrained(arch="swin_unetr", protocol="isles22" if task == "isles22" else "wmh", lr=1e-4, batch_size=4)
    (row,) = compare(given, summary(cases=TESTED[task]), task)["rows"]
    assert row["within_one_sd"] is None
    assert "do not use as a target" in row["remark"]
    (row,) = compare(given | {"protocol": "wmh"}, summary(cases=40))["rows"]
    assert (row["within_one_sd"], row["remark"]) == (False, "")


def test_other_cases_have_their_own_column():
    (row,) = compare(pretrained(protocol="wmh"), summary(cases=110), "wmh_ood")["rows"]
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
    notes = "\n".join(
        compare(options(protocol="wmh" if evaluation else task, weights=weights), summary(), evaluation)["notes"]
    )
    assert all(word in notes for word in words)
    assert not any(word in notes for word in absent)


# Pretraining ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "mean"),
    [
        (("standard", False, "none"), 56.65),
        (("standard", True, "none"), 56.22),
        (("light", False, "none"), 58.61),
        (("light", False, "all"), 59.85),
    ],
)
def test_the_ablations_are_told_by_what_the_weights_say(how, mean):
    assert len(ABLATIONS) == 4
    provenance = AMAES | dict(zip(("decoder", "skips", "augment"), how, strict=True))
    found = compare(pretrained(protocol="brats21_cv"), summary(cases=918), pretraining=provenance)
    (row,) = found["rows"]
    assert row["mean"] == mean
    assert found["obstacles"] == []
    assert (row["within_one_sd"] is None) == (row["sd"] is None) == (how == ("standard", True, "none"))
    assert compare(pretrained(protocol="brats21_cv"), summary(cases=918))["rows"] == []  # weights that say nothing


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"decoder": "standard"}, "pretrained with decoder standard, no skip connections, augmentation all"),
        ({"augment": "none"}, "augmentation none"),
        ({"epochs": 20}, "pretrained for 20 epochs"),
        ({"steps": 500}, "pretrained for 500 steps"),
        ({"data": "demo"}, "pretrained on synthetic heads"),
        ({"objective": "supervised"}, "pretrained with --objective supervised"),
        ({"objective": "swin"}, "pretrained with --objective swin"),
    ],
)
def test_other_pretraining_than_the_rows_is_an_obstacle(changed, message):
    assert compare(pretrained(), summary(), pretraining=AMAES)["obstacles"] == []
    (found,) = compare(pretrained(), summary(), pretraining=AMAES | changed)["obstacles"]
    assert message in found


def test_swin_unetr_is_pretrained_with_its_own_losses():
    given = pretrained(arch="swin_unetr", lr=1e-4, batch_size=4)
    (found,) = compare(given, summary(), pretraining=AMAES)["obstacles"]
    assert "the paper's swin_unetr with SwinUNETR's own losses" in found
    assert compare(given, summary(), pretraining=AMAES | {"objective": "swin"})["obstacles"] == []


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
