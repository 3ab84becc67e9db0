"""Noise, blur, low resolution, bias field and gamma on single volumes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from amaes import rng
from amaes.augment import intensity as fn

SHAPE = (12, 14, 10)
GENERATOR = np.random.default_rng(1)
X = torch.from_numpy(GENERATOR.random((3, *SHAPE), dtype=np.float32))
NOISE = torch.from_numpy(GENERATOR.standard_normal((3, *SHAPE), dtype=np.float32))
TABLES = list(zip(*(map(torch.from_numpy, fn.low_resolution_tables(side, side // 2)) for side in SHAPE), strict=True))


def full(value) -> torch.Tensor:
    return torch.full((3,), value)


def lengths(*values) -> torch.Tensor:
    return torch.tensor([values] * 3)


NEUTRAL = {
    "additive noise": (lambda x: fn.additive_noise(x, full(0.0), NOISE), 0),
    "multiplicative noise": (lambda x: fn.multiplicative_noise(x, full(0.0), NOISE), 0),
    "blur": (lambda x: fn.blur(x, full(0.124)), 0),
    "low resolution": (lambda x: fn.low_resolution(x, lengths(*SHAPE), *TABLES), 0),
    "gamma": (lambda x: fn.gamma(x, full(1.0), torch.tensor([False, True, False])), 1e-6),
}
STRONG = {
    "additive noise": lambda x: fn.additive_noise(x, full(0.5), NOISE),
    "multiplicative noise": lambda x: fn.multiplicative_noise(x, full(0.5), NOISE),
    "blur": lambda x: fn.blur(x, full(1.0)),
    "low resolution": lambda x: fn.low_resolution(x, lengths(6, 14, 5), *TABLES),
    "bias field": lambda x: fn.bias_field(x, lengths(0, 13, 4)),
    "exp bias field": lambda x: fn.bias_field(x, lengths(0, 13, 4), "exp"),
    "gamma": lambda x: fn.gamma(x, full(0.5), torch.tensor([False, True, False])),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_parameters_change_nothing(name):
    transform, tolerance = NEUTRAL[name]
    torch.testing.assert_close(transform(X), X, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", STRONG)
def test_result_stays_in_the_range_of_each_volume(name):
    x = torch.stack([X[0], 3 * X[1] - 2, X[2] / 10])  # one with a negative minimum
    before = x.clone()
    y = STRONG[name](x)
    assert torch.equal(x, before)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert not torch.equal(y, x)
    low, high = fn.value_range(x)
    assert torch.all((y >= low) & (y <= high))


@pytest.mark.parametrize("name", STRONG)
@pytest.mark.parametrize("value", [0.0, 0.7])
def test_constant_volumes_stay_constant(name, value):
    y = STRONG[name](torch.full((3, *SHAPE), value))
    assert torch.all(y == value)


@pytest.mark.parametrize("name", STRONG)
def test_float64_agrees_with_float32(name):
    if name != "low resolution":  # its range clip compares voxels that may tie differently
        torch.testing.assert_close(STRONG[name](X.double()).float(), STRONG[name](X), rtol=0, atol=2e-6)


def test_additive_noise_has_its_sigma():
    noise = rng.normal(torch.tensor([7, 8, 9]), 32**3).view(3, 32, 32, 32)
    x = torch.full((3, 32, 32, 32), 0.5)
    change = fn.additive_noise(x, full(1e-3), noise, clip=False) - x
    assert change.std().item() == pytest.approx(1e-3, rel=0.02)
    x[:, 0, 0, 0], x[:, 1:] = 1.0, 0.0
    background = fn.additive_noise(x, full(1e-3), noise)[:, 1:]
    assert background.mean().item() == pytest.approx(1e-3 / math.sqrt(2 * math.pi), rel=0.02)


def test_multiplicative_noise_is_relative():
    noise = rng.normal(torch.tensor([7, 8, 9]), 32**3).view(3, 32, 32, 32)
    x = torch.linspace(0.0, 1.0, 32**3).view(1, 32, 32, 32).expand(3, -1, -1, -1)
    y = fn.multiplicative_noise(x, full(1e-2), noise, clip=False)
    inner = x > 0
    assert ((y - x)[inner] / x[inner]).std().item() == pytest.approx(1e-2, rel=0.02)
    assert torch.all(y[~inner] == 0)


def test_noise_depends_on_the_key_alone():
    keys = torch.tensor([11, 12, 13])
    together = fn.voxel_noise(keys, SHAPE)
    assert together.shape == (3, *SHAPE)
    assert torch.equal(fn.voxel_noise(keys[[2, 0]], SHAPE), together[[2, 0]])


@pytest.mark.parametrize("sigma", [0.2, 0.6, 1.0])
def test_blur_keeps_the_sum_and_answers_impulses_with_its_taps(sigma):
    y = fn.blur(X, full(sigma))
    torch.testing.assert_close(y.sum((1, 2, 3)), X.sum((1, 2, 3)), rtol=1e-4, atol=0)
    impulse = torch.zeros(1, 11, 11, 11)
    impulse[0, 5, 5, 5] = 1
    taps = fn.blur_taps(torch.tensor([sigma]), 4)[0].float()
    expected = taps[:, None, None] * taps[:, None] * taps
    out = fn.blur(impulse, torch.tensor([sigma]), clip=False)[0, 1:10, 1:10, 1:10]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_blur_mirrors_with_the_edge_voxel_repeated():
    x = torch.arange(5.0).view(1, 5, 1, 1)
    taps = fn.blur_taps(torch.tensor([1.0]), 4)[0].float()
    padded = torch.tensor([3, 2, 1, 0, 0, 1, 2, 3, 4, 4, 3, 2, 1], dtype=torch.float32)
    expected = torch.stack([(taps * padded[i : i + 9]).sum() for i in range(5)])
    torch.testing.assert_close(fn.blur(x, torch.tensor([1.0])).flatten(), expected)


def test_low_resolution_leaves_other_axes_alone():
    x = X[:, :, :1, :1].expand(3, *SHAPE).contiguous()  # varies along axis 0 only
    y = fn.low_resolution(x, lengths(6, 14, 10), *TABLES)
    assert torch.equal(y, y[:, :, :1, :1].expand_as(y))
    flat = X[:, :1].expand(3, *SHAPE).contiguous()  # constant along axis 0
    torch.testing.assert_close(fn.low_resolution(flat, lengths(6, 14, 10), *TABLES), flat, rtol=0, atol=1e-6)


def test_low_resolution_stays_in_the_range_of_the_voxels_that_survive():
    y = fn.low_resolution(X, lengths(6, 9, 5), *TABLES)
    kept = [(np.arange(n) + 0.5) * side / n for side, n in zip(SHAPE, (6, 9, 5), strict=True)]  # centres of n samples
    x, y_, z = (torch.from_numpy(places.astype(int)) for places in kept)
    small = X[:, x][:, :, y_][:, :, :, z]
    low, high = fn.value_range(small)
    assert torch.all((y >= low) & (y <= high))


def test_low_resolution_lengths_differ_within_a_batch():
    rows = torch.tensor([[6, 14, 10], [12, 7, 10], [12, 14, 10]])
    together = fn.low_resolution(X, rows, *TABLES)
    for row in range(3):
        assert torch.equal(together[row : row + 1], fn.low_resolution(X[row : row + 1], rows[row : row + 1], *TABLES))
    assert torch.equal(together[2], X[2])


@pytest.mark.parametrize("mode", ["official", "exp"])
def test_bias_field_shape(mode):
    centre = torch.tensor([[4, 0, 9]])
    field = fn.bias_values(SHAPE, centre, mode, torch.float64)[0]
    if mode == "exp":
        assert torch.all((field > 0) & (field <= 1))
        field = 1 + field.log()
    assert field[4, 0, 9] == field.amax() == 1
    for axis, side in enumerate(SHAPE):
        second = field.diff(n=2, dim=axis)
        torch.testing.assert_close(second, torch.full_like(second, -2 / side**2), rtol=0, atol=1e-12)
        assert field.diff(n=3, dim=axis).abs().amax() < 1e-12
    mixed = field.diff(dim=0).diff(dim=1)
    assert mixed.abs().amax() < 1e-12  # a sum of functions of single axes
    assert field.amin() >= 1 - sum(((side - 1) / side) ** 2 for side in SHAPE)


def test_official_bias_field_turns_dark_where_it_is_negative():
    field = fn.bias_values(SHAPE, lengths(0, 0, 0))
    y = fn.bias_field(X, lengths(0, 0, 0))
    assert (field < 0).any()
    low = X.amin((1, 2, 3)).view(-1, 1, 1, 1).expand_as(y)
    assert torch.equal(y[field < 0], low[field < 0])


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("value", [0.5, 0.8, 1.5, 2.0])
def test_gamma_curve(value, inverted):
    y = fn.gamma(X, full(value), torch.full((3,), inverted))
    for before, after in zip(X.flatten(1), y.flatten(1), strict=True):
        order = before.argsort()
        assert torch.all(after[order].diff() >= -1e-6)  # monotone
        assert after[order[[0, -1]]].tolist() == pytest.approx(before[order[[0, -1]]].tolist(), abs=1e-6)
    brighter = (value < 1) != inverted
    assert torch.all((y >= X - 1e-6) if brighter else (y <= X + 1e-6))


def test_inverted_gamma_is_the_curve_of_the_negative():
    inverted = fn.gamma(X, full(1.7), full(True).bool())
    torch.testing.assert_close(inverted, 1 - fn.gamma(1 - X, full(1.7), full(False).bool()), rtol=0, atol=1e-6)
