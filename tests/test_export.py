"""Weights to give away: they load wherever the checkpoint did, and say nothing of the machine they were made on."""

from __future__ import annotations

import json
import re

import nibabel as nib
import numpy as np
import pytest
import torch

from amaes import checkpoint, cli, export
from amaes.files import sha256
from amaes.models import build_segmenter
from tests.conftest import make_volume
from tests.test_predict import SCAN, save_checkpoint
from tests.test_predict import run as predict

OPTIONS = {
    "data": "/data/me/stores/brains",
    "out": "C:\\runs\\a",
    "weights": "pre/step-9.pt",
    "lr": 1e-4,
    "steps": 3,
    "epochs": 9,
}
PROVENANCE = {"options": OPTIONS | {"pretrain_data": ["/data/x/", "/data/y"]}, "store": "abc", "commit": "123"}


def run(capsys, *options):
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: export.main(export.parse_options([*map(str, options)])))
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture
def fold(tmp_path):
    """A fold whose checkpoint was evaluated."""
    folder = tmp_path / "run" / "fold0"
    more = {"optimizer": {"state": {0: torch.ones(5)}}, "provenance": PROVENANCE}
    path = save_checkpoint(folder / "checkpoints", **more)
    (folder / "config.json").write_text(json.dumps({"train": ["a", "b"], "test": ["c"]}))
    for name, space, value, digest in [("", "native", 0.875, sha256(path)), ("-store", "store", 0.5, "of another")]:
        classes = {"1": {"n_cases": 1, "dice": {"mean": value}}, "2": {"n_cases": 1, "dice": {"mean": None}}}
        content = {"checkpoint": {"sha256": digest}, "settings": {"space": space}, "classes": classes}
        (folder / f"results{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_an_exported_file_loads_wherever_a_checkpoint_does(fold, nifti_file, tmp_path, capsys, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="the optional package safetensors is not installed")
    out = tmp_path / "given" / f"net{suffix}"
    status, text, err = run(capsys, fold, out)
    assert (status, err) == (0, "")
    assert f"weights: {fold}/checkpoints/step-3.pt\n" in text
    assert f"SHA-256 {sha256(out)}" in text
    assert sorted(path.name for path in out.parent.iterdir()) == ["net.md", out.name]

    scan = nifti_file("scans/p1.nii.gz", make_volume(SCAN))
    for weights, folder in ((fold, "a"), (out, "b")):
        assert predict(capsys, "--weights", weights, "--images", scan, "--out", tmp_path / folder)[0] == 0
    a, b = (nib.load(tmp_path / folder / "p1.nii.gz").get_fdata() for folder in "ab")
    assert np.array_equal(a, b)
    network = build_segmenter("unet_tiny", num_classes=5)
    checkpoint.load_encoder(network, out)
    assert torch.equal(
        network.encoder.state_dict()["stages.0.0.conv.weight"], tensors(fold)["encoder.stages.0.0.conv.weight"]
    )
    assert checkpoint.import_weights(out, "unet_tiny").keys() == tensors(fold).keys()


def tensors(fold):
    return checkpoint.read(checkpoint.find_one(fold))["model"]


def test_no_optimizer_and_no_local_path_is_in_the_file_or_its_card(fold, tmp_path, capsys):
    run(capsys, fold, tmp_path / "net.pt")
    content = checkpoint.read(tmp_path / "net.pt")
    assert "optimizer" not in content
    options = content["provenance"]["options"]
    assert options == OPTIONS | {"data": "brains", "out": "a", "weights": "step-9.pt", "pretrain_data": ["x", "y"]}
    for text in ((tmp_path / "net.pt").read_bytes().decode("latin-1"), (tmp_path / "net.md").read_text()):
        assert not re.search(r"/data/me|C:.runs|/checkpoints", text)
        assert str(tmp_path) not in text


def test_the_card_tells_what_the_network_is_and_what_it_scored(fold, tmp_path, capsys):
    run(capsys, fold, tmp_path / "net.pt")
    card = (tmp_path / "net.md").read_text()
    for part in (
        "# net.pt",
        "| trained on | brains (store abc); 2 cases, tested on 1 others |",
        "| classes | 0 background, 1 one, 2 two |",
        "spacing 1.0 x 1.0 x 1.0, ",
        "| native | 1 one | 1 | 87.50 |",
        "| native | 2 two | 1 | – |",
        sha256(tmp_path / "net.pt"),
        'load_segmenter("net.pt")',
        "lr 0.0001",
    ):
        assert part in card, card
    assert "50.00" not in card  # of other weights
    assert "epochs" not in card  # --steps replaces them
    (fold / "config.json").write_text(json.dumps({"train": ["a", "b"], "test": []}))
    run(capsys, fold, tmp_path / "all.pt")
    card = (tmp_path / "all.md").read_text()
    assert "; 2 cases, tested on no others |" in card
    assert "Not measured: the training left no case to test on." in card


def test_weights_of_pretraining(tmp_path, capsys):
    path = save_checkpoint(tmp_path / "checkpoints", task="pretrain", labels={})
    assert run(capsys, tmp_path, tmp_path / "net.pt")[0] == 0
    card = (tmp_path / "net.md").read_text()
    assert "load_segmenter" not in card
    assert "train_finetune.py --data STORE --arch unet_tiny --weights" in card
    assert torch.equal(
        *(
            torch.cat([t.ravel() for t in checkpoint.import_weights(file).values()])
            for file in (path, tmp_path / "net.pt")
        )
    )


@pytest.mark.parametrize(
    ("given", "out", "message"),
    [
        ("none.pt", "net.pt", "none.pt: no such checkpoint"),
        ("run", "net.onnx", "net.onnx: expected a name that ends in .pt or .safetensors"),
        ("run", "there.pt", "there.pt: is there already"),
        ("run", "card.pt", "card.md: is there already"),
        ("foreign.pt", "net.pt", "foreign.pt: format None, expected"),
    ],
)
def test_wrong_uses_are_one_line(fold, tmp_path, capsys, monkeypatch, given, out, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.pt").touch()
    (tmp_path / "card.md").touch()
    torch.save({"w": torch.ones(3)}, tmp_path / "foreign.pt")
    status, _, err = run(capsys, given, out)
    assert (status, len(err.splitlines())) == (2, 1)
    assert message in err
    assert not (tmp_path / "net.pt").exists()
