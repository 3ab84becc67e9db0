"""What an evaluation leaves: the summary as JSON and Markdown, a row per case and class as CSV, a page of HTML."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from amaes.evaluation.report import report_html
from amaes.evaluation.scores import nan_to_null
from amaes.files import write_json, write_text

FIRST_COLUMNS = ("fold", "case", "subject", "class", "name", "n_ref", "n_pred", "status")


def write_results(
    folder: Path,
    suffix: str,
    summary: Mapping,
    folds: Sequence[Mapping],
    text: str,
    pictures: Mapping[str, Path | None] | None,
) -> None:
    """Write summary.json, summary.md, cases.csv and report.html.

    Args:
        folder: of the run, or of the predictions.
        suffix: of the files' names, before their ending.
        summary: with "labels", class number (as text) to name.
        folds: each with "fold" and "cases".
        text: Markdown of the summary.
        pictures: for the report, caption to PNG file; those that are not there are left out. None: nothing to draw.
    """
    drawn = None
    if pictures is not None:
        drawn = {caption: path for caption, path in pictures.items() if path is not None and path.is_file()}
    report = report_html(f"Evaluation of {folder.absolute().name}", text, folds, summary["labels"], drawn)
    write_text(folder / f"report{suffix}.html", report)
    write_json(folder / f"summary{suffix}.json", nan_to_null(summary))
    write_text(folder / f"summary{suffix}.md", text)
    write_text(folder / f"cases{suffix}.csv", cases_as_csv(folds, summary["labels"]))


def cases_as_csv(folds: Sequence[Mapping], names: Mapping[str, str]) -> str:
    """fold, case, subject, class ("all": pooled), its name, voxels, status, and every metric.

    A score that is not defined is an empty cell.

    Args:
        folds: each with "fold" and "cases".
        names: class number (as text) to name.
    """
    rows = []
    for fold in folds:
        for case in fold["cases"]:
            start = {"fold": fold["fold"], "case": case["id"], "subject": case["subject"]}
            for name, scores in case["classes"].items():
                rows.append({**start, "class": name, "name": names.get(name, ""), **scores})
    columns = list(dict.fromkeys([*FIRST_COLUMNS, *(name for row in rows for name in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if _is_undefined(value) else value for name, value in row.items()})
    return text.getvalue()


def _is_undefined(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
