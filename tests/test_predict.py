"""From NIfTI files to NIfTI files with nothing but a checkpoint."""

from __future__ import annotations

import itertools
import os
import pickle
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from amaes import checkpoint, predict
from amaes.models import build_autoencoder, build_segmenter
from amaes.predict import cases_to_predict, predict_file
from amaes.preprocess.config import Config
from amaes.preprocess.nifti import to_stored_axes, write_like
from tests.conftest import AFFINE, make_volume

TURNS = [
    np.column_stack([order, signs])
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
SCAN = (22, 26, 18)
PATCH = [32, 32, 32]


def save_checkpoint(path, channels=("image",), label_map=None, task="segment", **more):
    """A checkpoint of an untrained network, 3 classes."""
    torch.manual_seed(0)
    if task == "segment":
        build = {"arch": "unet_tiny", "in_channels": len(channels), "num_classes": 3}
        model = build_segmenter(**build)
    else:
        build = {"arch": "unet_tiny", "in_channels": len(channels)}
        model = build_autoencoder(**build)
    content = {
        "task": task,
        "model": model.state_dict(),
        "optimizer": {},
        "step": 3,
        "build": build,
        "preprocess": Config(label_map=label_map or {}).as_dict(),
        "channels": list(channels),
        "labels": {"0": "background", "1": "one", "2": "two"},
        "patch_size": PATCH,
        "provenance": {},
        **more,
    }
    return checkpoint.save(path, content, keep=1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def two_channels(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("two"), channels=("T1", "FLAIR"))


class Bands(nn.Module):
    """Class by intensity, no context."""

    def forward(self, x):
        x = x[:, :1]
        return torch.cat([0.3 - x, x * 0, x - 0.6], dim=1)


def meta(**more):
    return {"channels": ["image"], "preprocess": Config().as_dict(), "patch_size": [16, 16, 16], **more}


def run(capsys, *options):
    """main() as the command line runs it: status, stdout, stderr."""
    from amaes import cli

    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: predict.main(predict.parse_options([*map(str, options), "--device", "cpu"])))
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture(scope="module")
def turned_labels(tmp_path_factory):
    """Function: labels of one scan stored with its axes turned, mapped back to RAS."""
    folder = tmp_path_factory.mktemp("turned")

    def predicted(ornt, matrix):
        ras = np.kron(make_volume((6, 7, 5)), np.ones((2, 2, 2), np.float32))
        stored = to_stored_axes(ras, ornt)
        affine = matrix @ np.linalg.inv(nib.orientations.inv_ornt_aff(ornt, stored.shape))
        image = nib.Nifti1Image(stored, affine)
        nib.save(image, folder / "scan.nii.gz")
        labels, properties = predict_file(Bands(), meta(), [folder / "scan.nii.gz"])
        write_like(folder / "labels.nii.gz", labels, properties)
        source, result = nib.load(folder / "scan.nii.gz"), nib.load(folder / "labels.nii.gz")
        assert result.shape == source.shape
        assert result.header.get_best_affine().tobytes() == source.header.get_best_affine().tobytes()
        assert result.get_data_dtype() == np.uint8
        return nib.as_closest_canonical(result).get_fdata()

    return predicted


@pytest.mark.parametrize("kind", ["straight", "oblique"])
def test_axis_orders_do_not_change_the_labels(turned_labels, kind):
    matrix = np.diag([1.5, 1.25, 2.0, 1.0])
    if kind == "oblique":
        matrix[:3, :3] = nib.eulerangles.euler2mat(0.2, -0.15, 0.3) @ matrix[:3, :3]
    expected = turned_labels(TURNS[0], matrix)
    assert set(np.unique(expected)) == {0, 1, 2}
    for ornt in TURNS[1:]:
        assert np.array_equal(turned_labels(ornt, matrix), expected), ornt


def test_labels_lie_where_the_intensities_are(nifti_file):
    """At 1 mm nothing is resampled: each voxel has the class of its own intensity."""
    volume = make_volume(SCAN)
    labels, properties = predict_file(Bands(), meta(), [nifti_file("a.nii.gz", volume, np.diag([-1.0, 1, 1, 1]))])
    top = properties["intensity"][0]["q99"]
    expected = np.where(volume >= 0.6 * top, 2, np.where(volume > 0.3 * top, 1, 0))
    edges = np.abs(volume / top - 0.3) + np.abs(volume / top - 0.6) < 0.301  # rounding decides there
    assert np.array_equal(labels[~edges], expected[~edges])


def test_mapped_values_are_written(nifti_file):
    config = Config(label_map={4: 2}).as_dict()
    arguments = Bands(), meta(preprocess=config), [nifti_file("a.nii.gz")]
    assert set(np.unique(predict_file(*arguments)[0])) == {0, 1, 2}
    assert set(np.unique(predict_file(*arguments, restore_values=True)[0])) == {0, 1, 4}


# Command line ---------------------------------------------------------------------------------------------------------


def test_one_file(weights, nifti_file, tmp_path, capsys):
    scan = nifti_file("scans/p1.nii.gz", make_volume(SCAN))
    status, out, err = run(capsys, "--weights", weights, "--images", scan, "--out", tmp_path / "out")
    assert (status, err) == (0, "")
    assert "22 x 26 x 18 voxels, " in out
    result = nib.load(tmp_path / "out" / "p1.nii.gz")
    assert result.shape == SCAN
    assert np.array_equal(result.affine, AFFINE)
    assert len(np.unique(result.get_fdata())) > 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["p1.nii.gz"]


def test_checkpoint_alone_is_needed_and_older_output_is_replaced(weights, nifti_file, tmp_path, capsys):
    moved = shutil.copy(weights, tmp_path / "elsewhere.pt")
    scan, target = nifti_file("p1.nii.gz", make_volume(SCAN)), tmp_path / "out" / "p1.nii.gz"
    target.parent.mkdir()
    target.write_text("old")
    assert run(capsys, "--weights", moved, "--images", scan, "--out", target.parent)[0] == 0
    assert nib.load(target).shape == SCAN


def test_trailing_axis_is_kept(weights, nifti_file, tmp_path, capsys):
    scan = nifti_file("p1.nii.gz", make_volume(SCAN)[..., None])
    assert run(capsys, "--weights", weights, "--images", scan, "--out", tmp_path / "out")[0] == 0
    assert nib.load(tmp_path / "out" / "p1.nii.gz").shape == (*SCAN, 1)


def test_bad_files_of_a_folder_are_listed_and_the_others_done(weights, bad_files, tmp_path, capsys):
    folder = next(iter(bad_files.values())).parent
    shutil.copy(bad_files["no_orientation"], folder / "sub.nii.gz")
    status, out, err = run(capsys, "--weights", weights, "--images", folder, "--out", tmp_path / "out")
    assert status == 1
    done = sorted(path.name.split(".")[0] for path in (tmp_path / "out").iterdir())
    assert done == ["corrupt_gzip", "no_orientation", "sub"]  # a CRC is not looked at without --verify
    assert len(out.splitlines()) == 3
    refused = {line.split(": ")[1] for line in err.splitlines() if line.startswith("not predicted: ")}
    assert refused == set(bad_files) - {"corrupt_gzip", "no_orientation"}
    assert "truncated.nii.gz" in err


def test_only_bad_files_is_one_line_and_status_2(weights, bad_files, tmp_path, capsys):
    status, out, err = run(capsys, "--weights", weights, "--images", bad_files["truncated"], "--out", tmp_path / "out")
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "truncated.nii.gz: " in err
    status, _, err = run(
        capsys,
        "--weights",
        weights,
        "--images",
        *(bad_files[key] for key in ("truncated", "empty_file")),
        "--out",
        tmp_path / "out",
    )
    assert status == 2
    assert "none of 2 cases; the first, truncated: " in err
    assert not (tmp_path / "out").exists()


def test_several_files_are_the_channels_of_one_case(two_channels, nifti_file, tmp_path, capsys):
    scans = [nifti_file(f"{name}.nii.gz", make_volume(SCAN, seed)) for seed, name in enumerate(("a_T1", "a_FLAIR"))]
    for images, out in ((scans, "out"), (scans[::-1], "turned")):
        status, _, _ = run(capsys, "--weights", two_channels, "--images", *images, "--out", tmp_path / out)
        assert status == 0
    one, other = (nib.load(tmp_path / out / "a.nii.gz").get_fdata() for out in ("out", "turned"))
    assert np.array_equal(one, other)  # by name


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["p1/T1.nii.gz", "p1/flair.nii.gz"], "p1"),
        (["p1/x-T1.nii.gz", "p1/x-flair.nii.gz"], "x"),
        (["p1/first.nii.gz", "p1/second.nii.gz"], "p1"),
        (["p1/scan_0000.nii.gz", "p1/scan_0001.nii.gz"], "scan"),
        (["p1/x.NII.GZ"], "x"),
    ],
)
def test_name_of_a_case_of_files(nifti_file, names, expected):
    (item,) = cases_to_predict([nifti_file(name) for name in names], ["T1", "FLAIR"]).items
    assert item.id == expected


