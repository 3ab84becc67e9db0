"""The index of a store: what it lists, and what of an earlier run may stand beside a new one."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from amaes.data.store import STORE_FORMAT
from amaes.files import written_whole
from amaes.preprocess.config import Config
from amaes.preprocess.find_cases import Collection, Item


def prepare(
    store: Path, collection: Collection, config: Config, overwrite: bool, items: Sequence[Item] | None = None
) -> list[str]:
    """Refuse a folder that is not ours or of other settings; remove what an ended run left half-done. Returns notes.

    `items` are those of a shard: other shards may be writing, so that only what is half-done of these is removed.
    """
    index = store / "dataset.json"
    if not index.is_file():
        remove_temporary(store, items)
        return []
    try:
        old = json.loads(index.read_text(encoding="utf-8"))
        ours, listed = old["format"] == STORE_FORMAT, {case["id"] for case in old["cases"]}
        before = {**Config.from_dict(old["config"]).settings(), "channels": old["channels"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise ValueError(f"{index}: not the index of a store ({STORE_FORMAT}); give another folder as --out")
    remove_temporary(store, items)
    now = {**config.settings(), "channels": collection.channels}
    differing = [name for name in now if before.get(name) != now[name]]
    if differing and not overwrite:
        text = "; ".join(f"{name} is {before.get(name)} there, {now[name]} here" for name in differing)
        raise ValueError(f"{store}: made with other settings: {text}; give another --out, or --overwrite to redo it")
    if overwrite:
        index.unlink()
    gone = sorted(listed - {item.id for item in collection.items})
    if not gone:
        return []
    return [f"{len(gone)} cases of the store are not among these inputs and leave its index ({gone[0]}, ...)"]


def write_index(store: Path, collection: Collection, config: Config, names: dict[int, str], done: list) -> None:
    """Write dataset.json, which makes the folder a store; `done` is the items whose arrays are there, with outcomes."""
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
        "labels": {str(value): name for value, name in names.items()},
        "cases": cases,
    }
    with written_whole(store / "dataset.json") as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def class_names(collection: Collection, config: Config, found: Sequence[int], notes: list[str]) -> dict[int, str]:
    """Names of the stored label values: declared ones, after mapping, or those that occur; {} without labels."""
    if not found:
        return {}
    names = {0: "background"}
    for value, name in collection.classes.items():
        names.setdefault(config.label_map.get(value, value), name)
    for value in sorted(set(found)):
        names.setdefault(value, f"label_{value}")
    if collection.foreground_name is not None and set(names) == {0, 1}:
        names[1] = collection.foreground_name
    if max(names) != len(names) - 1:
        values = " ".join(map(str, sorted(names)))
        notes.append(f"label values {values} are not consecutive; --label-map OLD:NEW with --overwrite closes the gaps")
    return dict(sorted(names.items()))


def remove_temporary(store: Path, items: Sequence[Item] | None = None) -> None:
    """Half-written files of a store, and nothing else: the folder may hold more; of these items only, where given."""
    ours = (
        []
        if items is not None
        else [path for name in ("dataset.json", "report.jsonl") for path in store.glob(f".{name}.*.tmp")]
    )
    targets = None if items is None else {path for item in items for path in case_files(store, item.id)}
    for path in [*ours, *(store / "cases").rglob(".*.tmp")]:
        match = re.fullmatch(r"\.(.+)\.\d+\.tmp", path.name)
        if match and (targets is None or path.with_name(match[1]) in targets):
            path.unlink(missing_ok=True)


def case_files(store: Path, name: str) -> tuple[Path, Path, Path]:
    """The image, label and record of a case."""
    return tuple(store / "cases" / f"{name}{suffix}" for suffix in (".npy", "_label.npy", ".json"))
