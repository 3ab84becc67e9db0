"""The scores of a folder of predictions that were made elsewhere: NIfTI files named as their labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from amaes.evaluation.command_line import PROBABILITIES, failure_message
from amaes.evaluation.scores import summarise
from amaes.metrics import measure_case
from amaes.preprocess.config import Config
from amaes.preprocess.file_names import id_of, is_nifti, subject_of
from amaes.preprocess.read_case import read_file, read_label

Pair = tuple[np.ndarray, np.ndarray, tuple[float, ...], list[str]]  # prediction, reference, spacing in mm, warnings


def measure_folder(
    predictions: Path, labels: Path, *, measured: Mapping, missing: str = "error"
) -> tuple[dict, list[dict]]:
    """Score every label's prediction on the label's grid.

    Args:
        predictions, labels: folders; a prediction has the name of its label, `.nii` or `.nii.gz`.
        measured: "metrics", "empty" and "tau" of `amaes.metrics.measure_case`.
        missing: what a label without prediction is: "error", a case without scores; "zero", an empty prediction.

    Returns:
        A summary as of a run (`scores.summarise`), whose classes are all values of the files but 0; and its one fold,
        {"fold", "cases", "failed"}.

    Raises:
        FileNotFoundError: a folder is not there.
        ValueError: no prediction has the name of a label.
    """
    of_label, of_prediction = _files(labels, "labels"), _files(predictions, "predictions")
    if not of_label.keys() & of_prediction.keys():
        example = f"such as {next(iter(of_label.values())).name}" if of_label else f"and {labels} holds no NIfTI file"
        raise ValueError(f"`predictions` {predictions}: no file has the name of a label, {example}")
    values, failed = {}, {}
    for id in tqdm(of_label, desc=f"{predictions}, reading", unit="case", disable=None):
        try:  # one case must not end the others
            prediction, reference, _, _ = _read(of_label[id], of_prediction.get(id))
            values[id] = {*np.unique(prediction).tolist(), *np.unique(reference).tolist()}
        except (ValueError, OSError, MemoryError) as error:
            failed[id] = failure_message(error)
        if id not in of_prediction:
            failed[id] = f"no prediction {Path(id).name}.nii.gz in {predictions}"
            if missing == "error":
                values.pop(id, None)
    classes = sorted(set().union(*values.values()) - {0})
    regions = {str(value): (value,) for value in classes}
    cases = []
    for id in tqdm(values, desc=str(predictions), unit="case", disable=None):
        prediction, reference, spacing, warnings = _read(of_label[id], of_prediction.get(id))
        num_classes = max(classes, default=0) + 1
        rows = measure_case(prediction, reference, num_classes, spacing, **measured, regions=regions)
        cases.append({"id": id, "subject": subject_of(id), "classes": rows, "warnings": warnings})
    fold = {"fold": 0, "cases": cases, "failed": [{"id": id, "message": text} for id, text in failed.items()]}
    summary = {
        "format": "amaes-summary-1",
        "run": str(predictions),
        "reference": str(labels),
        "settings": {**measured, "space": "native", "missing": missing},
        "labels": {str(value): str(value) for value in classes},
        "unused": sorted(str(path) for id, path in of_prediction.items() if id not in of_label),
        **summarise([fold]),
    }
    return summary, [fold]


def folder_note(summary: Mapping) -> str:
    """One line on what was measured, for the table."""
    unused = f" {len(summary['unused'])} predictions have no label there." if summary["unused"] else ""
    empty = "left out" if summary["settings"]["empty"] == "nan" else "1"
    return (
        f"Against {summary['reference']}, on the grids of the labels; a class that neither map has: {empty}.{unused} "
        "Which cases the networks were trained on is not known here."
    )


def _files(folder: Path, parameter: str) -> dict[str, Path]:
    """{id: file} of a folder's NIfTI files, without the probabilities that `amaes.predict` writes beside them."""
    if not folder.is_dir():
        raise FileNotFoundError(f"`{parameter}` {folder}: no such folder")
    paths = [path for path in sorted(folder.rglob("*")) if is_nifti(path.name) and path.is_file()]
    return {id_of(folder, path): path for path in paths if path.relative_to(folder).parts[0] != PROBABILITIES}


def _read(label: Path, prediction: Path | None) -> Pair:
    """Both maps in RAS on the label's grid; no prediction is an empty one. RejectedInput where a file is no label."""
    warnings: list[str] = []
    header, _ = read_file(label, Config())
    reference, _ = read_label(label, header, Config(), warnings)
    if prediction is None:
        return np.zeros_like(reference), reference, header.ras_spacing, warnings
    return read_label(prediction, header, Config(), warnings)[0], reference, header.ras_spacing, warnings
