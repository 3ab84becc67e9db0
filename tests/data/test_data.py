import json
import shutil

import numpy as np
import pytest
import torch

from amaes import rng
from amaes.data.loader import loader
from amaes.data.order import Batches, Share
from amaes.data.patches import Patches, read_window
from amaes.data.splits import fold_splits, pretrain_split, saved_split
from amaes.data.store import Store
from tests.stores import SHAPES, make_store, position_image


@pytest.fixture
def store(tmp_path):
    return Store(make_store(tmp_path / "store", count=7, channels=2, labels=True))


def test_store_reads_what_is_there(store):
    assert [case.id for case in store.cases] == [f"case{i:02d}" for i in range(7)]
    assert store.channels == ["C0", "C1"]
    assert store.labels == {0: "background", 1: "one", 2: "two"}
    assert store.num_classes == 3
    image = store.image("case01")
    assert isinstance(image, np.memmap)
    assert image.shape == (2, *SHAPES[1])
    assert store.label("case02").shape == SHAPES[2]
    assert store.index("case03") == 3


def edit(store, change):
    path = store.path / "dataset.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="other"), "format 'other', expected 'amaes-store-1'"),
        (lambda c: c["cases"][0].update(id="../../etc/passwd"), "leads out of the store"),
        (lambda c: c["cases"][0].update(id="/etc/passwd"), "leads out of the store"),
        (lambda c: c.pop("channels"), "not a store's index"),
        (lambda c: c.update(cases=[3]), "not a store's index"),
        (lambda c: c.update(labels=["a"]), "not a store's index"),
    ],
)
def test_a_store_that_is_not_ours_is_refused(store, change, message):
    edit(store, change)
    with pytest.raises(ValueError, match=message):
        Store(store.path)


def test_a_store_that_was_written_anew_is_noticed(store):
    index = store.path / "dataset.json"
    content = index.read_text()
    index.write_text(content + " ")  # touched, the same cases
    store.check_unchanged()
    index.write_text(content.replace('"config_hash": "', '"config_hash": "other'))
    with pytest.raises(ValueError, match="was changed since it was read"):
        store.check_unchanged()
    index.unlink()  # it is being written
    with pytest.raises(ValueError, match="was changed since it was read"):
        store.check_unchanged()


