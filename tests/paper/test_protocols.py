"""The paper's experiments: which cases, which folds, and what is left out of an evaluation."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import evaluate
import train_finetune
from amaes import checkpoint, cli
from amaes.data.store import Store
from amaes.paper.numbers import TESTED
from amaes.paper.protocols import PROTOCOLS, check_store, evaluation_cases, named_cases, saved_folds, training_sets
from amaes.preprocess.collection import Item
from amaes.preprocess.config import Config
from amaes.preprocess.find_cases import collect
from amaes.preprocess.sources import SourceFolder, leave_out_test
from amaes.preprocess.write_store import write_store
from tests.conftest import save_nifti
from tests.stores import SHAPES, position_image

ROOT = Path(__file__).parent.parent.parent
BRATS = [f"BraTS2021_{number:05d}" for number in range(0, 1251 * 2, 2)]  # numbers have gaps, as in the release
ISLES = [f"sub-strokecase{number:04d}" for number in range(1, 251)]
WMH = [f"{site}_{number:03d}" for k, site in enumerate(("ge3t", "singapore", "utrecht")) for number in range(20)]


def index(folder, ids, channel="FLAIR", labels=(0, 1), label_map=None, labelled=True, sequence=None, **config):
    """A store of the index alone."""
    folder.mkdir(parents=True, exist_ok=True)
    subject = {"session": None, "sequence": sequence, "labelled": labelled, "shape": [20, 24, 28]}
    content = {
        "format": "amaes-store-1",
        "config_hash": "0" * 16,
        "channels": channel.split(),
        "config": {"normalization": "unit", "spacing": [1.0, 1.0, 1.0], "label_map": label_map or {}} | config,
        "labels": {str(value): f"label {value}" for value in labels},
        "cases": [{"id": id, "subject": id.split("/")[0], **subject} for id in sorted(ids)],
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return Store(folder)


def brats(folder, ids=BRATS, **changed):
    return index(folder, ids, **{"labels": (0, 1, 2, 3), "label_map": {"4": 3}} | changed)


@pytest.fixture(scope="module")
def folds_of(tmp_path_factory):
    """Function: the folds of a protocol for a store whose cases have these names as ids."""

    def folds(names, key):
        protocol = PROTOCOLS[key]
        labels = {"label_map": protocol.label_map, "labels": range(protocol.classes)}
        return saved_folds(index(tmp_path_factory.mktemp("store"), names, protocol.channel, **labels), key)

    return folds


# Folds ----------------------------------------------------------------------------------------------------------------


def test_brats21_tests_every_fold_on_the_313_and_never_trains_on_them(folds_of):
    folds = folds_of(BRATS, "brats21")
    assert [(len(fold["train"]), len(fold["test"])) for fold in folds] == [(20, 313)] * 6
    order = np.random.RandomState(4215532).permutation(1251)
    assert order[:5].tolist() == [684, 1126, 1148, 844, 1209]
    assert folds[0]["test"] == sorted(BRATS[i] for i in order[:313])
    assert all(fold["test"] == folds[0]["test"] for fold in folds)
    trained = [name for fold in folds for name in fold["train"]]
    assert len(set(trained)) == 120
    assert not set(trained) & set(folds[0]["test"])


def test_the_ablations_test_the_rest_of_the_pool_with_the_same_training_cases(folds_of):
    folds, fixed = folds_of(BRATS, "brats21_cv"), folds_of(BRATS, "brats21")
    assert [len(fold["test"]) for fold in folds] == [918] * 6
    assert [fold["train"] for fold in folds] == [fold["train"] for fold in fixed]
    assert not set(folds[0]["test"]) & set(fixed[0]["test"])


def test_isles22_leaves_63_unused_and_tests_the_167_others(folds_of):
    folds = folds_of(ISLES, "isles22")
    assert [(len(fold["train"]), len(fold["test"])) for fold in folds] == [(20, 167)] * 6
    used = {name for fold in folds for side in fold.values() for name in side}
    assert len(used) == 187
    assert not used & {ISLES[i] for i in (249, 63, 33, 142, 42)}  # the first of RandomState(859032).permutation(250)
    assert len({name for fold in folds for name in fold["train"]}) == 120


def test_wmh_has_three_disjoint_training_sets_twice(folds_of):
    folds = folds_of(WMH, "wmh")
    assert [(len(fold["train"]), len(fold["test"])) for fold in folds] == [(20, 40)] * 6
    for repetition in (folds[:3], folds[3:]):
        assert sorted(name for fold in repetition for name in fold["train"]) == sorted(WMH)
    assert {tuple(fold["train"]) for fold in folds[:3]}.isdisjoint(tuple(fold["train"]) for fold in folds[3:])


def test_the_numbers_of_tested_cases_are_those_of_the_paper(folds_of):
    for key, names in {"brats21": BRATS, "brats21_cv": BRATS, "isles22": ISLES, "wmh": WMH}.items():
        assert {len(fold["test"]) for fold in folds_of(names, key)} == {TESTED[key]}


def test_training_sets_by_hand():
    # RandomState(1000).permutation(7) = 4 1 5 2 6 0 3, RandomState(1001).permutation(7) = 6 2 4 0 3 1 5
    assert training_sets("gfedcba", folds=3, size=3) == [["b", "e", "f"], ["a", "c", "g"], ["c", "e", "g"]]
    assert training_sets("abcdefg", folds=1, size=4) == [["b", "c", "e", "f"]]


def test_a_pool_without_a_case_to_test_on_is_refused():
    with pytest.raises(ValueError, match="a pool of 20 cases; a fold needs 20 for training and at least one more"):
        training_sets([str(i) for i in range(20)])


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{}", "TrainingData/{}", "BraTS21/{}/ses-1/FLAIR", "x/{0}/{0}_flair"])
def test_the_folds_do_not_depend_on_how_the_store_names_its_cases(tmp_path, folds_of, form):
    # a folder whose order is not that of the names
    prefix = {name: f"{i % 3}-part/" if "/" in form else "" for i, name in enumerate(BRATS)}
    store = brats(tmp_path / "store", [prefix[name] + form.format(name) for name in BRATS])
    found = saved_folds(store, "brats21")
    expected = folds_of(BRATS, "brats21")
    for fold, names in zip(found, expected, strict=True):
        assert fold == {side: [prefix[name] + form.format(name) for name in names[side]] for side in names}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Utrecht/0/pre", "utrecht_000"),
        ("Utrecht_11", "utrecht_011"),
        ("WMH/Singapore_50/ses-1/FLAIR", "singapore_050"),
        ("training/Amsterdam/GE3T/100/pre", "ge3t_100"),
        ("Amsterdam_GE1T5_150", "ge1t5_150"),
        ("test/Amsterdam/Philips_VU .PETMR_01./160/pre", "philips_160"),
        ("WMH/Amsterdam_Philips_VU-PETMR_01-_161/ses-1/FLAIR", "philips_161"),
        ("/data/utrecht2/WMH/training/Singapore/52/wmh.nii.gz", "singapore_052"),
        ("case07", None),
    ],
)
def test_scanner_and_number_name_a_case_of_wmh(text, name):
    assert PROTOCOLS["wmh"].name_in([text]) == name


def test_a_name_is_read_from_the_label_file_where_the_id_has_none(tmp_path):
    store = index(tmp_path / "store", ["a", "b"], label_map={"2": 0})
    (store.path / "cases").mkdir()
    for id, number in (("a", 8), ("b", 6)):
        path = {"label_file": f"/data/training/Utrecht/{number}/wmh.nii.gz"}
        (store.path / "cases" / f"{id}.json").write_text(json.dumps(path))
    assert named_cases(store, "wmh") == {"utrecht_006": "b", "utrecht_008": "a"}


def test_two_cases_of_one_name_and_a_case_without_are_refused(tmp_path):
    store = index(tmp_path / "a", ["x/Utrecht_1", "y/Utrecht_1"])
    with pytest.raises(ValueError, match=r"x/Utrecht_1 and y/Utrecht_1 are both utrecht_001 of WMH"):
        named_cases(store, "wmh")
    store = index(tmp_path / "b", ["sub-strokecase0001", "mine"], channel="DWI")
    (store.path / "cases").mkdir()
    (store.path / "cases" / "mine.json").write_text('{"label_file": null}')
    with pytest.raises(
        ValueError, match="case mine: no name of a case of ISLES22 in its id, such as sub-strokecase0001"
    ):
        named_cases(store, "isles22")


# Stores ---------------------------------------------------------------------------------------------------------------


def test_the_split_on_disk_says_what_it_follows_from(tmp_path):
    store = brats(tmp_path / "store")
    folds = saved_folds(store, "brats21")
    ((name, saved),) = json.loads((store.path / "splits.json").read_text())["splits"].items()
    assert name.startswith("protocol brats21: 1251 cases, 313 held out with seed 4215532, pool of 938; 6 folds of 20")
    assert saved == folds == saved_folds(store, "brats21")


def test_another_number_of_cases_is_refused_unless_allowed(tmp_path):
    store = index(tmp_path / "store", WMH[:30], label_map={"2": 0})
    with pytest.raises(ValueError, match="found 30 cases for protocol wmh, expected 60; `allow_incomplete`"):
        saved_folds(store, "wmh")
    folds = saved_folds(store, "wmh", allow_incomplete=True)
    assert [(len(fold["train"]), len(fold["test"])) for fold in folds] == [(20, 10)] * 6
    assert len({tuple(fold["train"]) for fold in folds}) == 6  # one chunk a repetition
    assert "INCOMPLETE, 30 of 60 cases" in (store.path / "splits.json").read_text()
    more = index(tmp_path / "more", [*WMH, "GE1T5_150"], label_map={"2": 0})
    with pytest.raises(ValueError, match="found 61 cases for protocol wmh, expected 60$"):
        saved_folds(more, "wmh", allow_incomplete=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"channel": "T1"}, "channels T1, expected labelled cases of FLAIR alone"),
        ({"channel": "FLAIR T1"}, "channels FLAIR T1, expected"),
        ({"labelled": False}, "expected labelled cases"),
        ({"label_map": {}, "labels": (0, 1, 2, 4)}, "5 classes after label map none, expected 4 after 4:3"),
        ({"label_map": {"4": 3, "2": 1}}, "4 classes after label map 4:3 2:1, expected 4"),
        ({"spacing": [2.0, 2.0, 2.0]}, r"spacing \[2.0, 2.0, 2.0\], expected"),
        ({"normalization": "zscore"}, "normalization zscore, expected unit"),
    ],
)
def test_a_store_preprocessed_otherwise_is_refused_with_the_command(tmp_path, changed, message):
    store = brats(tmp_path / "store", BRATS[:3], **changed)
    with pytest.raises(ValueError, match=message) as error:
        check_store(store, "brats21")
    command = "python -m amaes.preprocess --source brats21=DIR --sequence FLAIR --with-labels --out STORE"
    assert command in str(error.value)


def test_stores_of_the_release_are_accepted(tmp_path):
    check_store(brats(tmp_path / "a", BRATS[:3], channel="flair", label_map={"4": 3, "3": 3}), "brats21")
    check_store(index(tmp_path / "b", ISLES[:3], channel="image", sequence="DWI"), "isles22")
    check_store(index(tmp_path / "c", WMH[:3], label_map={"2": 0, "0": 0}), "wmh")


def test_of_a_channel_without_a_name_the_sequence_counts(tmp_path):
    with pytest.raises(ValueError, match="channels image, expected labelled cases of DWI alone"):
        check_store(index(tmp_path / "store", ISLES[:3], channel="image", sequence="FLAIR"), "isles22")


# Evaluation on other cases --------------------------------------------------------------------------------------------


OOD = (
    [f"Utrecht_{i}" for i in range(30)]
    + [f"Singapore_{50 + i}" for i in range(30)]
    + [f"Amsterdam_GE3T_{100 + i}" for i in range(30)]
    + [f"Amsterdam_GE1T5_{150 + i}" for i in range(10)]
    + [f"Amsterdam_Philips_VU_.PETMR_01._{160 + i}" for i in range(10)]
)


def test_of_the_110_cases_20_are_of_unseen_scanners(tmp_path):
    store = index(tmp_path / "store", OOD, label_map={"2": 0})
    ids, groups = evaluation_cases(store, "wmh_ood", "wmh", ["Utrecht_31"])
    assert sorted(ids) == sorted(OOD)
    unseen, seen = groups.values()
    assert sorted(unseen) == sorted(OOD[90:])
    assert sorted(seen) == sorted(OOD[:90])


def test_cases_that_were_trained_on_are_no_test(tmp_path):
    store = index(tmp_path / "store", OOD, label_map={"2": 0})
    with pytest.raises(ValueError, match="has 1 cases that the networks were trained on, such as utrecht_003"):
        evaluation_cases(store, "wmh_ood", "wmh", ["training/Utrecht/3/pre"])
    with pytest.raises(ValueError, match="trained with `protocol` wmh, not with `protocol` isles22"):
        evaluation_cases(store, "wmh_ood", "isles22", [])
    with pytest.raises(ValueError, match="not without `protocol`"):
        evaluation_cases(store, "wmh_ood", None, [])
    few = index(tmp_path / "few", OOD[:40], label_map={"2": 0})
    with pytest.raises(ValueError, match="found 40 cases for `protocol` wmh_ood, expected 110; `allow_incomplete`"):
        evaluation_cases(few, "wmh_ood", "wmh", [])
    assert len(evaluation_cases(few, "wmh_ood", "wmh", [], allow_incomplete=True)[0]) == 40


BLOB = (slice(6, 10), slice(7, 11), slice(5, 9))  # 64 voxels, bright
PART = (slice(6, 8), *BLOB[1:])  # half of it
OTHER = (slice(8, 10), *BLOB[1:])  # the other half
SHAPE, LPS = (20, 22, 18), np.diag([-1.0, -1.0, 1.0, 1.0])


class Threshold(nn.Module):
    """Class 1 where it is bright."""

    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return torch.cat([self.at - x, x - self.at], dim=1)


def wmh_store(folder, cases):
    """Every scan has the blob; the label 1 and 2 in the boxes given."""
    for name, boxes in cases.items():
        scan, label = np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.uint8)
        scan[3:17, 3:19, 3:15], scan[3:5, 3:5, 3:5], scan[BLOB] = 200, 0, 1000
        for value, box in boxes.items():
            label[box] = value
        save_nifti(folder / "task" / name / "FLAIR.nii.gz", scan, LPS)
        save_nifti(folder / "task" / name / "wmh.nii.gz", label, LPS)
    found = collect(folder / "task", channels=["FLAIR"], label_name="wmh")
    write_store(found, folder / "store", Config(label_map={2: 0}))
    return folder / "store"


@pytest.fixture
def wmh_run(tmp_path, monkeypatch):
    """A finished run of --protocol wmh with one fold, tested on one case: lesion and other pathology share the blob."""
    store = wmh_store(tmp_path / "own", {"Utrecht_1": {1: PART, 2: OTHER}, "Utrecht_2": {1: BLOB}})
    meta = {
        "step": 5,
        "channels": ["FLAIR"],
        "preprocess": Config(label_map={2: 0}).as_dict(),
        "patch_size": [16] * 3,
        "build": {"num_classes": 2},
    }
    monkeypatch.setattr(checkpoint, "load_segmenter", lambda path, device="cpu": (Threshold().eval(), meta))
    folder = tmp_path / "run"
    (folder / "fold0" / "checkpoints").mkdir(parents=True)
    with zipfile.ZipFile(folder / "fold0" / "checkpoints" / "step-5.pt", "w") as archive:
        archive.writestr("data", "weights")
    (folder / "fold0" / "config.json").write_text(json.dumps({"train": ["Utrecht_2"], "test": ["Utrecht_1"]}))
    given = {"steps": 5, "data": str(store), "protocol": "wmh", "arch": "unet_xl", "decoder": "unet"}
    (folder / "config.json").write_text(json.dumps({"options": given | {"weights": "scratch"}}))
    return folder


def run(capsys, *words):
    """evaluate.py as the command line runs it: status, stdout, stderr."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: evaluate.main(evaluate.parse_options([*map(str, words), "--device", "cpu"])))
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_other_pathology_is_left_out_of_both_maps(wmh_run, capsys):
    status, out, err = run(capsys, wmh_run, "--metrics", "volume_difference")
    assert (status, err) == (0, "")
    row = json.loads((wmh_run / "fold0" / "results.json").read_text())["cases"][0]["classes"]["1"]
    assert (row["dice"], row["n_ref"], row["n_pred"], row["volume_difference"]) == (1, 32, 32, 0)
    assert "Voxels of label 2 in the label files are left out of both maps." in out
    assert run(capsys, wmh_run, "--wmh-label2", "background")[0] == 0
    row = json.loads((wmh_run / "fold0" / "results.json").read_text())["cases"][0]["classes"]["1"]
    assert (row["n_ref"], row["n_pred"]) == (32, 64)
    assert row["dice"] == pytest.approx(2 * 32 / (32 + 64))


