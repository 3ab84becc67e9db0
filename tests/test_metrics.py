"""Metrics against values worked out by hand, on anisotropic volumes, in every empty state."""

from __future__ import annotations

import math

import numpy as np
import pytest

from amaes import metrics
from amaes.metrics import METRICS, dice, hd95, lesion_f1, measure_case, surface_dice

SHAPE, SPACING = (20, 24, 28), (1.0, 2.0, 3.0)
DIAGONAL = math.sqrt(20.0**2 + 48.0**2 + 84.0**2)


def cube(start, stop, shape=SHAPE):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = True
    return mask


EMPTY = np.zeros(SHAPE, bool)
OBLIQUE = 1.0000000189  # mm, what a turned 1 mm affine in float32 gives
BOX = cube((4, 5, 6), (8, 9, 10))  # 4 x 4 x 4 voxels


def brute_distances(prediction, reference, spacing):
    """All pairs of surface voxels, in the whole image."""

    def surface(mask):
        padded = np.pad(mask, 1)
        inner = np.ones_like(mask)
        for axis in range(3):
            for shift in (-1, 1):
                inner &= np.roll(padded, shift, axis)[1:-1, 1:-1, 1:-1]
        return np.argwhere(mask & ~inner) * spacing

    a, b = surface(prediction), surface(reference)
    d = np.linalg.norm(a[:, None] - b[None], axis=2)
    return d.min(1), d.min(0)


# shift by one voxel along x: TP 48, FP 16, FN 16
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dice", 0.75),
        ("volume_difference", 0.0),
        ("relative_volume_difference", 0.0),
        ("hd95", 1.0),
        ("lesion_f1", 1.0),
        ("lesion_count_difference", 0.0),
    ],
)
def test_box_moved_by_one_voxel(name, expected):
    moved = cube((5, 5, 6), (9, 9, 10))
    assert getattr(metrics, name)(moved, BOX, SPACING) == pytest.approx(expected, abs=1e-12)


# 4 x 4 x 4 reference inside a 4 x 4 x 6 prediction
@pytest.mark.parametrize(
    ("name", "expected"),
    [("dice", 128 / 160), ("volume_difference", 32 * 6 / 1000), ("relative_volume_difference", 50.0), ("hd95", 6.0)],
)
def test_box_too_long(name, expected):
    assert getattr(metrics, name)(cube((4, 5, 6), (8, 9, 12)), BOX, SPACING) == pytest.approx(expected)


@pytest.mark.parametrize(("axis", "gap"), [(0, 5.0), (1, 10.0), (2, 15.0)])
def test_distances_are_in_mm_of_their_axis(axis, gap):
    start = [2, 2, 2]
    start[axis] += 5
    a, b = cube((2, 2, 2), (3, 3, 3)), cube(start, [s + 1 for s in start])
    assert hd95(a, b, SPACING) == pytest.approx(gap)
    assert surface_dice(a, b, SPACING, tau=gap - 0.1) == 0.0
    assert surface_dice(a, b, SPACING, tau=gap) == 1.0


@pytest.mark.parametrize("sparse", [1e9, 0], ids=["distance transform", "tree"])
def test_surface_metrics_equal_all_pairs_of_the_whole_image(monkeypatch, sparse):
    monkeypatch.setattr(metrics, "_SPARSE", sparse)
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1) * SPACING
    a = np.linalg.norm(grid - (9, 20, 40), axis=-1) < 9
    b = (np.linalg.norm(grid - (11, 24, 46), axis=-1) < 8) | cube((0, 0, 0), (2, 2, 1))  # touches the image's border
    there, back = brute_distances(a, b, SPACING)
    assert hd95(a, b, SPACING) == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
    within = np.concatenate([there, back]) <= 2.5
    assert surface_dice(a, b, SPACING, tau=2.5) == pytest.approx(within.mean())


