"""Ghosting and Gibbs ringing: spectra, closed forms, ranges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from amaes.augment.kspace import ghosting_weights, gibbs_weights
from tests.augment.lines import ghosting, gibbs_ringing

SHAPE = (12, 16, 20)
AXES = pytest.mark.parametrize("axis", [0, 1, 2])
X = torch.from_numpy(0.5 + 0.5 * np.random.default_rng(2).random((2, *SHAPE)))  # [0.5, 1], float64


def per_volume(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64 if isinstance(values[0], float) else torch.int64)


@AXES
def test_neutral_parameters_change_nothing(axis):
    side = SHAPE[axis]
    same = ghosting(X, per_volume(1.0, 1.0), per_volume(2, 5), axis)
    torch.testing.assert_close(same, X, rtol=0, atol=1e-6)
    torch.testing.assert_close(gibbs_ringing(X, per_volume(side, side + 9), axis), X, rtol=0, atol=1e-6)


@AXES
def test_ghosting_attenuates_every_nth_line(axis):
    alpha, repetitions = 0.9, 4
    y = ghosting(X, per_volume(alpha, alpha), per_volume(repetitions, repetitions), axis, clip=False)
    before, after = torch.fft.fft(X, dim=axis + 1), torch.fft.fft(y, dim=axis + 1)
    line = torch.arange(SHAPE[axis])
    expected = 1.0 - (1.0 - alpha) * (line % repetitions == 0).double()
    expected = expected.view([-1 if d == axis else 1 for d in range(3)])
    torch.testing.assert_close(after, before * expected, rtol=1e-9, atol=1e-9)


@AXES
@pytest.mark.parametrize("repetitions", [2, 4])
def test_ghosting_closed_form(axis, repetitions):
    """Where N divides n: negative copies of relative size (1 - alpha) / N, spaced n / N."""
    alpha, side = 0.85, SHAPE[axis]
    y = ghosting(X, per_volume(alpha, alpha), per_volume(repetitions, repetitions), axis, clip=False)
    share = (1 - alpha) / repetitions
    copies = sum(torch.roll(X, j * side // repetitions, axis + 1) for j in range(1, repetitions))
    torch.testing.assert_close(y, (1 - share) * X - share * copies, rtol=0, atol=1e-9)


def test_ghosting_dims_the_mean_and_is_complex_where_n_is_not_divided():
    y = ghosting(X, per_volume(0.85, 0.95), per_volume(4, 2), 2, clip=False)
    ratio = y.mean((1, 2, 3)) / X.mean((1, 2, 3))
    assert ratio.tolist() == pytest.approx([0.85, 0.95], rel=1e-4)
    weights = ghosting_weights(np.array([0.85, 0.9]), np.array([3, 7]), 20)
    direct = torch.fft.ifft(torch.fft.fft(X, dim=3) * torch.from_numpy(weights).view(2, 1, 1, 20), dim=3)
    assert direct.imag.abs().amax() > 1e-3
    y = ghosting(X, per_volume(0.85, 0.9), per_volume(3, 7), 2, clip=False)
    torch.testing.assert_close(y, direct.abs(), rtol=0, atol=1e-12)


def test_ghosting_never_touches_the_last_line():
    weights = ghosting_weights(np.array([0.5]), np.array([10]), 21)[0]
    assert np.flatnonzero(weights == 0.5).tolist() == [0, 10]


def test_negative_images_are_shifted_first():
    y = X - 0.8
    shift = (-y.amin((1, 2, 3))).view(-1, 1, 1, 1)
    expected = ghosting(y + shift, per_volume(0.9, 0.9), per_volume(3, 3), 1, clip=False) - shift
    torch.testing.assert_close(ghosting(y, per_volume(0.9, 0.9), per_volume(3, 3), 1, clip=False), expected)


@AXES
def test_ringing_empties_the_outer_lines(axis):
    side, lines = SHAPE[axis], SHAPE[axis] - 4
    y = gibbs_ringing(X, per_volume(lines, lines), axis, clip=False)
    frequency = torch.fft.fftfreq(side, 1 / side)
    energy = torch.fft.fft(y, dim=axis + 1).abs().square().movedim(axis + 1, 0).flatten(1).sum(1)
    outside = (frequency < -lines // 2) | (frequency > lines // 2)
    assert outside.sum() == 3
    assert energy[outside].sum() < 1e-4 * energy[frequency != 0].sum()


def test_kept_lines():
    """Even sides keep -h ... h - 1, odd ones -h + 1 ... h; more lines than the side keep everything."""
    five, six, more = np.array([5]), np.array([6]), np.array([20])
    assert sorted(np.fft.fftfreq(8, 1 / 8)[gibbs_weights(six, 8)[0] > 0]) == [-3, -2, -1, 0, 1, 2]
    assert np.array_equal(gibbs_weights(five, 8), gibbs_weights(six, 8))
    assert sorted(np.fft.fftfreq(9, 1 / 9)[gibbs_weights(six, 9)[0] > 0]) == [-2, -1, 0, 1, 2, 3]
    assert np.all(gibbs_weights(more, 9) == 1)


@pytest.mark.parametrize(("lines", "overshoot"), [(96, 0.1002), (112, 0.0594), (126, 0.0078)])
def test_overshoot_at_a_step(lines, overshoot):
    step = torch.full((1, 128, 1, 1), 0.25, dtype=torch.float64)
    step[:, 64:] = 0.75
    free = gibbs_ringing(step, per_volume(lines), 0, clip=False)
    assert (free.amax() - 0.75).item() / 0.5 == pytest.approx(overshoot, abs=1e-4)
    assert gibbs_ringing(step, per_volume(lines), 0).amax() <= 0.75


def test_more_lines_are_closer():
    errors = [(gibbs_ringing(X, per_volume(k, k), 2, clip=False) - X).norm().item() for k in (10, 14, 18, 20)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9


@pytest.mark.parametrize("side", [8, 9, 15, 24, 32, 96])
def test_the_mean_survives_every_allowed_cut(side):
    """Regression: an absolute cut removes the zero frequency of small patches."""
    lines = torch.arange(round(0.75 * side), side + 1)
    assert np.all(gibbs_weights(lines.numpy(), side)[:, 0] == 1)
    x = torch.from_numpy(0.5 + 0.5 * np.random.default_rng(3).random((1, side, 4, 4))).expand(len(lines), -1, -1, -1)
    y = gibbs_ringing(x, lines, 0, clip=False)
    assert (y.mean((1, 2, 3)) - x.mean((1, 2, 3))).abs().amax() < 5e-3


@AXES
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_constant_volumes(axis, value):
    x = torch.full((2, *SHAPE), value)
    assert torch.all(ghosting(x, per_volume(0.85, 0.95), per_volume(2, 7), axis) == value)
    assert torch.all(gibbs_ringing(x, per_volume(8, 15), axis) == value)


@AXES
def test_range_clip_dtype_and_input(axis):
    x = (3 * X - 2).float()
    before = x.clone()
    for y in (ghosting(x, per_volume(0.85, 0.9), per_volume(3, 4), axis), gibbs_ringing(x, per_volume(9, 10), axis)):
        assert y.dtype == torch.float32
        low, high = x.amin((1, 2, 3)).view(-1, 1, 1, 1), x.amax((1, 2, 3)).view(-1, 1, 1, 1)
        assert torch.all((y >= low) & (y <= high))
    assert torch.equal(x, before)


def test_axis_of_one_voxel():
    x = X[:, :1].float()
    assert torch.isfinite(ghosting(x, per_volume(0.85, 0.9), per_volume(2, 3), 0)).all()
    torch.testing.assert_close(gibbs_ringing(x, per_volume(1, 1), 0), x)
