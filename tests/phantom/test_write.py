"""Synthetic heads as files: whole, the same bytes again, and read by preprocessing."""

import json

import nibabel as nib
import numpy as np
import pytest

from amaes.data.store import Store
from amaes.phantom import LABELS, SCANNERS, make_demo_data, phantom, write, write_phantoms
from amaes.phantom.__main__ import main
from amaes.preprocess.config import Config
from amaes.preprocess.find_cases import collect
from amaes.preprocess.write_store import write_store

SMALL = 40.0  # field of view of quick heads, mm


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("heads") / "set", 6, 5, sequences=["FLAIR"], labels=True, fov=SMALL)


def test_files_pair_up_by_name(written):
    images, labels = (sorted(path.name for path in (written / kind).iterdir()) for kind in ("images", "labels"))
    assert images == labels == [f"sub-{subject:04d}_FLAIR.nii.gz" for subject in range(1, 7)]


def test_files_hold_what_was_drawn(written):
    for subject in range(1, 7):
        scanner = SCANNERS[subject % len(SCANNERS)]
        drawn = phantom(5, subject, "FLAIR", scanner, fov=SMALL)
        image, label = (nib.load(written / kind / f"sub-{subject:04d}_FLAIR.nii.gz") for kind in ("images", "labels"))
        assert image.get_data_dtype() == scanner.dtype
        assert label.get_data_dtype() == np.uint8
        assert (image.header["sform_code"] > 0, image.header["qform_code"] > 0) == (
            scanner.form != "qform",
            scanner.form != "sform",
        )
        np.testing.assert_allclose(
            image.get_fdata(), drawn.image, atol=0.51 * scanner.slope * (scanner.dtype != "float32")
        )
        np.testing.assert_array_equal(np.asarray(label.dataobj), drawn.label)
        for file in (image, label):
            np.testing.assert_allclose(file.affine, drawn.affine, atol=1e-3)
            assert file.header.get_xyzt_units()[0] == "mm"


def test_files_are_the_same_bytes_again(written, tmp_path):
    again = write_phantoms(tmp_path / "again", 6, 5, sequences=["FLAIR"], labels=True, fov=SMALL)
    paths = sorted(path.relative_to(written) for path in written.rglob("*") if path.is_file())
    assert len(paths) == 13
    assert all((written / path).read_bytes() == (again / path).read_bytes() for path in paths)


def test_a_written_folder_is_reused_and_anything_else_refused(written, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    write_phantoms(written, 6, 5, sequences=["FLAIR"], labels=True, fov=SMALL)
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before
    with pytest.raises(ValueError, match="not this set of phantoms"):
        write_phantoms(written, 6, 6, sequences=["FLAIR"], labels=True, fov=SMALL)
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="not empty"):
        write_phantoms(tmp_path, 1, fov=SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "years"


def test_a_failure_leaves_nothing(monkeypatch, tmp_path):
    real, calls = write._nifti, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(write, "_nifti", full)
    with pytest.raises(OSError, match="No space"):
        write_phantoms(tmp_path / "deep" / "set", 1, fov=SMALL)
    assert list((tmp_path / "deep").iterdir()) == []


def test_command_line_writes_the_same(monkeypatch, capsys, tmp_path):
    command = f"phantom --out {tmp_path / 'a'} --subjects 1 --sequences T1w FLAIR --fov 40 --first 9 --seed 1"
    monkeypatch.setattr("sys.argv", command.split())
    assert main() == 0
    assert "2 scans of 1 heads" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "a" / "images").iterdir()) == [
        "sub-0009_FLAIR.nii.gz",
        "sub-0009_T1w.nii.gz",
    ]
    assert not (tmp_path / "a" / "labels").exists()
    assert json.loads((tmp_path / "a" / "dataset.json").read_text())["phantoms"]["first"] == 9


def test_preprocessing_takes_them_all(written, tmp_path):
    result = write_store(collect(written / "images", written / "labels"), tmp_path / "store", Config())
    assert result.count("ok") == 6
    assert not any(outcome.row["warnings"] for outcome in result.outcomes)
    store = Store(tmp_path / "store")
    assert store.labels == LABELS
    assert [case.subject for case in store.cases] == [f"sub-{subject:04d}" for subject in range(1, 7)]
    for case in store.cases:
        assert max(case.shape) < 1.1 * SMALL
        assert store.image(case.id).max() == 1
        assert set(np.unique(store.label(case.id))) == set(LABELS)


def test_demo_data_is_a_store_made_once(monkeypatch, tmp_path):
    monkeypatch.setattr(write, "DEMO", {"subjects": 2, "fov": SMALL})
    path = make_demo_data(tmp_path / "run" / "demo")
    store = Store(path)
    assert len(store.cases) == 6
    assert {case.sequence for case in store.cases} == {"T1", "T2", "FLAIR"}
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*.npy")}
    assert make_demo_data(tmp_path / "run" / "demo") == path
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*.npy")} == before