def test_missing_and_broken_files_are_named(store, tmp_path):
    with pytest.raises(FileNotFoundError, match="no store there"):
        Store(tmp_path / "nope")
    (store.path / "cases" / "case00.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"case00\.npy: missing"):
        store.image("case00")
    shutil.copy(store.path / "cases" / "case02.npy", store.path / "cases" / "case01.npy")
    with pytest.raises(
        ValueError, match=r"case01\.npy: holds float32 \(2, 20, 60, 34\), expected floating \(2, 36, 44, 50\)"
    ):
        store.image("case01")
    with pytest.raises(ValueError, match="has no case 'nope'"):
        store.image("nope")
    (store.path / "dataset.json").write_text("hello")
    with pytest.raises(ValueError, match="not JSON"):
        Store(store.path)


def test_objects_in_an_array_are_refused(store):
    np.save(store.path / "cases" / "case00.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        store.image("case00")


# Splits


def test_folds_follow_the_published_rule_and_are_disjoint(store):
    folds = fold_splits(store, folds=4, train_cases=2)
    order = np.random.RandomState(1000).permutation(7)
    expected = [sorted(f"case{i:02d}" for i in order[2 * k : 2 * k + 2]) for k in range(3)]
    assert [fold["train"] for fold in folds[:3]] == expected
    for fold in folds:
        assert len(fold["test"]) == 5
        assert sorted(fold["train"] + fold["test"]) == [case.id for case in store.cases]
    second = np.random.RandomState(1001).permutation(7)
    assert folds[3]["train"] == sorted(f"case{i:02d}" for i in second[:2])


def test_folds_keep_subjects_together(tmp_path):
    store = Store(make_store(tmp_path / "store", count=8, labels=True, subjects=4))
    subject = {case.id: case.subject for case in store.cases}
    for fold in fold_splits(store, folds=5, train_cases=3):
        assert not {subject[i] for i in fold["train"]} & {subject[i] for i in fold["test"]}
        assert len(fold["train"]) == 4  # whole subjects of two


def test_too_few_labelled_cases_are_counted(store, tmp_path):
    with pytest.raises(ValueError, match="`train_cases` 7: .* has 7 labelled cases of 7 subjects"):
        fold_splits(store, folds=2, train_cases=7)
    with pytest.raises(ValueError, match="no labelled case"):
        fold_splits(Store(make_store(tmp_path / "other")), folds=2, train_cases=1)


def test_validation_takes_whole_subjects(tmp_path):
    store = Store(make_store(tmp_path / "store", count=9, subjects=3))
    split = pretrain_split(store, fraction=0.2)
    assert len(split["validation"]) == 3  # two wanted, a subject has three
    subject = {case.id: case.subject for case in store.cases}
    assert not {subject[i] for i in split["train"]} & {subject[i] for i in split["validation"]}
    assert len(pretrain_split(store, 0.2, split_by="volume")["validation"]) == 2
    assert pretrain_split(store, 0.0)["validation"] == []
    with pytest.raises(ValueError, match="`split_by` 'site' is unknown; accepted: subject, volume"):
        pretrain_split(store, split_by="site")


def test_one_subject_is_trained_on_and_not_validated(tmp_path):
    store = Store(make_store(tmp_path / "store", count=2, subjects=1))
    assert pretrain_split(store, 0.5) == {"train": ["case00", "case01"], "validation": []}


def test_a_split_is_written_once_and_reused(store):
    first = saved_split(store, "a", lambda: {"train": ["case00"], "test": ["case02"]})
    assert saved_split(store, "a", dict) == first
    saved_split(store, "b", lambda: [{"train": ["case01"], "test": []}])
    assert saved_split(store, "a", dict) == first


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["cases"].pop(),
        lambda c: c["cases"][1].update(subject="s00"),
        lambda c: c["labels"].update({"1": "other"}),
    ],
)
def test_a_store_that_has_changed_gets_another_split(store, change):
    saved_split(store, "a", lambda: {"train": ["case00"], "test": []})
    edit(store, change)
    other = saved_split(Store(store.path), "a", lambda: {"train": ["case01"], "test": []})
    assert other["train"] == ["case01"]
    assert len(json.loads((store.path / "splits.json").read_text())["splits"]) == 2  # the first stays on record


def test_splits_that_cannot_be_right_are_refused(store):
    saved_split(store, "a", lambda: {"train": ["case00"], "test": ["case01"]})
    path = store.path / "splits.json"
    text = path.read_text()
    path.write_text(text.replace("case00", "nobody"))
    with pytest.raises(ValueError, match="names 1 cases that the store does not have, e.g. nobody"):
        saved_split(store, "a", dict)
    path.write_text(text.replace("case00", "case01"))
    with pytest.raises(ValueError, match="has subject s01 on both sides"):
        saved_split(store, "a", dict)
    assert saved_split(store, "a", dict, by_subject=False) == {"train": ["case01"], "test": ["case01"]}
    for broken in ("{", "{}", "[]"):
        path.write_text(broken)
        with pytest.raises(ValueError, match="splits.json: not"):
            saved_split(store, "a", dict)


