"""evaluate.py on a store whose scores are known by hand."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

import evaluate
from amaes import checkpoint, cli
from amaes.data.store import Store
from amaes.files import locked
from amaes.preprocess.config import Config
from amaes.preprocess.find_cases import collect
from amaes.preprocess.write_store import write_store
from tests.conftest import save_nifti
from tests.test_predict import save_checkpoint

SHAPE, LPS = (20, 22, 18), np.diag([-1.0, -1.0, 1.0, 1.0])
BLOB = (slice(6, 10),) * 3  # 64 voxels, bright
BODY = (slice(3, 17), slice(3, 19), slice(3, 15))  # 2688 voxels with the blob, 2680 without the corner
CORNER = (slice(3, 5),) * 3  # background, so that the crop has some
MOVED = (slice(7, 11), slice(6, 10), slice(6, 10))  # 48 voxels in common with the blob


class Threshold(nn.Module):
    """Class 1 above an intensity; the blob has 1, the body 0.2."""

    def __init__(self, at):
        super().__init__()
        self.at = nn.Parameter(torch.tensor(at))

    def forward(self, x):
        return torch.cat([self.at - x, x - self.at], dim=1)


def write_checkpoint(path, text):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", text)


def scan(level=1000.0):
    volume = np.zeros(SHAPE, np.float32)
    volume[BODY], volume[CORNER], volume[BLOB] = 200, 0, level
    return volume


@pytest.fixture
def store(tmp_path):
    """Cases a to d; the label of a is the blob, of b the blob moved by a voxel, c has none, d has the blob."""
    for name, box in {"a": BLOB, "b": MOVED, "c": None, "d": BLOB}.items():
        label = np.zeros(SHAPE, np.uint8)
        if box is not None:
            label[box] = 4
        save_nifti(tmp_path / "images" / f"{name}.nii.gz", scan(), LPS)
        save_nifti(tmp_path / "labels" / f"{name}.nii.gz", label, LPS)
    write_store(collect(tmp_path / "images", tmp_path / "labels"), tmp_path / "store", Config(label_map={4: 1}))
    return tmp_path / "store"


@pytest.fixture
def make_run(tmp_path, store, monkeypatch):
    """Function: a finished run of threshold networks, `make_run("first", 0.5, [["a", "b"], ["b", "c"]])`."""
    thresholds, calls = {}, []

    def load(path, device="cpu"):
        run = Path(path).parents[2].name
        model = Threshold(thresholds[run])
        model.register_forward_hook(lambda *_: calls.append(run))
        config = Config(label_map={4: 1}).as_dict()
        build = {"num_classes": make.classes.get(run, 2)}
        return model.eval(), {
            "step": 5,
            "channels": ["image"],
            "preprocess": config,
            "patch_size": [16] * 3,
            "build": build,
        }

    monkeypatch.setattr(checkpoint, "load_segmenter", load)

    def make(name, threshold, tests, steps=5):
        thresholds[name] = threshold
        run = tmp_path / name
        run.mkdir()
        for k, test in enumerate(tests):
            folder = run / f"fold{k}"
            (folder / "checkpoints").mkdir(parents=True)
            write_checkpoint(folder / "checkpoints" / "step-5.pt", f"{name} {threshold}")
            (folder / "config.json").write_text(json.dumps({"train": sorted({*"abcd"} - {*test}), "test": test}))
        (run / "config.json").write_text(json.dumps({"options": {"steps": steps, "data": str(store)}}))
        return run

    make.calls, make.thresholds, make.classes = calls, thresholds, {}
    return make


def run(capsys, *options):
    """main() as the command line runs it: status, stdout, stderr."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: evaluate.main(evaluate.parse_options([*map(str, options), "--device", "cpu"])))
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_scores_by_hand(make_run, capsys):
    folder = make_run("first", 0.5, [["a", "b"], ["b", "c"]])
    status, out, err = run(capsys, folder)
    assert (status, err) == (0, "")
    results = json.loads((folder / "fold0" / "results.json").read_text())
    a, b = (case["classes"]["1"] for case in results["cases"])
    assert a == {
        "n_ref": 64,
        "n_pred": 64,
        "status": "ok",
        "dice": 1,
        "hd95": 0,
        "surface_dice": 1,
        "volume_difference": 0,
    }
    assert b["dice"] == 0.75
    assert b["hd95"] == 1.0
    (_, c) = (case["classes"]["1"] for case in json.loads((folder / "fold1" / "results.json").read_text())["cases"])
    assert (c["status"], c["dice"], c["n_ref"]) == ("false_positive", 0, 0)
    assert c["hd95"] == pytest.approx(math.sqrt(20**2 + 22**2 + 18**2))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["dice"]["folds"] == [0.875, 0.375]
    assert summary["dice"]["mean"] == 0.625
    assert summary["dice"]["sd"] == pytest.approx(math.sqrt(2) * 0.25)  # n - 1
    assert summary["classes"]["1"]["n_false_positive"] == 1
    assert summary["classes"]["1"]["dice"]["n_valid"] == 4
    assert summary["checkpoints"][0]["sha256"]
    assert "Dice" in out
    assert "| mean ± sd |" in out
    assert "62.50 ± 35.36" in out
    assert (folder / "summary.md").read_text() in out


