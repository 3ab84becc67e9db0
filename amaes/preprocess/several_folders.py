"""The cases of several folders as one collection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from amaes.preprocess.collection import Collection
from amaes.preprocess.find_cases import check_ids, collect


def collect_folders(images: Sequence[Path], labels: Sequence[Path] = (), **options) -> Collection:
    """`collect` of each folder, joined.

    Args:
        images: folders, or files.
        labels: folders of labels: none, or one for each folder of images, in the same order.
        options: of `collect`.

    Raises:
        ValueError: of `collect`; or the folders have other channels or class names, or two files have one id.
    """
    if labels and len(labels) != len(images):
        text = f"{len(labels)} folders for {len(images)} of `images`; expected one for each, in the same order"
        raise ValueError(f"`labels`: {text}")
    parts = [collect(*pair, **options) for pair in zip(images, labels or [None] * len(images), strict=True)]
    if len(parts) == 1:
        return parts[0]
    first, classes = parts[0], {}
    for folder, part in zip(images, parts, strict=True):
        if part.channels != first.channels:
            here, there = " ".join(part.channels), " ".join(first.channels)
            raise ValueError(
                f"`images`: {folder} has the channels {here}, {images[0]} has {there}; give them to two stores"
            )
        if part.regions != first.regions:
            raise ValueError(f"`images`: {folder} declares other regions than {images[0]}")
        for value, name in part.classes.items():
            if classes.setdefault(value, name) != name:
                raise ValueError(f"`images`: {folder} calls label {value} {name!r}, others call it {classes[value]!r}")
    items = sorted((item for part in parts for item in part.items), key=lambda item: item.id)
    try:
        check_ids(items, with_labels=True)
    except ValueError as error:
        raise ValueError(
            f"{error}; the folder above both, given as `images`, makes its folders part of the ids"
        ) from None
    notes = [f"{folder}: {note}" for folder, part in zip(images, parts, strict=True) for note in part.notes]
    return replace(first, items=items, classes=classes, notes=notes)