def test_spheres_of_two_radii():
    """Concentric spheres of 8 and 11 mm on an anisotropic grid: 3 mm apart, and volumes in the ratio (8/11)^3."""
    grid = np.stack(np.meshgrid(*map(np.arange, (60, 40, 30)), indexing="ij"), -1) * (0.5, 0.8, 1.0)
    r = np.linalg.norm(grid - (15, 16, 15), axis=-1)
    small, large = r < 8, r < 11
    spacing = (0.5, 0.8, 1.0)
    assert hd95(small, large, spacing) == pytest.approx(3.0, abs=0.6)
    ratio = (8 / 11) ** 3
    assert dice(small, large) == pytest.approx(2 * ratio / (1 + ratio), abs=0.01)
    volume = 4 / 3 * math.pi * (11**3 - 8**3) / 1000
    assert metrics.volume_difference(small, large, spacing) == pytest.approx(volume, rel=0.01)


def test_lesions_by_hand():
    reference = cube((1, 1, 1), (3, 3, 3)) | cube((10, 10, 10), (12, 12, 12)) | cube((16, 20, 24), (17, 21, 25))
    reference |= cube((3, 3, 3), (4, 4, 4))  # touches the first by a corner: the same lesion
    prediction = cube((2, 2, 2), (3, 3, 3)) | cube((14, 2, 2), (15, 3, 3)) | cube((14, 6, 2), (15, 7, 3))
    # found 1, missed 2, false 2
    assert lesion_f1(prediction, reference) == pytest.approx(1 / (1 + 4 / 2))
    assert metrics.lesion_recall(prediction, reference) == pytest.approx(1 / 3)
    assert metrics.lesion_count_difference(prediction, reference) == 0


def test_one_prediction_over_two_lesions_finds_both():
    reference = cube((2, 2, 2), (3, 3, 3)) | cube((6, 2, 2), (7, 3, 3))
    bridge = cube((2, 2, 2), (7, 3, 3))
    assert lesion_f1(bridge, reference) == 1.0
    assert metrics.lesion_count_difference(bridge, reference) == 1.0


NAN = float("nan")
STATES = {  # metric: both empty, both empty with "one", missed, false positive
    "dice": (NAN, 1.0, 0.0, 0.0),
    "volume_difference": (0.0, 0.0, 0.384, 0.384),
    "relative_volume_difference": (NAN, NAN, 100.0, NAN),
    "hd95": (NAN, NAN, DIAGONAL, DIAGONAL),
    "surface_dice": (NAN, 1.0, 0.0, 0.0),
    "lesion_f1": (NAN, 1.0, 0.0, 0.0),
    "lesion_recall": (NAN, NAN, 0.0, NAN),
    "lesion_count_difference": (0.0, 0.0, 1.0, 1.0),
}


def test_every_metric_has_its_empty_states_listed():
    assert set(STATES) == set(METRICS)


@pytest.mark.parametrize("name", STATES)
def test_empty_states(name):
    function, (both, both_one, missed, false) = getattr(metrics, name), STATES[name]
    assert function(EMPTY, EMPTY, SPACING) == pytest.approx(both, nan_ok=True)
    assert function(EMPTY, EMPTY, SPACING, empty="one") == pytest.approx(both_one, nan_ok=True)
    assert function(EMPTY, BOX, SPACING) == pytest.approx(missed, nan_ok=True)
    assert function(BOX, EMPTY, SPACING) == pytest.approx(false, nan_ok=True)


@pytest.mark.parametrize("axis", range(3))
def test_surface_dice_of_a_shift_by_tau_is_not_lost_to_rounding(axis):
    assert surface_dice(np.roll(BOX, 1, axis), BOX, (OBLIQUE,) * 3) == 1
    assert surface_dice(np.roll(BOX, 1, axis), BOX, (1.0001,) * 3) < 1