def test_a_store_that_cannot_be_written_to_is_split_all_the_same(store, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert saved_split(store, "a", lambda: {"train": [], "test": []}) == {"train": [], "test": []}
    assert not (store.path / "splits.json").exists()


# Patches


def test_a_window_is_cut_out_and_padded():
    array = position_image(2, (4, 5, 6))
    inside = read_window(array, (1, 0, 2), (3, 5, 2), fill=-1)
    assert np.array_equal(inside, array[:, 1:4, :, 2:4])
    padded = read_window(array, (-2, 3, 0), (8, 4, 6), fill=-1)
    assert np.array_equal(padded[:, 2:6, :2], array[:, :, 3:])
    assert (padded[:, :2] == -1).all()
    assert (padded[:, :, 2:] == -1).all()
    assert (read_window(array, (9, 0, 0), (2, 5, 6), fill=-1) == -1).all()


def test_reading_a_window_leaves_the_array_alone(store):
    patch = read_window(store.image("case00"), (0, 0, 0), (4, 4, 4), 0.0)
    patch[:] = 5
    assert store.image("case00").max() < 1


def test_small_axes_are_centred_and_large_ones_vary(store):
    patches = Patches(store, (32, 32, 32), seed=1)
    case = store.cases[2]  # 20 x 60 x 34
    starts = np.array([patches._start(rng.stream(1, epoch, 2, "crop"), case) for epoch in range(200)])
    assert (starts[:, 0] == -6).all()
    assert starts[:, 1].min() == 0
    assert starts[:, 1].max() == 28
    assert set(starts[:, 2]) == {0, 1, 2}


def test_published_crop_places_the_window_uniformly(store):
    case = store.cases[2]
    window = Patches(store, (16, 16, 16), (24, 24, 24), crop="window")
    starts = np.array([window._start(rng.stream(0, epoch, 2, "crop"), case) for epoch in range(300)])
    assert (starts[:, 0] == -2).all()
    assert (starts[:, 1].min(), starts[:, 1].max()) == (0, 36)
    patch = Patches(store, (16, 16, 16), (24, 24, 24), crop="patch")
    starts = np.array([patch._start(rng.stream(0, epoch, 2, "crop"), case) for epoch in range(300)])
    assert (starts[:, 1].min(), starts[:, 1].max()) == (-4, 40)  # the patch itself reaches both ends


def test_foreground_patches_hold_a_foreground_voxel(store):
    always = Patches(store, (16, 16, 16), seed=0, labels=True, foreground=0.999999)
    assert all((always[(epoch, 0)]["label"] > 0).any() for epoch in range(50))
    rarely = Patches(store, (16, 16, 16), seed=0, labels=True, foreground=0.0)
    assert not all((rarely[(epoch, 0)]["label"] > 0).any() for epoch in range(50))


def test_foreground_starts_are_uniform_around_the_voxel(store):
    patches = Patches(store, (16, 16, 16), labels=True, foreground=0.5)
    starts = set()
    for epoch in range(2000):
        generator = rng.stream(0, epoch, 0, "crop")
        if generator.random() < 0.5:
            starts.add(patches._start(rng.stream(0, epoch, 0, "crop"), store.cases[0])[0])
    assert starts == set(range(14))  # voxels 5 to 13 in a patch of 16: 0 to 13


def test_an_empty_label_falls_back_to_a_uniform_patch(store):
    path = store.path / "cases" / "case00.json"
    properties = json.loads(path.read_text()) | {"foreground": {}, "label_counts": {}}
    path.write_text(json.dumps(properties))
    item = Patches(store, (16, 16, 16), labels=True, foreground=0.999)[(0, 0)]
    assert item["image"].shape == (2, 16, 16, 16)


def test_image_and_label_come_from_the_same_place(store):
    item = Patches(store, (16, 24, 32), seed=3, labels=True)[(5, 1)]
    image, label = item["image"].numpy(), item["label"].numpy()
    full, full_label = store.image("case01"), store.label("case01")
    x, y, z = np.argwhere(full[0] == image[0, 0, 0, 0])[0]
    assert np.array_equal(image, full[:, x : x + 16, y : y + 24, z : z + 32])
    assert np.array_equal(label, full_label[x : x + 16, y : y + 24, z : z + 32])


def test_zscored_stores_are_padded_with_their_minimum(store):
    edit(store, lambda c: c["config"].update(normalization="zscore"))
    path = store.path / "cases" / "case02.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intensity": [{"min": 2, "mean": 8, "std": 4}]}))
    item = Patches(Store(store.path), (32, 32, 32))[(0, 2)]
    assert (item["image"][:, :6] == -1.5).all()


def test_the_share_of_places_that_a_patch_can_come_from(tmp_path):
    store = Store(make_store(tmp_path / "store", count=1))
    x, y, z = store.cases[0].shape
    patch, window = (x - 3, y - 1, z), (x - 1, y, z + 5)  # 4 x 2 x 1 places, of which the window leaves 2 x 1 x 1
    assert Patches(store, patch, window, crop="window").crop_coverage([0]) == 2 / 8
    assert Patches(store, patch, window, crop="patch").crop_coverage([0]) == 1
    assert Patches(store, patch, crop="window").crop_coverage([0]) == 1


