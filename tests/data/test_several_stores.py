import json

import numpy as np
import pytest
import torch

from amaes.data.classes import Classes, check_labels, labelled
from amaes.data.loader import loader
from amaes.data.order import MixedBatches, Share
from amaes.data.patches import Patches
from amaes.data.several_stores import SeveralStores, open_stores, saved_pretrain_split
from amaes.data.splits import pretrain_split
from amaes.data.store import Store
from tests.stores import make_store


def edit(folder, change):
    content = json.loads((folder / "dataset.json").read_text())
    change(content)
    (folder / "dataset.json").write_text(json.dumps(content))


def make_pair(tmp_path, labels=None, count=4):
    """Two stores of 3 and `count` cases; the second one's labels are named as given."""
    first = make_store(tmp_path / "first", count=3, labels=True)
    second = make_store(tmp_path / "second", count=count, labels=True)
    edit(second, lambda c: c.update(labels=labels or {"0": "Background", "1": "TWO", "2": "three"}))
    return first, second


@pytest.fixture
def pool(tmp_path):
    return open_stores(make_pair(tmp_path))


# Cases ----------------------------------------------------------------------------------------------------------------


def test_the_cases_of_all_stores_are_one_list(pool):
    names = ["first/case00", "first/case01", "first/case02", *(f"second/case{i:02d}" for i in range(4))]
    assert [case.id for case in pool.cases] == names
    assert pool.cases[4].subject == "second/s01"
    assert pool.store_of.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert pool.index("second/case02") == 5
    assert np.array_equal(pool.image("second/case02"), pool.stores[1].image("case02"))
    assert np.array_equal(pool.label("first/case01"), pool.stores[0].label("case01"))
    assert isinstance(pool.image("first/case00"), np.memmap)
    assert pool.properties("second/case03") == pool.stores[1].properties("case03")
    assert pool.config == pool.stores[0].config
    assert pool.groups([0, 6, 2, 3]) == [[0, 2], [6, 3]]
    with pytest.raises(ValueError, match=r"first \+ .*second: has no case 'case00'"):
        pool.image("case00")


def test_patches_are_read_from_a_pool_as_from_a_store(pool):
    patches = Patches(pool, (16, 24, 20), labels=True, foreground=1.0)
    (batch,) = loader(patches, [[(0, 1), (0, 5)]], workers=0, pin_memory=False)
    assert batch["image"].shape == (2, 1, 16, 24, 20)
    assert batch["case"] == [1, 5]
    assert (batch["label"].flatten(1).max(dim=1).values > 0).all()


def test_one_store_is_that_store(tmp_path):
    path = make_store(tmp_path / "alone", labels=True)
    store = open_stores([path])
    assert type(store) is Store
    assert store.fingerprint == Store(path).fingerprint


def test_folders_of_the_same_name_get_a_number(tmp_path):
    paths = [make_store(tmp_path / part / "store", count=2) for part in "abc"]
    assert open_stores(paths).names == ["store", "store-2", "store-3"]


def test_the_fingerprint_follows_from_the_stores_and_their_order(tmp_path):
    first, second = make_pair(tmp_path)
    prints = {open_stores(pair).fingerprint for pair in ((first, second), (first, second), (second, first))}
    assert len(prints) == 2
    edit(second, lambda c: c["cases"][0].update(subject="other"))
    assert open_stores((first, second)).fingerprint not in prints


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["config"].update(spacing=[2.0, 1.0, 1.0]),
            r"second: prepared with spacing \[2\.0, 1\.0, 1\.0\], .*first with \[1\.0, 1\.0, 1\.0\]; preprocess both",
        ),
        (
            lambda c: c["config"].update(normalization="zscore"),
            r"second: prepared with normalization zscore, .*first with unit; .* `normalization`",
        ),
        (lambda c: c.update(channels=["T1", "T2"]), r"second: has 2 channels \(T1, T2\), .*first has 1 \(C0\)"),
    ],
)
def test_stores_of_other_preparation_are_refused_with_both_values(tmp_path, change, message):
    first, second = make_pair(tmp_path)
    edit(second, change)
    with pytest.raises(ValueError, match=message):
        open_stores((first, second))


def test_label_maps_and_precision_may_differ_and_no_store_may_come_twice(tmp_path):
    first, second = make_pair(tmp_path)
    edit(second, lambda c: c["config"].update(label_map={"4": 3}, min_axis=15, dtype="float16"))
    edit(second, lambda c: c.update(channels=["FLAIR"]))
    assert open_stores((first, second)).channels == ["C0+FLAIR"]
    with pytest.raises(ValueError, match="first: given twice"):
        open_stores((first, second, first.parent / "second" / ".." / "first"))


def test_each_store_is_split_as_if_alone(tmp_path):
    first, second = make_pair(tmp_path)

    options = {"fraction": 0.5, "seed": 1, "split_by": "subject"}
    split = saved_pretrain_split(open_stores((first, second)), **options)
    alone = [saved_pretrain_split(Store(path), **options) for path in (first, second)]
    for side in ("train", "validation"):
        expected = [f"{name}/{id}" for name, part in zip(("first", "second"), alone, strict=True) for id in part[side]]
        assert split[side] == expected
    assert alone[0] == pretrain_split(Store(first), 0.5, seed=1)
    assert (first / "splits.json").is_file()
    assert (second / "splits.json").is_file()


