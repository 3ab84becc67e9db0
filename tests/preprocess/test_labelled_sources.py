"""Volumes of a release with their labels, for the tasks of the paper."""

import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from amaes.data.store import Store
from amaes.paper.protocols import PROTOCOLS, check_store, named_cases
from amaes.preprocess.__main__ import main
from amaes.preprocess.sources import find_source, take_labels, take_sequences
from tests.conftest import make_volume, save_nifti
from tests.preprocess.test_sources import refused

ROOT = Path(__file__).resolve().parent.parent.parent
SIZE = (16, 18, 17)


def save_case(folder, images, label, values):
    """Scans of one grid and a label that has `values`, one voxel each, among background."""
    for k, name in enumerate(images):
        save_nifti(folder / name, make_volume(SIZE, seed=k))
    data = np.zeros(SIZE, np.uint8)
    for k, value in enumerate(values):
        data[4 + k, 5, 6] = value
    save_nifti(folder / label, data)


@pytest.fixture
def releases(tmp_path):
    """Of every task two cases, as they are distributed."""
    for name in ("BraTS2021_00000", "BraTS2021_00002"):
        images = [f"{name}/{name}_{sequence}.nii.gz" for sequence in ("flair", "t1", "t1ce", "t2")]
        save_case(tmp_path / "BRATS21", images, f"{name}/{name}_seg.nii.gz", [1, 2, 4])
    for number in (1, 2):
        visit = f"sub-strokecase000{number}/ses-0001"
        stem = visit.replace("/", "_")
        images = [f"rawdata/{visit}/{stem}_{sequence}.nii.gz" for sequence in ("dwi", "adc")]
        save_case(tmp_path / "ISLES/ISLES-2022", images, f"derivatives/{visit}/{stem}_msk.nii.gz", [1])
        save_nifti(tmp_path / f"ISLES/ISLES-2022/rawdata/{visit}/{stem}_flair.nii.gz", make_volume((10, 11, 12)))
    for case in (
        "training/Utrecht/0",
        "training/Amsterdam/GE3T/100",
        "test/Amsterdam/Philips_VU .PETMR_01./160",
        "test/Singapore/50",
    ):
        save_case(tmp_path / "WMH" / case, ["pre/FLAIR.nii.gz", "pre/T1.nii.gz"], "wmh.nii.gz", [1, 2])
    return tmp_path


def documented():
    """The command lines of docs/reproduce.md that write the stores of the tasks."""
    text = (ROOT / "docs" / "reproduce.md").read_text()
    return re.findall(r"^python -m amaes\.preprocess (.*--with-labels.*)$", text, re.MULTILINE)


def test_the_documented_commands_write_the_stores_of_the_protocols(releases, monkeypatch):
    monkeypatch.chdir(releases)
    for name in ("BRATS21", "ISLES", "WMH"):
        monkeypatch.setenv(name, str(releases / name))
    for line in documented():
        assert main([*shlex.split(os.path.expandvars(line)), "--workers", "0"]) == 0
    expected = {
        "brats21": ("brats21", ["BraTS2021_00000", "BraTS2021_00002"], [0, 1, 2, 3]),
        "isles22": ("isles22", ["sub-strokecase0001", "sub-strokecase0002"], [0, 1]),
        "wmh": ("wmh", ["ge3t_100", "utrecht_000"], [0, 1]),
        "wmh_ood": ("wmh", ["philips_160", "singapore_050"], [0, 1]),
    }
    assert sorted(path.name for path in Path("stores").iterdir()) == sorted(expected)
    for folder, (protocol, names, values) in expected.items():
        store = Store(f"stores/{folder}")
        check_store(store, protocol)
        ids = named_cases(store, protocol)
        assert list(ids) == names
        assert len(store.cases) == len(names)
        assert np.unique(store.label(ids[names[0]])).tolist() == values
        assert Path(store.properties(ids[names[0]])["label_file"]).is_relative_to(releases)


def test_labels_that_were_taken_are_not_left_out(releases):
    folder = find_source("brats21", releases / "BRATS21")
    assert len(folder.excluded["label"]) == 2
    assert take_labels([folder]) == {4: 3}
    assert folder.excluded["label"] == []
    assert {item.label.name for item in folder.items} == {"BraTS2021_00000_seg.nii.gz", "BraTS2021_00002_seg.nii.gz"}