def test_label_2_cannot_be_left_out_of_preprocessed_labels(wmh_run, capsys):
    status, _, err = run(capsys, wmh_run, "--space", "store")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "--wmh-label2 background" in err
    assert run(capsys, wmh_run, "--space", "store", "--wmh-label2", "background")[0] == 0
    config = json.loads((wmh_run / "config.json").read_text())
    del config["options"]["protocol"]
    (wmh_run / "config.json").write_text(json.dumps(config))
    status, _, err = run(capsys, wmh_run, "--wmh-label2", "ignore")
    assert status == 2
    assert "was not trained with --protocol wmh" in err


def test_the_challenge_cases_are_evaluated_apart_from_the_folds_own(wmh_run, tmp_path, capsys):
    run(capsys, wmh_run)
    own = (wmh_run / "fold0" / "results.json").read_bytes()
    cases = {"Utrecht_7": {1: BLOB}, "Amsterdam_GE1T5_150": {1: PART}, "Amsterdam_Philips_160": {1: PART, 2: OTHER}}
    store = wmh_store(tmp_path / "ood", cases)
    status, out, err = run(capsys, wmh_run, "--protocol", "wmh_ood", "--data", store)
    assert (status, "found 3 cases for --protocol wmh_ood, expected 110" in err) == (2, True)
    status, out, err = run(capsys, wmh_run, "--protocol", "wmh_ood", "--data", store, "--allow-incomplete", "--paper")
    assert (status, err) == (0, "")
    two_thirds = 2 * 32 / (32 + 64)
    summary = json.loads((wmh_run / "summary-wmh_ood.json").read_text())
    assert summary["dice"]["mean"] == pytest.approx((1 + two_thirds + 1) / 3)
    unseen, seen = summary["groups"].values()
    assert (unseen["n_cases"], unseen["dice"]["mean"]) == (2, pytest.approx((two_thirds + 1) / 2))
    assert (seen["n_cases"], seen["dice"]["mean"]) == (1, 1)
    assert "unseen scanners (GE1T5, Philips) | 2 | 83.33" in out
    assert "67.22 ± 1.59" in out  # U-Net XL from scratch, Table 4
    assert summary["paper"]["task"] == "wmh_ood"
    names = {path.name for path in (wmh_run / "fold0" / "predictions-wmh_ood").iterdir()}
    assert {f"{name}.nii.gz" for name in cases} <= names
    assert (wmh_run / "fold0" / "results.json").read_bytes() == own
    assert [path.name for path in (wmh_run / "fold0" / "predictions").glob("*.nii.gz")] == ["Utrecht_1.nii.gz"]
    assert len(json.loads((wmh_run / "fold0" / "results-wmh_ood.json").read_text())["cases"]) == 3


