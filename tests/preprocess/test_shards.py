"""A store written by several processes at once: what each does, locks, restart, and the run that completes it."""

import hashlib
import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from amaes.files import locked
from amaes.preprocess import store_case, write_store
from amaes.preprocess.__main__ import main
from amaes.preprocess.config import Config
from amaes.preprocess.find_cases import collect
from tests.conftest import make_volume, save_nifti

ROOT = Path(__file__).resolve().parent.parent.parent
COUNT = 5


@pytest.fixture
def scans(tmp_path):
    """A folder of scans of different sides."""
    for k in range(COUNT):
        size = tuple(n + k for n in (12, 14, 10))
        save_nifti(tmp_path / f"images/sub-{k}/sub-{k}_T1w.nii.gz", make_volume(size, seed=k), dtype="uint16")
    return tmp_path / "images"


@pytest.fixture
def processed(monkeypatch):
    """The ids of the cases that are preprocessed, not merely found done."""
    whole, done = store_case.preprocess_case, []

    def counting(*arguments, **options):
        done.append(options["case_id"].split("/")[0])
        return whole(*arguments, **options)

    monkeypatch.setattr(store_case, "preprocess_case", counting)
    return done


def content(store):
    """{file: bytes} of what a store is made of."""
    files = [store / "dataset.json", *sorted((store / "cases").rglob("*.*"))]
    return {str(path.relative_to(store)): path.read_bytes() for path in files if path.is_file()}


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_shards_and_their_merge_equal_one_run(scans, tmp_path, capsys):
    """The shards run at the same time, as array jobs do."""
    line = [sys.executable, "-m", "amaes.preprocess", "--images", str(scans), "--workers", "0", "--out"]
    shards = [
        subprocess.Popen([*line, str(tmp_path / "s"), "--shard", f"{k}/2"], cwd=ROOT, stderr=subprocess.DEVNULL)
        for k in range(2)
    ]
    assert [shard.wait(timeout=60) for shard in shards] == [0, 0]
    assert not (tmp_path / "s/dataset.json").exists()
    assert not (tmp_path / "s/report.jsonl").exists()
    assert [row["id"][:5] for row in rows(tmp_path / "s/report-shard-0-of-2.jsonl")] == ["sub-0", "sub-2", "sub-4"]
    assert [row["id"][:5] for row in rows(tmp_path / "s/report-shard-1-of-2.jsonl")] == ["sub-1", "sub-3"]
    options = ["--images", str(scans), "--workers", "0", "--out"]
    assert main([*options, str(tmp_path / "s")]) == 0
    assert f"{COUNT} inputs: 0 ok, {COUNT} skipped" in capsys.readouterr().out
    assert main([*options, str(tmp_path / "whole")]) == 0
    assert content(tmp_path / "s") == content(tmp_path / "whole")
    assert len(content(tmp_path / "s")) == 1 + 2 * COUNT


def test_a_killed_shard_does_nothing_twice(scans, tmp_path, processed, monkeypatch):
    counting = store_case.preprocess_case

    def dying(*arguments, **options):
        if options["case_id"].startswith("sub-2"):
            raise KeyboardInterrupt
        return counting(*arguments, **options)

    collection = collect(scans)
    with monkeypatch.context() as patch:
        patch.setattr(store_case, "preprocess_case", dying)
        with pytest.raises(KeyboardInterrupt):
            write_store.write_store(collection, tmp_path / "s", Config(), shard=(0, 2))
    assert processed == ["sub-0"]
    result = write_store.write_store(collection, tmp_path / "s", Config(), shard=(0, 2))
    assert processed == ["sub-0", "sub-2", "sub-4"]
    assert (result.count("skipped"), result.count("ok")) == (1, 2)


def test_the_merge_does_what_is_missing(scans, tmp_path, processed):
    collection = collect(scans)
    write_store.write_store(collection, tmp_path / "s", Config(), shard=(1, 2))
    result = write_store.write_store(collection, tmp_path / "s", Config())
    assert processed == ["sub-1", "sub-3", "sub-0", "sub-2", "sub-4"]
    assert (result.count("skipped"), result.count("ok")) == (2, 3)
    assert len(json.loads((tmp_path / "s/dataset.json").read_text())["cases"]) == COUNT