def test_two_files_of_one_channel_are_refused(nifti_file):
    with pytest.raises(ValueError, match="two files are called T1"):
        cases_to_predict([nifti_file(name) for name in ("a_T1.nii.gz", "b_t1.nii.gz")], ["T1", "FLAIR"])
    assert cases_to_predict([nifti_file("x.NII.GZ")], ["image"]).items[0].id == "x"


def test_a_full_disk_ends_the_run_at_its_first_case(weights, nifti_file, tmp_path, capsys):
    for name in "abc":
        nifti_file(f"s/{name}.nii.gz", make_volume(SCAN))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.nii.gz").symlink_to("/dev/full")
    status, out, err = run(capsys, "--weights", weights, "--images", tmp_path / "s", "--out", tmp_path / "out")
    assert (status, len(out.splitlines()), len(err.splitlines())) == (2, 1, 1)
    assert f"{tmp_path / 'out'}: 1 of 3 cases predicted; the disk is full; what was written is whole" in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii.gz", "b.nii.gz"]


def test_missing_channels_are_filled_where_training_did(nifti_file, tmp_path, capsys):
    config = Config(missing_channel="zeros").as_dict()
    weights = save_checkpoint(tmp_path / "zeros", channels=("T1", "FLAIR"), preprocess=config)
    nifti_file("s/a_T1.nii.gz", make_volume(SCAN))
    options = ["--weights", weights, "--images", tmp_path / "s"]
    assert run(capsys, *options, "--out", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "a.nii.gz").is_file()


