"""The picture of a run's curves: drawn from metrics.jsonl, and never the end of a run."""

from __future__ import annotations

import json

import pytest

from amaes.training.curves import draw_progress

LINES = [
    {"step": 10, "loss": 0.5, "lr": 1e-4, "dice": 0.2},
    {"step": 20, "loss": None, "lr": 5e-5, "dice": None},
    {"step": 20, "val_dice": 0.4},
    {"step": 20, "val_loss": 0.3, "val_baseline": 0.6},
]


def write(folder, lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "lo')


@pytest.mark.parametrize("lines", [LINES, LINES[:1], LINES[2:3], [{"step": 1}]], ids=["all", "one", "Dice", "none"])
def test_the_curves_are_drawn(tmp_path, lines):
    image = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed")
    write(tmp_path, lines)
    assert draw_progress(tmp_path) is None
    assert image.imread(tmp_path / "progress.png").std() > 0


def test_a_picture_that_cannot_be_drawn_is_a_line(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    write(tmp_path, [{"step": 1, "loss": 0.5}, {"step": "two", "loss": 0.5}])
    assert "progress.png: not drawn (TypeError" in draw_progress(tmp_path)
    assert not (tmp_path / "progress.png").exists()


def test_without_a_line_there_is_no_picture(tmp_path):
    assert draw_progress(tmp_path) is None
    (tmp_path / "metrics.jsonl").touch()
    assert draw_progress(tmp_path) is None
    assert not (tmp_path / "progress.png").exists()
