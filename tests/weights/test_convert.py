"""Old pickles: read without running them, whole networks and all; only --trust runs what is in a file."""

import argparse
import os
import pathlib
import subprocess
import sys
from collections import OrderedDict, defaultdict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from amaes import checkpoint, cli
from amaes.models import build_autoencoder, build_segmenter
from amaes.weights import __main__, tensor_files
from amaes.weights.convert import convert_weights
from amaes.weights.tensor_files import read
from tests import formula, reference

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.tensor([1.0, 2.0], dtype=torch.float16)}


class Payload:
    """Does something when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Thing:
    def __init__(self):
        self.tensor = torch.ones(3)


class Predictor(nn.Module):
    """A network around another, as some are published: pickled whole."""

    def __init__(self, network):
        super().__init__()
        self.base_model = network


Pair = namedtuple("Pair", "a b")


def saved(tmp_path, content, **options):
    torch.save(content, tmp_path / "old.pt", **options)
    return tmp_path / "old.pt"


def converted(path, trust=False):
    out = path.with_name("new.pt")
    done = convert_weights(path, out, trust)
    return done, read(out)


def test_objects_are_left_out_and_not_needed(tmp_path):
    content = {
        "state_dict": OrderedDict(WEIGHTS),
        "epoch": np.int64(7),
        "score": np.float32(0.5),
        "lists": [(1, 2.5), {"x"}, None, True],
        "table": {1: "one"},
        "hyper_parameters": argparse.Namespace(lr=1e-3, out=pathlib.Path("runs")),
        "thing": Thing(),
        "groups": defaultdict(list),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
        "curve": np.arange(3),
    }
    path = saved(tmp_path, content)
    with pytest.raises(ValueError, match="not a checkpoint"):
        checkpoint.read(path)
    done, back = converted(path)
    assert done.how == "without running code; objects in it are left out"
    assert all(torch.equal(back["state_dict"][key], value) for key, value in WEIGHTS.items())
    del back["state_dict"]
    assert back == {"epoch": 7, "score": 0.5, "lists": [[1, 2.5], ["x"], None, True], "table": {"1": "one"}}
    assert [line.split(" ")[0] for line in done.left_out] == [
        "hyper_parameters",
        "thing",
        "groups",
        "optimizer",
        "curve",
    ]
    assert "hyper_parameters (argparse.Namespace)" in done.left_out
    assert "optimizer (torch.Tensor)" in done.left_out


def test_a_whole_network_is_read_without_its_classes(tmp_path, monkeypatch):
    network = build_autoencoder("unet_tiny")
    path = saved(tmp_path, nn.DataParallel(Predictor(network)))
    for name in ("Predictor", "Thing"):
        monkeypatch.delattr(sys.modules[__name__], name)
    done, _ = converted(path)
    assert not done.left_out
    imported = checkpoint.import_weights(tmp_path / "new.pt", "unet_tiny")
    assert imported.keys() == network.state_dict().keys()
    assert all(torch.equal(imported[key], value) for key, value in network.state_dict().items())
    with pytest.raises(ValueError, match="not a checkpoint"):
        checkpoint.import_weights(path)


@pytest.mark.parametrize(
    "content", [WEIGHTS, {"params": WEIGHTS, "n": 1}, {"model": nn.Linear(3, 2)}, {"network": nn.Linear(3, 2)}]
)
def test_weights_are_found_where_they_are(tmp_path, content):
    done, _ = converted(saved(tmp_path, content))
    assert [tuple(value.shape) for value in done.weights.values()] == [(2, 3), (2,)]


def test_a_file_that_is_sound_stays_as_it_is(tmp_path):
    done, back = converted(saved(tmp_path, {"network_weights": WEIGHTS, "nnssl_adaptation_plan": {"x": [1, None]}}))
    assert done.how == "as tensors and plain data"
    assert back["nnssl_adaptation_plan"] == {"x": [1, None]}
    assert back["network_weights"].keys() == WEIGHTS.keys()


@pytest.mark.parametrize("function", ["os.system", "subprocess.call", "builtins.exec"])
def test_a_payload_is_not_run(tmp_path, function):
    marker = tmp_path / "was run"
    call = {
        "os.system": (os.system, f"touch '{marker}'"),
        "subprocess.call": (subprocess.call, ["touch", str(marker)]),
        "builtins.exec": (exec, f"open({str(marker)!r}, 'w')"),
    }[function]
    path = saved(tmp_path, {"state_dict": WEIGHTS, "more": Payload(*call)})
    if function == "os.system":  # of a module that torch blocks by name
        with pytest.raises(
            ValueError, match=r"old\.pt: cannot be read .*blocked.*; .* if you trust its source, `trust`"
        ):
            convert_weights(path, tmp_path / "new.pt")
        assert not (tmp_path / "new.pt").exists()
    else:
        assert converted(path)[0].left_out == [f"more ({function.replace('subprocess', 'commands')})"]  # its old name
    assert not marker.exists()


def test_only_trust_runs_what_is_in_a_file(tmp_path):
    marker = tmp_path / "was run"
    content = {"state_dict": WEIGHTS, "more": Payload(os.system, f"touch '{marker}'")}
    done, back = converted(saved(tmp_path, content), trust=True)
    assert marker.exists()
    assert done.how == "as it is, with the code in it"
    assert back["state_dict"].keys() == WEIGHTS.keys()


def test_the_oldest_format_with_objects_needs_trust(tmp_path):
    content = {"state_dict": WEIGHTS, "pair": Pair(1, 2), "args": argparse.Namespace(x=1)}
    path = saved(tmp_path, content, _use_new_zipfile_serialization=False)
    with pytest.raises(
        ValueError, match=r"old\.pt: cannot be read \(.*\); reading it as it is would run the code in it"
    ):
        convert_weights(path, tmp_path / "new.pt")
    done, back = converted(path, trust=True)
    assert back["pair"] == [1, 2]
    assert done.left_out == ["args (argparse.Namespace)"]


def test_trust_does_not_help_where_a_class_is_missing(tmp_path, monkeypatch):
    path = saved(tmp_path, {"thing": Thing()}, _use_new_zipfile_serialization=False)
    monkeypatch.delattr(sys.modules[__name__], "Thing")
    with pytest.raises(ValueError, match=r"cannot be read even so \(.*Thing"):
        convert_weights(path, tmp_path / "new.pt", trust=True)


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("content", [{}, [1], {"epoch": 3}, {"thing": Thing()}])
def test_a_file_without_weights_is_refused(tmp_path, content, trust):
    with pytest.raises(ValueError, match=rf"cannot be read {'even so ' if trust else ''}\(no weights found\)"):
        convert_weights(saved(tmp_path, content), tmp_path / "new.pt", trust)
    assert not (tmp_path / "new.pt").exists()


def test_a_network_that_contains_itself_ends(tmp_path):
    network = nn.Linear(2, 2)
    network._modules["again"] = network
    with pytest.raises(ValueError, match="no weights found"):
        convert_weights(saved(tmp_path, network), tmp_path / "new.pt")


def tree(depth, width):
    """Nested dictionaries, each of which holds the next under `width` names."""
    content = {"w": torch.ones(2)}
    for _ in range(depth):
        content = dict.fromkeys("abc"[:width], content)
    return content


@pytest.mark.parametrize(("depth", "width", "said"), [(100, 1, "nested more than"), (30, 2, "too many entries")])
def test_what_would_have_no_end_is_left_out(tmp_path, monkeypatch, depth, width, said):
    monkeypatch.setattr(tensor_files, "MAX_ENTRIES", 1000)
    path = saved(tmp_path, {"state_dict": WEIGHTS, "more": tree(depth, width)})
    with pytest.raises(ValueError, match=rf"old\.pt: not a checkpoint \({said}"):
        checkpoint.read(path)
    assert said in converted(path)[0].left_out[0]


def test_a_network_with_too_many_ways_through_it_ends(tmp_path):
    network = nn.Sequential()
    for _ in range(30):
        network = nn.Sequential(network, network)
    with pytest.raises(ValueError, match="no weights found"):
        convert_weights(saved(tmp_path, Predictor(network)), tmp_path / "new.pt")


def test_what_a_whole_network_would_not_save_is_not_a_weight(tmp_path):
    network = nn.Linear(3, 2)
    network.register_buffer("kept", torch.ones(1))
    network.register_buffer("passing", torch.ones(1), persistent=False)
    assert converted(saved(tmp_path, network))[0].weights.keys() == network.state_dict().keys()


def test_an_object_among_the_weights_is_named(tmp_path):
    done, _ = converted(saved(tmp_path, {"state_dict": {**WEIGHTS, "packed": Thing(), "n": 3}}))
    assert done.left_out == ["packed (tests.weights.test_convert.Thing)", "n (builtins.int)"]


def test_damaged_files_and_tensors_that_claim_too_much_are_refused(tmp_path):
    path = saved(tmp_path, {"w": torch.zeros(1).expand(10**6, 10**6), "x": Thing()})
    with pytest.raises(ValueError, match=r"its tensor w claims \(1000000, 1000000\)"):
        convert_weights(path, tmp_path / "new.pt")
    path.write_text("hello")
    with pytest.raises(ValueError, match=r"old\.pt: cannot be read \("):
        convert_weights(path, tmp_path / "new.pt")
    (tmp_path / "old.safetensors").write_text("hello")
    with pytest.raises(ValueError, match=r"old\.safetensors: (needs the package|not a whole)"):
        convert_weights(tmp_path / "old.safetensors", tmp_path / "new.pt", trust=True)
    with pytest.raises(FileNotFoundError, match="no such file"):
        convert_weights(tmp_path / "none.pt", tmp_path / "new.pt")


def test_an_old_checkpoint_as_safetensors_loads(tmp_path):
    pytest.importorskip("safetensors")
    keys = reference.key_list("amaes_unet_b_lw_dec")
    weights = {f"model.{key.removeprefix('model.')}": formula.value(key, shape) for key, shape in keys.items()}
    path = saved(tmp_path, {"state_dict": weights, "hyper_parameters": argparse.Namespace(x=1), "epoch": 3})
    convert_weights(path, tmp_path / "new.safetensors")
    assert read(tmp_path / "new.safetensors")["epoch"] == 3
    with torch.device("meta"):
        network = build_segmenter("unet_b")
    assert checkpoint.load_encoder(network, tmp_path / "new.safetensors").coverage == 1.0
    convert_weights(tmp_path / "new.safetensors", tmp_path / "back.pt")
    assert torch.equal(read(tmp_path / "back.pt")["state_dict"][key := next(iter(weights))], weights[key])


def command(capsys, *words, status=0):
    with pytest.raises(SystemExit) as end:
        cli.run(__main__.main, __main__.parse_options([str(word) for word in words]))
    assert end.value.code == status
    return capsys.readouterr()


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "started_as", "amaes convert-weights")
    network = build_autoencoder("unet_tiny")
    path = saved(tmp_path, {"model": network.state_dict(), "args": argparse.Namespace(x=1)})
    stdout = command(capsys, path, tmp_path / "new.pt").out
    assert "left out: args (argparse.Namespace)" in stdout
    assert "our own names; it fits --arch unet_tiny" in stdout
    with pytest.raises(SystemExit, match="2"):
        __main__.parse_options([str(path), str(tmp_path / "new.pt")])
    assert "new.pt: exists; take another name" in capsys.readouterr().err
    evil = saved(tmp_path, {"model": WEIGHTS, "more": Payload(os.system, "true")})
    stderr = command(capsys, evil, tmp_path / "evil.pt", status=2).err
    assert stderr.startswith(f"amaes convert-weights: error: {evil}: cannot be read")
    assert stderr.endswith("if you trust its source, --trust\n")
    assert "not recognised" in command(capsys, evil, tmp_path / "evil.pt", "--trust").out