def test_older_layouts_of_wmh(tmp_path):
    for name in (
        "old/Amsterdam/Train_GE3T/12/pre/FLAIR.nii.gz",
        "old/Amsterdam/Train_GE3T/12/pre/wmh.nii.gz",
        "training/Utrecht/13/pre/FLAIR.nii.gz",
        "training/Utrecht/13/pre/wmh.nii.gz",
        "loose/Singapore/14/pre/FLAIR.nii.gz",
        "loose/Singapore/14/wmh.nii.gz",
        "additional_annotations/observer_o3/training/Utrecht/13/result.nii.gz",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    folder = find_source("wmh", tmp_path)
    take_labels([folder])
    labels = {item.subject: item.label.relative_to(tmp_path).as_posix() for item in folder.items}
    assert labels == {
        "WMH/Amsterdam_GE3T_12": "old/Amsterdam/Train_GE3T/12/pre/wmh.nii.gz",
        "WMH/Utrecht_13": "training/Utrecht/13/pre/wmh.nii.gz",
        "WMH/Singapore_14": "loose/Singapore/14/wmh.nii.gz",
    }
    assert folder.excluded["label"] == ["additional_annotations/observer_o3/training/Utrecht/13/result.nii.gz"]


def test_a_case_without_label_is_rejected_and_named(releases, tmp_path, capsys):
    (releases / "BRATS21/BraTS2021_00002/BraTS2021_00002_seg.nii.gz").unlink()
    options = ["--source", f"brats21={releases}/BRATS21", "--sequence", "FLAIR", "--with-labels", "--workers", "0"]
    assert main([*options, "--out", str(tmp_path / "s"), "--dry-run"]) == 0
    assert "note: brats21: 1 volumes have a label, 1 have none and will be rejected" in capsys.readouterr().out
    assert main([*options, "--out", str(tmp_path / "s")]) == 1
    out = capsys.readouterr().out
    assert "2 inputs: 1 ok, 0 skipped, 1 rejected, 0 failed" in out
    assert "1 missing_label: BraTS21/BraTS2021_00002/ses-1/FLAIR" in out
    assert "expected the label of BraTS21/BraTS2021_00002 below" in out


def test_two_labels_of_one_case_are_refused(releases):
    (releases / "WMH/training/Utrecht/0/pre/wmh.nii.gz").touch()
    with pytest.raises(ValueError, match="are both the label of WMH/Utrecht_0"):
        take_labels([find_source("wmh", releases / "WMH")])


def test_a_case_may_lack_other_sequences(releases):
    (releases / "BRATS21/BraTS2021_00000/BraTS2021_00000_t1ce.nii.gz").unlink()
    (releases / "BRATS21/BraTS2021_00002/BraTS2021_00002_flair.nii.gz").unlink()
    folder = find_source("brats21", releases / "BRATS21")
    take_sequences([folder], ["FLAIR"])
    assert [item.subject for item in folder.items] == ["BraTS21/BraTS2021_00000"]
    assert len(folder.excluded["sequence"]) == 5


def test_the_dry_run_of_a_task_does_not_ask_to_hold_out_its_test_cases(releases, tmp_path, capsys):
    options = ["--source", f"brats21={releases}/BRATS21", "--out", str(tmp_path / "s"), "--dry-run"]
    assert main(options) == 0
    assert "THE TEST CASES ARE AMONG THESE" in capsys.readouterr().out
    assert main([*options, "--with-labels", "--sequence", "FLAIR"]) == 0
    out = capsys.readouterr().out
    assert "THE TEST CASES" not in out
    assert "6 volumes or files left out, sequence (BraTS2021_00000/BraTS2021_00000_t1.nii.gz" in out
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--source", "msseg1=.", "--with-labels"], "expected one of brats21, isles22, wmh, found msseg1"),
        (["--source", "wmh=.", "--source", "isles22=.", "--with-labels"], "found wmh and isles22"),
        (["--source", "wmh=.", "--with-labels", "--label-map", "2:1"], "--label-map: goes with --images"),
        (["--source", "wmh=.", "--sequence", "flair2"], "invalid choice: 'flair2'"),
        (["--images", ".", "--sequence", "FLAIR"], "--sequence FLAIR: goes with --source"),
        (["--images", ".", "--with-labels"], "--with-labels: goes with --source"),
    ],
)
def test_combinations_are_refused(options, said, tmp_path, capsys):
    assert said in refused(capsys, *options, "--out", tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("key", "text"), [("brats21", "BraTS2021_000011"), ("isles22", "sub-strokecase00011")])
def test_a_longer_number_is_not_cut_to_the_name_of_another_case(key, text):
    assert PROTOCOLS[key].name_in([text[:-1]]) == text[:-1]
    assert PROTOCOLS[key].name_in([text]) is None
