"""Runs that were edited, cut short or damaged, and devices as outputs: evaluate says so in one line, or makes anew."""

# ruff: noqa: F811 (fixtures of another module)

from __future__ import annotations

import errno
import json
import os
import zipfile

import numpy as np
import pytest

from amaes.data.store import Store
from amaes.evaluation import predictions
from amaes.evaluation.folds import open_run
from amaes.evaluation.predictions import open_predictions
from tests.evaluation.test_evaluate import make_run, run, store  # noqa: F401 (fixtures)

OTHER_TYPES = {"missing": None, "null": None, "number": 7, "list": [7], "object": {}, "text": "", "true": True}


@pytest.mark.parametrize("kind", OTHER_TYPES)
@pytest.mark.parametrize(
    ("file", "field", "right"),
    [
        ("config.json", "options", []),
        *(("config.json", name, []) for name in ("steps", "data", "weights", "arch", "decoder")),
        ("config.json", "protocol", ["missing", "null"]),
        ("config.json", "preset", ["missing"]),
        ("fold0/config.json", "train", []),
        ("fold0/config.json", "test", []),
    ],
)
def test_a_field_of_a_runs_record_that_is_missing_or_of_another_type(make_run, capsys, file, field, right, kind):
    folder = make_run("first", 0.5, [["a"]])
    config = json.loads((folder / "config.json").read_text())
    config["options"] |= {"weights": "scratch", "arch": "unet_tiny", "decoder": "unet", "protocol": None}
    (folder / "config.json").write_text(json.dumps(config))
    content = json.loads((folder / file).read_text())
    at = content["options"] if field in content.get("options", ()) or field == "preset" else content
    at[field] = OTHER_TYPES[kind]
    if kind == "missing":
        del at[field]
    elif field == "steps" and kind == "number":
        return
    (folder / file).write_text(json.dumps(content))
    status, out, err = run(capsys, folder, "--paper")
    if kind in right:
        assert (status, err) == (0, "")
        return
    assert (status, out, len(err.splitlines()), make_run.calls) == (2, "", 1, [])
    assert str(folder / file) in err
    assert field in err or field == "options"


@pytest.mark.parametrize("content", ["", "{", "null", "[]", '"x"', "7", "[" * 9999])
@pytest.mark.parametrize("file", ["config.json", "fold0/config.json"])
def test_a_runs_record_that_is_something_else(make_run, capsys, file, content):
    folder = make_run("first", 0.5, [["a"]])
    (folder / file).write_text(content)
    status, out, err = run(capsys, folder)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert str(folder / file) in err


def test_a_run_of_pretraining_is_named_as_one(make_run, capsys):
    folder = make_run("first", 0.5, [["a"]])
    config = json.loads((folder / "config.json").read_text()) | {"task": "pretrain"}
    (folder / "config.json").write_text(json.dumps(config))
    status, out, err = run(capsys, folder)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert f"{folder}: a run of pretraining; fine-tune it first" in err


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (["d"], ["a", "d"], "1 test cases were trained on, such as 'd'"),
        (["d"], [], "the fold has no case to test on (--train-cases all, or --splits without any)"),
        (["d"], ["a", "b", "b"], "'test' has 'b' twice"),
        (["d", "d"], ["a"], "'train' has 'd' twice"),
        (["d"], ["a", 7], "'test' is ['a', 7]"),
    ],
)
def test_a_fold_that_was_edited_is_refused(make_run, capsys, train, test, message):
    folder = make_run("first", 0.5, [["a"]])
    (folder / "fold0" / "config.json").write_text(json.dumps({"train": train, "test": test}))
    status, out, err = run(capsys, folder)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize("missing", ["error", "zero"])
def test_a_full_disk_ends_the_evaluation_at_its_first_case(make_run, capsys, monkeypatch, missing):
    folder = make_run("first", 0.5, [["a", "b", "c"]])
    tried = []

    def write_like(path, *_):
        tried.append(path)
        if len(tried) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return predictions_write_like(path, *_)

    predictions_write_like = predictions.write_like
    monkeypatch.setattr(predictions, "write_like", write_like)
    status, out, err = run(capsys, folder, "--missing", missing)
    assert (status, out, len(tried), len(err.splitlines())) == (2, "", 2, 1)
    assert "fold0: 1 of 3 cases measured; the disk is full" in err
    assert run(capsys, folder)[0] == 0
    assert len(tried) == 4  # b and c; what was written is used


