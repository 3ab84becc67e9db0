"""Which label file belongs to which case, by their names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from amaes.preprocess.collection import Item
from amaes.preprocess.file_names import channel_prefix, id_of, shorten, stem_of


def by_id(root: Path, files: Sequence[Path], label_name: str | None = None) -> dict[str, Path]:
    """{id: label file} of a tree of labels; the id ends before `label_name`: a/b of a/b_NAME, a of a/NAME.

    Raises:
        ValueError: two files have one id.
    """
    result: dict[str, Path] = {}
    for path in files:
        name = id_of(root, path)
        if label_name is not None:
            folder, prefix = path.parent.relative_to(root), channel_prefix(path, [label_name])[1]
            name = (folder / prefix if prefix else folder).as_posix()
        if name in result:
            raise ValueError(f"id_collision: {result[name]} and {path} both map to {name!r}")
        result[name] = path
    return result


def match_by_id(items: list[Item], label_files: Mapping[str, Path], labels: Path, notes: list[str]) -> list[Item]:
    """Give each case the label of its id; a case without one cannot be used.

    Args:
        items: the cases.
        label_files: of `by_id`.
        labels: their folder, for messages.
        notes: gets the labels that belong to no case.

    Raises:
        ValueError: no label has the id of a case.
    """
    if not any(item.id in label_files for item in items):
        first = next(iter(label_files))
        text = f"no label matches an image by name: labels such as {first!r}, images such as {items[0].id!r}"
        if Path(items[0].files[0]).name.startswith("sub-"):
            text += "; `label_name`, such as label-lesion_mask, matches by the parts of BIDS names"
        raise ValueError(f"`labels` {labels}: {text}")
    if unused := sorted(set(label_files) - {item.id for item in items}):
        notes.append(f"{len(unused)} labels belong to no image: {shorten(unused)}")
    return [with_label(item, label_files.get(item.id), f"in {labels}") for item in items]


def match_beside(items: list[Item], label_files: Sequence[Path], label_name: str, notes: list[str]) -> list[Item]:
    """Give each case the label that lies beside its images; a case without one cannot be used.

    A label belongs to the images of its folder whose names begin with what stands before `label_name` in its own name;
    where several labels fit, the one with the longest beginning is taken.

    Args:
        items: the cases.
        label_files: files called NAME, *_NAME or *-NAME.
        label_name: that NAME.
        notes: gets the labels that belong to no case.

    Raises:
        ValueError: two labels of one folder have the same beginning.
    """
    labels_of: dict[Path, dict[str, Path]] = defaultdict(dict)  # folder to {prefix: label}
    for path in label_files:
        prefix = channel_prefix(path, [label_name])[1]
        if prefix in labels_of[path.parent]:
            raise ValueError(f"id_collision: {labels_of[path.parent][prefix]} and {path} are labels of one case")
        labels_of[path.parent][prefix] = path
    result = []
    for item in items:
        image = next(path for path in item.images if path is not None)
        stem, labels = stem_of(image.name), labels_of[image.parent]
        fitting = [prefix for prefix in labels if not prefix or re.match(re.escape(prefix) + "[_-]", stem)]
        label = labels[max(fitting, key=len)] if fitting else None
        where = f"called {label_name}, *_{label_name} or *-{label_name} in {image.parent}"
        result.append(with_label(item, label, where))
    if unused := sorted(set(label_files) - {item.label for item in result}):
        notes.append(f"{len(unused)} labels belong to no image: {shorten(unused)}")
    return result


def with_label(item: Item, label: Path | None, where: str) -> Item:
    """The case with its label; a problem where there is none, which says where it was expected."""
    if label is None and item.problem is None:
        return replace(item, problem=("missing_label", f"{item.id}: expected a label {where}, found none"))
    return replace(item, label=label)
