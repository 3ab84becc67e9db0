"""Scores of single cases to the numbers of a fold, a run and a comparison of two runs, and their Markdown tables.

A case is {"id", "classes": {"1": {"n_ref", "n_pred", "status", metric: value}, ..., "all": {...}}} as `measure_case`
gives it; a fold is {"fold", "cases", "failed", ...}. NaN marks a score that is not defined; means skip it and say how
many values they rest on.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

NAN = float("nan")
MICRO = "all"  # the entry of a case that pools its foreground classes
TITLES = {  # metric: heading and the factor that gives its unit
    "dice": ("Dice, %", 100),
    "jaccard": ("Jaccard, %", 100),
    "sensitivity": ("sensitivity, %", 100),
    "precision": ("precision, %", 100),
    "volume_similarity": ("volume similarity, %", 100),
    "volume_difference": ("volume difference, ml", 1),
    "relative_volume_difference": ("volume difference, %", 1),
    "hd95": ("HD95, mm", 1),
    "assd": ("ASSD, mm", 1),
    "surface_dice": ("surface Dice, %", 100),
    "lesion_f1": ("lesion F1, %", 100),
    "lesion_recall": ("lesion recall, %", 100),
    "lesion_precision": ("lesion precision, %", 100),
    "lesion_count_difference": ("lesion count difference", 1),
}


# Numbers --------------------------------------------------------------------------------------------------------------


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


def fold_score(means: Mapping[str, Mapping], metric: str = "dice") -> float:
    """Mean over the foreground classes of their means over cases; NaN when no class has a value."""
    return _mean(_valid(row[metric]["mean"] for name, row in means.items() if name != MICRO))


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
    found = {}
    for name, members in groups.items():
        kept = set(members)
        of_group = [{**fold, "cases": [case for case in fold["cases"] if case["id"] in kept]} for fold in folds]
        n_cases = min(len(fold["cases"]) for fold in of_group)
        found[name] = {"n_cases": n_cases, "dice": summarise(of_group)["dice"]}
    return found


def mean_and_sd(values: Sequence[float]) -> dict:
    """{"mean", "sd", "folds"}: sd with n - 1, NaN for fewer than two values; NaN among the values is left out."""
    valid = _valid(values)
    sd = float(np.std(valid, ddof=1)) if len(valid) > 1 else NAN
    return {"mean": _mean(valid), "sd": sd, "folds": list(values)}


def compare(first: Sequence[Mapping], second: Sequence[Mapping], metric: str = "dice") -> dict[str, dict]:
    """Paired comparison of two runs over the cases that both tested.

    A case tested in several folds of a run counts once, with its mean. The p value is that of the two-sided Wilcoxon
    signed-rank test on the differences.

    Args:
        first, second: the folds of each run.
        metric: name of the score.

    Returns:
        {name: {"n", "n_left_out", "first", "second", "difference", "p"}} per class and for "mean", the mean over the
        foreground classes of a case; difference = second - first. n_left_out: cases where a score is not defined.

    Raises:
        ValueError: the runs score different classes.
    """
    a, b = _per_case(first, metric), _per_case(second, metric)
    common = sorted(a.keys() & b.keys())
    names = [list(scores) for scores in (*a.values(), *b.values())]
    if any(found != names[0] for found in names):
        raise ValueError("the runs score different classes and cannot be compared")
    rows = {}
    for name in names[0] if names else ():
        pairs = np.array([(a[case][name], b[case][name]) for case in common], float).reshape(-1, 2)
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
    from scipy.stats import wilcoxon  # slow to import, and --help needs none of it

    if len(differences) == 0:
        return NAN
    if not np.any(differences):
        return 1.0
    return float(wilcoxon(differences).pvalue)


def plain(content: object) -> object:
    """Data for JSON, which knows no NaN: null in its place; nothing is rounded."""
    if isinstance(content, Mapping):
        return {key: plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _per_case(folds: Sequence[Mapping], metric: str) -> dict[str, dict[str, float]]:
    """{case: {class: score, ..., "mean": score}}, averaged over the folds that tested the case."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for case in (case for fold in folds for case in fold["cases"]):
        scores = {name: row[metric] for name, row in case["classes"].items() if name != MICRO}
        for name, score in (scores | {"mean": _mean(_valid(scores.values()))}).items():
            found[case["id"]][name].append(score)
    return {case: {name: _mean(_valid(values)) for name, values in rows.items()} for case, rows in found.items()}


