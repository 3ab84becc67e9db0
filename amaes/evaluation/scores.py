"""From the scores of single cases to the numbers of a fold, of a run, and of a comparison of two runs.

A case is {"id", "classes": {"1": {"n_ref", "n_pred", "status", metric: value}, ..., "all": {...}}} as `measure_case`
gives it. A fold is {"fold", "cases", "failed", ...}. NaN marks a score that is not defined. Means leave NaN out and say
how many values they rest on.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

NAN = float("nan")
MICRO = "all"  # the entry of a case that pools its foreground classes


def fold_means(cases: Sequence[Mapping]) -> dict[str, dict]:
    """Per class (and "all") the mean of each metric over the cases of a fold, with the number of values behind it.

    Returns:
        {"1": {"n_cases", "n_empty", "n_missed", "n_false_positive", metric: {"mean", "n_valid"}, ...}, ..., "all": ...}
        n_empty counts cases where neither map has the class.
    """
    means = {}
    for name in cases[0]["classes"] if cases else ():
        rows = [case["classes"][name] for case in cases]
        states = Counter(row["status"] for row in rows)
        means[name] = {
            "n_cases": len(rows),
            "n_empty": states["both_empty"],
            "n_missed": states["missed"],
            "n_false_positive": states["false_positive"],
        }
        for metric in (key for key in rows[0] if key not in ("n_ref", "n_pred", "status")):
            valid = _valid(row[metric] for row in rows)
            means[name][metric] = {"mean": _mean(valid), "n_valid": len(valid)}
    return means


def fold_score(means: Mapping[str, Mapping]) -> float:
    """Dice of a fold: mean over the foreground classes of their means over cases; NaN when no class has a value."""
    return _mean(_valid(row["dice"]["mean"] for name, row in means.items() if name != MICRO))


def summarise(folds: Sequence[Mapping]) -> dict:
    """Mean and standard deviation (n - 1) over the folds of a run.

    Args:
        folds: each with "fold", "cases", "failed".

    Returns:
        {"folds": [{"fold", "n_cases", "n_failed", "dice", "classes"}, ...],
         "dice": {"mean", "sd", "folds"} of the fold scores,
         "classes": {name: {metric: {"mean", "sd", "folds", "n_valid"}, "n_empty", ...}}}
    """
    rows = []
    for fold in folds:
        means = fold_means(fold["cases"])
        counts = {"n_cases": len(fold["cases"]), "n_failed": len(fold["failed"])}
        rows.append({"fold": fold["fold"], **counts, "dice": fold_score(means), "classes": means})
    classes: dict[str, dict] = {}
    for name in dict.fromkeys(name for row in rows for name in row["classes"]):
        of_class = [row["classes"][name] for row in rows if name in row["classes"]]
        classes[name] = {
            key: sum(row[key] for row in of_class) for key in ("n_cases", "n_empty", "n_missed", "n_false_positive")
        }
        for metric in (key for key, value in of_class[0].items() if isinstance(value, Mapping)):
            classes[name][metric] = mean_and_sd([row[metric]["mean"] for row in of_class])
            classes[name][metric]["n_valid"] = sum(row[metric]["n_valid"] for row in of_class)
    return {"folds": rows, "dice": mean_and_sd([row["dice"] for row in rows]), "classes": classes}


def summarise_groups(folds: Sequence[Mapping], groups: Mapping[str, Iterable[str]]) -> dict[str, dict]:
    """`summarise` of every group of cases: {name: {"n_cases", "dice": {"mean", "sd", "folds"}}}.

    Args:
        folds: each with "fold", "cases", "failed".
        groups: name -> ids of its cases; n_cases is that of the fold with the fewest.
    """
    summaries = {}
    for name, ids in groups.items():
        members = set(ids)
        of_group = [{**fold, "cases": [case for case in fold["cases"] if case["id"] in members]} for fold in folds]
        n_cases = min(len(fold["cases"]) for fold in of_group)
        summaries[name] = {"n_cases": n_cases, "dice": summarise(of_group)["dice"]}
    return summaries


def mean_and_sd(values: Sequence[float]) -> dict:
    """{"mean", "sd", "folds"}: sd with n - 1, NaN for fewer than two values; NaN among the values is left out."""
    valid = _valid(values)
    sd = float(np.std(valid, ddof=1)) if len(valid) > 1 else NAN
    return {"mean": _mean(valid), "sd": sd, "folds": list(values)}


def compare_runs(first: Sequence[Mapping], second: Sequence[Mapping]) -> dict[str, dict]:
    """Paired comparison of the Dice of two runs over the cases that both tested.

    A case tested in several folds of a run counts once, with its mean. The p value is that of the two-sided Wilcoxon
    signed-rank test on the differences.

    Args:
        first, second: the folds of each run.

    Returns:
        {name: {"n", "n_left_out", "first", "second", "difference", "p"}} per class and for "mean", the mean over the
        foreground classes of a case; difference = second - first. n_left_out: cases where a score is not defined.

    Raises:
        ValueError: the runs score different classes.
    """
    of_first, of_second = _dice_per_case(first), _dice_per_case(second)
    common = sorted(of_first.keys() & of_second.keys())
    classes = [list(scores) for scores in (*of_first.values(), *of_second.values())]
    if any(names != classes[0] for names in classes):
        raise ValueError("the runs score different classes and cannot be compared")
    rows = {}
    for name in classes[0] if classes else ():
        pairs = np.array([(of_first[id][name], of_second[id][name]) for id in common], float).reshape(-1, 2)
        valid = pairs[np.isfinite(pairs).all(axis=1)]
        rows[name] = {
            "n": len(valid),
            "n_left_out": len(pairs) - len(valid),
            "first": _mean(valid[:, 0]),
            "second": _mean(valid[:, 1]),
            "difference": _mean(valid[:, 1] - valid[:, 0]),
            "p": wilcoxon_p(valid[:, 1] - valid[:, 0]),
        }
    return rows


def wilcoxon_p(differences: np.ndarray) -> float:
    """Two-sided p of the Wilcoxon signed-rank test; 1 when nothing differs, NaN without a pair."""
    from scipy.stats import wilcoxon  # slow to import, and needed for comparisons alone

    if len(differences) == 0:
        return NAN
    if not np.any(differences):
        return 1.0
    return float(wilcoxon(differences).pvalue)


def nan_to_null(content: object) -> object:
    """Plain data with None for NaN and infinity, which JSON does not have. Nothing is rounded."""
    if isinstance(content, Mapping):
        return {key: nan_to_null(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [nan_to_null(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _dice_per_case(folds: Sequence[Mapping]) -> dict[str, dict[str, float]]:
    """{case: {class: Dice, ..., "mean": Dice}}, averaged over the folds that tested the case."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for case in (case for fold in folds for case in fold["cases"]):
        scores = {name: row["dice"] for name, row in case["classes"].items() if name != MICRO}
        for name, score in (scores | {"mean": _mean(_valid(scores.values()))}).items():
            values[case["id"]][name].append(score)
    return {id: {name: _mean(_valid(scores)) for name, scores in of_case.items()} for id, of_case in values.items()}


def _valid(values: Iterable[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else NAN
