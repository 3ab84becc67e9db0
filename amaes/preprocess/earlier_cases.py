"""What a store holds before a run writes to it: which cases stay, and which inputs are not the files they were."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from amaes.files import read_json
from amaes.preprocess.case_record import check_record
from amaes.preprocess.config import PLACEHOLDER, STORE_FORMAT, Config
from amaes.preprocess.file_names import fault_of_id, shorten
from amaes.preprocess.store_index import case_files, class_names, remove_temporary, write_index

if TYPE_CHECKING:
    from amaes.preprocess.collection import Collection, Item
    from amaes.preprocess.report import Outcome


@dataclass(frozen=True)
class Earlier:
    """The cases of a store when a run begins.

    Attributes:
        listed: ids in the index.
        staying: {id: entry of the index} of those that stay, unless this run does them anew.
        prune: inputs that are left out now do not stay.
        labels: value to name; empty where the settings of the run differ.
        regions: name to classes that are scored as one.
        raw_values: of the label files, that others were mapped onto.
    """

    listed: frozenset[str] = frozenset()
    staying: Mapping[str, dict] = field(default_factory=dict)
    labels: Mapping[int, str] = field(default_factory=dict)
    regions: Mapping[str, Sequence[int]] = field(default_factory=dict)
    raw_values: frozenset[int] = frozenset()
    prune: bool = False

    def entries_beside(self, outcomes: Mapping[str, Outcome], store: Path) -> list[dict]:
        """The entries of the cases that stay beside those that a run has done; {id: outcome} of all its inputs."""
        return [entry for id, entry in self.staying.items() if self._stays(id, outcomes.get(id), store)]

    def _stays(self, id: str, outcome: Outcome | None, store: Path) -> bool:
        if outcome is None:  # not among the inputs
            return True
        left_out = outcome.row["status"] == "skipped" and self.prune
        return not outcome.done and not left_out and case_files(store, id)[2].is_file()


def prepare_folder(
    store: Path,
    collection: Collection,
    config: Config,
    *,
    overwrite: bool,
    prune: bool = False,
    items: Sequence[Item] | None = None,
) -> Earlier:
    """Make a folder ready to be written: check what is there, remove half-written files.

    Args:
        store: the folder, new or a store.
        collection: what will be written.
        config: its settings.
        overwrite: accept other settings and other files; the cases to redo leave the index until they are done.
        prune: cases that are not among the inputs will be taken out.
        items: those of a shard; only their half-written files are removed, since other shards may be writing.

    Raises:
        ValueError: the folder holds something else than a store, a store of other settings or other class names, or
            cases made from other files than those of the same id here.
    """
    content = read_index(store)
    remove_temporary(store, items)
    if content is None:
        return Earlier()
    inputs = {item.id for item in collection.items}
    entries = {entry["id"]: entry for entry in content["cases"]}
    others = sorted(set(entries) - inputs)
    before = Config.from_dict(content["config"])
    same = _check_settings(store, content, config, collection, overwrite, kept=[] if prune else others)
    if not same:
        entries = {}
    elif prune:
        entries = {id: entry for id, entry in entries.items() if id in inputs}
    _check_names_of_labels(store, inputs | set(entries))
    labels = {int(value): name for value, name in content["labels"].items()} if same else {}
    regions = content.get("regions", {}) if same else {}
    if set(entries) - inputs:
        _check_classes(store, labels, collection, config)
    listed = frozenset(entry["id"] for entry in content["cases"])
    if overwrite:
        _leave_index(store, content, before, [entry for id, entry in entries.items() if id not in inputs])
    elif changed := changed_inputs(store, collection.items if items is None else items, listed):
        text = f"{len(changed)} cases there were made from other files: {'; '.join(changed[:3])}"
        raise ValueError(f"{store}: {text}; `overwrite` takes the new ones; or give another folder")
    raw_values = frozenset(old for old, new in before.label_map.items() if old == new)
    return Earlier(listed, entries, labels, regions, raw_values, prune)


def read_index(store: Path) -> dict | None:
    """dataset.json of a store; None where the folder has none.

    Raises:
        ValueError: it is something else.
    """
    index = store / "dataset.json"
    if not index.is_file():
        return None
    try:
        content = read_json(index)
        is_store = content["format"] == STORE_FORMAT and isinstance(content["channels"], list)
        is_store = is_store and not any(fault_of_id(case["id"]) for case in content["cases"])
        Config.from_dict(content["config"])
        {int(value): str(name) for value, name in content["labels"].items()}
        [[*map(int, values)] for values in content.get("regions", {}).values()]
    except (ValueError, KeyError, TypeError, AttributeError):
        is_store = False
    if not is_store:
        raise ValueError(f"{index}: not the index of a store ({STORE_FORMAT}); give another folder")
    return content


def plan(store: Path, collection: Collection) -> list[str]:
    """What a run would find in the store; nothing where there is none."""
    content = read_index(store)
    if content is None:
        return []
    listed = frozenset(case["id"] for case in content["cases"])
    inputs = {item.id for item in collection.items}
    changed = changed_inputs(store, collection.items, listed)
    counts = f"{len(inputs - listed)} new, {len(inputs & listed)} there already, {len(listed - inputs)} of other inputs"
    return [f"{store}: {counts}", *(f"  made from other files: {text}" for text in changed)]


def changed_inputs(store: Path, items: Sequence[Item], listed: frozenset[str]) -> list[str]:
    """The cases of a store that were made from other files than the items of the same id, and how these differ.

    Files that have another time of change alone, or were moved, are compared by their content when their turn comes.
    """
    changed = []
    for item in items:
        if item.id not in listed or item.problem is not None:
            continue
        try:
            record = read_json(case_files(store, item.id)[2])
            check_record(case_files(store, item.id)[2], record, ("source_stamps",))
            before = [stamp and (str(stamp[0]), *stamp[1:3]) for stamp in record["source_stamps"]]
        except (OSError, ValueError, TypeError):  # damaged: done again
            continue
        difference = next(filter(None, map(_difference, before, (*item.images, item.label))), None)
        if difference is not None:
            changed.append(f"{item.id}: {difference}")
    return changed


def _difference(before: tuple[str, int, int] | None, path: Path | None) -> str | None:
    """How a file differs from the one that a case was made from (path, bytes, time of change); None: it does not."""
    if before is None:  # what was not there may be added
        return None
    if path is None:
        return f"was made with {before[0]}, which is not given now"
    there, now = Path(before[0]), os.path.normpath(path.absolute())
    try:
        state = path.stat()
        moved = not there.exists() and (state.st_size, state.st_mtime_ns) == tuple(before[1:])
        if now != before[0] and not moved and not (there.exists() and there.samefile(path)):
            return f"was {there}, is {now}"
    except OSError:  # its report says what is wrong with it
        return None
    return None if state.st_size == before[1] else f"{now} had {before[1]} bytes, has {state.st_size}"


def _check_settings(
    store: Path, content: dict, config: Config, collection: Collection, overwrite: bool, kept: list[str]
) -> bool:
    """Whether the store has the settings of this run; refused where it has not and any of its cases would stay."""
    before = {**Config.from_dict(content["config"]).settings(), "channels": content["channels"]}
    now = {**config.settings(), "channels": collection.channels}
    differing = [name for name in now if before.get(name) != now[name]]
    text = "; ".join(f"{name} is {before.get(name)} there, {now[name]} here" for name in differing)
    if differing and not overwrite:
        raise ValueError(f"{store}: made with other settings: {text}; give another folder, or `overwrite` to redo it")
    if differing and kept:
        others = f"{len(kept)} of its cases are not among these inputs and cannot be redone ({shorten(kept)})"
        raise ValueError(f"{store}: made with other settings: {text}; {others}; give them too, or `prune` them")
    return not differing


def _check_names_of_labels(store: Path, ids: set[str]) -> None:
    for id in ids:
        if f"{id}_label" in ids:
            raise ValueError(f"id_collision: {store}: a case {id}_label would lie where the label of {id} does")


def _check_classes(store: Path, labels: Mapping[int, str], collection: Collection, config: Config) -> None:
    """Refuse other names for the classes of a store whose cases stay."""
    if not any(item.label is not None for item in collection.items):
        return
    for value, name in class_names(collection, config, [0, 1] if collection.foreground_name else [0], []).items():
        there = labels.get(value, name)
        renamed = value in {config.label_map.get(given, given) for given in collection.names}
        if name != there and not renamed and not any(PLACEHOLDER.fullmatch(text) for text in (name, there)):
            text = f"label {value} is {there!r} there, {name!r} here"
            raise ValueError(f"{store}: {text}; where they are the same, `label_names` {value}:NAME says so")


def _leave_index(store: Path, content: dict, config: Config, entries: Sequence[dict]) -> None:
    """Take cases that will be redone out of the index, so that it never lists arrays of two versions."""
    if entries:
        labels = {int(value): name for value, name in content["labels"].items()}
        write_index(store, content["channels"], config, labels, entries, content.get("regions", {}))
    else:
        (store / "dataset.json").unlink()