def test_surface_dice_at_tau_by_the_tree():
    """Ten voxels of 0.1 mm are 1 mm in the tree as well, whose coordinates are rounded."""
    shape = (60, 60, 60)
    for start in range(1, 30):
        first, second = (cube((x, 0, 0), (x + 1, 1, 1), shape) for x in (start, start + 10))
        first[0, 40, 40] = second[0, 40, 40] = True  # the box begins there
        assert surface_dice(first, second, (0.1,) * 3) == 1, start


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("prediction", [BOX, cube((5, 5, 6), (9, 9, 10)), cube((0, 0, 0), (1, 1, 1))])
def test_missing_a_structure_never_scores_better(name, prediction):
    """A NaN would drop out of the mean and improve it."""
    function = getattr(metrics, name)
    some, none = function(prediction, BOX, SPACING), function(EMPTY, BOX, SPACING)
    smaller_is_better = name == "hd95" or name.endswith("difference")
    assert none >= some if smaller_is_better else none <= some


LABELS = np.zeros(SHAPE, np.uint8)
LABELS[4:8, 5:9, 6:10] = 1
LABELS[10:12, 5:9, 6:10] = 2
MOVED = np.roll(LABELS, 1, axis=0)


def test_case_per_class_and_micro():
    row = measure_case(MOVED, LABELS, 4, SPACING, ["dice", "hd95"])
    assert row["1"] == {"n_ref": 64, "n_pred": 64, "status": "ok", "dice": 0.75, "hd95": 1.0}
    assert row["2"]["dice"] == 0.5
    assert row["3"]["status"] == "both_empty"
    assert math.isnan(row["3"]["dice"])
    assert math.isnan(row["3"]["hd95"])
    assert row["all"] == {"n_ref": 96, "n_pred": 96, "status": "ok", "dice": 2 * (48 + 16) / 192}


@pytest.mark.parametrize("seed", range(3))
def test_case_equals_single_masks(seed):
    rng = np.random.default_rng(seed)
    prediction, reference = rng.integers(0, 4, (2, 9, 10, 11)).astype(np.uint8)
    prediction[prediction == 2] = 0  # a missed class
    row = measure_case(prediction, reference, 4, SPACING, METRICS)
    for k in range(1, 4):
        for name in METRICS:
            alone = getattr(metrics, name)(prediction == k, reference == k, SPACING)
            assert row[str(k)][name] == pytest.approx(alone, nan_ok=True), (k, name)


def test_penalty_of_a_missed_class_is_the_diagonal_of_the_image_not_of_the_box():
    row = measure_case(np.zeros_like(LABELS), LABELS, 3, SPACING, ["hd95"])
    assert row["1"]["hd95"] == pytest.approx(DIAGONAL)
    assert row["1"]["status"] == "missed"


def test_regions_join_classes():
    row = measure_case(MOVED, LABELS, 3, SPACING, ["dice", "surface_dice"], regions={"whole": (1, 2), "core": (2,)})
    assert list(row) == ["whole", "core", "all"]
    assert row["whole"]["n_ref"] == 96
    assert row["whole"]["dice"] == dice(MOVED > 0, LABELS > 0)
    assert row["whole"]["surface_dice"] == surface_dice(MOVED > 0, LABELS > 0, SPACING)


def test_confusion_matrix_is_the_same_in_slabs(monkeypatch):
    rng = np.random.default_rng(0)
    prediction, reference = rng.integers(0, 5, (2, 9, 10, 11))
    whole = metrics.confusion_matrix(prediction, reference, 5)
    assert whole[3, 1] == np.count_nonzero((reference == 3) & (prediction == 1))
    monkeypatch.setattr(metrics, "_SLAB", 200)
    assert (metrics.confusion_matrix(prediction, reference, 5) == whole).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ["dise"]}, "dise"),
        ({"num_classes": 2}, r"labels \[2\]; accepted: 0 to 1"),
        ({"spacing": (1, 1)}, "spacing"),
        ({"spacing": (1, 0, 1)}, "spacing"),
        ({"reference": LABELS[1:]}, r"\(19, 24, 28\)"),
        ({"empty": "zero"}, "zero"),
        ({"regions": {"x": (7,)}}, "region x"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"prediction": MOVED, "reference": LABELS, "num_classes": 3, "spacing": SPACING} | change
    with pytest.raises(ValueError, match=message):
        measure_case(**arguments)
