"""The scores of a fold's test cases, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn
from tqdm import tqdm

from amaes.data.store import Store
from amaes.evaluation.command_line import failure_message, stop_if_disk_full
from amaes.evaluation.folds import Fold, Run
from amaes.evaluation.predictions import Space, predict_once
from amaes.files import is_disk_full, read_json
from amaes.metrics import METRICS, measure_case


def predict_and_measure(
    fold: Fold,
    store: Store,
    model: nn.Module,
    meta: Mapping,
    space: Space,
    *,
    measured: Mapping,
    windows: Mapping,
    missing: str,
) -> tuple[list[dict], dict[str, str]]:
    """The scores of the test cases of a fold.

    Args:
        fold, store: which cases, and where they are.
        model, meta: of `load_segmenter`.
        space: of the predictions and references.
        measured: "metrics", "empty" and "tau" of `amaes.metrics.measure_case`.
        windows: options of `sliding_window`.
        missing: "zero": a case that cannot be predicted counts as an empty prediction; "error": it has no scores.

    Returns:
        {"id", "subject", "classes", "warnings"} of every case, and {id: message} of those that failed.

    Raises:
        OSError: the disk is full.
    """
    num_classes = meta["build"]["num_classes"]
    measured = {**measured, "regions": store.scored(num_classes)}
    cases, failed = [], {}
    for id in tqdm(fold.test, desc=str(fold.folder), unit="case", disable=None):
        try:  # one case must not end the others
            reference = space.reference(id)
            try:
                prediction = predict_once(model, store, id, space, reference, meta["patch_size"], **windows)
            except Exception as error:
                if missing == "error" or is_disk_full(error):
                    raise
                failed[id] = failure_message(error)
                prediction = np.zeros_like(reference.labels)
            if reference.ignored is not None:
                prediction[reference.ignored] = 0
            classes = measure_case(prediction, reference.labels, num_classes, reference.spacing, **measured)
            subject = store.cases[store.index(id)].subject
            cases.append({"id": id, "subject": subject, "classes": classes, "warnings": reference.warnings})
        except Exception as error:
            stop_if_disk_full(error, f"{fold.folder}: {len(cases)} of {len(fold.test)} cases measured")
            failed[id] = failure_message(error)
    return cases, failed


def metrics_with_earlier(run: Run, metrics: Sequence[str], suffix: str) -> list[str]:
    """The metrics to measure: those asked for, and those that the results of an earlier evaluation hold.

    Args:
        run: its folds may have results.
        metrics: asked for.
        suffix: of the names of the results.
    """
    earlier: dict[str, None] = {}
    for fold in run.folds:
        try:
            found = read_json(fold.folder / f"results{suffix}.json")["settings"]["metrics"]
            earlier |= dict.fromkeys(name for name in found if name in METRICS)
        except (OSError, ValueError, KeyError, TypeError):  # the first time, or damaged: written anew
            continue
    return list(dict.fromkeys([*earlier, *metrics]))
