"""Means over cases and folds, the comparison of two runs, and their tables, by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from amaes.evaluation import scores, tables
from amaes.metrics import measure_case


def case(id, pairs, empty="nan"):
    """A case from (prediction, reference) sizes per class: boxes of so many voxels from one corner."""
    maps = np.zeros((2, 10, 12, 14 * len(pairs)), np.uint8)
    for k, sizes in enumerate(pairs):
        for which, size in enumerate(sizes):
            maps[which, 0, :size, 14 * k] = k + 1
    return {"id": id, "classes": measure_case(*maps, len(pairs) + 1, (1, 1, 1), ["dice", "hd95"], empty)}


def fold(number, *cases):
    return {"fold": number, "cases": list(cases), "failed": []}


def test_means_say_how_many_values_they_rest_on():
    cases = [
        case("a", [(2, 2), (0, 0)]),
        case("b", [(2, 6), (0, 0)]),
        case("c", [(0, 0), (3, 0)]),
        case("d", [(0, 5), (0, 0)]),
    ]
    means = scores.fold_means(cases)
    assert means["1"]["dice"] == {"mean": pytest.approx((1 + 0.5 + 0) / 3), "n_valid": 3}
    assert {key: means["1"][key] for key in ("n_cases", "n_empty", "n_missed", "n_false_positive")} == {
        "n_cases": 4,
        "n_empty": 1,
        "n_missed": 1,
        "n_false_positive": 0,
    }
    assert means["2"]["dice"] == {"mean": 0.0, "n_valid": 1}
    assert scores.fold_score(means) == pytest.approx(0.25)  # macro: both classes count the same
    assert means["all"]["dice"]["mean"] == pytest.approx((1 + 0.5 + 0 + 0) / 4)


@pytest.mark.parametrize("missed", range(1, 5))
def test_more_misses_never_improve_a_summary(missed):
    """Failures must not drop out of a mean."""
    sizes = [(5, 5), (4, 5), (3, 5), (1, 5)]
    some = [(0, b) if i < missed - 1 else (a, b) for i, (a, b) in enumerate(sizes)]
    more = [(0, b) if i < missed else (a, b) for i, (a, b) in enumerate(sizes)]
    before, after = (scores.fold_means([case(str(i), [pair]) for i, pair in enumerate(s)]) for s in (some, more))
    assert after["1"]["dice"]["mean"] <= before["1"]["dice"]["mean"]
    assert after["1"]["hd95"]["mean"] >= before["1"]["hd95"]["mean"]
    assert after["1"]["hd95"]["n_valid"] == 4


def test_a_class_that_no_case_has_is_not_a_number_and_not_zero():
    summary = scores.summarise([fold(0, case("a", [(2, 2), (0, 0)]))])
    assert math.isnan(summary["classes"]["2"]["dice"]["mean"])
    assert summary["dice"]["mean"] == 1
    assert math.isnan(summary["dice"]["sd"])  # one fold
    text = tables.run_tables("run", summary, {"1": "core"}, "note")
    assert "| 2 | Dice, % | – | 0 | 1 | 0 | 0 |" in text
    assert "nan" not in text.lower().replace("not a number", "")
    assert "NaN" not in json.dumps(scores.nan_to_null(summary))


def test_cases_of_several_folds_count_once():
    first = [fold(0, case("a", [(2, 2)])), fold(1, case("a", [(2, 6)]), case("b", [(4, 4)]))]
    second = [fold(0, case("a", [(6, 6)]), case("b", [(0, 4)]), case("z", [(1, 1)]))]
    rows = scores.compare_runs(first, second)
    assert rows["1"]["n"] == 2
    assert rows["1"]["first"] == pytest.approx((0.75 + 1) / 2)
    assert rows["1"]["difference"] == pytest.approx((0.25 - 1) / 2)


def test_undefined_pairs_are_counted():
    rows = scores.compare_runs(
        [fold(0, case("a", [(0, 0)]), case("b", [(1, 1)]))], [fold(0, case("a", [(3, 0)]), case("b", [(1, 1)]))]
    )
    assert (rows["1"]["n"], rows["1"]["n_left_out"]) == (1, 1)


def test_wilcoxon_by_hand():
    assert scores.wilcoxon_p(np.array([])) != scores.wilcoxon_p(np.array([]))  # NaN
    assert scores.wilcoxon_p(np.zeros(4)) == 1
    assert scores.wilcoxon_p(np.array([1.0, 2, 3, 4, 5])) == pytest.approx(2 / 2**5)  # all of one sign


def test_other_classes_cannot_be_compared():
    with pytest.raises(ValueError, match="different classes"):
        scores.compare_runs([fold(0, case("a", [(1, 1)]))], [fold(0, case("a", [(1, 1), (1, 1)]))])


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("necrotic_core", "necrotic_core"),
        ("a|b", "a/b"),
        ("two\nlines\r\n| x | y |", "two lines / x / y /"),
        ("tab\tand\x1b[2J\u2028bell\x07", "tab and \\[2J bell"),
        ("<img src=x onerror=alert(1)>&amp;", "&lt;img src=x onerror=alert(1)&gt;&amp;amp;"),
        ("![x](http://x) `code`", "!\\[x\\](http://x) \\`code\\`"),
        ("\\[x](y)", "\\\\\\[x\\](y)"),
        ("", ""),
    ],
)
def test_names_are_shown_as_they_are_in_one_line(name, shown):
    summary = scores.summarise([fold(0, case("a", [(2, 2)]))])
    text = tables.run_tables(name, summary, {"1": name}, "note")
    assert text.splitlines()[0].rstrip() == f"## Dice of {tables.markdown_text(name)}".rstrip()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert f"| failed | {shown} | pooled |" in table[0]
    assert len({line.count("|") for line in table[:4]}) == 1  # no row is broken, no column added
    assert len(table) == 4 - 1 + 2 + 2 * 2
    summary |= {"run": name, "labels": {"1": name}}
    rows = scores.compare_runs([fold(0, case("a", [(2, 2)]))], [fold(0, case("a", [(2, 2)]))])
    assert f"| {shown} | 1 | 0 |" in tables.comparison_tables(summary, summary, rows)
