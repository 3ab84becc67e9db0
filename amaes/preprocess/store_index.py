"""The index of a store, dataset.json: how it is written, and what a run finds of an earlier one."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from amaes.files import written_whole
from amaes.preprocess.config import STORE_FORMAT, Config

if TYPE_CHECKING:
    from amaes.preprocess.collection import Collection, Item
    from amaes.preprocess.report import Outcome


def prepare_folder(
    store: Path, collection: Collection, config: Config, *, overwrite: bool, items: Sequence[Item] | None = None
) -> list[str]:
    """Make a folder ready to be written: check what is there, remove half-written files.

    Args:
        store: the folder, new or a store.
        collection: what will be written.
        config: its settings.
        overwrite: accept a store of other settings; its index is removed.
        items: those of a shard; only their half-written files are removed, since other shards may be writing.

    Returns:
        Notes for the user.

    Raises:
        ValueError: the folder holds something else than a store, or a store of other settings.
    """
    index = store / "dataset.json"
    if not index.is_file():
        remove_temporary(store, items)
        return []
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        is_store, ids = content["format"] == STORE_FORMAT, {case["id"] for case in content["cases"]}
        before = {**Config.from_dict(content["config"]).settings(), "channels": content["channels"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        is_store = False
    if not is_store:
        raise ValueError(f"{index}: not the index of a store ({STORE_FORMAT}); give another folder")
    remove_temporary(store, items)
    now = {**config.settings(), "channels": collection.channels}
    differing = [name for name in now if before.get(name) != now[name]]
    if differing and not overwrite:
        text = "; ".join(f"{name} is {before.get(name)} there, {now[name]} here" for name in differing)
        raise ValueError(f"{store}: made with other settings: {text}; give another folder, or `overwrite` to redo it")
    if overwrite:
        index.unlink()
    absent = sorted(ids - {item.id for item in collection.items})
    if not absent:
        return []
    return [f"{len(absent)} cases of the store are not among these inputs and leave its index ({absent[0]}, ...)"]


def write_index(
    store: Path, collection: Collection, config: Config, labels: dict[int, str], done: Sequence[tuple[Item, Outcome]]
) -> None:
    """Write dataset.json, which makes the folder a store.

    Args:
        store: the folder.
        collection: of all cases.
        config: how they were preprocessed.
        labels: value to name; empty where no case has a label.
        done: the cases whose arrays are there.
    """
    cases = [
        {
            "id": item.id,
            "subject": item.subject,
            "session": item.session,
            "sequence": item.sequence,
            "labelled": item.label is not None,
            "shape": outcome.row["shape"],
        }
        for item, outcome in done
    ]
    content = {
        "format": STORE_FORMAT,
        "config": config.as_dict(),
        "config_hash": config.hash(),
        "channels": collection.channels,
        "labels": {str(value): name for value, name in labels.items()},
        "cases": cases,
    }
    with written_whole(store / "dataset.json") as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def class_names(collection: Collection, config: Config, values: Sequence[int], notes: list[str]) -> dict[int, str]:
    """Names of the stored label values: of the declared ones, after mapping, and of all that occur.

    Args:
        collection: with the declared classes.
        config: with the label map.
        values: that occur in the labels of the store; empty where there are no labels.
        notes: gets a note where the values are not consecutive.

    Returns:
        {0: "background", 1: ...}, or {} without labels.
    """
    if not values:
        return {}
    names = {0: "background"}
    for value, name in collection.classes.items():
        names.setdefault(config.label_map.get(value, value), name)
    for value in sorted(set(values)):
        names.setdefault(value, f"label_{value}")
    if collection.foreground_name is not None and set(names) == {0, 1}:
        names[1] = collection.foreground_name
    if max(names) != len(names) - 1:
        text = " ".join(map(str, sorted(names)))
        notes.append(f"label values {text} are not consecutive; `label_map` OLD:NEW with `overwrite` closes the gaps")
    return dict(sorted(names.items()))


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
