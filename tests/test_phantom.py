"""Synthetic heads: the same again from the same seed, on every grid, with lesions where lesions are."""

import json
import math
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from amaes import phantom as module
from amaes.data.store import Store
from amaes.phantom import LABELS, SCANNERS, SIGNAL, TISSUES, Grid, Scanner, Waves, ellipsoid, phantom, write_phantoms
from amaes.preprocess.config import Config
from amaes.preprocess.find_cases import collect
from amaes.preprocess.write_store import write_store

QUIET = Scanner(noise=0.0)
SMALL = 40.0  # field of view of quick heads, mm


def canonical(array, affine):
    return np.asarray(nib.as_closest_canonical(nib.Nifti1Image(array, affine)).dataobj)


def test_positions_are_affine_in_the_index():
    grid = Grid((2, 3, 4), np.array([[0, 2, 0], [1, 0, 0], [0, 0, -3.0]]), np.array([10, 20, 30.0]))
    x, y, z = grid.positions()
    assert x.shape == (2, 3, 4)
    assert (x[1, 2, 3], y[1, 2, 3], z[1, 2, 3]) == (14, 21, 21)


def test_waves_equal_the_sum_of_cosines():
    waves = Waves(np.random.default_rng(0), 3.0, 9.0, count=7)
    grid = Grid((4, 5, 6), np.random.default_rng(1).normal(size=(3, 3)), np.array([1.0, -2.0, 3.0]))
    at = np.stack(grid.positions(), -1).astype(float)
    expected = np.cos(at @ waves.number.T + waves.phase).sum(-1) * math.sqrt(2 / 7)
    np.testing.assert_allclose(waves.on(grid), expected, atol=1e-4)


def test_ellipsoid_is_measured_in_millimetres():
    x = np.array([5.0, 6.0, 6.9, 7.1], np.float32)  # on an axis, which ends at 2 + 5 = 7
    distance = ellipsoid((x, np.ones(4), np.zeros(4)), (2, 1, 0), (5, 3, 4))
    np.testing.assert_allclose(distance, [2, 1, 0.1, -0.1], rtol=1e-4)
    ball = ellipsoid((3.0, 0.0, 4.0), (0, 0, 0), (7, 7, 7))
    assert ball == pytest.approx(2.0, rel=1e-5)


def test_same_arguments_same_arrays_and_each_argument_matters():
    one, again = phantom(3, 2, "T2w", fov=SMALL), phantom(3, 2, "T2w", fov=SMALL)
    np.testing.assert_array_equal(one.image, again.image)
    np.testing.assert_array_equal(one.label, again.label)
    np.testing.assert_array_equal(one.affine, again.affine)
    for other in (phantom(4, 2, "T2w", fov=SMALL), phantom(3, 1, "T2w", fov=SMALL)):
        assert np.mean(one.tissue != other.tissue) > 0.05
    assert np.abs(one.image - phantom(3, 2, "T1w", fov=SMALL).image).mean() > 0.05


@pytest.mark.parametrize("scanner", SCANNERS, ids=lambda scanner: scanner.orientation + scanner.air)
def test_grid_is_the_scanners(scanner):
    drawn = phantom(0, 1, "FLAIR", scanner, fov=SMALL)
    assert "".join(nib.aff2axcodes(drawn.affine)) == scanner.orientation
    np.testing.assert_allclose(nib.affines.voxel_sizes(drawn.affine), scanner.spacing)
    extent = np.array(drawn.image.shape) * scanner.spacing
    assert ((extent > 0.85 * SMALL) & (extent < 1.05 * SMALL)).all()
    assert nib.affines.obliquity(drawn.affine).max() == pytest.approx(np.radians(scanner.oblique), abs=0.1)
    assert drawn.image.dtype == np.float32
    assert drawn.image.shape == drawn.label.shape == drawn.tissue.shape
    assert set(np.unique(drawn.label)) == set(LABELS)
    assert drawn.image.min() >= 0
    assert 0.5 * scanner.full_scale < np.percentile(drawn.image, 99.5) < 2 * scanner.full_scale


def test_scanners_differ_where_files_do():
    for attribute in ("spacing", "orientation", "dtype", "full_scale", "form", "air"):
        assert len({getattr(scanner, attribute) for scanner in SCANNERS}) >= 3
    assert sum(scanner.oblique > 0 for scanner in SCANNERS) >= 2
    assert sum(max(scanner.spacing) > 1.9 * min(scanner.spacing) for scanner in SCANNERS) >= 2


def test_orientation_changes_the_order_of_voxels_and_not_the_head():
    one = phantom(0, 1, "T1w", QUIET, fov=SMALL)
    turned = phantom(0, 1, "T1w", replace(QUIET, orientation="PSR"), fov=SMALL)
    assert turned.image.shape != one.image.shape
    assert np.mean(canonical(turned.label, turned.affine) == one.label) > 0.999
    np.testing.assert_allclose(canonical(turned.image, turned.affine), one.image, atol=0.01)


def test_spacing_changes_the_sampling_and_not_the_volumes():
    one, thick = (phantom(0, 1, "FLAIR", replace(QUIET, spacing=s)) for s in ((1, 1, 1), (0.9, 0.9, 3.0)))
    for value in (1, 2):
        volumes = [(drawn.label == value).sum() * abs(np.linalg.det(drawn.affine)) for drawn in (one, thick)]
        assert volumes[1] == pytest.approx(volumes[0], rel=0.25)


