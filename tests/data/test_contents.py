"""What a store holds: numbers by hand, as text and as JSON."""

import json
import subprocess
import sys

import pytest

from amaes.cli import run
from amaes.data.__main__ import main
from amaes.data.contents import contents
from amaes.data.splits import fold_splits, saved_split
from amaes.data.store import Store
from tests.stores import make_store


@pytest.fixture
def store(tmp_path):
    """Three labelled cases of two subjects with voxels of 1 x 2 x 3 mm, 1 x 2 x 4 mm, 1 x 2 x 5 mm."""
    folder = make_store(tmp_path / "s", count=3, labels=True, subjects=2)
    for k in range(3):
        path = folder / "cases" / f"case0{k}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "ras_spacing": [1, 2, 3 + k]}))
    return folder


def test_numbers_by_hand(store):
    saved_split(Store(store), "two folds", lambda: fold_splits(Store(store), folds=2, train_cases=1))
    content = json.loads((store / "dataset.json").read_text())
    content["cases"][0]["sequence"] = "T1"
    content["regions"] = {"both": [1, 2]}
    (store / "dataset.json").write_text(json.dumps(content))  # other cases: the split is an old one
    saved_split(Store(store), "two folds", lambda: fold_splits(Store(store), folds=2, train_cases=1))
    found = contents(Store(store))
    assert (found["cases"], found["subjects"], found["labelled"], found["channels"]) == (3, 2, 3, ["C0"])
    assert found["sequences"] == {"T1": 1}
    assert found["shape"] == {"min": [20, 44, 34], "median": [36, 52, 36], "max": [40, 60, 50]}
    assert found["spacing_of_scans"] == {"min": [1, 2, 3], "median": [1, 2, 4], "max": [1, 2, 5]}
    n_voxels = 4 * 6 * 4, 2 * 2 * 2
    assert found["classes"] == [
        {
            "value": value,
            "name": name,
            "cases": 3,
            "ml": {"min": n * 6 / 1000, "median": n * 8 / 1000, "max": n * 10 / 1000},
        }
        for value, name, n in zip((1, 2), ("one", "two"), n_voxels, strict=True)
    ]
    assert found["regions"] == {"both": [1, 2]}
    assert found["bytes"] == sum(path.stat().st_size for path in (store / "cases").iterdir())
    assert [(split["name"], split["current"], split["folds"]) for split in found["splits"]] == [
        ("two folds", False, 2),
        ("two folds", True, 2),
    ]
    assert sum(found["splits"][0]["cases"].values()) == 3


def test_text_and_json(store, capsys):
    assert main([str(store)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{store}: 3 cases of 2 subjects, 3 labelled, 0.00 GB; id ")
    assert "label 1 one: in 3 cases; ml: 0.576 to 0.96, median 0.768\n" in text
    assert "voxels of 1 x 1 x 1 mm: 20 x 44 x 34 to 40 x 60 x 50, median 36 x 52 x 36\n" in text
    assert main([str(store), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == contents(Store(store))


def test_it_answers_without_torch(store):
    script = "import sys; from amaes.data.__main__ import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script, str(store)], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize(
    "regions", [None, [1], {"x": []}, {"x": [9]}, {"x": [0]}, {"x": "1"}, {"x": [1.0]}, {"a\n": [1]}]
)
def test_regions_that_are_none_are_refused(store, regions):
    content = json.loads((store / "dataset.json").read_text())
    (store / "dataset.json").write_text(json.dumps({**content, "regions": regions}))
    with pytest.raises(ValueError, match="dataset.json: not a store's index"):
        Store(store)


@pytest.mark.parametrize("record", [None, "{}", '{"ras_spacing": [1, 2, "x"], "label_counts": {}}', "[]"])
def test_a_damaged_record_is_named_in_one_line(store, capsys, record):
    path = store / "cases" / "case01.json"
    path.unlink() if record is None else path.write_text(record)
    with pytest.raises(SystemExit) as stop:
        run(main, [str(store)])
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n"), "case01" in error) == (2, 1, True)