def test_unknown_crop_is_named(store):
    with pytest.raises(ValueError, match="`crop` 'middle' is unknown; accepted: window, patch"):
        Patches(store, (16, 16, 16), crop="middle")


def test_values_that_are_not_finite_name_the_case(store):
    image = position_image(2, SHAPES[0])
    image[0] = np.nan
    np.save(store.path / "cases" / "case00.npy", image)
    with pytest.raises(ValueError, match=r"case case00 .*not finite"):
        list(loader(Patches(store, (16, 16, 16)), [[(0, 0)]], 0, pin_memory=False))


def test_a_label_the_store_does_not_declare_names_the_case(store):
    np.save(store.path / "cases" / "case00_label.npy", np.full(SHAPES[0], 3, np.uint8))
    with pytest.raises(ValueError, match=r"case case00 .*label value 3, its store declares 0 1 2"):
        list(loader(Patches(store, (16, 16, 16), labels=True), [[(0, 0)]], 0, pin_memory=False))


# Order


def samples(batches):
    return [batches.of_step(step) for step in range(batches.start, batches.stop)]


def test_no_case_is_no_batch():
    with pytest.raises(ValueError, match="no case to train on"):
        Batches([], Share(2), seed=0, start=0, stop=1)


def test_an_epoch_takes_each_case_once_and_drops_the_incomplete_batch():
    batches = Batches(range(7), Share(2), seed=0, start=0, stop=6)
    assert batches.pass_length == 6
    for epoch in range(2):
        taken = [sample for batch in samples(batches)[3 * epoch : 3 * epoch + 3] for sample in batch]
        assert {e for e, _ in taken} == {epoch}
        assert len({case for _, case in taken}) == 6


def test_without_dropping_batches_cross_the_end_of_a_pass():
    batches = Batches(range(3), Share(2), seed=0, start=0, stop=3, drop_last=False)
    taken = [sample for batch in samples(batches) for sample in batch]
    assert [e for e, _ in taken] == [0, 0, 0, 1, 1, 1]
    assert sorted(case for _, case in taken[:3]) == [0, 1, 2]


def test_a_batch_may_be_larger_than_the_number_of_cases():
    batch = Batches([4, 9], Share(5), seed=0, start=0, stop=1).of_step(0)
    assert sorted(batch)[:2] == [(0, 4), (0, 9)]
    assert len(set(batch)) == 5


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 1)])
def test_ranks_and_micro_steps_only_share_out_the_batch(world, accumulate):
    whole = Batches(range(10), Share(4), seed=5, start=3, stop=9)
    parts = [list(Batches(range(10), Share(4, accumulate, r, world), seed=5, start=3, stop=9)) for r in range(world)]
    for i, step in enumerate(range(3, 9)):
        joined = [s for part in parts for micro in part[i * accumulate : (i + 1) * accumulate] for s in micro]
        assert sorted(joined) == sorted(whole.of_step(step))
    assert len(whole) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers_or_on_where_a_run_starts(store, workers):
    patches = Patches(store, (16, 16, 16), seed=2, labels=True)
    reference = [patches[where] for where in Batches(range(7), Share(2), seed=2, start=0, stop=4).of_step(3)]
    batches = list(loader(patches, Batches(range(7), Share(2), seed=2, start=3, stop=4), workers, pin_memory=False))
    assert len(batches) == 1
    assert torch.equal(batches[0]["image"], torch.stack([item["image"] for item in reference]))
    assert torch.equal(batches[0]["label"], torch.stack([item["label"] for item in reference]))
    assert batches[0]["case"] == [item["case"] for item in reference]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_case_that_cannot_be_read_is_named(store, workers):
    (store.path / "cases" / "case03.npy").write_bytes(b"\x93NUMPY truncated")
    with pytest.raises(ValueError, match=r"case case03 of .*store"):
        list(loader(Patches(store, (16, 16, 16)), [[(0, 3)]], workers, pin_memory=False))
