"""What pretraining saw of the test cases: planted leaks of each kind, and nothing else."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from amaes.data.store import Store
from amaes.evaluation.leakage import check_run, find_leakage, is_distinctive, published_notes, thumbnail, trained_on
from tests.launch import TINY, run
from tests.stores import SHAPES, make_store


def write_store(folder, subjects, images, dtype=np.float32, hashed=True, channels=1):
    """One case per subject, case00, case01, ...; `images` are float32, stored as `dtype`."""
    (folder / "cases").mkdir(parents=True)
    cases = []
    for k, (subject, image) in enumerate(zip(subjects, images, strict=True)):
        case = {"id": f"case{k:02d}", "subject": subject, "labelled": False, "shape": image.shape[1:]}
        cases.append(case)
        np.save(folder / "cases" / f"{case['id']}.npy", image.astype(dtype))
        hashes = (
            {"channel_sha256": [hashlib.sha256(np.ascontiguousarray(c)).hexdigest() for c in image]} if hashed else {}
        )
        (folder / "cases" / f"{case['id']}.json").write_text(json.dumps({**case, **hashes}))
    index = {
        "format": "amaes-store-1",
        "config": {"normalization": "unit", "spacing": [1.0, 1.0, 1.0]},
        "config_hash": folder.name,
        "channels": [f"C{c}" for c in range(channels)],
        "labels": {},
        "cases": cases,
    }
    (folder / "dataset.json").write_text(json.dumps(index))
    return Store(folder)


def noise(seed, shape=SHAPES[0], channels=1):
    return np.random.default_rng(seed).random((channels, *shape), dtype=np.float32)


def blobs(seed, shape=SHAPES[0]):
    """Coarse structure, as a head has: what a thumbnail keeps."""
    coarse = np.random.default_rng(seed).random((4, 4, 4)).astype(np.float32)
    for axis, side in enumerate(shape):
        coarse = np.repeat(coarse, -(-side // 4), axis=axis).take(range(side), axis=axis)
    return coarse[None]


def all_ids(store):
    return [case.id for case in store.cases]


def test_unrelated_stores_have_nothing_in_common(tmp_path):
    fine = write_store(tmp_path / "fine", ["A/s01", "A/s02"], [noise(0), noise(1)])
    pre = write_store(tmp_path / "pre", ["B/s01", "B/s02", "B/OAS30001"], [noise(2), noise(3), noise(4)])
    found = find_leakage(fine, all_ids(fine), [pre], near=0.5)
    assert (found.subjects, found.same_images, found.near, found.unclear, found.seen) == ([], [], [], [], set())
    assert found.not_compared == 0


def test_only_the_planted_subject_is_found_and_only_where_it_is_tested(tmp_path):
    names = ["OASIS3/OAS30001", "OASIS3/OAS30002", "OASIS3/OAS30003"]
    fine = write_store(tmp_path / "fine", names, [noise(k) for k in range(3)])
    pre = write_store(tmp_path / "pre", ["oasis3/sub-oas30002", "OASIS3/OAS30003"], [noise(8), noise(9)])
    found = find_leakage(fine, ["case00", "case01"], [pre])
    assert [(e["test"], e["pretraining"], e["test_cases"]) for e in found.subjects] == [
        ("OASIS3/OAS30002", "oasis3/sub-oas30002", ["case01"])
    ]
    assert found.subjects[0]["evidence"] == "same data set and name"
    assert found.seen == {"case01"}


@pytest.mark.parametrize(
    ("one", "two", "kind"),
    [
        ("WMH/Utrecht_11", "wmh/utrecht-11", "subjects"),  # capitals and separators are habits
        ("WMH/11", "MSSEG/11", None),  # another data set
        ("A/OAS30001", "B/OAS30001", None),
        ("WMH/Utrecht/11", "WMH/Singapore/11", None),  # the number counts within a site
        ("sub-OAS30001", "OASIS3/OAS30001", "subjects"),  # long enough without the data set
        ("s01", "WMH/s01", "unclear"),
        ("s01", "s01", "unclear"),
        ("patient01", "patient01", "unclear"),
        ("1-11", "11-1", None),
    ],
)
def test_names_that_are_short_need_an_equal_data_set(tmp_path, one, two, kind):
    fine = write_store(tmp_path / "fine", [one], [noise(0)])
    pre = write_store(tmp_path / "pre", [two], [noise(1)])
    found = find_leakage(fine, ["case00"], [pre])
    assert [len(found.subjects), len(found.unclear)] == [kind == "subjects", kind == "unclear"]
    assert found.seen == ({"case00"} if kind == "subjects" else set())


def test_in_one_and_the_same_store_a_short_name_is_the_same_subject(tmp_path):
    store = write_store(tmp_path / "fine", ["s01", "s02"], [noise(0), noise(1)])
    found = find_leakage(store, ["case01"], [store])
    assert [entry["evidence"] for entry in found.subjects] == ["same store"]
    assert found.seen == {"case01"}


@pytest.mark.parametrize(
    ("name", "long"),
    [("oas30001", True), ("003-s-1234", True), ("brats2021-00001", True), ("strokecase0001", True), ("3001", False)]
    + [(name, False) for name in ("s01", "patient01", "case-00012", "control-001", "hippocampus-001", "subject0001")],
)
def test_names_that_tell_one_person_from_another(name, long):
    assert is_distinctive(name) is long


@pytest.mark.parametrize("hashed", [True, False])
def test_an_equal_image_under_another_name_is_found_in_any_channel(tmp_path, hashed):
    two = np.concatenate([noise(0), noise(1)])
    zeros = np.concatenate([noise(2), np.zeros_like(noise(2))])  # a missing channel
    fine = write_store(tmp_path / "fine", ["A/x", "A/y"], [two, zeros], hashed=hashed, channels=2)
    images = [noise(5), noise(1), np.zeros_like(noise(2)), noise(1, SHAPES[1])]
    pre = write_store(tmp_path / "pre", ["B/1", "B/2", "B/3", "B/4"], images, hashed=hashed)
    found = find_leakage(fine, all_ids(fine), [pre])
    matches = [(e["test"], e["channel"], e["pretraining"], e["pretraining_channel"]) for e in found.same_images]
    assert matches == [("case00", "C1", "case01", "C0")]
    assert (found.seen, found.subjects) == ({"case00"}, [])


def test_a_float16_store_is_compared_through_the_hashes_of_its_float32_arrays(tmp_path):
    fine = write_store(tmp_path / "fine", ["A/x"], [noise(0)])
    pre = write_store(tmp_path / "pre", ["B/1"], [noise(0)], np.float16)
    assert [entry["pretraining"] for entry in find_leakage(fine, ["case00"], [pre]).same_images] == ["case00"]
    old = write_store(tmp_path / "old", ["B/1"], [noise(0)], np.float16, hashed=False)
    found = find_leakage(fine, ["case00"], [old], near=0.99)
    assert (found.same_images, found.not_compared) == ([], 1)
    assert [entry["correlation"] for entry in found.near] == [pytest.approx(1, abs=1e-4)]


def test_a_scaled_copy_is_a_near_duplicate_with_its_best_match(tmp_path):
    fine = write_store(tmp_path / "fine", ["A/x", "A/y"], [blobs(0), blobs(1)])
    weak, strong = (0.8 * blobs(1) + 0.1 * noise(k) * k for k in (3, 1))
    pre = write_store(tmp_path / "pre", ["B/1", "B/2", "B/3"], [blobs(7), weak, strong])
    found = find_leakage(fine, all_ids(fine), [pre], near=0.95)
    assert [(entry["test"], entry["pretraining"]) for entry in found.near] == [("case01", "case02")]
    assert 0.95 < found.near[0]["correlation"] < 1
    assert find_leakage(fine, all_ids(fine), [pre], near=1.0).near == []
    assert find_leakage(fine, all_ids(fine), [pre]).near == []


def test_blocks_of_thumbnails_change_nothing(tmp_path, monkeypatch):
    fine = write_store(tmp_path / "fine", ["A/x"], [blobs(3)])
    pre = write_store(tmp_path / "pre", [f"B/{k}" for k in range(5)], [blobs(k) for k in range(5)])
    monkeypatch.setattr("amaes.evaluation.leakage.BLOCK", 2)
    assert [entry["pretraining"] for entry in find_leakage(fine, ["case00"], [pre], near=0.9).near] == ["case03"]


def test_thumbnail_is_the_mean_of_blocks():
    volume = np.zeros((64, 33, 20), np.float32)
    volume[2:4, 31:33, 5] = [[1, 3], [5, 7]]
    small = thumbnail(volume)
    assert small.shape == (32, 32, 32)
    assert small[1, 31, 8] == 4  # voxels 2, 3 of x; 31, 32 of y; voxel 8 * 20 // 32 = 5 of z
    assert np.count_nonzero(small) == np.sum(np.arange(32) * 20 // 32 == 5)


def test_what_a_checkpoint_was_trained_on():
    assert trained_on({"provenance": {"options": {"data": "/a"}}}) == ["/a"]
    assert trained_on({"provenance": {"options": {"data": ["/a", "/b"]}}}) == ["/a", "/b"]
    assert [trained_on(c) for c in ({}, {"provenance": 3}, {"provenance": {"options": {"data": [1]}}})] == [[], [], []]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "does not tell what its weights were trained on"),
        ({"provenance": {"options": {"data": "demo"}}}, "synthetic heads"),
        ({"provenance": {"options": {"data": ["/nowhere/store"]}}}, "/nowhere/store, which is not on this machine"),
    ],
)
def test_what_cannot_be_checked_is_said_with_the_way_to_check_it(tmp_path, content, message):
    torch.save({"weight": torch.zeros(1), **content}, tmp_path / "w.pt")
    store = write_store(tmp_path / "ISLES2022", ["A/x"], [noise(0)])
    seen, text = check_run(tmp_path, store, ["case00"], tmp_path / "w.pt")
    assert not seen
    assert message in text
    assert "NOT checked" in text
    assert "`pretrain_data` STORE" in text
    assert not (tmp_path / "leakage.json").exists()
    assert ("all 250 public cases" in text) is (not content)


def test_the_notes_on_published_weights_go_by_the_data_set(tmp_path):
    store = write_store(tmp_path / "hippocampus", ["A/x"], [noise(0)])
    assert published_notes(store) == []


def test_strict_leakage_stops_a_run_and_without_it_a_warning_and_the_list_remain(tmp_path):
    store = make_store(tmp_path / "fine", count=5, labels=True)
    pretraining = make_store(tmp_path / "pre", count=2)
    small = [*TINY, "--workers", 0, "--steps", 1]
    run("train_pretrain.py", *small, "--data", pretraining, "--out", tmp_path / "p")
    weights = tmp_path / "p" / "checkpoints" / "step-1.pt"
    options = [*small, "--data", store, "--folds", 1, "--train-cases", 2, "--weights", weights, "--out", tmp_path / "f"]
    done = run("train_finetune.py", *options, "--strict-leakage", status=2)
    content = json.loads((tmp_path / "f" / "leakage.json").read_text())
    test = json.loads((tmp_path / "f" / "config.json").read_text())["record"]["splits"][0]["test"]
    # Every case of a shape is equal in these stores: case00 is case03, case01 is case04.
    pairs = {"case00": "case00", "case03": "case00", "case01": "case01", "case04": "case01"}
    assert {e["test"]: e["pretraining"] for e in content["same_images"]} == {
        id: pairs[id] for id in test if id in pairs
    }
    assert content["subjects"] == []
    last = [line for line in done.stderr.splitlines() if line][-1]
    assert last.startswith(f"train_finetune.py: error: --strict-leakage: {len(set(test) & set(pairs))} of 3 test cases")
    assert str(tmp_path / "f" / "leakage.json") in last
    assert "Traceback" not in done.stderr
    run("train_finetune.py", *options, "--pretrain-data", tmp_path / "nowhere", "--overwrite", status=2)
    assert (tmp_path / "f" / "leakage.json").is_file()  # refused before anything of the run is touched
    done = run("train_finetune.py", *options)
    assert "WARNING" in done.stdout + done.stderr
    assert (tmp_path / "f" / "fold0" / "checkpoints" / "step-1.pt").is_file()
