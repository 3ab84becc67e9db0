"""The contact sheets of python -m amaes.augment."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from amaes.augment import PretrainAugment
from amaes.augment.__main__ import central_window, draw_rows, main, middle_slice, settings, transform_rows
from amaes.augment.draws import INTENSITY, SPATIAL

PATCH = (16, 20, 24)


@pytest.fixture(scope="module")
def augment() -> PretrainAugment:
    return PretrainAugment(PATCH, elastic_sigma=(20.0, 30.0))


@pytest.fixture(scope="module")
def window(augment) -> torch.Tensor:
    values = np.random.default_rng(0).random((1, 1, *augment.window_size), dtype=np.float32)
    return torch.from_numpy(values)


def test_every_transform_has_a_row_and_its_strongest_setting_shows(augment, window):
    assert set(settings(PATCH)) == {*SPATIAL, *INTENSITY}
    for title, panels in transform_rows(augment, window):
        change = panels[4][1]
        assert change.shape == (20, 16), title
        assert change.max() > 1e-4, title
        assert panels[2][1].max() <= change.max(), title  # the weak one changes less


def test_ten_draws(augment, window):
    rows = draw_rows(augment, window, token_size=4, mask_ratio=0.6)
    assert len(rows) == 10
    for _, panels in rows:
        _, source, mask, masked = (image for _, image, _ in panels)
        assert np.array_equal(masked, np.where(mask > 0, 0, source))


def test_window_is_cropped_and_padded_around_the_middle():
    volume = np.arange(1, 4 * 3 * 2 + 1, dtype=np.float32).reshape(4, 3, 2)
    window = central_window(volume, (2, 5, 2))[0, 0].numpy()
    assert np.array_equal(window[:, 1:4], volume[1:3])
    assert np.all(window[:, [0, 4]] == 1)


def test_slice_shows_anterior_up():
    volume = torch.zeros(1, 1, 3, 4, 5)
    volume[0, 0, 2, 3, 2] = 1  # right, anterior
    assert np.argwhere(middle_slice(volume)).tolist() == [[0, 2]]


def test_missing_matplotlib_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"need matplotlib: pip install 'amaes\[plots\]'"):
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
