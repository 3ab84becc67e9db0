"""Dice of whole scans while fine-tuning, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from amaes import distributed
from amaes.data.store import Store
from amaes.training.whole_scans import validation_dice
from tests.stores import make_store

RANKS = distributed.Ranks(0, 1, 0, 1, torch.device("cpu"))


class Oracle(nn.Module):
    """Logits of class 1 where the intensity is within (low, high)."""

    def __init__(self, low, high):
        super().__init__()
        self.bounds = nn.Parameter(torch.tensor([low, high]))

    def forward(self, x):
        inside = (x > self.bounds[0]) & (x < self.bounds[1])
        return torch.cat([torch.full_like(x, 0.5), inside.to(x), torch.zeros_like(x)], dim=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two cases; in the first, voxels of intensity 0.5 are class 1, in the second, those of 0.25; none has class 2."""
    folder = make_store(tmp_path_factory.mktemp("scans") / "store", count=2, labels=True)
    for k, value in enumerate((0.5, 0.25)):
        path = folder / "cases" / f"case0{k}.npy"
        image = np.zeros_like(np.load(path))
        image[0, 3:6, 4:9, 7:9], image[0, 20:22, 30:34, 11:13] = 0.5, 0.25
        np.save(path, image)
        np.save(folder / "cases" / f"case0{k}_label.npy", (image[0] == value).astype(np.uint8))
    return Store(folder)


@pytest.mark.parametrize(
    ("low", "high", "ids", "expected"),
    [
        (0.4, 0.6, ["case00"], 1.0),
        (0.4, 0.6, ["case00", "case01"], 0.5),
        (0.1, 0.6, ["case00"], 2 * 30 / (2 * 30 + 16)),  # 30 voxels of 0.5, 16 of 0.25
        (0.1, 0.6, ["case01", "case00"], (2 * 30 / 76 + 2 * 16 / 62) / 2),
        (0.8, 0.9, ["case00"], 0.0),
    ],
)
def test_dice_by_hand(store, low, high, ids, expected):
    network = Oracle(low, high).train()
    assert validation_dice(network, store, ids, (16, 24, 20), RANKS) == pytest.approx(expected)
    assert network.training


def test_voxels_that_are_left_out_are_not_scored(store, monkeypatch):
    monkeypatch.setattr(store, "ignored", 255)
    label = np.array(store.label("case00"))
    label[20:22] = 255  # of the voxels of 0.25
    monkeypatch.setattr(store, "label", lambda id: label)
    assert validation_dice(Oracle(0.1, 0.6), store, ["case00"], (16, 24, 20), RANKS) == pytest.approx(1.0)


def test_voxels_that_are_left_out_count_for_neither(store, monkeypatch):
    monkeypatch.setattr(store, "ignored", 7)
    label = np.array(store.label("case00"))
    label[20:22, 30:34, 11:13] = 7  # the 16 voxels of 0.25
    monkeypatch.setattr(store, "label", lambda id: label)
    assert validation_dice(Oracle(0.1, 0.6), store, ["case00"], (16, 24, 20), RANKS) == 1


def test_a_stop_request_gives_it_up(store):
    asked = iter([False, True])
    assert (
        validation_dice(Oracle(0.0, 1.0), store, ["case00", "case01"], (16,) * 3, RANKS, stop=lambda: next(asked))
        is None
    )
