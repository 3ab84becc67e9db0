"""Resampling against SciPy's filters, against stored results of skimage.transform.resize, and there and back."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from amaes.preprocess.resample import resample_image, resample_labels, target_shape

GOLDEN = (
    Path(__file__).parent.parent / "fixtures" / "resample_golden.npz"
)  # scikit-image 0.26, order 3 with anti-aliasing; order 0
SHAPES = [  # from, to
    ((12, 15, 9), (20, 22, 31)),
    ((30, 33, 27), (15, 11, 20)),
    ((32, 31, 8), (23, 22, 24)),
    ((8, 30, 31), (24, 30, 19)),
    ((10, 11, 12), (10, 11, 25)),
    ((1, 9, 14), (3, 9, 5)),
    ((3, 2, 40), (9, 1, 13)),
]


def scipy_formula(x, shape):
    f = np.array(x.shape) / np.array(shape)
    smooth = ndimage.gaussian_filter(x, np.maximum(0, (f - 1) / 2), mode="mirror") if (f > 1).any() else x
    return np.clip(ndimage.zoom(smooth, 1 / f, order=3, mode="mirror", grid_mode=True), x.min(), x.max())


@pytest.mark.parametrize("name", ["up", "down", "mixed"])
def test_equals_stored_results(name):
    golden = np.load(GOLDEN)
    result = resample_image(golden["image"], golden[name].shape)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    np.testing.assert_allclose(result, golden[name], rtol=0, atol=1e-6)
    label = resample_labels(golden["label"], golden[name].shape)
    assert np.array_equal(label, golden[f"label_{name}"])


@pytest.mark.parametrize(("old", "new"), SHAPES)
def test_equals_the_scipy_formula(old, new):
    x = np.random.default_rng(0).random(old, dtype=np.float32)
    np.testing.assert_allclose(resample_image(x, new), scipy_formula(x, new), rtol=0, atol=1e-6)


def test_memory_layout_does_not_matter():
    x = np.random.default_rng(0).random((12, 15, 9), dtype=np.float32)
    expected = resample_image(x, (9, 17, 11))
    assert np.array_equal(resample_image(np.asfortranarray(x), (9, 17, 11)), expected)
    assert np.array_equal(resample_image(x[::-1].copy()[::-1], (9, 17, 11)), expected)


def test_same_shape_is_a_copy():
    x = np.random.default_rng(0).random((5, 6, 7), dtype=np.float32)
    result = resample_image(x, (5, 6, 7))
    assert np.array_equal(result, x)
    assert not np.shares_memory(result, x)


@pytest.mark.parametrize(("old", "new"), SHAPES)
def test_stays_in_the_range_and_keeps_constants(old, new):
    x = (np.random.default_rng(0).random(old) > 0.5).astype(np.float32)  # overshoots at every edge
    result = resample_image(x, new)
    assert result.min() >= 0
    assert result.max() <= 1
    assert np.array_equal(resample_image(np.full(old, 0.3, np.float32), new), np.full(new, 0.3, np.float32))


@pytest.mark.parametrize(
    ("size", "spacing", "expected"), [(5, 0.5, 2), (7, 0.5, 4), (3, 0.1, 1), (40, 3.0, 120), (320, 0.72, 230)]
)
def test_target_size_rounds_half_to_even(size, spacing, expected):
    assert target_shape((size, 4, 5), (spacing, 1, 1), (1, 1, 1)) == (expected, 4, 5)


def test_nearest_takes_the_voxel_under_the_centre():
    label = np.arange(5, dtype=np.uint8).reshape(5, 1, 1)
    # (i + 0.5) * 5 / 3 = 0.83, 2.5, 4.17;  (i + 0.5) * 5 / 8 = 0.31, 0.94, 1.56, 2.19, 2.81, 3.44, 4.06, 4.69
    assert resample_labels(label, (3, 1, 1)).ravel().tolist() == [0, 2, 4]
    assert resample_labels(label, (8, 1, 1)).ravel().tolist() == [0, 0, 1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("method", ["nearest", "onehot_linear"])
@pytest.mark.parametrize(("old", "new"), SHAPES)
def test_labels_keep_their_values(old, new, method):
    label = np.random.default_rng(0).choice(np.array([0, 2, 7], dtype=np.uint8), old)
    result = resample_labels(label, new, method)
    assert result.dtype == np.uint8
    assert result.shape == new
    assert set(np.unique(result)) <= {0, 2, 7}


def test_linear_one_hot_by_hand():
    label = np.array([3, 1, 1, 3], dtype=np.uint8).reshape(4, 1, 1)
    # centres at 0.5 and 2.5 of 0..3: half of 3 and half of 1 each, a tie that the smaller value wins
    assert resample_labels(label, (2, 1, 1), "onehot_linear").ravel().tolist() == [1, 1]
    assert resample_labels(label, (8, 1, 1), "onehot_linear").ravel().tolist() == [3, 3, 1, 1, 1, 1, 3, 3]


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match="'cubic' is unknown; choose nearest or onehot_linear"):
        resample_labels(np.zeros((2, 2, 2), np.uint8), (3, 3, 3), "cubic")


@pytest.mark.parametrize(
    ("radius", "spacing", "least"), [(20, (1, 1, 3), 0.99), (20, (0.9, 0.9, 5), 0.98), (10, (0.5, 0.5, 0.5), 0.95)]
)
def test_spheres_survive_there_and_back(radius, spacing, least):
    shape = [int(np.ceil((2 * radius + 12) / s)) for s in spacing]
    axes = np.meshgrid(*((np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij")
    sphere = (sum(axis**2 for axis in axes) <= radius**2).astype(np.uint8)
    there = resample_labels(sphere, target_shape(shape, spacing, (1, 1, 1)))
    back = resample_labels(there, shape, "onehot_linear")
    assert 2 * (sphere & back).sum() / (sphere.sum() + back.sum()) >= least


def test_bytes_do_not_depend_on_the_number_of_threads():
    script = (
        "import hashlib, numpy as np; from amaes.preprocess.resample import resample_image;"
        "x = np.random.default_rng(0).random((90, 80, 20), dtype=np.float32);"
        "print(hashlib.sha256(resample_image(x, (65, 97, 60))).hexdigest())"
    )
    digests = set()
    for threads in ("1", "3"):
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", script]
        digests.add(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(digests) == 1
