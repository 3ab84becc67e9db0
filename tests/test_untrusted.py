"""Files that mean harm: stores, checkpoints and scans, none of which may run, write elsewhere or fill memory."""

import argparse
import gzip
import io
import json
import os
import pickle
import resource
import shutil
import struct
import time

import numpy as np
import pytest
import torch

from amaes import checkpoint
from amaes.data import splits
from amaes.data.patches import Patches
from amaes.data.splits import saved_split
from amaes.data.store import Store
from amaes.preprocess import nifti
from amaes.preprocess.dataset_json import read_dataset_json
from amaes.preprocess.earlier_cases import read_index
from amaes.training.earlier import options_of_earlier_runs
from tests.conftest import SHAPE, save_nifti
from tests.stores import make_store


@pytest.fixture
def store(tmp_path):
    return Store(make_store(tmp_path / "store", count=7, labels=True))


def cases_file(store, name):
    return store.path / "cases" / name


def header_of(shape):
    """The beginning of a .npy file of that shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_2_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


class Payload:
    """An object whose unpickling makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


# Stores


def edited(store, change):
    path = store.path / "dataset.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return store.path


@pytest.mark.parametrize("id", ["../x", "/x", "a/../../x", "..", "a\\..\\x", "C:x", "", "a\nb", "a\0b", 3, None, ["a"]])
def test_an_id_that_is_no_name_in_the_store_is_refused(store, id):
    with pytest.raises(ValueError, match=r"dataset\.json: not a store's index") as caught:
        Store(edited(store, lambda content: content["cases"][0].update(id=id)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["cases"][0].update(shape=[40, 52]),
        lambda c: c["cases"][0].update(shape=[40, 52, 0]),
        lambda c: c["cases"][0].update(shape=[40, 52, float("nan")]),
        lambda c: c["cases"][0].update(shape=[40, 52, "36"]),
        lambda c: c["cases"][0].update(shape=[40, 52, True]),
        lambda c: c["cases"][0].update(shape=7),
        lambda c: c["cases"][0].update(subject=7),
        lambda c: c["cases"][0].update(sequence={"a": 1}),
        lambda c: c["cases"][0].update(id=c["cases"][1]["id"]),
        lambda c: c["cases"][0].pop("labelled"),
        lambda c: c.update(cases={"a": 1}),
        lambda c: c.update(cases=None),
        lambda c: c.update(channels=[]),
        lambda c: c.update(channels=7),
        lambda c: c.update(labels={"one": "a"}),
        lambda c: c.update(labels={"-1": "a"}),
        lambda c: c.update(labels={str(10**9): "a"}),
        lambda c: c.update(config=7),
        lambda c: c.update(config={}),
        lambda c: c.pop("config_hash"),
    ],
)
def test_an_index_of_other_things_is_refused_with_one_line(store, change):
    with pytest.raises(ValueError, match=r"dataset\.json: not a store's index") as caught:
        Store(edited(store, change))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"", b"nul"])
def test_json_that_is_none_is_refused_with_one_line(store, text):
    (store.path / "dataset.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"dataset\.json: not JSON"):
        Store(store.path)
    saved_split(store, "a", lambda: {"train": ["case00"], "test": []})
    (store.path / "splits.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"splits\.json: not JSON"):
        saved_split(store, "a", dict)
    with pytest.raises(ValueError, match=r"dataset\.json: not "):
        read_index(store.path)
    with pytest.raises(ValueError, match=r"dataset\.json: not "):
        read_dataset_json(store.path, for_network=False)
    (store.path / "config.json").write_bytes(text)
    arguments = argparse.Namespace(overwrite=False, resume="auto", out=store.path)
    assert options_of_earlier_runs(arguments) == {}


@pytest.mark.parametrize(
    "split",
    [
        None,
        3,
        [],
        {},
        {"train": ["case00"]},
        {"train": "case00", "test": []},
        {"train": [["case00"]], "test": []},
        [[]],
    ],
)
def test_a_split_of_other_things_is_refused(store, split):
    path = store.path / "splits.json"
    saved_split(store, "a", lambda: {"train": ["case00"], "test": []})
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"splits": dict.fromkeys(content["splits"], split)}))
    with pytest.raises(ValueError, match=r"splits\.json: split 'a, .*' is not two lists of ids"):
        saved_split(store, "a", dict)


def test_a_split_of_ids_outside_the_store_is_refused(store):
    path = store.path / "splits.json"
    saved_split(store, "a", lambda: {"train": ["case00"], "test": []})
    path.write_text(path.read_text().replace("case00", "../../elsewhere"))
    with pytest.raises(ValueError, match=r"names 1 cases that the store does not have, e\.g\. \.\./\.\./elsewhere"):
        saved_split(store, "a", dict)


