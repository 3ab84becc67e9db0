"""What an H200 should reach at 128^3 in bf16, augmentation included, and whether the rows of gpu.py do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple


class Budget(NamedTuple):
    """What an H200 should reach at 128^3 in bf16, augmentation included.

    Attributes:
        text: what is measured.
        section: in which.
        value: of the section's rows; raises KeyError where one is missing.
        limit: a number it must reach, or stay below where `most`.
    """

    text: str
    section: str
    value: Callable[[list[dict]], float]
    limit: float
    most: bool = True


def find(rows: list[dict], field: str, **label: object) -> float:
    """A field of the row of this label."""
    for row in rows:
        if all(row.get(name) == value for name, value in label.items()) and field in row:
            return row[field]
    raise KeyError(field)


def passes(rows: list[dict], name: str) -> float:
    """Times that a depthwise convolution of stride 1 and kernel 3 could read one of its tensors, the worst size."""
    label = {"operation": "depthwise", "kernel": 3, "resample": "same", "form": "ours"}
    of_floor = [row[f"{name}_of_floor"] for row in rows if label.items() <= row.items() and f"{name}_of_floor" in row]
    if not of_floor:
        raise KeyError(name)
    return 2 * max(of_floor)  # the floor is two passes: one tensor read, one written or read


def of_plain(rows: list[dict], arch: str, mode: str) -> float:
    """Time of our step as a part of that of the plain form."""
    plain = find(rows, "patches_per_s", arch=arch, form="plain", mode=mode)
    return plain / find(rows, "patches_per_s", arch=arch, form="ours")


BUDGETS = (
    Budget(
        "U-Net XL, read and augmented, patches/s",
        "store",
        partial(find, field="patches_per_s", arch="unet_xl"),
        80,
        False,
    ),
    Budget(
        "U-Net B, read and augmented, patches/s",
        "store",
        partial(find, field="patches_per_s", arch="unet_b"),
        300,
        False,
    ),
    Budget(
        "U-Net XL, reading and augmentation, part of the step",
        "store",
        partial(find, field="share", arch="unet_xl"),
        0.05,
    ),
    Budget(
        "U-Net XL, peak GB per patch", "steps", partial(find, field="gb_per_patch", arch="unet_xl", form="ours"), 2.2
    ),
    Budget("MedNeXt-B, time / plain compiled", "steps", partial(of_plain, arch="mednext_b", mode="compiled"), 1 / 4),
    Budget("MedNeXt-v2 base, time / plain", "steps", partial(of_plain, arch="mednext_v2_base", mode="eager"), 1 / 5),
    Budget("depthwise forward, passes over a tensor", "operations", partial(passes, name="forward"), 3),
    Budget("depthwise weight gradient, passes over a tensor", "operations", partial(passes, name="weight"), 4),
)


def judge(sections: dict[str, dict]) -> list[dict]:
    """Every budget with its value, None where it was not measured, and its verdict."""
    lines = []
    for budget in BUDGETS:
        try:
            value = budget.value(sections[budget.section]["rows"])
            met = "met" if (value <= budget.limit if budget.most else value >= budget.limit) else "not met"
        except KeyError:
            value, met = None, "not run"
        limit = f"{'at most' if budget.most else 'at least'} {budget.limit:g}"
        lines.append({"budget": budget.text, "limit": limit, "value": value, "verdict": met})
    return lines
