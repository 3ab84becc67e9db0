"""A finished run is made longer; pretraining begins with the weights of another run."""

from __future__ import annotations

import json

import pytest
import torch

from tests.launch import TINY, run, weights
from tests.stores import make_store


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Two steps of pretraining, and their options."""
    folder = tmp_path_factory.mktemp("going on")
    options = ("--data", make_store(folder / "store"), *TINY, "--workers", 0, "--lr", "1e-3", "--log-every", 1)
    run("train_pretrain.py", *options, "--steps", 2, "--out", folder / "first")
    return folder, options


def test_a_finished_run_is_made_longer(pretrained):
    folder, options = pretrained
    done = run("train_pretrain.py", *options, "--steps", 4, "--out", folder / "first")
    assert (
        "made longer, 4 instead of 2 steps; from here on the learning rate is that of a run of this length"
        in done.stdout
    )
    assert weights(folder / "first")[0] == 4
    config = json.loads((folder / "first" / "config.json").read_text())
    assert (config["options"]["steps"], config["record"]["total_steps"]) == (4, 4)
    lines = [json.loads(line) for line in (folder / "first" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    lr = {line["step"]: line["lr"] for line in lines if "lr" in line}
    assert lr[3] == pytest.approx(1e-3 / 2)  # the middle of a cosine of 4 steps
    shorter = run("train_pretrain.py", *options, "--steps", 3, "--out", folder / "first", status=2)
    assert "total_steps 3: the run in" in shorter.stderr


def test_pretraining_begins_with_the_weights_of_a_run(pretrained):
    folder, options = pretrained
    words = (
        "--weights",
        folder / "first",
        "--transfer",
        "all",
        "--steps",
        1,
        "--lr",
        "1e-30",
        "--out",
        folder / "next",
    )
    done = run("train_pretrain.py", *options, *words)
    assert f"weights: {folder}/first/checkpoints/step-" in done.stdout
    _, before = weights(folder / "first")
    _, after = weights(folder / "next")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert len(json.loads((folder / "next" / "config.json").read_text())["record"]["weights"]) == 64
    refused = run("train_pretrain.py", *options, "--transfer", "all", "--out", folder / "none", status=2)
    assert "--transfer all: accepted with --weights CKPT" in refused.stderr
