"""The geometry that heads are made of, in millimetres."""

import math

import numpy as np
import pytest

from amaes.phantom.head import Grid, Waves, ellipsoid


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
