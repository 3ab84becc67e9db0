"""Pictures of the cases that a run segments worst, in the middle and best: outlines of reference and prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from amaes.evaluation.folds import Run
from amaes.evaluation.predictions import SPACES
from amaes.pictures import COLOUR_NAMES, Panel, Row, hstack, middle_slices, write_sheet

WORST = ("worst", "second worst", "third worst", "fourth worst", "fifth worst")
SIDE = 180  # pixels of a slice, about


class Chosen(NamedTuple):
    """A case to draw: why, the position of its fold, its id and its Dice, in [0, 1]."""

    title: str
    fold: int
    id: str
    dice: float


def choose_cases(folds: Sequence[Mapping]) -> list[Chosen]:
    """The five worst cases, the median and the best by mean Dice of the foreground classes, each once.

    Args:
        folds: each with "cases"; a case without a defined Dice is left out.
    """
    scored = []
    for k, fold in enumerate(folds):
        for case in fold["cases"]:
            values = [row["dice"] for name, row in case["classes"].items() if name != "all"]
            defined = [value for value in values if not math.isnan(value)]
            if defined:
                scored.append((sum(defined) / len(defined), k, case["id"]))
    scored.sort()
    titles = dict(enumerate(WORST[: len(scored)]))
    for place, title in ((len(scored) // 2, "median"), (len(scored) - 1, "best")):
        titles.setdefault(place, title)
    return [Chosen(titles[place], *scored[place][1:], scored[place][0]) for place in sorted(titles) if scored]


def pictures_of(run: Run, folds: Sequence[Mapping], space: str) -> dict[str, Path | None]:
    """The pictures of a run's report, caption to PNG file: cases, which are drawn anew, and the curves of training.

    Args:
        run, folds, space: of `draw_cases`.
    """
    drawn = draw_cases(run.path / f"cases{run.folds[0].suffix}.png", run, folds, space)
    curves = {f"Training of fold {fold.number}": fold.folder / "progress.png" for fold in run.folds}
    return {"The worst cases, the median and the best: outlines of the classes": drawn, **curves}


def draw_cases(path: Path, run: Run, folds: Sequence[Mapping], space: str) -> Path | None:
    """Write the cases of `choose_cases` as one sheet, three slices through each, reference beside prediction.

    Args:
        path: of the PNG file.
        run: its folds have predictions.
        folds: the results of those folds, in the same order.
        space: "native" or "store".

    Returns:
        The path; None where matplotlib is not installed or fails, or no case has a Dice.
    """
    chosen = choose_cases(folds)
    if not chosen or find_spec("matplotlib") is None:
        return None
    rows = [_row(case, run, space) for case in chosen]
    classes = [(value, name) for value, name in sorted(run.store.labels.items()) if value > 0]
    colours = ", ".join(f"{name} {COLOUR_NAMES[(value - 1) % len(COLOUR_NAMES)]}" for value, name in classes)
    try:
        write_sheet(path, f"{run.path.name}: {colours}", rows)
    except Exception:  # whatever a broken matplotlib raises, the tables are worth more
        return None
    return path


def _row(case: Chosen, run: Run, space: str) -> Row:
    fold = run.folds[case.fold]
    grid = SPACES[space](run.store, fold.folder / f"predictions{fold.suffix}", fold.ignored_label)
    title = f"{case.title}: {case.id}, fold {fold.number}, Dice {100 * case.dice:.1f} %"
    try:
        reference = grid.reference(case.id)
        prediction = grid.prediction(case.id, reference)
        if reference.ignored is not None:
            prediction[reference.ignored] = 0
        image = grid.image(case.id, reference)
        return Row(title, _panels(image, reference.labels, prediction, reference.spacing))
    except (OSError, ValueError) as error:  # a file that went away since it was measured
        return Row(f"{title}: {error}", [Panel(np.zeros((8, 8)))])


def _panels(image: np.ndarray, reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]) -> list[Panel]:
    """Reference and prediction over the same slices, where most of both is seen."""
    both = (reference > 0) | (prediction > 0)
    at = [int(np.argmax(both.sum(axis=tuple(k for k in range(3) if k != axis)))) for axis in range(3)]
    pixel = max(side * mm for side, mm in zip(image.shape, spacing, strict=True)) / SIDE
    low, high = np.percentile(image, (1, 99.5))
    grey = (image - low) / max(high - low, 1e-6)
    slices = {"spacing": spacing, "pixel": pixel, "at": at}
    shown = hstack(middle_slices(grey, **slices))
    return [
        Panel(shown, caption, label=hstack(middle_slices(labels, **slices)))
        for caption, labels in (("reference", reference), ("prediction", prediction))
    ]