def test_predictions_are_on_the_scans_grid_with_its_label_values(make_run, tmp_path, capsys):
    folder = make_run("first", 0.5, [["a"]])
    assert run(capsys, folder)[0] == 0
    prediction = nib.load(folder / "fold0" / "predictions" / "a.nii.gz")
    assert np.array_equal(prediction.get_fdata(), nib.load(tmp_path / "labels" / "a.nii.gz").get_fdata())
    assert np.array_equal(prediction.affine, LPS)


def test_predictions_are_reused_until_weights_or_settings_change(make_run, capsys):
    folder = make_run("first", 0.5, [["a", "b"]])
    calls = make_run.calls
    run(capsys, folder)
    first = len(calls)
    assert first > 0
    assert run(capsys, folder, "--metrics", "lesion_f1")[0] == 0  # measured again, not predicted
    assert len(calls) == first
    (folder / "fold0" / "predictions" / "b.nii.gz").unlink()
    run(capsys, folder)
    assert len(calls) == first * 1.5
    run(capsys, folder, "--overlap", 0.25)
    assert len(calls) > first * 1.5
    before = len(calls)
    make_run.thresholds["first"] = 0.1
    write_checkpoint(folder / "fold0" / "checkpoints" / "step-5.pt", "retrained")
    _, out, _ = run(capsys, folder, "--overlap", 0.25)
    assert len(calls) > before
    assert "4.66" in out  # 2 * 64 / (2680 + 64)


@pytest.mark.parametrize("space", ["native", "store"])
def test_voxels_that_preprocessing_left_out_are_not_scored(make_run, store, capsys, space):
    label = np.zeros(SHAPE, np.uint8)
    label[BLOB] = 1
    label[3:6] = 2  # of the bright voxels, too, which the network calls class 1
    save_nifti(store.parent / "labels" / "a.nii.gz", label, LPS)
    config = Config(label_map={2: 255})
    only_a = collect(store.parent / "images" / "a.nii.gz", store.parent / "labels")
    write_store(only_a, store, config, overwrite=True, prune=True)
    assert Store(store).labels == {0: "background", 1: "label_1"}
    run_folder = make_run("r", 0.1, [["a"]])  # the whole body
    status, out, _ = run(capsys, run_folder, "--space", space, "--metrics", "dice")
    assert "Voxels of label 2 in the label files are left out of both maps." in out
    path = next((run_folder / "fold0").glob("results*.json"))
    row = json.loads(path.read_text())["cases"][0]["classes"]["1"]
    left = BODY[0].stop - 6, *(side.stop - side.start for side in BODY[1:])
    assert (status, row["n_ref"], row["n_pred"]) == (0, 64, np.prod(left))