# Classes --------------------------------------------------------------------------------------------------------------


def test_classes_of_the_same_name_are_one_in_any_case(pool):
    classes = Classes.of(pool)
    assert classes.names == pool.labels == {0: "background", 1: "one", 2: "two", 3: "three"}
    assert classes.count == 4
    tables, allowed = classes.rows([2, 3])  # a case of each store
    assert tables[:, :4].tolist() == [[0, 1, 2, 4], [0, 2, 3, 4]]  # 4: not declared
    assert allowed.tolist() == [[True, True, True, False], [True, False, True, True]]
    assert tables.dtype == torch.int64
    assert tables.shape == (2, 256)


def test_values_may_have_gaps_and_placeholders_are_no_names(tmp_path):
    pool = open_stores(make_pair(tmp_path, {"0": "background", "2": "label_2", "7": "One"}))
    edit(pool.stores[0].path, lambda c: c.update(labels={"0": "background", "1": "one", "2": "label_2"}))
    pool = open_stores([store.path for store in pool.stores])
    classes = Classes.of(pool)
    assert classes.names == {0: "background", 1: "one", 2: "first: label_2", 3: "second: label_2"}
    assert classes.tables[1, [0, 2, 7]].tolist() == [0, 3, 1]
    assert classes.count == 4


def test_the_classes_of_one_store_are_its_values(tmp_path):
    path = make_store(tmp_path / "alone", labels=True)
    edit(path, lambda c: c.update(labels={"0": "background", "1": "one", "3": "three"}))
    classes = Classes.of(Store(path))
    assert classes.count == Store(path).num_classes == 4
    assert classes.names == {0: "background", 1: "one", 3: "three"}
    assert classes.tables[0, :5].tolist() == [0, 1, 4, 3, 4]
    assert classes.allowed.tolist() == [[True, True, False, True]]


def test_a_value_that_is_not_declared_is_refused_with_its_file(tmp_path):
    first, second = make_pair(tmp_path, {"0": "background", "1": "one"})
    pool = open_stores((first, second))
    ids = [case.id for case in pool.cases]
    check_labels(pool, ids[:3])
    message = r"second/cases/case00_label\.npy: holds label value 2 \(8 voxels\), .*json declares 0 background, 1 one"
    with pytest.raises(ValueError, match=message):
        check_labels(pool, ids)
    with pytest.raises(ValueError, match="case00_label"):
        labelled(Store(second), ["case00"])


def test_a_label_is_held_to_what_its_own_store_declares(tmp_path):
    first, second = make_pair(tmp_path, {"0": "background", "1": "one"})
    pool = open_stores((first, second))
    assert np.flatnonzero(pool.declared(pool.cases[0].id)).tolist() == [0, 1, 2]
    assert np.flatnonzero(pool.declared(pool.cases[-1].id)).tolist() == [0, 1]


def test_cases_without_label_are_left_out(tmp_path):
    first, second = make_pair(tmp_path)
    edit(second, lambda c: c["cases"][1].update(labelled=False))
    pool = open_stores((first, second))
    assert labelled(pool, ["first/case00", "second/case01", "second/case02"]) == ["first/case00", "second/case02"]
    with pytest.raises(ValueError, match="has no case"):
        labelled(pool, ["case00"])


# Order ----------------------------------------------------------------------------------------------------------------


def test_stores_are_drawn_by_the_root_of_their_size():
    order = MixedBatches([range(100), range(100, 104), []], Share(50), seed=0, start=0, stop=40)
    samples = [sample for step in range(40) for sample in order.of_step(step)]
    small = [case for _, case in samples if case >= 100]
    assert len(small) / len(samples) == pytest.approx(2 / 12, abs=0.025)  # 2000 draws: three deviations
    assert {case for _, case in samples if case < 100} == set(range(100))
    assert max(small.count(case) for case in range(100, 104)) < 1.4 * len(small) / 4
    assert [epoch for epoch, _ in samples] == list(range(2000))  # no (epoch, case) comes twice


def test_ranks_micro_steps_and_restarts_share_one_sequence():
    groups = [[5, 6, 7], [8, 9]]
    whole = MixedBatches(groups, Share(8), seed=1, start=0, stop=5)
    steps = [whole.of_step(step) for step in range(5)]
    assert list(whole) == steps
    parts = [list(MixedBatches(groups, Share(8, 2, rank, 2), seed=1, start=2, stop=5)) for rank in (0, 1)]
    joined = [a + b for a, b in zip(*parts, strict=True)]
    assert [joined[i] + joined[i + 1] for i in (0, 2, 4)] == steps[2:]
    assert len(MixedBatches(groups, Share(8, 2), seed=1, start=2, stop=5)) == 6
    assert MixedBatches(groups, Share(8), seed=2, start=0, stop=5).of_step(0) != steps[0]
    with pytest.raises(ValueError, match="no case to train on"):
        MixedBatches([[], []], Share(8), seed=0, start=0, stop=1)


def test_a_pool_needs_no_stores_of_equal_size(tmp_path):
    stores = [Store(make_store(tmp_path / name, count=n, labels=True)) for name, n in (("a", 1), ("b", 5))]
    assert SeveralStores(stores).store_of.tolist() == [0, 1, 1, 1, 1, 1]
