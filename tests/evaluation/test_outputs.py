"""What evaluate.py leaves of every case, its report, and the scores of folders of predictions."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from amaes.evaluation import case_pictures
from amaes.evaluation.case_pictures import choose_cases
from amaes.evaluation.report import markdown_to_html, report_html
from amaes.evaluation.tables import markdown_table, markdown_text
from tests.conftest import save_nifti
from tests.evaluation.test_evaluate import BLOB, LPS, MOVED, SHAPE, make_run, run, store  # noqa: F401 (fixtures)


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_row_per_fold_case_and_class(make_run, capsys):  # noqa: F811
    folder = make_run("first", 0.5, [["a", "b"], ["c"]])
    assert run(capsys, folder)[0] == 0
    rows = rows_of(folder / "cases.csv")
    assert [(row["fold"], row["case"], row["subject"], row["class"]) for row in rows] == [
        (fold, case, case, name) for fold, case in (("0", "a"), ("0", "b"), ("1", "c")) for name in ("1", "all")
    ]
    assert [row["dice"] for row in rows] == ["1.0", "1.0", "0.75", "0.75", "0.0", "0.0"]
    assert (rows[2]["hd95"], rows[2]["status"], rows[4]["status"]) == ("1.0", "ok", "false_positive")
    assert rows[3]["hd95"] == ""  # only overlap is pooled


def test_results_of_another_space_and_other_metrics_are_added(make_run, capsys):  # noqa: F811
    folder = make_run("first", 0.5, [["a", "b"]])
    run(capsys, folder, "--metrics", "dice", "hd95")
    calls = len(make_run.calls)
    native = (folder / "cases.csv").read_text()
    assert run(capsys, folder, "--space", "store", "--metrics", "dice")[0] == 0
    assert (folder / "cases.csv").read_text() == native
    assert list(rows_of(folder / "cases-store.csv")[0])[-1] == "dice"
    calls = len(make_run.calls)
    run(capsys, folder, "--metrics", "lesion_f1")
    row = rows_of(folder / "cases.csv")[0]
    assert list(row)[-3:] == ["dice", "hd95", "lesion_f1"]
    assert (row["hd95"], row["lesion_f1"]) == ("0.0", "1.0")
    assert len(make_run.calls) == calls  # measured again, not predicted
    assert set(json.loads((folder / "summary.json").read_text())["classes"]["1"]) >= {"dice", "hd95", "lesion_f1"}


@pytest.fixture
def folders(tmp_path):
    """labels/a, b, d and predictions of a (equal), b (a voxel off, a class of its own) and x."""
    blob, moved, two = (np.zeros(SHAPE, np.uint8) for _ in range(3))
    blob[BLOB], moved[MOVED], two[BLOB] = 4, 4, 4
    two[0, 0, 0] = 9
    for name, label in {"a": blob, "b": moved, "d": blob}.items():
        save_nifti(tmp_path / "labels" / f"{name}.nii.gz", label, LPS)
    for name, label in {"a": blob, "b": two, "x": blob}.items():
        save_nifti(tmp_path / "predictions" / f"{name}.nii", label, LPS)
    save_nifti(tmp_path / "predictions" / "probabilities" / "a.nii.gz", np.stack([blob] * 3, axis=3), LPS)
    return ["--predictions", tmp_path / "predictions", "--labels", tmp_path / "labels"]


@pytest.mark.parametrize(("missing", "mean"), [("error", [1, 0.75]), ("zero", [1, 0.75, 0])])
def test_a_folder_of_predictions_is_scored(folders, capsys, missing, mean):
    status, out, err = run(capsys, *folders, "--metrics", "dice", "--missing", missing)
    assert status == 1
    assert f"{folders[1]}: d: no prediction d.nii.gz in {folders[1]}" in err
    summary = json.loads((folders[1] / "summary.json").read_text())
    assert summary["classes"]["4"]["dice"]["mean"] == pytest.approx(np.mean(mean))
    assert summary["classes"]["9"]["n_false_positive"] == 1
    assert [path[-5:] for path in summary["unused"]] == ["x.nii"]
    assert (folders[1] / "summary.md").read_text() in out
    assert "1 predictions have no label there" in out
    assert [row["case"] for row in rows_of(folders[1] / "cases.csv")][::3] == ["a", "b", "d"][: len(mean)]


def test_two_folders_of_predictions_are_compared(folders, tmp_path, capsys):
    for name in "abd":
        label = np.zeros(SHAPE, np.uint8)
        label[MOVED], label[0, 0, 0] = 4, 9
        save_nifti(tmp_path / "other" / f"{name}.nii.gz", label, LPS)
    _, out, _ = run(capsys, folders[0], folders[1], tmp_path / "other", *folders[2:], "--metrics", "dice")
    assert f"## Dice % of {tmp_path / 'other'} against {folders[1]}" in out
    assert "| 4 | 2 | 0 | 87.50 | 87.50 | +0.00 |" in out
    assert "of these same few networks" in out
    page = (tmp_path / "other" / "report.html").read_text()
    assert "Dice of" in page
    assert "Pictures" not in page  # there is no image


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected RUN, or --predictions DIR --labels DIR"),
        (["RUN", "--predictions", "P", "--labels", "L"], "and not both"),
        (["--predictions", "P"], "given together"),
        (["RUN", "--labels", "L"], "given together"),
        (["--predictions", "P", "--labels", "L", "--space", "store"], "not with --data, --space"),
        (["--predictions", "P", "--labels", "none"], "--labels none: no such folder"),
        (["--predictions", "none", "--labels", "L"], "--predictions none: no such folder"),
        (["--predictions", "L", "--labels", "P"], "no file has the name of a label, such as a.nii.gz"),
    ],
)
def test_wrong_uses_are_one_line(tmp_path, capsys, monkeypatch, options, message):
    save_nifti(tmp_path / "P" / "a.nii.gz", np.zeros(SHAPE, np.uint8), LPS)
    save_nifti(tmp_path / "L" / "b.nii.gz", np.zeros(SHAPE, np.uint8), LPS)
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *options)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]


# The report -----------------------------------------------------------------------------------------------------------


def fold_of(*dice):
    return {
        "fold": 0,
        "cases": [{"id": f"c{k}", "classes": {"1": {"dice": v}, "all": {"dice": 0}}} for k, v in enumerate(dice)],
    }


NAN = float("nan")


@pytest.mark.parametrize(
    ("dice", "expected"),
    [
        ([], []),
        ([NAN], []),
        ([0.5], ["worst c0"]),
        ([0.9, 0.1, NAN], ["worst c1", "second worst c0"]),
        (
            [0.1 * k for k in range(9, -1, -1)],  # c9 is the worst
            [
                "worst c9",
                "second worst c8",
                "third worst c7",
                "fourth worst c6",
                "fifth worst c5",
                "median c4",
                "best c0",
            ],
        ),
    ],
)
def test_the_worst_the_median_and_the_best_are_chosen_once(dice, expected):
    assert [f"{case.title} {case.id}" for case in choose_cases([fold_of(*dice)])] == expected


class Tags(HTMLParser):
    """Checks that every tag is closed, and keeps what the page would load."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.tags = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_markdown_of_our_tables_becomes_html():
    table = markdown_table(["class", "**Dice %**"], [["<b>a|[x](y)", "**1**"], ["–", ""]])
    page = markdown_to_html(
        f"## {markdown_text('run_[1] & <i>')}\n\nOne\ntwo\n\n{table}\n\nNot:\n- a\n- b\n\n1. x\n2. y\n"
    )
    assert "<h2>run_[1] &amp; &lt;i&gt;</h2>" in page
    assert "<p>One\ntwo</p>" in page
    assert "<tr><th>class</th><th><b>Dice %</b></th></tr>" in page
    assert "<tr><td>&lt;b&gt;a/[x](y)</td><td><b>1</b></td></tr>\n<tr><td>–</td><td></td></tr>" in page
    assert "<p>Not:</p><ul><li>a</li><li>b</li></ul>\n<ul><li>x</li><li>y</li></ul>" in page
    tags = Tags()
    tags.feed(page)
    assert tags.open == []


