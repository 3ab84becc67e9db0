"""The index of a store, dataset.json, and the names of its classes and files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from amaes.files import written_whole
from amaes.preprocess.config import IGNORED, PLACEHOLDER, STORE_FORMAT, Config

if TYPE_CHECKING:
    from amaes.preprocess.collection import Collection, Item
    from amaes.preprocess.report import Outcome


def entry_of(item: Item, outcome: Outcome) -> dict:
    """What the index says of a case."""
    return {
        "id": item.id,
        "subject": item.subject,
        "session": item.session,
        "sequence": item.sequence,
        "labelled": item.label is not None,
        "shape": outcome.row["shape"],
    }


def write_index(
    store: Path,
    channels: Sequence[str],
    config: Config,
    labels: Mapping[int, str],
    entries: Sequence[dict],
    regions: Mapping[str, Sequence[int]],
) -> None:
    """Write dataset.json, which makes the folder a store.

    Args:
        store: the folder.
        channels: names.
        config: how the cases were preprocessed.
        labels: value to name; empty where no case has a label.
        entries: of the cases whose arrays are there, see `entry_of`.
        regions: name to classes that are scored as one; empty: every class is scored.
    """
    content = {
        "format": STORE_FORMAT,
        "config": config.as_dict(),
        "config_hash": config.hash(),
        "channels": list(channels),
        "labels": {str(value): name for value, name in labels.items()},
        **({"regions": {name: list(values) for name, values in regions.items()}} if regions else {}),
        "cases": list(entries),
    }
    with written_whole(store / "dataset.json") as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def class_names(
    collection: Collection,
    config: Config,
    values: Sequence[int],
    notes: list[str],
    before: Mapping[int, str] | None = None,
) -> dict[int, str]:
    """Names of the stored label values: of the declared ones, after mapping, and of all that occur.

    Names that were given come first, then declared ones, then those that the store has.

    Args:
        collection: with the declared classes, and the names that were given.
        config: with the label map.
        values: that occur in the labels of the store; empty where there are no labels.
        notes: gets a note where the values are not consecutive.
        before: names in the store, of earlier runs.

    Returns:
        {0: "background", 1: ...}, or {} without labels.
    """
    if not values:
        return {}
    names, before = {0: "background"}, before or {}
    for value, name in collection.classes.items() if any(item.label for item in collection.items) else ():
        names.setdefault(config.label_map.get(value, value), name)
    if config.ignores:  # no class
        names.pop(IGNORED, None)
        values = set(values) - {IGNORED}
    for value in sorted(set(values) - {0}):
        if PLACEHOLDER.fullmatch(names.setdefault(value, f"label_{value}")):
            names[value] = before.get(value, names[value])
    if collection.foreground_name is not None and set(names) == {0, 1} and PLACEHOLDER.fullmatch(names[1]):
        names[1] = collection.foreground_name
    for value, name in collection.names.items():
        names[config.label_map.get(value, value)] = name
    if max(names) != len(names) - 1:
        text = " ".join(map(str, sorted(names)))
        notes.append(f"label values {text} are not consecutive; `label_map` OLD:NEW with `overwrite` closes the gaps")
    return dict(sorted(names.items()))


def region_classes(
    collection: Collection, config: Config, labels: Mapping[int, str], before: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    """{name: classes} of the regions that are declared or given, after mapping; else of those that the store has.

    Raises:
        ValueError: a region has no class, or one that no label has.
    """
    if not collection.regions:
        return {name: list(values) for name, values in before.items() if set(values) <= set(labels)}
    regions = {}
    for name, values in collection.regions.items():
        classes = sorted({config.label_map.get(value, value) for value in values} - {0})
        if name == "all" or name.isdecimal():
            raise ValueError(f"`regions`: {name!r} is the name of a score already; give the region another one")
        if not classes or not set(classes) <= set(labels):
            known = ", ".join(f"{value} {text}" for value, text in labels.items() if value)
            text = f"has the classes {' '.join(map(str, classes)) or '(none)'}, the labels hold {known}"
            raise ValueError(f"`regions`: {name} {text}; `label_names` declares a label that no case has")
        regions[name] = classes
    return regions


def remove_temporary(store: Path, items: Sequence[Item] | None = None) -> None:
    """Remove half-written files of a store and nothing else: the folder may hold other files.

    Args:
        store: the folder.
        items: remove only those of these cases; None = of all cases, of the index and of the report.
    """
    paths = list((store / "cases").rglob(".*.tmp"))
    if items is None:
        paths += [path for name in ("dataset.json", "report.jsonl") for path in store.glob(f".{name}.*.tmp")]
    targets = None if items is None else {path for item in items for path in case_files(store, item.id)}
    for path in paths:
        match = re.fullmatch(r"\.(.+)\.\d+\.tmp", path.name)
        if match and (targets is None or path.with_name(match[1]) in targets):
            path.unlink(missing_ok=True)


def case_files(store: Path, id: str) -> tuple[Path, Path, Path]:
    """The image, label and record of a case."""
    return tuple(store / "cases" / f"{id}{suffix}" for suffix in (".npy", "_label.npy", ".json"))
