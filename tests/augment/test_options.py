"""Every option changes what it says, in the pipeline as the training scripts call it; channels draw as published."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from amaes.augment import FinetuneAugment, PretrainAugment

PATCH = (16, 20, 12)


def plateau(augment, channels=1, samples=8):
    """Windows of 0 and 1 only, where overshoot shows."""
    noise = torch.rand(samples, channels, *augment.window_size, generator=torch.Generator().manual_seed(0))
    return (noise > 0.5).float()


def run(samples=8, epoch=0, **options):
    augment = PretrainAugment(PATCH, "all", seed=1, **options)
    draws = augment.draw([epoch] * samples, list(range(samples)), 1)
    return augment(plateau(augment, samples=samples), draws)


@pytest.mark.parametrize("order", [1, 3])
def test_plateaus_at_the_ends_of_the_range_are_not_exceeded(order):
    for epoch in range(6):
        for volume in run(epoch=epoch, order=order, rotation=1.0, scale=1.0):
            assert volume.min() >= 0
            assert volume.max() <= 1


def test_low_resolution_does_not_overshoot_in_fine_tuning_either():
    augment = FinetuneAugment(
        PATCH, "all", seed=0, low_resolution=1.0, low_resolution_channel=1.0, gamma=0.0, bias_field=0.0
    )
    draws = augment.draw([0] * 8, list(range(8)), 1).only("low_resolution")
    image, _ = augment(plateau(augment), torch.zeros(8, *augment.window_size, dtype=torch.uint8), draws)
    assert image.min() >= 0
    assert image.max() <= 1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_memory_layout_does_not_depend_on_the_draw(axis):
    augment = PretrainAugment(PATCH, "all", seed=0, ghosting=1.0)
    draws = next(
        d
        for d in (augment.draw([epoch], [0], 1).only("ghosting") for epoch in range(50))
        if d.ghosting_axis[0, 0] == axis
    )
    assert augment(plateau(augment, samples=1), draws)[0].is_contiguous()


@pytest.mark.parametrize(
    "change",
    [
        {"bias_field": 1.0, "bias": "exp"},
        {"bias_field": 1.0, "clip": False},
        {"elastic": 1.0, "elastic_alpha": (2000.0, 2000.0)},
        {"rotation": 1.0, "fill": 0.5},
        {"rotation": 1.0, "order": 3},
        {"gamma": 1.0, "gamma_inversion": 1.0},
    ],
)
def test_an_option_changes_the_result(change):
    name = next(iter(change))
    with_default = run(**{name: 1.0})
    changed = run(**change)
    assert any(not torch.equal(a, b) for a, b in zip(with_default, changed, strict=True))


def test_draws_are_per_sample_or_per_channel_as_published():
    augment = PretrainAugment(PATCH, "all", seed=0)
    draws = augment.draw([0] * 500, list(range(500)), 2)
    for name in ("blur_sigma", "gamma", "gamma_inversion"):
        values = np.asarray(getattr(draws, name)).reshape(500, -1)
        assert values.shape[1] == 1 or (values[:, 0] == values[:, 1]).all(), name
    for name in ("additive_noise", "multiplicative_noise", "ghosting", "gibbs_ringing", "bias_field"):
        values = np.asarray(getattr(draws, name))
        assert (values[:, 0] != values[:, 1]).any(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"preset": "none", "order": 3},
            "order=3: nothing reads it, as the probability of elastic and rotation and sc",
        ),
        ({"rotation": 0.0, "scale": 0.0, "elastic": 0.0, "fill": 0.5}, "fill=0.5: nothing reads it"),
        ({"preset": "none", "clip": False}, "clip=False: nothing reads it.*; accepted then: True"),
        ({"gamma": 0.0, "gamma_low": (0.2, 0.3)}, "gamma_low=.*as the probability of gamma is 0"),
        ({"mirror_axis": 0.5}, "mirror_axis=0.5: nothing reads it"),
        ({"bias_field": 0.0, "bias": "exp"}, "bias='exp': nothing reads it, as the probability of bias_field is 0"),
    ],
)
def test_options_that_nothing_reads_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PretrainAugment(**({"patch_size": PATCH} | options))


def test_options_and_help_need_no_torch():
    code = """
import sys
from amaes.augment import PRETRAIN_PRESETS, Options
from amaes.augment.__main__ import parse_options
try:
    parse_options(["--help"])
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--mask-ratio" in done.stdout


def test_what_scripts_always_give_and_default_values_are_accepted():
    assert FinetuneAugment(PATCH, "none", window="parity").window_size == PATCH
    assert PretrainAugment(PATCH, "none", order=1, fill="min").preset == "none"
    assert PretrainAugment(PATCH, "all", mirror=0.5, mirror_axis=0.5).options.mirror_axis == 0.5


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("blur_sigma", 1.5, "draws: blur_sigma 1.5, expected 0.0 to 1.0, what these options can draw"),
        ("elastic_sigma", 31.0, "draws: elastic_sigma 31, expected 20.0 to 30.0"),
        ("elastic_sigma", 19.0, "draws: elastic_sigma 19"),
        ("low_resolution_lengths", 7, r"draws: low_resolution_lengths 7, expected \[ 8 10  6\] to \[16 20 12\]"),
    ],
)
def test_replayed_draws_beyond_the_options_are_refused(field, value, message):
    augment = PretrainAugment(PATCH, "all")
    draws = augment.draw([0], [0], 1)
    name = field.rsplit("_", 1)[0]
    beyond = replace(draws.only(name), **{field: np.full_like(getattr(draws, field), value)})
    window = plateau(augment, samples=1)
    with pytest.raises(ValueError, match=message):
        augment(window, beyond)
    assert augment(window, replace(beyond, **{name: np.zeros_like(getattr(beyond, name))}))[0].shape[2:] == PATCH


def test_draws_at_the_ends_of_the_options_are_accepted():
    augment = PretrainAugment(PATCH, "all")
    draws = augment.draw([0], [0], 1)
    ends = {"blur_sigma": 1.0, "elastic_sigma": 30.0, "low_resolution_lengths": np.array([8, 20, 6])}
    full = {field: np.broadcast_to(value, getattr(draws, field).shape) for field, value in ends.items()}
    ends = replace(draws.only("blur", "elastic", "low_resolution"), **full)
    assert augment(plateau(augment, samples=1), ends)[0].isfinite().all()