def _valid(values: Iterable[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else NAN


# Tables ---------------------------------------------------------------------------------------------------------------


def run_tables(title: str, summary: Mapping, names: Mapping[str, str], note: str) -> str:
    """Markdown of a run: Dice per fold and class, then every metric over the folds.

    Args:
        title: of the run.
        summary: of `summarise`.
        names: class number (as text) to name.
        note: one line below the title, what was measured and where.
    """
    classes = summary["classes"]
    foreground = [name for name in classes if name != MICRO]
    columns = [*foreground, MICRO]
    heads = [names.get(name, name) for name in foreground]
    rows = [
        [row["fold"], row["n_cases"], row["n_failed"], *_dice_cells(row["classes"], columns), _percent(row["dice"])]
        for row in summary["folds"]
    ]
    total = [spread(classes[name]["dice"], 100) if name in classes else "–" for name in columns]
    rows.append(["mean ± sd", "", "", *total, f"**{spread(summary['dice'], 100)}**"])
    dice = table(["fold", "cases", "failed", *heads, "pooled", "**Dice %**"], rows)

    every = []
    for name, row in classes.items():
        counts = [row["n_empty"], row["n_missed"], row["n_false_positive"]]
        for metric in (key for key, value in row.items() if isinstance(value, Mapping)):
            heading, scale = TITLES[metric]
            label = "pooled" if name == MICRO else names.get(name, name)
            every.append([label, heading, spread(row[metric], scale), row[metric]["n_valid"], *counts])
    heads = ["class", "metric", "mean ± sd over folds", "n_valid", "n_empty", "missed", "false positives"]
    legend = (
        "Dice: mean over the foreground classes of their means over cases. Pooled: voxels of all foreground classes of "
        "a case counted together. sd: over folds, n - 1. n_empty: neither map has the class. A missed class has Dice 0 "
        "and, as distance, the diagonal of the image."
    )
    return f"## Dice of {title}\n\n{note}\n\n{dice}\n\n{table(heads, every)}\n\n{legend}\n"


def group_table(groups: Mapping[str, Mapping]) -> str:
    """Markdown of `summarise_groups`."""
    rows = [[name, row["n_cases"], spread(row["dice"], 100)] for name, row in groups.items()]
    return f"{table(['cases of', 'cases', 'Dice %'], rows)}\n"


def comparison_tables(
    titles: tuple[str, str], summaries: tuple[Mapping, Mapping], rows: Mapping, names: Mapping
) -> str:
    """Markdown of two runs side by side: fold scores, then the paired comparison over cases."""
    of_fold = [{row["fold"]: row["dice"] for row in summary["folds"]} for summary in summaries]
    folds = []
    for fold in sorted(of_fold[0].keys() | of_fold[1].keys()):
        a, b = (scores.get(fold, NAN) for scores in of_fold)
        folds.append([fold, _percent(a), _percent(b), _signed(b - a)])
    means = [summary["dice"]["mean"] for summary in summaries]
    spreads = [spread(summary["dice"], 100) for summary in summaries]
    folds.append(["mean ± sd", *spreads, f"**{_signed(means[1] - means[0])}**"])
    paired = [
        [
            names.get(name, name),
            row["n"],
            row["n_left_out"],
            _percent(row["first"]),
            _percent(row["second"]),
            _signed(row["difference"]),
            "–" if math.isnan(row["p"]) else f"{row['p']:.2g}",
        ]
        for name, row in rows.items()
    ]
    heads = ["class", "cases", "left out", *titles, "difference", "p"]
    return (
        f"## Dice % of {titles[1]} against {titles[0]}\n\n{table(['fold', *titles, 'difference'], folds)}\n\n"
        f"Paired over the cases that both tested; p: two-sided Wilcoxon signed-rank test.\n\n{table(heads, paired)}\n"
    )


def _dice_cells(means: Mapping[str, Mapping], classes: Iterable[str]) -> list[str]:
    return [_percent(means[name]["dice"]["mean"]) if name in means else "–" for name in classes]


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.2f}"


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:+.2f}"


def spread(row: Mapping, scale: float) -> str:
    """Mean ± sd of a row {"mean", "sd"}, multiplied by `scale`; a dash where there is no mean."""
    if math.isnan(row["mean"]):
        return "–"
    sd = "" if math.isnan(row["sd"]) else f" ± {scale * row['sd']:.2f}"
    return f"{scale * row['mean']:.2f}{sd}"


def table(heads: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)
