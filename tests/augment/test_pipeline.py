"""Draws, presets, and the invariants of the whole augmentation."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from amaes.augment import Draws, FinetuneAugment, PretrainAugment, check_finite
from amaes.augment.options import INTENSITY, SPATIAL
from amaes.augment.spatial import centre_crop

PATCH = (12, 16, 20)
BATCH, CHANNELS = 4, 2
GATES = (*SPATIAL, *INTENSITY)


def window_for(augment, batch=BATCH, channels=CHANNELS, seed=0) -> torch.Tensor:
    values = np.random.default_rng(seed).random((batch, channels, *augment.window_size), dtype=np.float32)
    return torch.from_numpy(values)


def force(draws: Draws, **gates: bool) -> Draws:
    """Gates on or off for every sample."""
    return replace(draws, **{name: np.full_like(getattr(draws, name), value) for name, value in gates.items()})


def all_on(augment, batch=BATCH, channels=CHANNELS) -> Draws:
    return force(augment.draw([0] * batch, range(batch), channels), **dict.fromkeys(GATES, True))


def same_draws(first: Draws, second: Draws) -> bool:
    return all(np.array_equal(getattr(first, field.name), getattr(second, field.name)) for field in fields(Draws))


@pytest.fixture(scope="module")
def augment() -> PretrainAugment:
    return PretrainAugment(PATCH, elastic_sigma=(3.0, 5.0))


# --- draws ---


def test_draws_depend_on_seed_epoch_and_sample_alone(augment):
    draws = augment.draw([3, 1, 3], [7, 8, 9], CHANNELS)
    assert same_draws(draws[[2, 0]], augment.draw(torch.tensor([3, 3]), torch.tensor([9, 7]), CHANNELS))
    assert not same_draws(draws[:1], augment.draw([4], [7], CHANNELS))
    assert not same_draws(draws[:1], PretrainAugment(PATCH, seed=1).draw([3], [7], CHANNELS))
    one = augment.draw([3], [7], 1)
    assert np.array_equal(one.bias_field_centre, draws.bias_field_centre[:1, :1])  # channels add numbers, move none


def test_switching_a_transform_off_moves_no_other_draw(augment):
    fewer = PretrainAugment(PATCH, elastic_sigma=(3.0, 5.0), ghosting=0.0, rotation=0.0, blur=1.0)
    first, second = (a.draw([0] * 50, range(50), 1) for a in (augment, fewer))
    for field in fields(Draws):
        if field.name not in ("ghosting", "rotation", "blur"):
            assert np.array_equal(getattr(first, field.name), getattr(second, field.name)), field.name


@pytest.fixture(scope="module")
def many() -> Draws:
    rows = 20_000
    return PretrainAugment((32, 32, 32)).draw([0] * rows, range(rows), 1)


def assert_rate(hits: np.ndarray, expected: float) -> None:
    error = math.sqrt(expected * (1 - expected) / hits.size)
    assert abs(hits.mean() - expected) < 5 * error, (hits.mean(), expected)


def test_gate_frequencies(many):
    rates = {
        "rotation": 0.2,
        "scale": 0.2,
        "elastic": 0.33,
        "additive_noise": 0.2,
        "blur": 0.1,
        "multiplicative_noise": 0.2,
        "ghosting": 0.2,
        "gibbs_ringing": 0.2,
        "low_resolution": 0.1,
        "bias_field": 0.33,
        "gamma": 0.2,
    }
    assert set(rates) == set(GATES)
    for name, rate in rates.items():
        assert_rate(getattr(many, name), rate)
    spatial = np.stack([getattr(many, name) for name in SPATIAL])
    intensity = np.stack([getattr(many, name)[:, 0] for name in INTENSITY])
    assert_rate(~spatial.any(0), 0.4288)
    assert_rate(~intensity.any(0), 0.1778)
    assert_rate(~spatial.any(0) & ~intensity.any(0), 0.4288 * 0.1778)
    assert intensity.sum(0).mean() == pytest.approx(1.53, abs=0.05)
    assert_rate(~(spatial[1:].any(0) | (spatial[0] & (many.rotation_degrees != 0).any(1))), 0.4330)
    assert not many.mirror.any()


def test_parameter_distributions(many):
    assert_rate(many.rotation_degrees != 0, 0.66)
    assert_rate(many.gamma_inversion, 0.05)
    assert_rate(many.gamma_value < 1, 0.5)
    assert many.gamma_value.mean() == pytest.approx(1.125, abs=0.015)
    assert many.additive_noise_sigma.mean() == pytest.approx(5.5e-4, rel=0.02)
    assert_rate((many.low_resolution_lengths < 32).any(2), 1 - (1 - 0.33 * 31.5 / 32) ** 3)  # zoom > 31.5/32 rounds up
    for name, low, high in (
        ("rotation_degrees", -30, 30),
        ("scale_factor", 0.9, 1.1),
        ("elastic_alpha", 200, 600),
        ("elastic_sigma", 20, 30),
        ("blur_sigma", 0, 1),
        ("additive_noise_sigma", 1e-4, 1e-3),
        ("multiplicative_noise_sigma", 1e-4, 1e-3),
        ("ghosting_alpha", 0.85, 0.95),
        ("gamma_value", 0.5, 2.0),
    ):
        values = getattr(many, name)
        assert low <= values.min() < low + 0.01 * (high - low), name
        assert high - 0.01 * (high - low) < values.max() <= high, name


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ghosting_repetitions", range(2, 11)),
        ("ghosting_axis", range(3)),
        ("gibbs_ringing_lines", range(24, 33)),
        ("gibbs_ringing_axis", range(3)),
        ("bias_field_centre", range(32)),
    ],
)
def test_whole_numbers_are_uniform(many, name, values):
    drawn = getattr(many, name)
    assert set(np.unique(drawn)) == set(values)
    for value in values:
        assert_rate(drawn == value, 1 / len(values))


def test_low_resolution_lengths(many):
    assert set(np.unique(many.low_resolution_lengths)) == set(range(16, 33))
    chosen = many.low_resolution_lengths[:, 0]
    shared = [set(row[row < 32]) for row in chosen]
    assert all(len(lengths) <= 1 for lengths in shared)  # the chosen axes share one zoom


def test_summary_names_what_is_on(augment):
    draws = force(all_on(augment), **dict.fromkeys(GATES, False))
    assert draws.summary(0) == "nothing"
    assert force(draws, gamma=True).summary(0).startswith("gamma (value ")


# --- presets and options ---


def test_preset_none_is_the_window(augment):
    nothing = PretrainAugment(PATCH, preset="none")
    window = window_for(nothing)
    source, target = nothing(window, nothing.draw([0] * BATCH, range(BATCH), CHANNELS))
    assert torch.equal(source, window)
    assert torch.equal(target, window)
    assert source.data_ptr() != target.data_ptr() != window.data_ptr()


def test_preset_spatial_moves_source_and_target_alike():
    augment = PretrainAugment(PATCH, preset="spatial")
    window = window_for(augment)
    source, target = augment(window, force(augment.draw([0] * BATCH, range(BATCH), CHANNELS), rotation=True))
    assert torch.equal(source, target)
    assert not torch.equal(target, centre_crop(window, PATCH))


def test_bad_input_is_refused(augment):
    draws, window = augment.draw([0] * BATCH, range(BATCH), CHANNELS), window_for(augment)
    with pytest.raises(ValueError, match=r"window .*: expected \(4, 2, 24, 26, 26\)"):
        augment(window[..., 1:], draws)
    with pytest.raises(ValueError, match="expected floating-point"):
        augment(window.long(), draws)
    with pytest.raises(ValueError, match="3 epochs and 2 samples"):
        augment.draw([0, 0, 0], [1, 2], 1)
    window[2, 1, 3, 4, 5] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinite intensities in samples \[2\]"):
        augment(window, draws)
    check_finite(window[:2])
    finetune = FinetuneAugment(PATCH)
    image, draws = window_for(finetune), finetune.draw([0] * BATCH, range(BATCH), CHANNELS)
    with pytest.raises(ValueError, match="expected an integer dtype"):
        finetune(image, torch.zeros(BATCH, *PATCH), draws)
    with pytest.raises(ValueError, match=r"label .*: expected \(4, 12, 16, 20\)"):
        finetune(image, torch.zeros(BATCH, 1, *PATCH, dtype=torch.uint8), draws)


def test_large_half_precision_windows_are_finite():
    check_finite(torch.full((1, 1, 50, 50, 50), 1.0, dtype=torch.float16))  # the sum exceeds what float16 holds


# --- target ---


def test_target_is_the_spatial_output_bit_for_bit(augment):
    window, draws = window_for(augment), all_on(augment)
    source, target = augment(window, draws)
    clean, same = augment(window, force(draws, **dict.fromkeys(INTENSITY, False)))
    assert torch.equal(target, same)
    assert torch.equal(clean, same)
    assert (source != target).any()
    clean.zero_()
    assert same.any()  # no shared memory


def test_untouched_samples_are_the_exact_crop(augment):
    window = window_for(augment)
    draws = force(all_on(augment), **dict.fromkeys(GATES, False))
    draws.rotation[1] = draws.gamma[2] = True
    source, target = augment(window, draws)
    crop = centre_crop(window, PATCH)
    for row in (0, 2, 3):
        assert torch.equal(target[row], crop[row])
    for row in (0, 3):
        assert torch.equal(source[row], crop[row])
    assert not torch.equal(target[1], crop[1])
    assert not torch.equal(source[2], crop[2])


def test_official_window_resamples_every_sample():
    augment = PretrainAugment(PATCH, preset="spatial", window="official", elastic=0.0)
    assert augment.window_size == (23, 25, 25)
    window = window_for(augment)
    draws = force(augment.draw([0] * BATCH, range(BATCH), CHANNELS), **dict.fromkeys(SPATIAL, False))
    _, target = augment(window, draws)
    average = (window[:, :, 5:18] + window[:, :, 6:19])[:, :, :12] / 2
    for axis in (3, 4):  # half-voxel offsets along every axis
        side = PATCH[axis - 2]
        start = (window.shape[axis] - side) // 2
        average = (average.narrow(axis, start, side) + average.narrow(axis, start + 1, side)) / 2
    torch.testing.assert_close(target, average, rtol=0, atol=1e-6)


# --- invariants of the whole ---


def test_samples_are_independent_bit_for_bit(augment):
    window, draws = window_for(augment, batch=6), augment.draw([1] * 6, range(6), CHANNELS)
    draws = force(draws, elastic=True)
    for field in INTENSITY:
        getattr(draws, field)[[0, 3, 4]] = True
    together = augment(window, draws)
    order = [4, 0, 5, 2, 1, 3]
    shuffled = augment(window[order], draws[order])
    others = augment(torch.cat([window[:1], 5 * window_for(augment, 5, seed=9)]), draws)
    for result, permuted, changed in zip(together, shuffled, others, strict=True):
        assert torch.equal(result[order], permuted)
        assert torch.equal(result[:1], changed[:1])
    for row in range(6):
        alone = augment(window[row : row + 1], draws[row : row + 1])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True)), row


def test_channels_share_coordinates_and_nothing_else(augment):
    window = window_for(augment, channels=1).expand(-1, CHANNELS, -1, -1, -1)
    source, target = augment(window, all_on(augment))
    assert torch.equal(target[:, 0], target[:, 1])
    assert not torch.equal(source[:, 0], source[:, 1])


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("scale", [1.0, -3.0])
def test_range_is_never_exceeded(scale, order):
    augment = PretrainAugment((8, 12, 10), order=order, **dict.fromkeys(GATES, 0.7), mirror=0.5)
    batch = 250
    window = scale * window_for(augment, batch, 1)
    window[:, :, :3] = 0
    for epoch in range(4 if order == 1 else 1):
        for out in augment(window, augment.draw([epoch] * batch, range(batch), 1)):
            flat, bounds = out.flatten(1), window.flatten(1)
            assert torch.all(flat.amin(1) >= bounds.amin(1))
            assert torch.all(flat.amax(1) <= bounds.amax(1))


def test_input_is_not_changed_and_no_graph_is_recorded(augment):
    window = window_for(augment).requires_grad_()
    before = window.detach().clone()
    source, target = augment(window, all_on(augment))
    assert torch.equal(window, before)
    assert not source.requires_grad
    assert not target.requires_grad
    assert source.is_contiguous()


def test_settings_of_the_process_change_nothing(augment):
    window, draws = window_for(augment), all_on(augment)
    expected = augment(window, draws)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results = augment(window, draws)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for result, value in zip(results, expected, strict=True):
        assert result.dtype == torch.float32
        assert torch.equal(result, value)


def test_half_precision_windows_are_computed_in_float32(augment):
    window, draws = window_for(augment).half(), all_on(augment)
    for half, full in zip(augment(window, draws), augment(window.float(), draws), strict=True):
        assert half.dtype == torch.float32
        assert torch.equal(half, full)


@pytest.mark.parametrize("value", [0.0, 0.4])
def test_constant_volumes_stay_constant(augment, value):
    window = torch.full((BATCH, CHANNELS, *augment.window_size), value)
    source, target = augment(window, all_on(augment))
    torch.testing.assert_close(target, torch.full_like(target, value), rtol=0, atol=1e-7)
    torch.testing.assert_close(source, target, rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("patch", [(1, 12, 10), (10, 1, 1), (2, 3, 9)])
def test_thin_patches(patch, order):
    for window in ("parity", "none"):
        augment = PretrainAugment(patch, order=order, window=window)
        for out in augment(window_for(augment), all_on(augment)):
            assert out.shape == (BATCH, CHANNELS, *patch)
            assert torch.isfinite(out).all()


def test_float64_agrees(augment):
    window, draws = window_for(augment), force(all_on(augment), low_resolution=False)
    for double, single in zip(augment(window.double(), draws), augment(window, draws), strict=True):
        torch.testing.assert_close(double.float(), single, rtol=0, atol=1e-4)  # random voxels: steep everywhere


def test_cubic_interpolation_of_smooth_data_is_close_to_linear():
    linear, cubic = (PretrainAugment(PATCH, preset="spatial", order=order) for order in (1, 3))
    axes = [torch.linspace(-1, 1, side) for side in linear.window_size]
    smooth = sum(torch.cos(2 * a).view(-1, *(1,) * (2 - d)) for d, a in enumerate(axes)).expand(BATCH, 1, -1, -1, -1)
    draws = force(linear.draw([0] * BATCH, range(BATCH), 1), rotation=True)
    first, second = linear(smooth, draws)[1], cubic(smooth, draws)[1]
    torch.testing.assert_close(first, second, rtol=0, atol=0.03)
    assert not torch.equal(first, second)


# --- mirror, fine-tuning ---


def test_mirror_flips_source_target_and_label():
    options = {"mirror": 1.0, "mirror_axis": 1.0}
    pretrain = PretrainAugment(PATCH, preset="spatial", rotation=0.0, scale=0.0, elastic=0.0, **options)
    window = window_for(pretrain)
    draws = pretrain.draw([0] * BATCH, range(BATCH), CHANNELS)
    assert all(torch.equal(out, window.flip((2, 3, 4))) for out in pretrain(window, draws))
    finetune = FinetuneAugment(PATCH, rotation=0.0, scale=0.0, **options)
    label = (window[:, 0] > 0.5).to(torch.uint8)
    image, moved = finetune(window, label, draws)
    assert torch.equal(image, window.flip((2, 3, 4)))
    assert torch.equal(moved, label.flip((1, 2, 3)))


@pytest.mark.parametrize("preset", ["spatial", "all"])
@pytest.mark.parametrize("window", ["none", "parity"])
def test_labels_follow_the_image(preset, window):
    augment = FinetuneAugment((24, 20, 16), preset=preset, window=window)
    axes = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in augment.window_size), indexing="ij")
    image = (1 - sum((a / b) ** 2 for a, b in zip(axes, (9, 6, 7), strict=True)) / 2).clamp(min=0)
    label = (image > 0.6).to(torch.int16) * 7
    draws = augment.draw([0] * BATCH, range(BATCH), 1)
    draws = force(draws, rotation=True, scale=True, elastic=preset == "all", **dict.fromkeys(INTENSITY, False))
    out, moved = augment(image.expand(BATCH, 1, -1, -1, -1), label.expand(BATCH, -1, -1, -1), draws)
    assert moved.dtype == torch.int16
    assert set(moved.unique().tolist()) == {0, 7}
    wrong = (out[:, 0] > 0.6) != (moved == 7)
    assert wrong.float().mean() < 0.04
    assert torch.all((out[:, 0][wrong] - 0.6).abs() < 0.15)
    assert not torch.equal(moved[0], moved[1])


def test_intensity_transforms_leave_labels_alone():
    augment = FinetuneAugment(PATCH, preset="all", clip=True)
    window = window_for(augment)
    label = (window[:, 1] > 0.5).to(torch.uint8)
    draws = force(all_on(augment), **dict.fromkeys(SPATIAL, False))
    image, moved = augment(window, label, draws)
    assert torch.equal(moved, label)
    assert moved.data_ptr() != label.data_ptr()
    assert not torch.equal(image, window)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu_and_never_waits(augment):
    window, draws = window_for(augment), force(all_on(augment), low_resolution=False)
    augment(window.cuda(), draws)  # sends the tables
    on_device = window.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = augment(on_device, draws)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for result, expected in zip(results, augment(window, draws), strict=True):
        torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=2e-5)
