"""A folder into a store: isolation, reports, restart, refusals, exit statuses."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from amaes.cli import run
from amaes.files import locked
from amaes.preprocess import store_case, write_store
from amaes.preprocess.__main__ import main
from amaes.preprocess.collection import Item
from amaes.preprocess.config import Config
from amaes.preprocess.find_cases import collect
from amaes.preprocess.processes import in_processes
from amaes.preprocess.report import Outcome
from tests.conftest import make_volume, save_nifti

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def scans(tmp_path):
    """Function: a folder of n scans of different sides."""

    def make(count=3, shape=(12, 14, 10), root="images"):
        for k in range(count):
            size = tuple(n + k for n in shape)
            save_nifti(tmp_path / root / f"sub-{k}/sub-{k}_T1w.nii.gz", make_volume(size, seed=k), dtype="uint16")
        return tmp_path / root

    return make


def report(store):
    return [json.loads(line) for line in (store / "report.jsonl").read_text().splitlines()]


def index(store):
    return json.loads((store / "dataset.json").read_text())


def arrays(store):
    """{file: digest} of all arrays."""
    return {str(p.relative_to(store)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(store.rglob("*.npy"))}


def command(*arguments):
    """Run the command line in a process of its own."""
    line = [sys.executable, "-m", "amaes.preprocess", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)


def refused(capsys, *arguments):
    """Run the command line here; the one line of its refusal."""
    with pytest.raises(SystemExit) as caught:
        run(lambda: main([str(argument) for argument in arguments]))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


# The store ------------------------------------------------------------------------------------------------------------


def test_store_holds_what_its_index_says(scans, tmp_path):
    labels = tmp_path / "labels"
    for k in range(3):
        label = np.zeros([n + k for n in (12, 14, 10)], dtype=np.uint8)
        label[3:6, 3:6, 3:6] = k  # none in the first
        save_nifti(labels / f"sub-{k}/sub-{k}_T1w.nii.gz", label)
    result = write_store.write_store(collect(scans(), labels), tmp_path / "s", Config())
    content = index(tmp_path / "s")
    assert content["format"] == "amaes-store-1"
    assert content["config"] == Config().as_dict()
    assert content["config_hash"] == Config().hash()
    assert content["channels"] == ["image"]
    assert content["labels"] == {"0": "background", "1": "label_1", "2": "label_2"}
    assert [case["id"] for case in content["cases"]] == [f"sub-{k}/sub-{k}_T1w" for k in range(3)]
    for k, case in enumerate(content["cases"]):
        assert (case["subject"], case["session"], case["sequence"], case["labelled"]) == (f"sub-{k}", None, "T1", True)
        base = tmp_path / "s" / "cases" / case["id"]
        image, label = np.load(f"{base}.npy", mmap_mode="r"), np.load(f"{base}_label.npy", mmap_mode="r")
        assert image.shape == (1, *case["shape"])
        assert image.dtype == np.float32
        assert label.shape == tuple(case["shape"])
        properties = json.loads(Path(f"{base}.json").read_text())
        assert properties["shape"] == case["shape"]
        assert properties["subject"] == case["subject"]
        assert list(properties["foreground"]) == ([] if k == 0 else [str(k)])
        for value, samples in properties["foreground"].items():
            assert (label.ravel()[samples] == int(value)).all()
            assert len(samples) == np.count_nonzero(label == int(value))
    assert result.status() == 0
    assert [row["status"] for row in report(tmp_path / "s")] == ["ok"] * 3


def test_half_precision_store(scans, tmp_path):
    write_store.write_store(collect(scans(1)), tmp_path / "s", Config(dtype="float16"))
    image = np.load(next((tmp_path / "s").rglob("*.npy")), mmap_mode="r")
    assert image.dtype == np.float16
    assert 0 <= image.min() < image.max() <= 1


def test_large_classes_are_sampled_always_alike():
    label = np.zeros((40, 30, 20), dtype=np.uint8)
    label[5:, :, :] = 2
    samples = store_case._foreground(label)
    assert list(samples) == ["2"]
    assert len(set(samples["2"])) == store_case.FOREGROUND_SAMPLES
    assert (label.ravel()[samples["2"]] == 2).all()
    assert samples == store_case._foreground(label)


def test_declared_names_pass_the_label_map(tmp_path):
    folder = tmp_path / "d"
    label = np.zeros((12, 14, 10), dtype=np.uint8)
    label[2:4], label[5:7], label[8:10] = 1, 2, 4
    save_nifti(folder / "imagesTr/a.nii.gz")
    save_nifti(folder / "labelsTr/a.nii.gz", label)
    declared = {"0": "background", "1": "core", "2": "edema", "4": "enhancing"}
    (folder / "dataset.json").write_text(json.dumps({"modality": {"0": "T1"}, "labels": declared}))
    write_store.write_store(collect(folder), tmp_path / "s", Config(label_map={4: 3, 2: 0}))
    assert index(tmp_path / "s")["labels"] == {"0": "background", "1": "core", "3": "enhancing"}
    result = write_store.write_store(collect(folder), tmp_path / "t", Config())
    assert "label values 0 1 2 4 are not consecutive" in result.summary()
    assert index(tmp_path / "s")["channels"] == ["T1"]


def test_values_that_others_are_mapped_onto_are_recorded(tmp_path):
    """A class of several values has no way back; {2: 1} alone would not tell that there was a 1."""
    from amaes.inference import undo_label_map  # imports torch, which the worker processes of this module need not

    label = np.zeros((12, 14, 10), dtype=np.uint8)
    label[2:4], label[5:7], label[8:10] = 1, 2, 4
    save_nifti(tmp_path / "i/a.nii.gz")
    save_nifti(tmp_path / "l/a.nii.gz", label)
    collection, store = collect(tmp_path / "i", tmp_path / "l"), tmp_path / "s"
    for status in ("ok", "skipped"):
        result = write_store.write_store(collection, store, Config(label_map={2: 1, 4: 3}))
        assert result.outcomes[0].row["status"] == status
        assert index(store)["config"]["label_map"] == {"1": 1, "2": 1, "4": 3}
        assert index(store)["config_hash"] == Config(label_map={2: 1, 4: 3}).hash()
    label_map = Config.from_dict(index(store)["config"]).label_map
    assert undo_label_map(np.arange(4, dtype=np.uint8), label_map).tolist() == [0, 1, 2, 4]


def test_negative_label_values_are_mapped(tmp_path):
    label = np.zeros((12, 14, 10), dtype=np.int16)
    label[2:4], label[5:7] = -1, 1
    save_nifti(tmp_path / "i/a.nii.gz")
    save_nifti(tmp_path / "l/a.nii.gz", label)
    options = ["--images", tmp_path / "i", "--labels", tmp_path / "l", "--out", tmp_path / "s", "--workers", 0]
    assert main([*map(str, options), "--label-map", "3:2", "-1:0"]) == 0
    assert index(tmp_path / "s")["labels"] == {"0": "background", "1": "label_1"}


# Faults ---------------------------------------------------------------------------------------------------------------


def test_a_folder_of_all_faults_is_survived(bad_files, tmp_path, capsys):
    folder = next(iter(bad_files.values())).parent
    save_nifti(folder / "good.nii.gz")
    done = command("--images", folder, "--out", tmp_path / "s", "--workers", 2, "--verify", "--strict-orientation")
    assert done.returncode == 1
    assert f"{len(bad_files) + 1} inputs: 1 ok, 0 skipped, {len(bad_files)} rejected, 0 failed" in done.stdout
    rows = {row["id"]: row for row in report(tmp_path / "s")}
    assert {name: rows[name]["reason"] for name in bad_files} == {name: name for name in bad_files}
    assert all(rows[name]["message"].startswith(f"{name}.nii.gz: ") for name in bad_files)
    assert [case["id"] for case in index(tmp_path / "s")["cases"]] == ["good"]
    assert list(arrays(tmp_path / "s")) == ["cases/good.npy"]


def test_nothing_usable_is_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "a.nii.gz").write_text("hello\n")
    line = refused(capsys, "--images", tmp_path / "i", "--out", tmp_path / "s", "--workers", 0)
    assert "none of 1 inputs could be used; the first: not_gzip: a.nii.gz: expected gzip data" in line
    assert report(tmp_path / "s")[0]["reason"] == "not_gzip"
    assert not (tmp_path / "s" / "dataset.json").exists()


def test_missing_label_rejects_its_case(scans, tmp_path):
    folder = scans(2)
    labels = tmp_path / "labels"
    save_nifti(labels / "sub-1/sub-1_T1w.nii.gz", np.zeros((13, 15, 11), dtype=np.uint8))
    result = write_store.write_store(collect(folder, labels), tmp_path / "s", Config())
    assert [outcome.row["reason"] for outcome in result.outcomes] == ["missing_label", None]
    assert (result.status(), result.status(allow_rejects=True)) == (1, 0)


def test_an_unforeseen_error_is_a_line_of_the_report(scans, tmp_path, monkeypatch):
    whole = store_case.preprocess_case

    def fails(images, *arguments, **options):
        if "sub-1" in str(images[0]):
            raise MemoryError("no\nmemory")
        return whole(images, *arguments, **options)

    monkeypatch.setattr(store_case, "preprocess_case", fails)
    result = write_store.write_store(collect(scans()), tmp_path / "s", Config())
    row = result.outcomes[1].row
    assert (row["status"], row["reason"]) == ("failed", "unexpected:MemoryError")
    assert row["message"] == "sub-1/sub-1_T1w: no memory"
    assert result.status(allow_rejects=True) == 1
    assert len(index(tmp_path / "s")["cases"]) == 2


def dies(item):
    """A job that ends its own process on the second item."""
    if item.id == "b":
        os.kill(os.getpid(), signal.SIGKILL)
    return Outcome({"id": item.id, "status": "ok"})


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_is_killed_costs_one_item(workers):
    items = [Item(name, ()) for name in "abcde"]
    results = in_processes(items, dies, workers, write_store._worker_died)
    outcomes = {outcome.row["id"]: outcome.row for outcome in results}
    assert [outcomes[name]["status"] for name in "abcde"] == ["ok", "failed", "ok", "ok", "ok"]
    assert outcomes["b"]["reason"] == "unexpected:WorkerDied"
    assert "ended by SIGKILL; probably out of memory" in outcomes["b"]["message"]


def test_fail_fast_reports_the_rest_as_not_run(scans, tmp_path, capsys):
    folder = scans(4)
    (folder / "sub-1" / "sub-1_T1w.nii.gz").write_bytes(b"")
    arguments = ["--images", str(folder), "--out", str(tmp_path / "s"), "--workers", "0"]
    assert main([*arguments, "--fail-fast"]) == 1
    assert [row["reason"] for row in report(tmp_path / "s")] == [None, "empty_file", "not_run", "not_run"]
    assert main(arguments) == 1
    assert main([*arguments, "--allow-rejects"]) == 0
    assert "4 inputs: 0 ok, 3 skipped, 1 rejected, 0 failed" in capsys.readouterr().out


def test_fail_fast_keeps_what_an_earlier_run_finished(scans, tmp_path):
    folder, store = scans(4), tmp_path / "s"
    write_store.write_store(collect(folder), store, Config())
    (folder / "sub-1" / "sub-1_T1w.nii.gz").write_bytes(b"")
    save_nifti(folder / "sub-3/sub-3_T1w.nii.gz", make_volume(seed=9))
    result = write_store.write_store(collect(folder), store, Config(), fail_fast=True, overwrite=True)
    assert [case["id"][:5] for case in index(store)["cases"]] == ["sub-0", "sub-1", "sub-2", "sub-3"]
    assert [outcome.row["reason"] for outcome in result.outcomes] == [None, "empty_file", None, "not_run"]


def test_the_report_names_the_option_that_helps(tmp_path, bad_files):
    shutil.copytree(bad_files["singular_affine"].parent, tmp_path / "i", symlinks=True)
    save_nifti(tmp_path / "i" / "good.nii.gz")
    write_store.write_store(collect(tmp_path / "i"), tmp_path / "s", Config())
    messages = {row["id"]: row["message"] for row in report(tmp_path / "s")}
    assert messages["singular_affine"].endswith("; --assume-ras takes the stored axes as RAS")
    save_nifti(tmp_path / "c" / "T1.nii.gz")
    save_nifti(tmp_path / "c" / "b" / "T1.nii.gz")
    save_nifti(tmp_path / "c" / "b" / "T2.nii.gz")
    write_store.write_store(collect(tmp_path / "c", channels=["T1", "T2"]), tmp_path / "t", Config())
    assert report(tmp_path / "t")[1]["message"].endswith("missing T2; --missing-channel zeros fills")


def test_full_disk_is_one_line_and_leaves_nothing_half_written(scans, tmp_path, monkeypatch, capsys):
    write, calls = store_case._write_array, []

    def full(path, array):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, array)

    monkeypatch.setattr(store_case, "_write_array", full)
    arguments = ("--images", scans(), "--out", tmp_path / "s", "--workers", 0)
    line = refused(capsys, *arguments)
    assert "the disk is full; what was written is whole, free some space" in line
    assert len(arrays(tmp_path / "s")) == 1
    assert not (tmp_path / "s" / "dataset.json").exists()
    assert main([str(argument) for argument in arguments]) == 0
    assert "2 ok, 1 skipped" in capsys.readouterr().out


# Restart --------------------------------------------------------------------------------------------------------------


def test_arrays_do_not_depend_on_the_number_of_workers(scans, tmp_path):
    collection = collect(scans(4))
    for workers in (0, 1, 3):
        write_store.write_store(collection, tmp_path / str(workers), Config(), workers=workers)
    assert len(arrays(tmp_path / "0")) == 4
    assert arrays(tmp_path / "0") == arrays(tmp_path / "1") == arrays(tmp_path / "3")
    assert index(tmp_path / "0") == index(tmp_path / "3")


def statuses(folder, store, config=None, **options):
    result = write_store.write_store(collect(folder), store, config or Config(), **options)
    return [outcome.row["status"] for outcome in result.outcomes]


def test_what_is_done_is_skipped_and_what_changed_is_redone(scans, tmp_path):
    folder, store = scans(), tmp_path / "s"
    assert statuses(folder, store) == ["ok"] * 3
    before = arrays(store)
    assert statuses(folder, store) == ["skipped"] * 3
    assert statuses(folder, store, Config(verify=True)) == ["skipped"] * 3
    case = store / "cases" / "sub-1" / "sub-1_T1w"
    for damage in (
        lambda: Path(f"{case}.json").unlink(),
        lambda: Path(f"{case}.json").write_text("{"),
        lambda: Path(f"{case}.npy").unlink(),
        lambda: Path(f"{case}.npy").write_bytes(Path(f"{case}.npy").read_bytes()[:-4]),
        lambda: np.save(f"{case}.npy", np.zeros((1, 2, 3, 4), dtype=np.float32)),
        lambda: os.utime(folder / "sub-1" / "sub-1_T1w.nii.gz", (1, 1)),
    ):
        damage()
        assert statuses(folder, store) == ["skipped", "ok", "skipped"]
    assert arrays(store) == before
    assert statuses(folder, store, overwrite=True) == ["ok"] * 3


def test_a_label_that_appears_later_is_added(scans, tmp_path):
    folder = scans(1)
    write_store.write_store(collect(folder), tmp_path / "s", Config())
    assert index(tmp_path / "s")["labels"] == {}
    save_nifti(tmp_path / "l/sub-0/sub-0_T1w.nii.gz", np.ones((12, 14, 10), dtype=np.uint8))
    result = write_store.write_store(collect(folder, tmp_path / "l"), tmp_path / "s", Config())
    assert result.outcomes[0].row["status"] == "ok"
    assert index(tmp_path / "s")["cases"][0]["labelled"]
    with pytest.raises(
        ValueError, match=r"sub-0_T1w: was made with .*/l/sub-0/sub-0_T1w.nii.gz, which is not given now"
    ):
        write_store.write_store(collect(folder), tmp_path / "s", Config())
    write_store.write_store(collect(folder), tmp_path / "s", Config(), overwrite=True)
    assert not list(tmp_path.glob("s/cases/**/*_label.npy"))


def test_a_killed_run_continues_to_the_same_store(scans, tmp_path):
    folder = scans(6, shape=(60, 62, 30))
    write_store.write_store(collect(folder), tmp_path / "whole", Config())
    store = tmp_path / "s"
    line = [sys.executable, "-m", "amaes.preprocess", "--images", str(folder), "--out", str(store), "--workers", "1"]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 60
    while not arrays(store) and time.monotonic() < limit:
        time.sleep(0.005)
    process.kill()
    process.wait()
    (store / "cases" / ".left.npy.1.tmp").write_bytes(b"half")
    assert command(*line[3:]).returncode == 0
    assert arrays(store) == arrays(tmp_path / "whole")
    assert index(store) == index(tmp_path / "whole")
    assert not list(store.rglob("*.tmp"))


def test_interrupt_ends_with_130_and_keeps_what_is_done(scans, tmp_path):
    folder, store = scans(40, shape=(60, 62, 30)), tmp_path / "s"
    line = [sys.executable, "-m", "amaes.preprocess", "--images", str(folder), "--out", str(store), "--workers", "1"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so do theirs
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 60
    while not (store / "report.jsonl").is_file() and time.monotonic() < limit:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1] == "interrupted"
    assert not list(store.rglob("*.tmp"))
    assert not (store / "dataset.json").exists()


# Refusals -------------------------------------------------------------------------------------------------------------


def test_a_store_of_other_settings_is_refused_with_both_values(scans, tmp_path, capsys):
    folder, store = scans(1), tmp_path / "s"
    arguments = ["--images", folder, "--out", store, "--workers", 0]
    assert statuses(folder, store) == ["ok"]
    line = refused(capsys, *arguments, "--spacing", 2, 2, 2)
    assert "spacing is [1.0, 1.0, 1.0] there, [2.0, 2.0, 2.0] here" in line
    assert "--overwrite" in line
    assert "channels is ['image'] there, ['T1w'] here" in refused(capsys, *arguments, "--channels", "T1w")
    assert statuses(folder, store, Config(spacing=(2, 2, 2)), overwrite=True) == ["ok"]
    assert index(store)["config"]["spacing"] == [2, 2, 2]


def test_a_folder_that_is_not_a_store_is_left_alone(scans, tmp_path, capsys):
    folder = scans(1)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "dataset.json").write_text('{"modality": {}}')
    line = refused(capsys, "--images", folder, "--out", tmp_path / "s", "--workers", 0, "--overwrite")
    assert "not the index of a store" in line
    assert (tmp_path / "s" / "dataset.json").read_text() == '{"modality": {}}'
    (tmp_path / "file").touch()
    assert "file" in refused(capsys, "--images", folder, "--out", tmp_path / "file", "--workers", 0)


@pytest.mark.parametrize("text", ['{"modality": {}}', '{"format": "amaes-store-1"}', "[]", "null", '{"format": 3}'])
def test_nothing_is_deleted_from_a_folder_that_is_not_a_store(scans, tmp_path, capsys, text):
    store = tmp_path / "s"
    (store / "cases").mkdir(parents=True)
    (store / "dataset.json").write_text(text)
    (store / "cases" / ".a.npy.1.tmp").touch()
    line = refused(capsys, "--images", scans(1), "--out", store, "--workers", 0)
    assert "not the index of a store" in line
    assert (store / "cases" / ".a.npy.1.tmp").exists()


def test_only_temporary_files_of_the_store_are_deleted(scans, tmp_path):
    store, folder = tmp_path / "s", scans(1)
    others = [store / ".editor.tmp", store / "mine" / ".a.npy.1.tmp", store / "cases" / ".swap.tmp", store / ".x.1.tmp"]
    ours = [store / ".report.jsonl.7.tmp", store / "cases" / "deep" / ".a.npy.12.tmp"]
    for path in (*others, *ours):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert statuses(folder, store) == ["ok"]
    assert all(path.exists() for path in others)
    assert not any(path.exists() for path in ours)


def test_two_processes_do_not_write_one_store(scans, tmp_path):
    collection = collect(scans(1))
    (tmp_path / "s").mkdir()
    with locked(tmp_path / "s", ""), pytest.raises(ValueError, match="another process is writing this store"):
        write_store.write_store(collection, tmp_path / "s", Config())


def test_collisions_stop_before_anything_is_written(tmp_path, capsys):
    save_nifti(tmp_path / "i" / "a.nii")
    save_nifti(tmp_path / "i" / "a.nii.gz")
    assert "id_collision: " in refused(capsys, "--images", tmp_path / "i", "--out", tmp_path / "s", "--workers", 0)
    assert not (tmp_path / "s").exists()
