"""The published numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

TESTED = {"brats21": 313, "brats21_cv": 918, "isles22": 167, "wmh": 40, "wmh_ood": 110}  # cases of a fold


@dataclass(frozen=True)
class Row:
    """A row of Tables 4 and 6.

    Attributes:
        model: as printed.
        parameters: millions.
        dice: task -> (mean, sd), %.
        no_target: tasks whose printed value is, or may be, a typing error.
    """

    model: str
    parameters: int
    dice: Mapping[str, tuple[float, float]]
    no_target: tuple[str, ...] = ()


def _row(model: str, parameters: int, *dice: tuple[float, float], no_target: tuple[str, ...] = ()) -> Row:
    tasks = ("brats21", "isles22", "wmh", "wmh_ood")
    return Row(model, parameters, dict(zip(tasks, dice, strict=True)), no_target)
