"""Geometry: rotations, scaling, elastic deformation, borders, labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from amaes.augment import spatial

GENERATOR = np.random.default_rng(0)
CUBE = torch.from_numpy(GENERATOR.random((1, 2, 12, 12, 12), dtype=np.float32))
BOX = torch.from_numpy(GENERATOR.random((1, 1, 14, 16, 18), dtype=np.float32))


def matrix(degrees=(0, 0, 0), scale=1.0) -> torch.Tensor:
    return torch.from_numpy(spatial.coordinate_matrices(np.array([degrees], dtype=float), np.array([scale])))


def turn(x: torch.Tensor, degrees=(0, 0, 0), scale=1.0, patch=None, cubic=False, **options) -> torch.Tensor:
    offsets = spatial.sampling_offsets(matrix(degrees, scale), patch or x.shape[2:], x.dtype)
    return spatial.resample(x, offsets, filters=filters(x) if cubic else None, **options)


def filters(x: torch.Tensor) -> list[torch.Tensor]:
    return [torch.from_numpy(spatial.spline_filter(side)) for side in x.shape[2:]]


def ramp(shape, direction) -> torch.Tensor:
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in shape), indexing="ij")
    return sum(slope * axis for slope, axis in zip(direction, axes, strict=True))[None, None]


@pytest.mark.parametrize(
    ("patch", "official", "parity"),
    [
        ((128, 128, 128), (181, 181, 181), (182, 182, 182)),
        ((32, 32, 32), (45, 45, 45), (46, 46, 46)),
        ((64, 64, 64), (90, 90, 90), (90, 90, 90)),
        ((128, 128, 96), (181, 181, 160), (182, 182, 160)),
        ((64, 96, 128), (143, 160, 160), (144, 160, 160)),
    ],
)
def test_window_sizes(patch, official, parity):
    assert spatial.window_size(patch, "official") == official
    assert spatial.window_size(patch, "parity") == parity
    assert spatial.window_size(patch, "none") == patch


@pytest.mark.parametrize("cubic", [False, True])
def test_identity_is_the_centre_crop(cubic):
    patch = (8, 10, 12)
    torch.testing.assert_close(turn(BOX, patch=patch, cubic=cubic), spatial.centre_crop(BOX, patch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize(("axis", "dims"), [(0, (1, 2)), (1, (2, 0)), (2, (0, 1))])
@pytest.mark.parametrize("quarters", [-1, 1, 2])
def test_quarter_turns(axis, dims, quarters, cubic):
    degrees = [90 * quarters if d == axis else 0 for d in range(3)]
    expected = torch.rot90(CUBE, quarters, [d + 2 for d in dims])
    torch.testing.assert_close(turn(CUBE, degrees, cubic=cubic), expected, rtol=0, atol=1e-5)


def test_rotations_apply_about_axis_2_first():
    expected = torch.rot90(torch.rot90(CUBE, 1, (2, 3)), 1, (3, 4))
    torch.testing.assert_close(turn(CUBE, (90, 0, 90)), expected, rtol=0, atol=1e-5)


def test_scale_half_halves_the_slope():
    x = ramp((16, 16, 16), (1, 0, 0)).float()
    torch.testing.assert_close(turn(x, scale=0.5), 0.5 * x, rtol=0, atol=1e-5)


def test_scale_above_one_fills_the_border_with_the_minimum():
    out = turn(CUBE, scale=1.5)
    low = CUBE.amin()
    border = torch.ones(12, 12, 12, dtype=torch.bool)
    border[2:10, 2:10, 2:10] = False  # 1.5 * 3.5 <= 5.5 < 1.5 * 4.5
    assert torch.all(out[..., border] == low)
    assert torch.all(out[..., ~border] > low)


@pytest.mark.parametrize("fill", [-3.0, 7.5])
def test_fill_value_is_never_blended(fill):
    out = turn(CUBE + 1, (20, -10, 30), 1.2, fill=fill, clip=False)
    inside = (out >= 1) & (out <= 2)
    assert torch.all(inside | (out == fill))
    assert 0 < inside.float().mean() < 1


def test_rounding_does_not_push_border_voxels_outside():
    offsets = torch.tensor([5.5, 5.5005, -5.5005, 5.502, -5.502]).view(1, 1, 5, 1, 1) * torch.ones(1, 3, 1, 1, 1)
    assert spatial.outside(offsets, (12, 12, 12)).flatten().tolist() == [False, False, False, True, True]


def test_fill_minimum_is_per_sample_over_channels():
    x = torch.cat([CUBE, CUBE + 1])  # two samples
    offsets = spatial.sampling_offsets(matrix(scale=1.5).expand(2, 3, 3), (12, 12, 12))
    corner = spatial.resample(x, offsets)[:, :, 0, 0, 0]
    assert torch.equal(corner, x.flatten(1).amin(1)[:, None].expand(2, 2))


@pytest.mark.parametrize("direction", [(1, 0, 0), (0.5, -2, 0.25)])
def test_linear_ramps_are_exact(direction):
    x = ramp((40, 40, 40), direction)
    degrees, scale, patch = (17, -25, 30), 1.05, (12, 14, 10)
    positions = spatial.sampling_offsets(matrix(degrees, scale), patch, torch.float64)[0]
    expected = sum(slope * q for slope, q in zip(direction, positions, strict=True))
    span = (x.amax() - x.amin()).item()
    torch.testing.assert_close(turn(x, degrees, scale, patch)[0, 0], expected, rtol=0, atol=1e-9 * span)
    torch.testing.assert_close(turn(x.float(), degrees, scale, patch)[0, 0], expected.float(), rtol=0, atol=1e-5 * span)
    margin = min((39 / 2) - q.abs().amax().item() for q in positions)
    tolerance = 0.268**margin * span * 2  # the mirror at the faces bends the spline there
    torch.testing.assert_close(turn(x, degrees, scale, patch, True)[0, 0], expected, rtol=0, atol=tolerance)


def test_constant_displacement_is_a_shift():
    shift = torch.zeros(1, 3, 8, 8, 8)
    shift[:, 0] = 1.0
    offsets = spatial.sampling_offsets(matrix(), (8, 8, 8)) + spatial.transform_displacement(matrix().float(), shift)
    expected = BOX[:, :, 4:12, 4:12, 5:13]
    torch.testing.assert_close(spatial.resample(BOX, offsets), expected, rtol=0, atol=1e-5)


def test_displacement_is_rotated_and_scaled():
    """q = s R^T (p + d) with d along axis 0: a quarter turn about axis 2 sends it to axis 1, backwards."""
    d = torch.zeros(1, 3, 2, 2, 2, dtype=torch.float64)
    d[:, 0] = 1.0
    q = spatial.transform_displacement(matrix((0, 0, 90), 2.0), d)
    torch.testing.assert_close(q[0, :, 0, 0, 0], torch.tensor([0.0, -2.0, 0.0], dtype=torch.float64))


def test_low_rank_field_has_the_covariance_of_filtered_noise():
    for side in (48, 128):
        basis = torch.from_numpy(spatial.smoothing_basis(20.0, side))
        for sigma in (20.0, 25.0, 30.0):
            filters = spatial.smoothing_matrix(torch.tensor([sigma], dtype=torch.float64), side, 120)[0]
            full, low = filters @ filters.T, (filters @ basis) @ (filters @ basis).T
            assert (full - low).norm() < 3e-6 * full.norm()
    assert basis.shape == (128, 10)


@pytest.fixture(scope="module")
def fields() -> tuple[torch.Tensor, torch.Tensor]:
    """120 draws of unit coefficients at side 128, on every 8th voxel and at full resolution along one line."""
    basis = torch.from_numpy(spatial.smoothing_basis(20.0, 128))
    filters = spatial.smoothing_matrix(torch.tensor([20.0], dtype=torch.float64), 128, 120)[0] @ basis
    noise = torch.from_numpy(GENERATOR.uniform(-1, 1, (360, 10, 10, 10)))
    some = filters[::8]
    coarse = torch.einsum("nabc,xa,yb,zc->nxyz", noise, some, some, some)
    line = torch.einsum("nabc,a,b,zc->nz", noise, filters[64], filters[64], filters)
    return coarse, line


def test_elastic_size(fields):
    """rms 8.42e-4 alpha over the patch at sigma = 20, corners about 0.37 of the centre."""
    coarse, _ = fields
    assert coarse.square().mean().sqrt().item() == pytest.approx(8.42e-4, rel=0.1)
    deviation = coarse.square().mean(0).sqrt()
    corners = torch.stack([deviation[x, y, z] for x in (0, -1) for y in (0, -1) for z in (0, -1)]).mean()
    centre = deviation[7:9, 7:9, 7:9].mean()
    # the last coarse voxel is 120, not 127: the true corners, index 0, are half of these
    assert 0.3 < (deviation[0, 0, 0] / centre).item() < 0.45
    assert corners > deviation[0, 0, 0]


def test_elastic_field_is_smooth(fields):
    _, line = fields
    assert line.diff(dim=1).abs().amax() < 0.1 * line.abs().amax()


def test_elastic_bound_holds():
    basis = torch.from_numpy(spatial.smoothing_basis(4.0, 20))
    sigma = np.array([4.0, 6.0])
    factors = [spatial.smoothing_matrix(torch.from_numpy(sigma), 20, 24) @ basis] * 3
    coefficients = GENERATOR.uniform(-300, 300, (2, 3, *[basis.shape[1]] * 3))
    unmoved = matrix().expand(2, 3, 3)
    offsets = spatial.elastic_offsets(unmoved, torch.from_numpy(coefficients), factors, torch.float64)
    largest = (offsets - spatial.sampling_offsets(unmoved, (20, 20, 20), torch.float64)).abs().amax((1, 2, 3, 4))
    bound = torch.from_numpy(spatial.elastic_bound(coefficients, sigma))
    assert torch.all(largest < bound)
    assert torch.all(bound < 20 * largest)


@pytest.mark.parametrize("degrees", [(0, 0, 0), (3, -2, 5), (30, -30, 30), (10, 0, 0)])
@pytest.mark.parametrize("scale", [0.9, 1.0, 1.05, 1.1])
def test_host_knows_what_leaves_the_window(degrees, scale):
    patch, window = (16, 12, 20), (20, 16, 22)
    offsets = spatial.sampling_offsets(matrix(degrees, scale), patch)
    leaves = spatial.leaves_window(matrix(degrees, scale).numpy(), np.zeros(1), patch, window)
    assert bool(spatial.outside(offsets, window).any()) == leaves[0]


def test_labels_round_halves_up():
    label = torch.arange(5, dtype=torch.uint8).view(1, 5, 1, 1) + 10
    offsets = torch.zeros(1, 3, 6, 1, 1)
    offsets[0, 0, :, 0, 0] = torch.tensor([-2.5, -2.0, -1.5, 0.5, 2.0, 2.3])
    assert spatial.sample_label(label, offsets).flatten().tolist() == [0, 10, 11, 13, 14, 0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_labels_stay_labels(dtype):
    label = torch.from_numpy(GENERATOR.choice([3, 7, 200], (1, 14, 16, 18))).to(dtype)
    offsets = spatial.sampling_offsets(matrix((30, 20, -30), 1.1), (14, 16, 18))
    moved = spatial.sample_label(label, offsets)
    assert moved.dtype == dtype
    assert set(moved.unique().tolist()) == {0, 3, 7, 200}


def test_label_moves_with_the_image():
    axes = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in (24, 26, 28)), indexing="ij")
    x = (1 - sum((a / b) ** 2 for a, b in zip(axes, (8, 6, 10), strict=True)) / 2).clamp(min=0)[None, None]
    label = (x[:, 0] > 0.6).to(torch.uint8)
    offsets = spatial.sampling_offsets(matrix((25, -20, 30), 0.95), (20, 20, 20))
    image, moved = spatial.resample(x, offsets)[:, 0], spatial.sample_label(label, offsets)
    wrong = (image > 0.6) != (moved == 1)
    assert wrong.float().mean() < 0.03
    assert torch.all((image[wrong] - 0.6).abs() < 0.1)  # on the boundary only


@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize("shape", [(1, 9, 11), (9, 1, 2), (2, 11, 1)])
def test_axes_of_one_voxel(shape, cubic):
    x = torch.from_numpy(GENERATOR.random((2, 1, *shape), dtype=np.float32))
    offsets = spatial.sampling_offsets(matrix().expand(2, 3, 3), shape)
    filters_of_x = filters(x) if cubic else None
    torch.testing.assert_close(spatial.resample(x, offsets, filters=filters_of_x), x, rtol=0, atol=1e-5)
    assert torch.isfinite(turn(x[:1], (10, 20, 30), cubic=cubic)).all()


def test_cubic_overshoots_without_the_clip_only():
    x = (BOX > 0.5).float()
    assert turn(x, (20, 0, 0), cubic=True, clip=False, border=False).amax() > 1.01
    clipped = turn(x, (20, 0, 0), cubic=True)
    assert clipped.amin() == 0
    assert clipped.amax() == 1
