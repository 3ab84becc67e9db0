"""Quality control of a store: statistics against numbers worked out by hand, outliers, sheets, errors."""

from __future__ import annotations

import csv
import json
import sys

import numpy as np
import pytest

from amaes.data import quality
from amaes.data.quality import case_statistics, outliers, report, slices, source_of
from amaes.data.store import Case, Store
from amaes.preprocess.__main__ import main
from tests.stores import make_store

SHAPE = (16, 24, 8)


def write_store(folder, images, ids=None, spacing=(1.0, 1.0, 1.0), normalization="unit", properties=None):
    """A store of these images, (C, X, Y, Z)."""
    ids, cases = ids or [f"case{k:02d}" for k in range(len(images))], []
    for id, image in zip(ids, images, strict=True):
        case = {"id": id, "subject": id.rpartition("/")[0], "labelled": False, "shape": image.shape[1:]}
        cases.append(case)
        path = folder / "cases" / f"{id}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, image)
        path.with_suffix(".json").write_text(json.dumps({**case, **(properties or {})}))
    index = {
        "format": "amaes-store-1",
        "config": {"normalization": normalization, "spacing": spacing},
        "config_hash": "0",
        "channels": [f"C{c}" for c in range(len(images[0]))] if images else ["C0"],
        "labels": {},
        "cases": cases,
    }
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(index))
    return folder