def test_regions_are_scored_in_place_of_classes(make_run, store, capsys):
    label = np.zeros(SHAPE, np.uint8)
    label[BLOB], label[BODY[0], BODY[1], 12:15] = 1, 2
    save_nifti(store.parent / "labels" / "a.nii.gz", label, LPS)
    only_a = collect(store.parent / "images" / "a.nii.gz", store.parent / "labels")
    only_a = replace(only_a, regions={"tumour": (1, 2), "core": (1,)})
    write_store(only_a, store, Config(), overwrite=True, prune=True)
    make_run.classes["r"] = 3
    run_folder = make_run("r", 0.5, [["a"]])  # class 1 where it is bright
    status, out, _ = run(capsys, run_folder, "--metrics", "dice")
    classes = json.loads((run_folder / "fold0/results.json").read_text())["cases"][0]["classes"]
    n_tumour = 64 + 14 * 16 * 3
    assert (status, list(classes)) == (0, ["tumour", "core", "all"])
    assert (classes["core"]["dice"], classes["tumour"]["n_ref"]) == (1.0, n_tumour)
    assert classes["tumour"]["dice"] == pytest.approx(2 * 64 / (64 + n_tumour))
    assert "| tumour (1 + 2) |" in out


def remake(store, level):
    """Another image of one case, label files as they were."""
    image = save_nifti(store.parent / "images" / "b.nii.gz", scan(level), LPS)
    write_store(collect(image, store.parent / "labels"), store, Config(label_map={4: 1}), overwrite=True)


def test_predictions_of_changed_images_are_made_again(make_run, store, capsys):
    folder = make_run("first", 0.5, [["a", "b"]])
    calls = make_run.calls
    run(capsys, folder)
    first = len(calls)
    remake(store, 300)
    run(capsys, folder)
    assert len(calls) == first * 1.5  # b alone
    b = nib.load(folder / "fold0" / "predictions" / "b.nii.gz").get_fdata()
    assert np.count_nonzero(b) == 2680 + 64 - 64  # 200 / 300 is above the threshold: the body
    run(capsys, folder)
    assert len(calls) == first * 1.5


def test_a_damaged_prediction_is_made_again(make_run, capsys):
    folder = make_run("first", 0.5, [["a", "b"]])
    run(capsys, folder)
    path = folder / "fold0" / "predictions" / "b.nii.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert run(capsys, folder)[0] == 0
    assert path.read_bytes() == whole


def test_one_process_evaluates_a_fold(make_run, capsys):
    folder = make_run("first", 0.5, [["a"]])
    with locked(folder / "fold0", ""):
        status, out, err = run(capsys, folder, "--overlap", 0.25)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "another process is evaluating" in err
    assert run(capsys, folder)[0] == 0


def test_a_damaged_checkpoint_is_an_unfinished_fold(make_run, capsys):
    folder = make_run("first", 0.5, [["a"], ["b"]])
    path = folder / "fold1" / "checkpoints" / "step-5.pt"
    path.write_bytes(path.read_bytes().replace(b"first", b"FIRST"))  # its checksum tells
    status, out, err = run(capsys, folder)
    assert status == 1
    assert "fold1: step-5.pt is damaged, left out" in err
    assert "100.00" in out


def test_scans_without_orientation_are_read_as_preprocessing_did(make_run, store, tmp_path, capsys):
    folder = make_run("first", 0.5, [["a", "b"]])
    for part in ("images", "labels"):
        for path in (tmp_path / part).iterdir():
            data = np.asarray(nib.load(path).dataobj)
            save_nifti(path, data, LPS, qform=0, patch={280: bytes(16)})  # srow_x = 0
    config = Config(label_map={4: 1}, assume_ras=True)
    write_store(collect(tmp_path / "images", tmp_path / "labels"), store, config, overwrite=True)
    status, _, err = run(capsys, folder)
    assert (status, err) == (0, "")
    assert json.loads((folder / "summary.json").read_text())["dice"]["mean"] == 0.875