@pytest.mark.parametrize("subject", range(4))
def test_lesions_lie_in_white_matter_and_ventricles_in_the_brain(subject):
    drawn = phantom(7, subject, "FLAIR")
    share = {name: np.mean(drawn.tissue[drawn.label == 1] == index) for index, name in enumerate(TISSUES)}
    assert share["white"] > 0.85
    assert share["white"] + share["rim"] + share["grey"] > 0.98
    fluid = [TISSUES.index(name) for name in ("ventricle", "choroid")]
    assert np.isin(drawn.tissue[drawn.label == 2], fluid).mean() > 0.98
    assert 50 < (drawn.label == 1).sum() < 4000  # voxels of 1 mm
    assert {"skin", "fat", "skull", "fluid", "grey", "white", "deep"} <= {TISSUES[i] for i in np.unique(drawn.tissue)}


@pytest.mark.parametrize(("sequence", "sign"), [("FLAIR", 1), ("T2w", 1), ("T1w", -1)])
def test_lesions_stand_out_from_white_matter(sequence, sign):
    drawn = phantom(1, 5, sequence, QUIET)
    white = (drawn.tissue == TISSUES.index("white")) & (drawn.label == 0)
    difference = drawn.image[drawn.label == 1].mean() - drawn.image[white].mean()
    assert sign * difference > 2 * drawn.image[white].std()


def test_no_threshold_finds_the_lesions():
    """Neither in the whole head nor, told where the brain is, in the brain; the best of thresholds for all scans."""
    dice = {"head": [], "brain": []}
    for subject in range(len(SCANNERS)):
        drawn = phantom(2, subject, "FLAIR", SCANNERS[subject])
        lesion, image = drawn.label == 1, drawn.image / SCANNERS[subject].full_scale
        for name, mask in (("head", True), ("brain", drawn.tissue >= TISSUES.index("fluid"))):
            found = [(image > level) & mask for level in np.linspace(0.3, 1.2, 40)]
            dice[name].append([2 * (f & lesion).sum() / (f.sum() + lesion.sum()) for f in found])
    best = {name: np.mean(rows, axis=0).max() for name, rows in dice.items()}
    assert best["head"] < 0.2
    assert best["brain"] < 0.6


def test_number_of_lesions_is_an_argument():
    assert (phantom(0, 1, fov=SMALL, lesions=0).label == 1).sum() == 0
    assert (phantom(0, 1, lesions=12).label == 1).sum() > (phantom(0, 1, lesions=2).label == 1).sum() > 0


def test_air_is_noise_zero_or_gone():
    outside, air = TISSUES.index("fluid"), 0
    by_air = {
        kind: phantom(0, 1, "T1w", replace(SCANNERS[0], air=kind), fov=SMALL) for kind in ("noise", "zero", "stripped")
    }
    assert (by_air["noise"].image > 0).mean() > 0.99
    assert (by_air["zero"].image[by_air["zero"].tissue == air] == 0).all()
    assert (by_air["stripped"].image[by_air["stripped"].tissue < outside] == 0).all()
    assert (by_air["stripped"].image[by_air["stripped"].tissue >= outside] > 0).mean() > 0.99


@pytest.mark.parametrize(
    ("arguments", "message"), [({"sequence": "PD"}, "T1w, T2w, FLAIR"), ({"fov": 20}, "32 to 256")]
)
def test_bad_arguments_say_what_is_accepted(arguments, message):
    with pytest.raises(ValueError, match=message):
        phantom(0, **arguments)


# Files ----------------------------------------------------------------------------------------------------------------


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
    real, calls = module._nifti, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(module, "_nifti", full)
    with pytest.raises(OSError, match="No space"):
        write_phantoms(tmp_path / "deep" / "set", 1, fov=SMALL)
    assert list((tmp_path / "deep").iterdir()) == []


def test_command_line_writes_the_same(monkeypatch, capsys, tmp_path):
    command = f"phantom --out {tmp_path / 'a'} --subjects 1 --sequences T1w FLAIR --fov 40 --first 9 --seed 1"
    monkeypatch.setattr("sys.argv", command.split())
    assert module.main() == 0
    assert "2 scans of 1 heads" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "a" / "images").iterdir()) == [
        "sub-0009_FLAIR.nii.gz",
        "sub-0009_T1w.nii.gz",
    ]
    assert not (tmp_path / "a" / "labels").exists()
    assert json.loads((tmp_path / "a" / "dataset.json").read_text())["phantoms"]["first"] == 9


def test_every_sequence_names_every_tissue():
    assert {len(signals) for signals in SIGNAL.values()} == {len(TISSUES)}


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
    monkeypatch.setattr(module, "DEMO", {"subjects": 2, "fov": SMALL})
    path = module.make_demo_data(tmp_path / "run" / "demo")
    store = Store(path)
    assert len(store.cases) == 6
    assert {case.sequence for case in store.cases} == {"T1", "T2", "FLAIR"}
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*.npy")}
    assert module.make_demo_data(tmp_path / "run" / "demo") == path
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*.npy")} == before
