import json
import sys

import pytest
import torch

from amaes import checkpoint
from amaes.models import build_autoencoder, build_segmenter
from amaes.weights.tensor_files import read, weights_entry, write

BUILD = {"arch": "unet_tiny", "in_channels": 1, "num_classes": 2}


def segmenter():
    """A checkpoint without its optimizer, as it is given away."""
    return {
        "format": checkpoint.FORMAT,
        "task": "segment",
        "model": build_segmenter(**BUILD).state_dict(),
        "build": BUILD,
        "preprocess": {"spacing": [1.0, 1.0, 1.0]},
        "channels": ["T1w"],
        "labels": {"0": "background"},
        "patch_size": [32, 48, 32],
    }


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.fixture
def package():
    return pytest.importorskip("safetensors.torch")


def test_a_file_of_torch_has_what_was_written(tmp_path):
    write(tmp_path / "a.pt", {"model": {"w": torch.arange(3)}, "step": 2})
    back = read(tmp_path / "a.pt")
    assert (back["step"], back["model"]["w"].tolist()) == (2, [0, 1, 2])


def test_a_checkpoint_as_safetensors_is_a_checkpoint(package, tmp_path):
    content = segmenter()
    write(tmp_path / "deep" / "weights.safetensors", content)
    back = read(tmp_path / "deep" / "weights.safetensors")
    assert equal(back.pop("model"), content.pop("model"))
    assert back == content
    network, meta = checkpoint.load_segmenter(tmp_path / "deep" / "weights.safetensors")
    assert meta == content
    assert not network.training
    report = checkpoint.load_encoder(build_autoencoder("unet_tiny"), tmp_path / "deep" / "weights.safetensors")
    assert (report.coverage, report.source) == (1.0, "checkpoint of unet_tiny")


def test_a_state_dict_goes_there_and_back_in_its_types(package, tmp_path):
    content = {"a": torch.rand(2, 3, dtype=torch.bfloat16), "b": torch.zeros(()), "c": torch.arange(6).view(2, 3).t()}
    write(tmp_path / "a.safetensors", content | {"epoch": 3})
    back = read(tmp_path / "a.safetensors")
    assert back.pop("epoch") == 3
    assert equal(back, content)


def test_files_of_the_package_alone_are_state_dicts(package, tmp_path):
    state = build_autoencoder("unet_tiny").state_dict()
    package.save_file(state, tmp_path / "theirs.safetensors")
    assert equal(read(tmp_path / "theirs.safetensors"), state)
    assert set(checkpoint.import_weights(tmp_path / "theirs.safetensors", "unet_tiny")) == set(state)


def test_a_second_name_of_a_tensor_is_left_out(package, tmp_path):
    one, two = torch.rand(4), torch.rand(4)
    content = {"first": one, "second": one, "other": two, "empty": torch.zeros(0), "empty too": torch.zeros(0)}
    write(tmp_path / "a.safetensors", {"state_dict": content})
    assert equal(read(tmp_path / "a.safetensors")["state_dict"], {k: v for k, v in content.items() if k != "second"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"step": 1}, "expected one set of weights, found none"),
        ({"model": {"w": torch.ones(1)}, "ema": {"w": torch.ones(1)}}, "found 'model' and 'ema'"),
        ({"model": {"w": torch.ones(1)}, "w": torch.ones(1)}, "found 'model' and loose tensors"),
        ({"model": {"w": torch.ones(1)}, "optimizer": {"state": [torch.ones(1)]}}, "Tensor is not JSON"),
    ],
)
def test_content_that_safetensors_does_not_hold_is_refused(package, tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"a\.safetensors: this content cannot be written .*{message}"):
        write(tmp_path / "a.safetensors", content)
    assert not list(tmp_path.iterdir())


def test_weights_entry():
    assert weights_entry({"model": {"w": torch.ones(1)}, "build": {}, "step": 3}) == "model"
    assert weights_entry({"w": torch.ones(1), "step": 3}) is None


@pytest.mark.parametrize(
    "ours", ["{", "[]", "null", "{}", '{"entries": 3, "holder": null}', '{"entries": {}, "holder": []}', "[" * 10**5]
)
def test_odd_metadata_are_refused(package, tmp_path, ours):
    package.save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors", {"amaes": ours})
    with pytest.raises(ValueError, match=r"a\.safetensors: the metadata of this \.safetensors file are damaged"):
        read(tmp_path / "a.safetensors")


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "header", "claims"])
def test_a_damaged_file_is_refused(package, tmp_path, damage):
    path = tmp_path / "a.safetensors"
    write(path, {"w": torch.rand(100)})
    data = path.read_bytes()
    header = json.dumps({"w": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 400]}}).encode()
    path.write_bytes(
        {
            "cut": data[:-50],
            "empty": b"",
            "text": b"hello",
            "header": b"\xff" * 8 + data[8:],
            "claims": len(header).to_bytes(8, "little") + header + bytes(400),
        }[damage]
    )
    with pytest.raises(ValueError, match=r"a\.safetensors: not a whole \.safetensors file"):
        read(path)


def test_a_missing_package_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "a.safetensors").touch()
    for act in (lambda path: read(path), lambda path: write(path, {"w": torch.ones(1)})):
        with pytest.raises(ValueError, match=r"needs the package safetensors .*: pip install 'amaes\[safetensors\]'"):
            act(tmp_path / "a.safetensors")