@pytest.mark.parametrize("options", [[], ["--space", "store"]], ids=["native", "store"])
def test_the_report_is_one_file(make_run, capsys, options):  # noqa: F811
    folder = make_run("first", 0.5, [["a", "b"], ["b", "c"]])
    for k in (0, 1):
        (folder / f"fold{k}" / "progress.png").write_bytes(b"picture")
    assert run(capsys, folder, "--metrics", "dice", *options)[0] == 0
    suffix = "-store" if options else ""
    page = (folder / f"report{suffix}.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert not tags.tags & {"script", "link", "iframe"}
    assert all(source.startswith("data:image/png;base64,") for source in tags.sources)
    assert page.count("Training of fold") == 4  # caption and alternative text
    assert "62.50" in page
    assert re.search(r"<td>1</td><td>c</td><td>c</td><td>0.00</td>", page)


def test_names_are_shown_as_they_are(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    case = {"id": "<script>x</script>", "subject": "&", "classes": {"1": {"dice": 0.5}}}
    page = report_html("<i>", "", [{"fold": 0, "cases": [case]}], {"1": "<u>"}, {'"><script>': tmp_path / "a.png"})
    tags = Tags()
    tags.feed(page)
    assert not tags.tags & {"script", "i", "u"}


@pytest.mark.parametrize("options", [[], ["--space", "store"]], ids=["native", "store"])
def test_cases_are_drawn(make_run, capsys, options):  # noqa: F811
    image = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed")
    folder = make_run("first", 0.5, [["a", "b"], ["b", "c"]])
    run(capsys, folder, "--metrics", "dice", *options)
    suffix = "-store" if options else ""
    drawn = image.imread(folder / f"cases{suffix}.png")[:, :, :3]
    orange = np.abs(drawn - np.array([230, 159, 0]) / 255).max(axis=2) < 0.01
    assert orange.any()  # outlines of class 1
    assert "data:image/png;base64,iVBOR" in (folder / f"report{suffix}.html").read_text()


def test_a_picture_that_fails_costs_no_table(make_run, capsys, monkeypatch):  # noqa: F811
    def broken(*_):
        raise ImportError("no backend")

    monkeypatch.setattr(case_pictures, "write_sheet", broken)
    monkeypatch.setattr(case_pictures, "find_spec", lambda _: True)
    folder = make_run("first", 0.5, [["a", "b"]])
    assert run(capsys, folder, "--metrics", "dice")[0] == 0
    assert "they need a working matplotlib" in (folder / "report.html").read_text()