def test_other_cases_need_their_store(wmh_run, capsys):
    status, _, err = run(capsys, wmh_run, "--protocol", "wmh_ood")
    assert (status, "needs --data" in err) == (2, True)


# Whole ----------------------------------------------------------------------------------------------------------------


def test_a_protocol_trains_and_is_recorded(tmp_path, monkeypatch, capsys):
    ids = [f"Utrecht_{number}" for number in range(22)]
    store = index(tmp_path / "store", ids, label_map={"2": 0})
    (store.path / "cases").mkdir()
    for i, id in enumerate(ids):
        shape = SHAPES[i % 3]
        label = np.zeros(shape, np.uint8)
        label[5:9, 20:26, 10:14] = 1
        np.save(store.path / "cases" / f"{id}.npy", position_image(1, shape))
        np.save(store.path / "cases" / f"{id}_label.npy", label)
        flat = {"1": np.flatnonzero(label).tolist()}
        (store.path / "cases" / f"{id}.json").write_text(json.dumps({"foreground": flat, "label_counts": {"1": 96}}))
    entries = json.loads((store.path / "dataset.json").read_text())
    for entry in entries["cases"]:
        entry["shape"] = SHAPES[ids.index(entry["id"]) % 3]
    (store.path / "dataset.json").write_text(json.dumps(entries))
    words = [
        *("--data", store.path, "--protocol", "wmh", "--fold", 3, "--arch", "unet_tiny", "--patch-size", 32),
        *("--batch-size", 1, "--steps", 1, "--workers", 0, "--augment", "none", "--device", "cpu"),
        *("--out", tmp_path / "run"),
    ]
    command = ["train_finetune.py", *map(str, words)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        cli.run(train_finetune.main, train_finetune.parse_options())
    assert stop.value.code == 2
    refusal = capsys.readouterr().err.strip()
    assert refusal.endswith("--allow-incomplete takes what is there, for numbers of no paper")
    done = subprocess.run(
        [sys.executable, *command, "--allow-incomplete"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    fold = json.loads((tmp_path / "run" / "fold3" / "config.json").read_text())
    order = np.random.RandomState(1003).permutation(22)  # one chunk a repetition: fold 3 is of repetition 3
    assert fold["train"] == [ids[i] for i in sorted(order[:20])]
    assert sorted(fold["train"] + fold["test"]) == sorted(ids)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["options"]["protocol"] == "wmh"


def test_pretraining_leaves_out_the_cases_that_brats21_is_tested_on(tmp_path, folds_of):
    items = [
        Item(f"BraTS21/{name}/ses-1/FLAIR", (tmp_path / f"{name}.nii.gz",), subject=f"BraTS21/{name}") for name in BRATS
    ]
    folder = SourceFolder("brats21", tmp_path, items)
    leave_out_test([folder], "brats21")
    kept = {item.subject.removeprefix("BraTS21/") for item in folder.items}
    assert kept == set(BRATS) - set(folds_of(BRATS, "brats21")[0]["test"])