def test_more_shards_than_cases_and_only_bad_ones(scans, tmp_path):
    (scans / "sub-1/sub-1_T1w.nii.gz").write_bytes(b"")
    collection = collect(scans)
    assert write_store.write_store(collection, tmp_path / "s", Config(), shard=(7, 9), workers=2).items == []
    result = write_store.write_store(collection, tmp_path / "s", Config(), shard=(1, COUNT))
    assert [outcome.row["reason"] for outcome in result.outcomes] == ["empty_file"]
    assert result.status() == 1
    assert "report-shard-1-of-5.jsonl" in result.summary()


def test_whole_runs_and_shards_keep_each_other_out(scans, tmp_path):
    collection, store = collect(scans), tmp_path / "s"
    store.mkdir()
    with ExitStack() as stack:
        stack.enter_context(locked(store, "", shared=True))
        stack.enter_context(locked(store, "", name=".lock-shard-0-of-2"))
        with pytest.raises(ValueError, match="another process is writing this store, or a shard of it"):
            write_store.write_store(collection, store, Config())
        with pytest.raises(ValueError, match="another process is writing shard 0/2 of this store"):
            write_store.write_store(collection, store, Config(), shard=(0, 2))
        write_store.write_store(collection, store, Config(), shard=(1, 2))
    with locked(store, ""), pytest.raises(ValueError, match="another process is writing this store as a whole"):
        write_store.write_store(collection, store, Config(), shard=(0, 2))
    write_store.write_store(collection, store, Config(), shard=(0, 2))


def test_half_written_files_of_other_shards_are_left_alone(scans, tmp_path):
    collection, store = collect(scans), tmp_path / "s"
    halves = [store / f"cases/sub-{k}/.sub-{k}_T1w.npy.123.tmp" for k in range(2)]
    halves.append(store / ".dataset.json.123.tmp")
    for half in halves:
        half.parent.mkdir(parents=True, exist_ok=True)
        half.touch()
    write_store.write_store(collection, store, Config(), shard=(0, 2))
    assert [half.exists() for half in halves] == [False, True, True]
    write_store.write_store(collection, store, Config(), shard=(9, 10))
    assert [half.exists() for half in halves] == [False, True, True]
    write_store.write_store(collection, store, Config())
    assert not any(half.exists() for half in halves)


def test_a_shard_cannot_overwrite(scans, tmp_path):
    with pytest.raises(ValueError, match="`shard` and `overwrite` exclude each other"):
        write_store.write_store(collect(scans), tmp_path / "s", Config(), shard=(0, 2), overwrite=True)


def test_channels_have_a_digest_that_does_not_depend_on_the_stored_type(tmp_path):
    for k, name in enumerate(("T1", "FLAIR")):
        save_nifti(tmp_path / f"i/a/{name}.nii.gz", make_volume(seed=k))
    collection, digests = collect(tmp_path / "i", channels=["FLAIR", "T1"]), {}
    for dtype in ("float32", "float16"):
        write_store.write_store(collection, tmp_path / dtype, Config(dtype=dtype))
        digests[dtype] = json.loads((tmp_path / dtype / "cases/a.json").read_text())["channel_sha256"]
    stored = np.load(tmp_path / "float32/cases/a.npy")
    assert digests["float32"] == [hashlib.sha256(channel.tobytes()).hexdigest() for channel in stored]
    assert digests["float16"] == digests["float32"]
    assert len(set(digests["float32"])) == 2


def test_a_case_that_was_never_filtered_is_looked_at_again(tmp_path, processed):
    save_nifti(tmp_path / "i/thin.nii.gz", make_volume((12, 20, 20)))
    save_nifti(tmp_path / "i/wide.nii.gz", make_volume((16, 20, 20)))
    line = ["--images", str(tmp_path / "i"), "--out", str(tmp_path / "s"), "--workers", "0"]
    assert main(line) == 0
    assert main([*line, "--corpus-filter", "on", "--prune"]) == 0
    assert processed == ["thin", "wide"] * 2
    assert [case["id"] for case in json.loads((tmp_path / "s/dataset.json").read_text())["cases"]] == ["wide"]
    assert main(line) == 0
    assert processed == ["thin", "wide"] * 2 + ["thin"]
