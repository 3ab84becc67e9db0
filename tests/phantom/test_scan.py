"""Synthetic heads: the same again from the same seed, on every grid, with lesions where lesions are."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from amaes.phantom import LABELS, SCANNERS, SIGNAL, TISSUES, Scanner, phantom

QUIET = Scanner(noise=0.0)
SMALL = 40.0  # field of view of quick heads, mm


def canonical(array, affine):
    return np.asarray(nib.as_closest_canonical(nib.Nifti1Image(array, affine)).dataobj)


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


def test_every_sequence_names_every_tissue():
    assert {len(signals) for signals in SIGNAL.values()} == {len(TISSUES)}