def head(level=0.5, shape=SHAPE, background=0.0):
    """A box of two grey values in an even background."""
    volume = np.full((1, *shape), background, np.float32)
    x, y, z = (side // 4 for side in shape)
    volume[:, x:-x, y:-y, z:-z] = level
    volume[:, x:-x, y : y + 4, z:-z] = level / 2  # a third of it
    return volume


def test_statistics_are_those_worked_out_by_hand(tmp_path):
    image = np.zeros((1, *SHAPE), np.float32)
    image[0, 4:12, 6:18, 2:6] = 0.2  # 384 of 3072 voxels
    image[0, 4:12, 6:9, 2:6] = 1.0  # 96 of them
    image[0, 0, 0, 0] = 0.1  # one of the corner voxels, which are 8 x (2 x 3 x 1)
    where = {"crop_box": [[0, 16], [5, 29], [2, 10]], "ras_shape": [20, 29, 12], "ras_spacing": [0.5, 1.0, 3.0]}
    store = Store(write_store(tmp_path / "s", [image], spacing=(2.0, 1.0, 3.0), properties=where))
    (row,) = case_statistics(store, store.cases[0])
    foreground = np.r_[[0.2] * 288, [1.0] * 96, 0.1]
    assert [row[f"fov_{axis}_mm"] for axis in "xyz"] == [32, 24, 24]
    assert [row[f"spacing_{axis}_mm"] for axis in "xyz"] == [0.5, 1.0, 3.0]
    assert row["crop_touches"] == 2  # the lower end of x, the upper end of y
    assert (row["min"], row["max"], row["nonfinite"]) == (0, 1, 0)
    assert row["foreground_fraction"] == pytest.approx(385 / 3072, abs=1e-6)
    assert row["zero_fraction"] == pytest.approx(2687 / 3072, abs=1e-6)
    assert row["background_nonzero"] == pytest.approx(1 / 48, abs=1e-6)
    assert row["stripped_guess"] is False
    assert row["mean"] == pytest.approx((288 * 0.2 + 96 + 0.1) / 385, rel=1e-5)
    assert row["sd"] == pytest.approx(foreground.std(), rel=1e-5)
    assert (row["p50"], row["p95"]) == (pytest.approx(0.2), pytest.approx(1.0))


def test_an_empty_background_suggests_a_stripped_skull_and_noise_does_not(tmp_path):
    noisy = head() + np.random.default_rng(0).random(SHAPE, dtype=np.float32) / 10
    store = Store(write_store(tmp_path / "s", [head(), noisy]))
    assert [case_statistics(store, case)[0]["stripped_guess"] for case in store.cases] == [True, False]


def test_large_volumes_are_sampled_evenly(tmp_path):
    ramp = np.broadcast_to(np.linspace(0, 1, 120, dtype=np.float32), (1, 100, 90, 120))
    store = Store(write_store(tmp_path / "s", [np.ascontiguousarray(ramp)]))
    (row,) = case_statistics(store, store.cases[0])
    assert row["p50"] == pytest.approx(0.5, abs=0.02)
    assert row["mean"] == pytest.approx(0.5, abs=0.02)


def test_every_channel_has_a_row(tmp_path):
    store = Store(write_store(tmp_path / "s", [np.concatenate([head(0.4), head(0.8)])]))
    assert [(row["channel"], row["sequence"], row["max"]) for row in case_statistics(store, store.cases[0])] == [
        ("C0", "C0", pytest.approx(0.4)),
        ("C1", "C1", pytest.approx(0.8)),
    ]


@pytest.mark.parametrize(
    ("id", "subject", "source"),
    [("WMH/1/v/T1", "WMH/1", "WMH"), ("patient01/T1", "patient01", "all"), ("case01", "case01", "all")],
)
def test_the_source_is_the_first_part_of_an_id_that_is_not_the_subject(id, subject, source):
    assert source_of(Case(id, subject, False, SHAPE)) == source


def planted(folder, **where):
    """Ten heads, of which one is short, one bright, and one holds a value that is not a number."""
    images = [head(0.5 + 0.002 * k) for k in range(10)]
    images[2] = head(0.5, (16, 24, 40))
    images[5] = head(1.0)
    images[7][0, 8, 12, 4] = np.nan
    return write_store(folder, images, **where)


def test_planted_outliers_are_listed_with_reasons_and_nothing_else(tmp_path):
    store = Store(planted(tmp_path / "s"))
    listed = outliers([row for case in store.cases for row in case_statistics(store, case)])
    assert {entry["id"] for entry in listed} == {"case02", "case05", "case07"}
    by_id = {entry["id"]: entry for entry in listed}
    assert by_id["case07"]["reasons"] == ["values that are not finite"]
    assert (listed[0]["id"], listed[0]["score"]) == ("case07", None)
    # Extents 8 mm but for one: the spread is the least one of 4 mm, z = (40 - 8) / 4.
    assert "extent from foot to head 40 mm, median 8 mm (z +8.0)" in by_id["case02"]["reasons"]
    assert any(text.startswith("mean of the foreground 0.833") for text in by_id["case05"]["reasons"])


def test_small_groups_and_other_sources_are_not_compared(tmp_path):
    rows = []
    for name, count, level in (("A", 8, 0.5), ("B", 8, 1.0), ("C", 5, 0.5)):
        ids = [f"{name}/{k}/v/T1" for k in range(count)]
        images = [head(level if name != "C" or k else 1.0) for k in range(count)]
        store = Store(write_store(tmp_path / name, images, ids))
        rows += [row for case in store.cases for row in case_statistics(store, case)]
    assert outliers(rows) == []


def test_what_is_wrong_in_itself_needs_no_others(tmp_path):
    mask = (head(1.0) > 0).astype(np.float32)
    store = Store(write_store(tmp_path / "s", [np.zeros_like(mask), mask, head(1.5), head(0.5)]))
    rows = [row for case in store.cases for row in case_statistics(store, case)]
    assert {entry["id"]: entry["reasons"] for entry in outliers(rows)} == {
        "case00": ["no foreground: all sampled values are equal"],
        "case01": ["a foreground of one value, as in a mask"],
        "case02": ["values from 0 to 1.5, expected 0 to 1"],
    }
    assert {entry["id"] for entry in outliers(rows, unit_range=False)} == {"case00", "case01"}


def test_without_matplotlib_statistics_are_written_and_the_remedy_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    store = planted(tmp_path / "s")
    (store / "cases" / "case09.npy").unlink()
    assert main(["--qc", str(store)]) == 0
    text = capsys.readouterr().out
    assert "10 cases, 4 worth a look" in text
    assert "pip install 'amaes[plots]'" in text
    assert "case09: cannot be read: " in text
    content = json.loads((store / "qc" / "qc.json").read_text())
    assert [entry["id"] for entry in content["outliers"]][:2] == ["case09", "case07"]
    with (store / "qc" / "qc.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(content["cases"]) == 9
    assert float(table[5]["mean"]) == content["cases"][5]["mean"]
    assert sorted(path.name for path in (store / "qc").iterdir()) == ["qc.csv", "qc.json"]


def test_sheets_are_numbered_and_replaced(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(quality, "PER_PAGE", 4)
    store, out = planted(tmp_path / "s"), tmp_path / "out"
    out.mkdir()
    (out / "sheet-gone-9.png").write_bytes(b"of an earlier run")
    (out / "mine-1.png").write_bytes(b"not ours")
    assert "3 contact sheets" in report(store, out)
    names = [f"sheet-all-{k}.png" for k in (1, 2, 3)]
    assert sorted(path.name for path in out.glob("*.png")) == ["mine-1.png", *names]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_outliers_are_drawn_first_and_the_others_evenly(monkeypatch):
    monkeypatch.setattr(quality, "OTHERS", 2)
    rows = [{"id": f"c{k}", "channel": "C0"} for k in range(6)]
    reasons = {("c4", "C0"): "x", ("c1", "C0"): "x"}
    assert [row["id"] for row in quality.drawn_rows(rows, reasons)] == ["c1", "c4", "c0", "c3"]


def test_tiles_show_the_middle_in_true_proportions_anterior_and_superior_up(tmp_path):
    image = np.full((1, *SHAPE), 0.5, np.float32)  # 16 x 24 x 32 mm
    image[0, :4] = 0.25  # left
    image[0, :, 18:] = 1.0  # anterior
    image[0, :, :, 6:] = 0.75  # superior
    store = Store(write_store(tmp_path / "s", [image], spacing=(1.0, 1.0, 4.0)))
    (row,) = case_statistics(store, store.cases[0])
    shown = slices(store, row, pixel=0.5)
    axial, coronal, sagittal = shown[:, :96], shown[:, 96:192], shown[:, 192:]
    sizes = [
        (np.ptp(np.flatnonzero(t.any(1))) + 1, np.ptp(np.flatnonzero(t.any(0))) + 1) for t in np.split(shown, 3, 1)
    ]
    assert sizes == [(48, 32), (64, 32), (64, 48)]  # pixels of 0.5 mm
    assert (axial[47, 32], axial[47, 60], axial[25, 47]) == (0.25, 0.5, 1.0)
    assert (coronal[17, 60], coronal[78, 33]) == (0.75, 0.25)
    assert (sagittal[78, 25], sagittal[78, 70]) == (1.0, 0.5)  # the face on the left


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--qc", "nowhere"], FileNotFoundError, "nowhere: no store there"),
        (["--qc", "empty"], ValueError, "the store has no cases"),
        (["--qc", "s", "--out", "file"], ValueError, "`out` file: a file, expected a folder"),
    ],
)
def test_user_errors_name_what_is_wrong(tmp_path, monkeypatch, options, error, message):
    monkeypatch.chdir(tmp_path)
    write_store(tmp_path / "empty", [])
    write_store(tmp_path / "s", [head()])
    (tmp_path / "file").write_text("")
    with pytest.raises(error, match=message):
        main(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--qc", "s", "--labels", "x"], "--labels: does not go with --qc"),
        (["--qc", "s", "--images", "x"], "not allowed with argument"),
        (["--images", "x"], "the following arguments are required: --out"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(options)
    assert message in capsys.readouterr().err


def test_sources_in_other_alphabets_have_sheets_of_their_own(tmp_path):
    pytest.importorskip("matplotlib")
    store = make_store(tmp_path / "s", 2)
    content = json.loads((store / "dataset.json").read_text())
    for case, source in zip(content["cases"], ("é", "ü"), strict=True):
        for path in sorted((store / "cases").glob(f"{case['id']}.*")):
            target = store / "cases" / source / path.name
            target.parent.mkdir(exist_ok=True)
            path.rename(target)
        case["id"] = f"{source}/{case['id']}"
    (store / "dataset.json").write_text(json.dumps(content))
    assert "2 contact sheets" in report(store)
    assert sorted(path.name for path in (store / "qc").glob("*.png")) == ["sheet-é-1.png", "sheet-ü-1.png"]
