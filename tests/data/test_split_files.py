"""Splits that a user brings, and validation cases that are drawn."""

from __future__ import annotations

import json

import pytest

from amaes.data.split_files import read_splits, shared_subjects
from amaes.data.splits import all_cases, hold_out_validation
from amaes.data.store import Store
from tests.stores import make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """case00 to case05 of the subjects s00, s01, s02, twice."""
    return Store(make_store(tmp_path_factory.mktemp("split") / "store", labels=True, subjects=3))


def ids(text):
    return [f"case0{number}" for number in text]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


FOLDS = [{"train": ids("03"), "validation": ids("1"), "test": ids("24")}, {"train": ids("14"), "test": ids("0235")}]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", FOLDS, FOLDS),
        ("a.json", [{"train": ids("30"), "val": ids("1"), "test": ids("42")}], FOLDS[:1]),
        ("splits_final.json", [{"train": ids("14"), "val": ids("5320")}], FOLDS[1:]),
        (
            "a.json",
            [{"train": ids("14"), "validation": ids("0")}],
            [{"train": ids("14"), "validation": ids("0"), "test": []}],
        ),
        (
            "a.csv",
            "\ufeffcase,fold,role\n"
            + "".join(
                f"case0{number},{fold},{role}\n"
                for fold, numbers in ((1, "140235"), (0, "31240"))
                for number, role in zip(
                    numbers,
                    ("train train test test test test" if fold else "train validation test test train").split(),
                    strict=True,
                )
            ),
            FOLDS,
        ),
    ],
)
def test_files_of_splits(store, tmp_path, name, content, expected):
    assert read_splits(write(tmp_path / name, content), store) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", [{"train": ["nobody"], "test": ids("0")}], "fold 0: train case 'nobody' is not in the store"),
        ("a.json", [FOLDS[0], {"train": ids("00")}], "fold 1: train case 'case00' is given twice"),
        ("a.json", [{"train": ids("0"), "test": ids("0")}], "fold 0: case 'case00' is in two roles, train and test"),
        ("a.json", [{"train": ids("0"), "val": ids("0"), "test": []}], "in two roles, train and validation"),
        ("a.json", [{"train": [], "test": ids("0")}], "fold 0: has no case to train on"),
        ("a.json", [{"train": "case00"}], "fold 0: 'train' is 'case00', expected a list of ids"),
        ("a.json", [{"training": ids("0")}], "fold 0 has .'training'., accepted: train, validation, val, test"),
        ("a.json", ["train"], "fold 0 has 'train'"),
        ("a.json", {"train": []}, "not a list of folds"),
        ("a.json", [], "not a list of folds"),
        ("a.json", "{", "a.json"),
        ("a.csv", "id,fold,role\n", r"has the columns \['id', 'fold', 'role'\], expected case, fold, role"),
        ("a.csv", "", "has the columns None"),
        ("a.csv", "case,fold,role\ncase00,x,train\n", "line 2: fold 'x', expected 0, 1"),
        ("a.csv", "case,fold,role\ncase00,0\n", "line 2: role None, expected one of train"),
        ("a.csv", "case,fold,role\ncase00,1,train\n", r"has the folds \[1\], expected 0, 1, ... without a gap"),
        ("a.csv", "case,fold,role\n", r"has the folds \[\]"),
    ],
)
def test_wrong_files_are_refused(store, tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_splits(write(tmp_path / name, content), store)


def test_missing_files_and_cases_without_a_label(tmp_path):
    store = Store(make_store(tmp_path / "store"))
    with pytest.raises(FileNotFoundError, match=r"`splits` .*none.csv: no such file"):
        read_splits(tmp_path / "none.csv", store)
    with pytest.raises(ValueError, match="train case 'case00' has no label"):
        read_splits(write(tmp_path / "a.json", FOLDS), store)


def test_validation_is_drawn_by_subject_from_the_test_cases(store):
    split = {"train": ids("03"), "test": ids("1245")}
    drawn = [hold_out_validation(split, store, 1, seed) for seed in range(8)]
    assert {tuple(fold["validation"]) for fold in drawn} == {tuple(ids("14")), tuple(ids("25"))}  # both of a subject
    for fold in drawn:
        assert fold["train"] == ids("03")
        assert sorted(fold["validation"] + fold["test"]) == ids("1245")
        assert shared_subjects(fold, store) == []
    assert drawn[0] == hold_out_validation(split, store, 1, 0)
    with pytest.raises(ValueError, match="`val_cases` 3: the fold has 4 cases to test on; none would be left"):
        hold_out_validation(split, store, 3, 0)


def test_no_validation_cases_leave_a_fold_as_it_is_and_all_cases_are_one_fold(store):
    assert hold_out_validation(FOLDS[1], store, 0, 0) == FOLDS[1]
    assert all_cases(store) == [{"train": ids("012345"), "test": []}]


def test_subjects_in_two_parts_are_found_and_told(store, tmp_path):
    fold = {"train": ids("0"), "test": ids("13")}
    assert shared_subjects(fold, store) == ["s00"]
    told = []
    assert read_splits(write(tmp_path / "a.json", [FOLDS[1], fold]), store, told.append) == [FOLDS[1], fold]
    assert len(told) == 1
    assert "fold 1: 1 subjects have cases in several parts, such as s00" in told[0]