def test_runs_of_other_classes_are_refused_before_any_work(make_run, store, capsys):
    first, second = make_run("first", 0.5, [["a"]]), make_run("second", 0.5, [["a"]])
    index = json.loads((store / "dataset.json").read_text())
    index["labels"]["2"] = "other"
    (store / "dataset.json").write_text(json.dumps(index))
    make_run.classes["second"] = 3
    status, out, err = run(capsys, first, second)
    assert (status, out, make_run.calls, len(err.splitlines())) == (2, "", [], 1)
    assert "has the classes 1, 2, " in err
    assert "has 1: " in err


def test_a_number_without_a_label_is_no_class(make_run, store, capsys):
    folder = make_run("first", 0.5, [["a"]])
    index = json.loads((store / "dataset.json").read_text())
    index["labels"] = {"0": "background", "1": "one", "3": "three"}
    (store / "dataset.json").write_text(json.dumps(index))
    make_run.classes["first"] = 4
    assert run(capsys, folder, "--empty", "one", "--space", "store")[0] == 0
    assert list(json.loads((folder / "summary-store.json").read_text())["classes"]) == ["1", "3", "all"]


def test_a_store_that_moved_is_to_be_given(make_run, store, tmp_path, capsys, monkeypatch):
    folder = make_run("first", 0.5, [["a"]])
    (folder / "config.json").write_text(json.dumps({"options": {"steps": 5, "data": "store"}}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    status, _, err = run(capsys, folder)
    assert status == 2
    assert "--data STORE gives it" in err
    assert run(capsys, folder, "--data", store)[0] == 0


def test_two_runs_are_compared_case_by_case(make_run, tmp_path, capsys):
    first = make_run("first", 0.5, [["a", "b"], ["b", "c"]])
    second = make_run("second", 0.1, [["a", "c"], ["b", "d"]])
    status, out, _ = run(capsys, first, second, "--json", tmp_path / "out" / "all.json")
    assert status == 0
    content = json.loads((tmp_path / "out" / "all.json").read_text())
    row = content["comparisons"][0]["dice"]["mean"]
    low = 2 * 64 / (2680 + 64)
    assert row["n"] == 3  # d was tested by the second alone
    assert row["first"] == pytest.approx((1 + 0.75 + 0) / 3)
    assert row["difference"] == pytest.approx((low - 1 + low - 0.75 + 0) / 3)
    assert row["p"] == pytest.approx(0.5)  # two differences, both negative: 2 / 2^2
    assert [len(entry["folds"]) for entry in content["runs"]] == [2, 2]
    assert f"## Dice % of {second} against {first}" in out


def test_a_run_against_itself_does_not_differ(make_run, capsys):
    folder = make_run("first", 0.5, [["a", "b"]])
    _, out, _ = run(capsys, folder, folder)
    assert "| +0.00 | 1 |" in out


def test_store_space_is_labelled_as_such(make_run, store, capsys):
    folder = make_run("first", 0.5, [["a", "b"]])
    for path in (store.parent / "labels").iterdir():
        path.unlink()
    status, _, err = run(capsys, folder)
    assert status == 2
    assert len(err.splitlines()) == 1
    assert "a.nii.gz" in err
    assert "--space store" in err
    status, out, _ = run(capsys, folder, "--space", "store")
    assert status == 0
    assert "not comparable" in out
    assert json.loads((folder / "summary-store.json").read_text())["dice"]["mean"] == 0.875


@pytest.mark.parametrize(("missing", "mean", "n_cases"), [("error", 1.0, 1), ("zero", 0.5, 2)])
def test_a_case_that_fails_is_listed(make_run, store, capsys, missing, mean, n_cases):
    folder = make_run("first", 0.5, [["a", "b"]])
    (store / "cases" / "b.npy").write_bytes(b"")
    status, out, err = run(capsys, folder, "--missing", missing)
    assert status == 1
    assert "fold0: b: " in err
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["dice"]["mean"] == mean
    assert summary["folds"][0]["n_cases"] == n_cases
    assert summary["folds"][0]["n_failed"] == 1
    assert "Dice" in out


def test_a_fold_without_a_single_score_is_shown_as_such(make_run, store, capsys):
    folder = make_run("first", 0.5, [["a"], ["b"]])
    (store / "cases" / "b.npy").write_bytes(b"")
    only = make_run("only", 0.5, [["b"]])
    _, out, _ = run(capsys, only)
    assert "| fold | cases | failed | pooled | **Dice %** |" in out
    assert "| 0 | 0 | 1 | – | – |" in out
    status, out, _ = run(capsys, folder, folder)
    assert status == 1
    assert "| 1 | 0 | 1 | – | – | – |" in out
    assert "**100.00**" in out


def test_label_on_another_grid_is_an_error_of_its_case(make_run, tmp_path, capsys):
    folder = make_run("first", 0.5, [["a", "b"]])
    elsewhere = LPS.copy()
    elsewhere[0, 3] = 5  # mm
    save_nifti(tmp_path / "labels" / "b.nii.gz", np.zeros(SHAPE, np.uint8), elsewhere)
    status, _, err = run(capsys, folder)
    assert status == 1
    assert "5 mm" in err


def test_predictions_are_resampled_onto_labels_that_preprocessing_resampled(make_run, store, tmp_path, capsys):
    folder = make_run("first", 0.5, [["a", "b"]])
    half = np.kron(np.asarray(nib.load(tmp_path / "labels" / "a.nii.gz").dataobj), np.ones((2, 2, 2), np.uint8))
    affine = LPS @ np.diag([0.5, 0.5, 0.5, 1])
    affine[:3, 3] = LPS[:3, :3] @ np.full(3, -0.25)  # the voxels' corners in common
    save_nifti(tmp_path / "labels" / "a.nii.gz", half, affine)
    config = Config(label_map={4: 1}, on_geometry_mismatch="resample")
    write_store(collect(tmp_path / "images", tmp_path / "labels"), store, config, overwrite=True)
    for _ in range(2):  # predicted, and read again
        status, _, err = run(capsys, folder)
        assert (status, err) == (0, "")
        a, b = json.loads((folder / "fold0" / "results.json").read_text())["cases"]
        assert (a["classes"]["1"]["n_ref"], a["classes"]["1"]["dice"]) == (8 * 64, 1)
        assert "resampled onto the grid of a.nii.gz" in a["warnings"][-1]
        assert (b["classes"]["1"]["dice"], b["warnings"]) == (0.75, [])
    assert nib.load(folder / "fold0" / "predictions" / "a.nii.gz").shape == SHAPE  # stays on the scan's grid


def test_a_real_network_as_a_program(store, tmp_path):
    folder = tmp_path / "run"
    path = save_checkpoint(folder / "fold0" / "checkpoints", label_map={4: 1})
    assert path.name == "step-3.pt"
    (folder / "fold0" / "config.json").write_text(json.dumps({"train": ["d"], "test": ["a", "b"]}))
    (folder / "config.json").write_text(json.dumps({"options": {"steps": 3, "data": str(store)}}))
    command = [sys.executable, Path(evaluate.__file__), folder, "--device", "cpu", "--metrics", "dice", "lesion_f1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, env=environment)
    assert "Dice" in done.stdout
    assert "lesion F1, %" in done.stdout


@pytest.mark.parametrize(
    "start",
    ["runpy.run_path('evaluate.py', run_name='__main__')", "runpy.run_module('amaes.predict', run_name='__main__')"],
)
def test_help_needs_no_torch(start):
    code = f"""
import runpy, sys
sys.argv[1:] = ["--help"]
try:
    {start}
except SystemExit as stop:
    assert not stop.code
    assert "torch" not in sys.modules
"""
    folder = Path(evaluate.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert "--tta" in done.stdout
