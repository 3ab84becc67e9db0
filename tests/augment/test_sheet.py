"""The sheets of python -m amaes.augment."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from amaes.augment import PretrainAugment
from amaes.augment.__main__ import main, parse_options
from amaes.augment.options import INTENSITY, SPATIAL
from amaes.augment.sheets import axial, draw_rows, transform_rows, weak_and_strong

PATCH = (16, 20, 24)


@pytest.fixture(scope="module")
def augment() -> PretrainAugment:
    return PretrainAugment(PATCH, elastic_sigma=(20.0, 30.0))


@pytest.fixture(scope="module")
def window(augment) -> torch.Tensor:
    values = np.random.default_rng(0).random((1, 1, *augment.window_size), dtype=np.float32)
    return torch.from_numpy(values)


def test_every_transform_has_a_row_and_its_strongest_setting_shows(augment, window):
    assert set(weak_and_strong(PATCH)) == {*SPATIAL, *INTENSITY}
    for row in transform_rows(augment, window):
        plain, weak, weak_change, strong, change = (panel.image for panel in row.panels)
        assert plain.shape == weak_change.shape == change.shape == (20, 16), row.title
        assert np.abs(strong - plain).max() > 1e-4, row.title
        assert np.abs(weak - plain).max() <= np.abs(strong - plain).max(), row.title  # the weak one changes less
        np.testing.assert_allclose(change, np.abs(strong - plain) / np.abs(strong - plain).max(), rtol=1e-5)


def test_ten_draws(augment, window):
    rows = draw_rows(augment, window, token_size=4, mask_ratio=0.6)
    assert len(rows) == 10
    for row in rows:
        _, source, mask, masked = (panel.image for panel in row.panels)
        assert np.array_equal(masked, np.where(mask > 0, 0, source))


def test_slice_shows_anterior_up():
    volume = torch.zeros(1, 1, 3, 4, 5)
    volume[0, 0, 2, 3, 2] = 1  # right, anterior
    assert np.argwhere(axial(volume)).tolist() == [[0, 2]]


def test_missing_matplotlib_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"`out`: needs matplotlib .*: pip install 'amaes\[plots\]'"):
        main([str(tmp_path / "scan.nii"), "--out", str(tmp_path)])


def test_sheets_are_written(tmp_path, nifti_file):
    pytest.importorskip("matplotlib")
    scan = nifti_file("scan.nii.gz")
    assert main([str(scan), "--out", str(tmp_path / "out"), "--patch-size", "16", "20", "24"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["draws.png", "transforms.png"]


def test_missing_scan_is_named(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(FileNotFoundError, match="scan.nii: no such file"):
        main([str(tmp_path / "scan.nii"), "--out", str(tmp_path)])


@pytest.mark.parametrize(("given", "sides"), [(["16"], (16, 16, 16)), (["16", "20", "24"], (16, 20, 24))])
def test_a_patch_is_a_cube_or_three_sides(given, sides):
    assert parse_options(["scan.nii", "--out", "out", "--patch-size", *given]).patch_size == sides
