"""The Markdown tables of a run, and of two runs side by side."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from amaes.evaluation.scores import MICRO, NAN

TITLES = {  # metric: its heading, and the factor that gives the unit
    "dice": ("Dice, %", 100),
    "volume_difference": ("volume difference, ml", 1),
    "relative_volume_difference": ("volume difference, %", 1),
    "hd95": ("HD95, mm", 1),
    "surface_dice": ("surface Dice, %", 100),
    "lesion_f1": ("lesion F1, %", 100),
    "lesion_recall": ("lesion recall, %", 100),
    "lesion_count_difference": ("lesion count difference", 1),
}


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
    total = [mean_sd_text(classes[name]["dice"], 100) if name in classes else "–" for name in columns]
    rows.append(["mean ± sd", "", "", *total, f"**{mean_sd_text(summary['dice'], 100)}**"])
    dice = markdown_table(["fold", "cases", "failed", *heads, "pooled", "**Dice %**"], rows)

    every = []
    for name, row in classes.items():
        counts = [row["n_empty"], row["n_missed"], row["n_false_positive"]]
        for metric in (key for key, value in row.items() if isinstance(value, Mapping)):
            heading, scale = TITLES[metric]
            label = "pooled" if name == MICRO else names.get(name, name)
            every.append([label, heading, mean_sd_text(row[metric], scale), row[metric]["n_valid"], *counts])
    heads = ["class", "metric", "mean ± sd over folds", "n_valid", "n_empty", "missed", "false positives"]
    legend = (
        "Dice: mean over the foreground classes of their means over cases. Pooled: voxels of all foreground classes of "
        "a case counted together. sd: over folds, n - 1. n_empty: neither map has the class. A missed class has Dice 0 "
        "and, as distance, the diagonal of the image."
    )
    return f"## Dice of {markdown_text(title)}\n\n{note}\n\n{dice}\n\n{markdown_table(heads, every)}\n\n{legend}\n"


def settings_note(summary: Mapping) -> str:
    """One line: what was measured, on which grid, and with which weights."""
    settings = summary["settings"]
    space = {
        "native": "Native space: the scans' own grids, label files as they are.",
        "store": "Preprocessed space: not comparable with scores on the scans' own grids.",
    }[settings["space"]]
    empty = "left out" if settings["empty"] == "nan" else "1"
    weights = ", ".join(f"{c['file']} ({c['sha256'][:8]})" for c in summary["checkpoints"])
    tta = ", 8 mirrorings" if settings["tta"] else ""
    ignored = settings["ignored_label"]
    left_out = "" if ignored is None else f" Voxels of label {ignored} in the label files are left out of both maps."
    return (
        f"{space} Store {summary['store']['id']}; weights {weights}; overlap {settings['overlap']:g}{tta}; "
        f"a class that neither map has: {empty}.{left_out}"
    )


def group_table(groups: Mapping[str, Mapping]) -> str:
    """Markdown of `summarise_groups`."""
    rows = [[name, row["n_cases"], mean_sd_text(row["dice"], 100)] for name, row in groups.items()]
    return f"{markdown_table(['cases of', 'cases', 'Dice %'], rows)}\n"


def comparison_tables(first: Mapping, second: Mapping, rows: Mapping[str, Mapping]) -> str:
    """Markdown of two runs side by side: the scores of the folds, then the paired comparison over cases.

    Args:
        first, second: summaries, with "run" and "labels".
        rows: of `compare_runs`.
    """
    titles = [first["run"], second["run"]]
    of_first, of_second = ({row["fold"]: row["dice"] for row in summary["folds"]} for summary in (first, second))
    folds = []
    for fold in sorted(of_first.keys() | of_second.keys()):
        a, b = of_first.get(fold, NAN), of_second.get(fold, NAN)
        folds.append([fold, _percent(a), _percent(b), _signed(b - a)])
    means = [mean_sd_text(summary["dice"], 100) for summary in (first, second)]
    folds.append(["mean ± sd", *means, f"**{_signed(second['dice']['mean'] - first['dice']['mean'])}**"])
    paired = [
        [
            first["labels"].get(name, name),
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
    of, against = markdown_text(titles[1]), markdown_text(titles[0])
    return (
        f"## Dice % of {of} against {against}\n\n{markdown_table(['fold', *titles, 'difference'], folds)}\n\n"
        "Paired over the cases that both tested; p: two-sided Wilcoxon signed-rank test over the cases of these same "
        "few networks. It says nothing about other seeds, training cases or runs.\n\n"
        f"{markdown_table(heads, paired)}\n"
    )


def _dice_cells(means: Mapping[str, Mapping], classes: Iterable[str]) -> list[str]:
    return [_percent(means[name]["dice"]["mean"]) if name in means else "–" for name in classes]


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.2f}"


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:+.2f}"


def mean_sd_text(row: Mapping, scale: float) -> str:
    """Mean ± sd of a row {"mean", "sd"}, multiplied by `scale`; a dash where no mean is defined."""
    if math.isnan(row["mean"]):
        return "–"
    sd = "" if math.isnan(row["sd"]) else f" ± {scale * row['sd']:.2f}"
    return f"{scale * row['mean']:.2f}{sd}"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(markdown_text(cell).replace("|", "/") for cell in line) + " |" for line in lines)


def markdown_text(value: object) -> str:
    """A name of the user's (a class, a run) as text of one line that shows as it is, also with HTML or a link in it."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(value))
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"(?=[\\`\[\]])", r"\\", text)