def test_messages_name_no_option_of_another_program(two_channels, bad_files, nifti_file, tmp_path, capsys):
    nifti_file("s/a_T1.nii.gz", make_volume(SCAN))
    moved = AFFINE.copy()
    moved[0, 3] += 50
    nifti_file("s/b_T1.nii.gz", make_volume(SCAN))
    nifti_file("s/b_FLAIR.nii.gz", make_volume(SCAN), moved)
    for name in ("c_T1", "c_FLAIR"):
        shutil.copy(bad_files["singular_affine"], tmp_path / "s" / f"{name}.nii.gz")
    options = ["--weights", two_channels, "--out", tmp_path / "out"]
    status, _, err = run(capsys, *options, "--images", tmp_path / "s")
    assert status == 2
    assert "--" not in err.replace("--images", "")
    for case in "bc":
        scans = [tmp_path / "s" / f"{case}_{name}.nii.gz" for name in ("T1", "FLAIR")]
        status, _, err = run(capsys, *options, "--images", *scans)
        assert status == 2
        assert "--" not in err


def test_restored_labels_on_request(nifti_file, tmp_path, capsys):
    weights = save_checkpoint(tmp_path / "mapped", label_map={40: 1, 50: 2})
    scan = nifti_file("p1.nii.gz", make_volume(SCAN))
    for more, accepted in (([], {0, 1, 2}), (["--restore-labels"], {0, 40, 50})):
        assert run(capsys, "--weights", weights, "--images", scan, "--out", tmp_path / "out", *more)[0] == 0
        values = set(np.unique(nib.load(tmp_path / "out" / "p1.nii.gz").get_fdata()).astype(int))
        assert values <= accepted
        assert len(values) > 1


