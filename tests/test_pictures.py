"""Slices, outlines, and the sheets that are written of them."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from amaes import pictures
from amaes.pictures import COLOURS, Panel, Row, centred, hstack, middle_slices, outlined, write_patches, write_sheet


def test_slices_show_anterior_or_superior_up_and_the_face_on_the_left():
    volume = np.zeros((3, 4, 5))
    volume[2, 3, 2] = 1  # right, anterior
    volume[1, 2, 4] = 2  # superior
    volume[1, 3, 2] = 3  # anterior
    axial, coronal, sagittal = middle_slices(volume)
    assert (axial.shape, coronal.shape, sagittal.shape) == ((4, 3), (5, 3), (5, 4))
    assert (axial[0, 2], axial[0, 1]) == (1, 3)  # the right of the subject on the right
    assert coronal[0, 1] == 2
    assert (sagittal[0, 1], sagittal[2, 0]) == (2, 3)


def test_slices_have_true_proportions_and_keep_the_values():
    volume = np.random.default_rng(0).integers(0, 9, (4, 6, 5))
    axial, coronal, sagittal = middle_slices(volume, spacing=(1.0, 0.5, 2.0))  # mm; a pixel is 0.5 mm
    assert (axial.shape, coronal.shape, sagittal.shape) == ((6, 8), (20, 8), (20, 6))
    assert np.array_equal(axial[:, ::2], volume[:, ::-1, 2].T)
    coarse = middle_slices(volume, spacing=(1.0, 0.5, 2.0), pixel=1.0)
    assert [image.shape for image in coarse] == [(3, 4), (10, 4), (10, 3)]


def test_arrays_are_cropped_and_padded_around_the_middle():
    volume = np.arange(1, 4 * 3 * 2 + 1, dtype=np.float32).reshape(4, 3, 2)
    window = centred(volume, (2, 5, 2), fill=volume.min())
    assert np.array_equal(window[:, 1:4], volume[1:3])
    assert np.all(window[:, [0, 4]] == 1)


def test_images_stand_side_by_side():
    row = hstack([np.ones((2, 3)), np.full((4, 1), 2.0)])
    assert row.shape == (4, 4 + pictures.GAP)
    assert row[1:3, :3].sum() == row.sum() - 8 == 6


def test_outlines_of_a_label():
    label = np.zeros((7, 6), np.uint8)
    label[1:6, 1:5] = 2
    label[3, 2] = 0
    shown = outlined(np.full((7, 6), 0.5), label)
    coloured = (shown != 0.5).any(2)
    expected = label > 0
    expected[4, 3] = False  # the only voxel all of whose neighbours are of its class, besides (2, 3)
    expected[2, 3] = False
    assert coloured[3, 3]  # beside the hole
    assert np.array_equal(coloured, expected)
    np.testing.assert_allclose(shown[1, 1], COLOURS[1], rtol=1e-6)


def test_intensities_outside_of_the_range_and_not_finite():
    shown = outlined(np.array([[-1.0, 2.0, np.nan]]), None)
    assert shown[0, :, 0].tolist() == [0, 1, 0]


def test_missing_matplotlib_names_the_parameter_and_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"`panels_every`: needs matplotlib \(.*\): pip install 'amaes\[plots\]'"):
        pictures.check_matplotlib("panels_every")


def read_png(path) -> np.ndarray:
    return pytest.importorskip("matplotlib.image").imread(path)[:, :, :3]


def test_a_sheet_shows_its_panels_in_columns(tmp_path):
    pytest.importorskip("matplotlib")
    white, label = np.ones((30, 40)), np.zeros((30, 40), np.uint8)
    label[10:20, 10:30] = 1
    rows = [
        Row("first", [Panel(white, "a\nb", label), Panel(white / 2, "$c$", marked=True)]),
        Row("", [Panel(white[:20], "d")]),
    ]
    write_sheet(tmp_path / "sheet.png", "heading", rows, zoom=2)
    page = read_png(tmp_path / "sheet.png")
    first = pictures.HEADING + pictures.TITLE + 2 * pictures.LINE + 3
    second = first + 60 + pictures.GAP + pictures.LINE + 3
    assert page.shape == (second + 40 + pictures.GAP, 300, 3)
    panel = page[first : first + 60, :80]
    np.testing.assert_allclose(panel[20, 30], COLOURS[0], atol=0.01)
    assert np.all(panel[:20] == 1)
    assert np.all(panel[24:36, 24:56] == 1)  # inside the outline
    np.testing.assert_allclose(page[first : first + 60, 80 + pictures.GAP : 160 + pictures.GAP], 0.5, atol=0.01)
    assert np.all(page[second : second + 40, :80] == 1)
    assert not page[second + 40 :].any()


def test_patches_have_a_row_each(tmp_path):
    pytest.importorskip("matplotlib")
    images = {"seen": torch.zeros(2, 1, 8, 6, 4), "target": torch.ones(2, 1, 8, 6, 4).bfloat16()}
    write_patches(tmp_path / "panels" / "step-1.png", images, ["one", "two"], "run, step 1")
    page = read_png(tmp_path / "panels" / "step-1.png")
    whole = (page == 1).all(2).sum()
    zoom = 160 // 8
    assert whole >= 2 * zoom**2 * (8 * 6 + 8 * 4 + 6 * 4)