@pytest.mark.parametrize(
    "record", ["", "{", "null", "[]", "[1]", "7", '"x"', "{}", '{"cases": null}', "[" * 9999, b"\xff"]
)
def test_predictions_with_a_broken_record_are_made_again(make_run, store, capsys, record):
    folder = make_run("first", 0.5, [["a"]])
    fold, of = open_run(folder).folds[0], Store(store)
    made_by = {"checkpoint": "x", "space": "native"}
    old = open_predictions(fold, of, made_by) / "a.nii.gz"
    path = old.with_name("made_by.json")
    whole = json.loads(path.read_text())
    for broken in [record, json.dumps({**whole, "cases": []}), json.dumps({**whole, "more": 1}), json.dumps(whole)]:
        old.touch()
        path.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
        open_predictions(fold, of, made_by)
        assert old.exists() == (broken == json.dumps(whole))
        assert json.loads(path.read_text()) == whole


def test_what_is_no_prediction_is_made_again(make_run, capsys):
    folder = make_run("first", 0.5, [["a"]])
    options = [folder, "--space", "store", "--metrics", "dice"]
    run(capsys, *options)
    path = folder / "fold0" / "predictions-store" / "a.npy"
    whole = path.read_bytes()
    shape = np.load(path).shape
    header = whole[:10] + whole[10:128].replace(b"fortran_order", b"fortran order")
    for array in (np.zeros((2, 3, 4), np.uint8), np.zeros(shape, np.float32), np.zeros(shape, object), None):
        if array is None:
            path.write_bytes(header)
        else:
            np.save(path, array)
        assert run(capsys, *options)[0] == 0
        assert path.read_bytes() == whole
    path.unlink()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", whole)
    assert run(capsys, *options)[0] == 0
    assert path.read_bytes() == whole


def test_the_table_goes_to_a_pipe_or_a_device_too(make_run, tmp_path, capsys):
    folder = make_run("first", 0.5, [["a"]])
    for target in ("/dev/null", "/dev/full", "."):
        link = tmp_path / "link"
        link.symlink_to(target)
        status, _, err = run(capsys, folder, "--json", link)
        assert link.is_symlink()
        link.unlink()
        assert status == (0 if target == "/dev/null" else 2)
        assert len(err.splitlines()) == (target != "/dev/null")
    assert (folder / "summary.json").is_file()
    assert "link is a folder; expected the name of a file" in err


def test_unfinished_folds_are_listed(make_run, capsys):
    folder = make_run("first", 0.5, [["a"], ["b"]])
    (folder / "fold1" / "checkpoints" / "step-5.pt").rename(folder / "fold1" / "checkpoints" / "step-2.pt")
    status, out, err = run(capsys, folder)
    assert status == 1
    assert "fold1: at step 2 of 5, left out" in err
    assert "100.00" in out


@pytest.mark.parametrize("what", ["no run", "no folds", "unfinished", "no store", "another store", "other spacing"])
def test_user_errors_are_one_line(what, make_run, store, tmp_path, capsys):
    folder, options = make_run("first", 0.5, [["a"]] if what != "no folds" else []), []
    if what == "no run":
        folder = tmp_path / "nothing"
    elif what == "unfinished":
        (folder / "config.json").write_text(json.dumps({"options": {"steps": 9, "data": str(store)}}))
    elif what == "no store":
        options = ["--data", tmp_path / "nothing"]
    else:
        index = json.loads((store / "dataset.json").read_text())
        if what == "another store":
            index["cases"] = index["cases"][1:]
        else:
            index["config"]["spacing"] = [2.0, 2.0, 2.0]
        (store / "dataset.json").write_text(json.dumps(index))
    status, out, err = run(capsys, folder, *options)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    expected = {
        "no run": "no config.json",
        "no folds": "no finished fold",
        "unfinished": "at step 5 of 9",
        "no store": "no store there",
        "another store": "'a'",
        "other spacing": "[2.0, 2.0, 2.0]",
    }
    assert expected[what] in err