def test_folder_is_grouped_by_channel_names(two_channels, nifti_file, tmp_path, capsys):
    for case in ("a", "b"):
        for seed, name in enumerate(("FLAIR", "T1")):
            nifti_file(f"scans/{case}_{name}.nii.gz", make_volume(SCAN, seed))
    nifti_file("scans/c_T1.nii.gz", make_volume(SCAN))
    status, _, err = run(capsys, "--weights", two_channels, "--images", tmp_path / "scans", "--out", tmp_path / "out")
    assert status == 1
    assert "not predicted: c: " in err
    assert "missing FLAIR" in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii.gz", "b.nii.gz"]
    both = [tmp_path / "scans" / f"a_{name}.nii.gz" for name in ("T1", "FLAIR")]
    assert run(capsys, "--weights", two_channels, "--images", *both, "--out", tmp_path / "files")[0] == 0
    one, other = (nib.load(path).get_fdata() for path in (tmp_path / "out/a.nii.gz", tmp_path / "files/a.nii.gz"))
    assert np.array_equal(one, other)  # the order is that of the checkpoint, not of the alphabet


def test_four_dimensional_file_holds_all_channels(two_channels, nifti_file, tmp_path, capsys):
    scan = nifti_file("a.nii.gz", np.stack([make_volume(SCAN), make_volume(SCAN, 1)], axis=3))
    assert run(capsys, "--weights", two_channels, "--images", scan, "--out", tmp_path / "out")[0] == 0
    assert nib.load(tmp_path / "out" / "a.nii.gz").shape == SCAN


def test_wrong_number_of_channels_is_said(two_channels, nifti_file, tmp_path, capsys):
    scan = nifti_file("scans/a.nii.gz", make_volume(SCAN))
    for images in ([scan], [scan.parent], [scan] * 3):
        status, _, err = run(capsys, "--weights", two_channels, "--images", *images, "--out", tmp_path / "out")
        assert status == 2
        assert f"the checkpoint expects 2 channels (T1, FLAIR), got {max(1, len(images))}" in err
        assert len(err.splitlines()) == 1


def test_pretraining_checkpoint_is_refused(nifti_file, tmp_path, capsys):
    path = save_checkpoint(tmp_path, task="pretrain")
    status, _, err = run(capsys, "--weights", path, "--images", nifti_file("a.nii.gz"), "--out", tmp_path / "out")
    assert status == 2
    assert "'pretrain'" in err
    assert len(err.splitlines()) == 1


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickle_is_refused_and_not_run(nifti_file, tmp_path, capsys):
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    torch.save({"model": Touch(trace)}, path)
    bare = tmp_path / "bare.pt"
    bare.write_bytes(pickle.dumps(Touch(trace), protocol=2))
    for file in (path, bare):
        status, _, err = run(capsys, "--weights", file, "--images", nifti_file("a.nii.gz"), "--out", tmp_path / "out")
        assert status == 2
        assert len(err.splitlines()) == 1
        assert not trace.exists()


@pytest.mark.parametrize(
    "what", ["no weights", "no image", "input is output", "two folders", "same names", "output is a file"]
)
def test_user_errors_are_one_line(what, weights, nifti_file, tmp_path, capsys):
    scan = nifti_file("scans/p1.nii.gz", make_volume(SCAN))
    other = nifti_file("more/p1.nii.gz", make_volume(SCAN))
    before = scan.read_bytes()
    options = {"--weights": [weights], "--images": [scan], "--out": [tmp_path / "out"]} | {
        "no weights": {"--weights": [tmp_path / "nothing.pt"]},
        "no image": {"--images": [tmp_path / "nothing.nii.gz"]},
        "input is output": {"--out": [scan.parent]},
        "two folders": {"--images": [scan.parent, other.parent]},
        "same names": {"--images": [scan, other]},
        "output is a file": {"--out": [weights / "more"]},
    }[what]
    status, _, err = run(capsys, *itertools.chain.from_iterable([key, *values] for key, values in options.items()))
    assert status == 2
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert scan.read_bytes() == before


def test_mirroring_says_its_price(weights, nifti_file, tmp_path, capsys):
    scan = nifti_file("p1.nii.gz", make_volume(SCAN))
    status, _, err = run(capsys, "--weights", weights, "--images", scan, "--out", tmp_path / "out", "--tta")
    assert status == 0
    assert "8 times" in err


def test_module_runs_as_a_program(weights, nifti_file, tmp_path):
    options = ["--weights", weights, "--images", nifti_file("p1.nii.gz"), "--out", tmp_path / "out", "--device", "cpu"]
    subprocess.run([sys.executable, "-m", "amaes.predict", *map(str, options)], check=True, capture_output=True)
    assert (tmp_path / "out" / "p1.nii.gz").is_file()
