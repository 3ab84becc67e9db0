"""Runs, ensembles and arrays in memory."""

# ruff: noqa: F811 (fixtures of another module)

from __future__ import annotations

import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from amaes import checkpoint, predict
from amaes.predict import predict_file
from amaes.preprocess.config import Config
from amaes.preprocess.nifti import to_stored_axes
from tests.conftest import make_volume
from tests.test_predict import SCAN, TURNS, Bands, meta, run, save_checkpoint, two_channels, weights  # noqa: F401 (fixtures)


def save_fold(run, fold, seed, **more):
    """A checkpoint of RUN/fold<k> with weights of its own."""
    path = save_checkpoint(run / f"fold{fold}" / "checkpoints", **more)
    content = checkpoint.read(path)
    noise = torch.Generator().manual_seed(seed)
    for tensor in content["model"].values():
        if tensor.is_floating_point():
            tensor += 0.1 * torch.randn(tensor.shape, generator=noise)
    torch.save(content, path)
    return path


def test_the_folds_of_a_run_average_their_probabilities(nifti_file, tmp_path, capsys):
    files = [save_fold(tmp_path / "run", fold, seed=fold) for fold in (0, 10, 2)]
    scan, out = nifti_file("scans/p1.nii.gz", make_volume(SCAN), np.diag([-1.0, -1.0, 1.0, 1.0])), tmp_path / "out"
    single = []
    for used, name in [(tmp_path / "run", "all"), *((file.parents[1], file.parents[1].name) for file in files)]:
        status, _, err = run(capsys, "--weights", used, "--images", scan, "--out", out / name, "--probabilities")
        assert status == 0
        image = nib.load(out / name / "probabilities" / "p1.nii.gz")
        assert np.array_equal(image.affine, nib.load(scan).affine)
        single.append(image.get_fdata())
        order = [0, 2, 10] if name == "all" else [int(name[4:])]
        assert err == f"weights: {', '.join(str(tmp_path / f'run/fold{k}/checkpoints/step-3.pt') for k in order)}\n"
    mean, *single = single  # 1 mm: nothing is resampled
    labels = nib.load(out / "all" / "p1.nii.gz").get_fdata()
    inside = make_volume(SCAN) > 0
    assert mean.shape == (*SCAN, 3)
    assert np.allclose(mean, np.mean(single, axis=0), atol=1e-6)
    assert np.array_equal(mean.argmax(3)[inside], labels[inside])
    assert not np.array_equal(labels, nib.load(out / "fold0" / "p1.nii.gz").get_fdata())


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"channels": ("T1",)}, "channels ['T1'], "),
        ({"label_map": {4: 1}}, "label_map {'4': 1}, "),
        ({"labels": {"0": "background", "1": "one", "2": "other"}}, "labels {'0': 'background', '1': 'one', '2': 'oth"),
        ({"patch_size": [16, 32, 32]}, "patch_size [16, 32, 32], "),
        ({"preprocess": Config(spacing=(2.0, 1.0, 1.0)).as_dict()}, "spacing [2.0, 1.0, 1.0], "),
    ],
)
def test_networks_that_differ_are_no_ensemble(weights, nifti_file, tmp_path, capsys, more, named):
    other = save_checkpoint(tmp_path, **more)
    both = ["--weights", weights, other]
    status, out, err = run(capsys, *both, "--images", nifti_file("a.nii.gz"), "--out", tmp_path / "out")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert f"{other}: has {named}" in err
    assert f"{weights} has " in err


def test_the_best_checkpoint_is_one_of_a_run(nifti_file, tmp_path, capsys):
    file = save_fold(tmp_path / "run", 0, seed=1)
    best = shutil.copy(file, file.with_name("best.pt"))
    options = ["--images", nifti_file("a.nii.gz"), "--out", tmp_path / "out", "--checkpoint", "best"]
    assert run(capsys, "--weights", tmp_path / "run", *options)[::2] == (0, f"weights: {best}\n")
    given = shutil.copy(file, tmp_path / "given.pt")  # an exported file has no step in its name
    both = f"weights: {file}, {given}\n"
    assert run(capsys, "--weights", tmp_path / "run", given, *options[:-2])[::2] == (0, both)
    status, _, err = run(capsys, "--weights", tmp_path / "run", tmp_path / "run" / "fold0", *options)
    assert (status, err.split(": error: ")[1]) == (2, f"--weights: {best} is given twice, and would count twice\n")
    status, _, err = run(capsys, "--weights", file, *options)
    assert (status, len(err.splitlines())) == (2, 1)
    assert "--checkpoint best: --weights names files" in err


@pytest.mark.parametrize("turn", [0, 13, 40])
def test_an_array_in_memory_is_segmented_as_its_file_is(two_channels, nifti_file, turn):
    model, meta = checkpoint.load_segmenter(two_channels)
    stored = to_stored_axes(np.stack([make_volume(SCAN, seed) for seed in (1, 2)], axis=3), TURNS[turn])
    affine = np.diag([1.5, 1.25, 2.0, 1.0]) @ np.linalg.inv(
        nib.orientations.inv_ornt_aff(TURNS[turn], stored.shape[:3])
    )
    labels = predict.predict_array(model, np.moveaxis(stored, 3, 0), affine, meta)
    expected, _ = predict_file(model, meta, [nifti_file("a.nii.gz", stored, affine)])
    assert np.array_equal(labels, expected)
    assert labels.shape == stored.shape[:3]
    assert len(np.unique(labels)) > 1


@pytest.mark.parametrize(
    ("array", "affine", "message"),
    [
        (np.ones(SCAN, np.float32), np.eye(4), "`array` is float32"),
        (np.ones((2, *SCAN), np.float32), np.eye(4), "channels image"),
        (np.ones((1, *SCAN), complex), np.eye(4), "complex128"),
        (np.ones((1, *SCAN), np.float32), np.zeros((4, 4)), "array: expected"),
        (np.ones((1, *SCAN), np.float32), np.eye(3), "an affine of 4 x 4 numbers"),
        (np.zeros((1, *SCAN), np.float32), np.eye(4), "array: "),
    ],
)
def test_an_array_that_is_no_scan_is_refused(array, affine, message):
    with pytest.raises(ValueError, match=message):
        predict.predict_array(Bands(), array, affine, meta())