def test_cases_may_lie_behind_a_link_and_are_only_read(store, tmp_path):
    shutil.move(store.path / "cases", tmp_path / "other disk")
    (store.path / "cases").symlink_to(tmp_path / "other disk")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "other disk").iterdir()}
    assert Patches(Store(store.path), (16, 24, 20))[(0, 3)]["image"].shape == (1, 16, 24, 20)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "other disk").iterdir()} == before


def test_what_is_written_into_a_store_follows_no_link(store, tmp_path):
    for name in ("splits.json", f".splits.json.{os.getpid()}.tmp"):
        victim = tmp_path / f"victim of {name}"
        victim.write_text(json.dumps({"format": splits.SPLITS_FORMAT, "splits": {}}))
        (store.path / name).symlink_to(victim)
        before = victim.read_text()
        saved_split(store, name, lambda: {"train": ["case00"], "test": []})
        assert victim.read_text() == before
    assert not (store.path / "splits.json").is_symlink()


def test_an_array_that_is_a_pickle_is_refused_and_not_run(store, tmp_path):
    marker = tmp_path / "was run"
    np.save(cases_file(store, "case03.npy"), np.array([Payload(marker)], dtype=object), allow_pickle=True)
    cases_file(store, "case04.npy").write_bytes(pickle.dumps(Payload(marker)))
    for id in ("case03", "case04"):
        with pytest.raises(ValueError, match=rf"{id}\.npy: not a whole array"):
            store.image(id)
    assert not marker.exists()


@pytest.mark.parametrize("side", [10**9, 2**31, 2**62, 2**63, 10**30])
def test_an_array_that_promises_more_than_it_holds_takes_no_memory(store, side):
    content = header_of((1, side, side, side)) + bytes(100)
    cases_file(store, "case03.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"case03\.npy: "):
        store.image("case03")
    path = edited(store, lambda c: c["cases"][3].update(shape=[side] * 3))  # an index that says the same
    with pytest.raises(ValueError, match=r"case03\.npy: "):
        Store(path).image("case03")


def test_a_checkpoint_with_a_payload_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "was run"
    torch.save({"format": "amaes-checkpoint-1", "model": {}, "extra": Payload(marker)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Payload(marker)))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match=f"{name}: not a checkpoint"):
            checkpoint.read(tmp_path / name)
    assert not marker.exists()


# Scans


@pytest.fixture
def bomb(tmp_path):
    """A small volume, and after it 10 GB of zeros in 10 MB."""
    path = save_nifti(tmp_path / "bomb.nii.gz")
    zeros = gzip.compress(bytes(1 << 24), 9)
    with path.open("ab") as file:
        for _ in range(600):
            file.write(zeros)
    return path


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


@pytest.mark.parametrize("verify", [False, True])
def test_a_scan_that_inflates_to_more_than_it_promises_is_not_read_to_its_end(bomb, verify):
    peak, began = peak_mb(), time.process_time()
    with pytest.raises(nifti.RejectedInput, match="header says 6720 bytes of data, file has more than 16783936"):
        nifti.read_nifti(bomb, verify=verify)
    assert time.process_time() - began < 3
    assert peak_mb() - peak < 200


@pytest.mark.parametrize("verify", [False, True])
def test_a_few_zero_bytes_may_follow_the_data_of_a_scan(tmp_path, verify):
    path = save_nifti(tmp_path / "padded.nii.gz")
    with path.open("ab") as file:
        file.write(gzip.compress(bytes(nifti.PADDING)))
    assert nifti.read_nifti(path, verify=verify)[1].shape == SHAPE
    with path.open("ab") as file:
        file.write(gzip.compress(bytes(1)))
    with pytest.raises(nifti.RejectedInput, match=f"file has {6720 + nifti.PADDING + 1}"):
        nifti.read_nifti(path, verify=verify)


def test_a_scan_that_promises_too_many_voxels_is_refused_before_memory_is_taken(tmp_path):
    peak = peak_mb()
    header = nifti.nib.Nifti2Header()
    header["dim"] = [3, 10**5, 10**5, 10**5, 1, 1, 1, 1]
    header["pixdim"][1:4], header["sform_code"], header["vox_offset"] = 1, 1, 544
    header["srow_x"][0] = header["srow_y"][1] = header["srow_z"][2] = 1
    for name, write in (("huge.nii", bytes), ("huge.nii.gz", gzip.compress)):
        (tmp_path / name).write_bytes(write(header.binaryblock + bytes(4096)))
        with pytest.raises(nifti.RejectedInput, match="expected at most 4096 per axis"):
            nifti.read_nifti(tmp_path / name)
    assert peak_mb() - peak < 100


def test_a_scan_whose_data_begin_far_behind_a_bomb_is_refused(tmp_path):
    began = time.process_time()
    path = save_nifti(tmp_path / "far.nii.gz", patch={108: struct.pack("<f", 1e10)})
    with pytest.raises(nifti.RejectedInput, match="expected data at byte 352 to 16777216, found 1e"):
        nifti.read_nifti(path)
    assert time.process_time() - began < 1
