"""A folder of cases into a store: each case for itself, every input reported, restartable, in worker processes."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from amaes.files import is_disk_full, locked, written_whole
from amaes.preprocess.collection import Collection, Item
from amaes.preprocess.config import IGNORED, Config
from amaes.preprocess.earlier_cases import Earlier, prepare_folder
from amaes.preprocess.processes import in_processes
from amaes.preprocess.report import STATUSES, Outcome, Result, not_done
from amaes.preprocess.store_case import store_case
from amaes.preprocess.store_index import (
    case_files,
    class_names,
    entry_of,
    region_classes,
    remove_temporary,
    write_index,
)

PROJECTION = 20  # cases after which disk and time are projected


def write_store(
    collection: Collection,
    store: str | Path,
    config: Config,
    *,
    workers: int = 0,
    overwrite: bool = False,
    prune: bool = False,
    fail_fast: bool = False,
    progress: bool = False,
    shard: tuple[int, int] | None = None,
) -> Result:
    """Preprocess all cases into a store; cases that are in it already are kept, those of other inputs as well.

    Args:
        collection: of `collect` or `collect_sources`.
        store: folder to write.
        config: the settings.
        workers: processes of one thread each; 0 = this process. The arrays do not depend on it.
        overwrite: redo cases that are done, from other files or with other settings.
        prune: take cases out of the store that are not among these, and delete their arrays.
        fail_fast: stop at the first input that is rejected or fails.
        progress: show a bar on stderr.
        shard: (i, n): only the cases i, i + n, i + 2n, ..., while other processes do the others; writes no index. The
            same call without it then keeps those cases, does what is missing and writes the index.

    Raises:
        ValueError: the folder holds a store of other settings, cases of the same ids made from other files, or
            something else; others are writing it; or not one input could be used.
        OSError: the disk is full; what was written is complete, and the same call continues.
    """
    store, began = _made_folder(Path(store)), time.perf_counter()
    config = _leaving_out(collection.left_out, config)
    items, report = collection.items, "report.jsonl"
    if shard is not None:
        _refuse_with_shard(overwrite, prune)
        items, report = items[shard[0] :: shard[1]], f"report-shard-{shard[0]}-of-{shard[1]}.jsonl"
    shard_items = None if shard is None else items
    with _locks(store, shard), _disk_full_explained(store):
        earlier = prepare_folder(store, collection, config, overwrite=overwrite, prune=prune, items=shard_items)
        notes, entries = [*collection.notes, *_note_on_left_out(config)], None
        without_items = Collection([], collection.channels, collection.classes)  # what a worker needs of it
        made_with = {"config": config, "collection": without_items, "redo": overwrite}
        job = partial(store_case, store=store, **made_with, listed=earlier.listed)
        try:
            outcomes = _run(items, job, store / report, workers=workers, fail_fast=fail_fast, progress=progress)
        finally:
            remove_temporary(store, shard_items)
        outcomes = [_earlier(outcome, item, job) for outcome, item in zip(outcomes, items, strict=True)]
        with written_whole(store / report) as file:
            file.writelines(outcome.line() for outcome in outcomes)
        if shard is None:
            entries = _finish(store, collection, config, outcomes, earlier, notes)
    result = Result(store, items, outcomes, notes, time.perf_counter() - began, report, entries, earlier.listed)
    assert len(items) == len(outcomes) == sum(result.count(status) for status in STATUSES)
    return result


def _made_folder(store: Path) -> Path:
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{store}: cannot be made a folder ({error.strerror})") from error
    return store


def _leaving_out(values: Sequence[int], config: Config) -> Config:
    """The settings with those label values left out, unless the label map says otherwise."""
    return replace(config, label_map={**dict.fromkeys(values, IGNORED), **config.label_map}) if values else config


def _note_on_left_out(config: Config) -> list[str]:
    values = " ".join(str(old) for old, new in config.label_map.items() if new == IGNORED)
    return [f"voxels of label {values} are left out of loss, sampling and scores"] if values else []


def _refuse_with_shard(overwrite: bool, prune: bool) -> None:
    if overwrite:
        raise ValueError("`shard` and `overwrite` exclude each other: a shard started again would redo its cases")
    if prune:
        raise ValueError("`shard` and `prune` exclude each other: the run without `shard` knows all cases")


@contextmanager
def _locks(store: Path, shard: tuple[int, int] | None) -> Iterator[None]:
    """A whole run and shards exclude each other, and so do two processes of the same shard."""
    if shard is None:
        with locked(store, "another process is writing this store, or a shard of it"):
            yield
    else:
        name = f".lock-shard-{shard[0]}-of-{shard[1]}"
        with (
            locked(store, "another process is writing this store as a whole", shared=True),
            locked(store, f"another process is writing shard {shard[0]}/{shard[1]} of this store", name=name),
        ):
            yield


@contextmanager
def _disk_full_explained(store: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        text = "the disk is full; what was written is whole, free some space and run the same command again to go on"
        raise OSError(f"{store}: {text}") from error


def _run(
    items: list[Item], job: Callable[[Item], Outcome], report: Path, *, workers: int, fail_fast: bool, progress: bool
) -> list[Outcome]:
    """The outcomes in the order of the items; each line of the report is written as soon as its case ends."""
    outcome_of: dict[str, Outcome] = {}
    if workers:
        outcomes = in_processes(items, job, min(workers, len(items)), _worker_died)
    else:
        outcomes = (job(item) for item in items)
    bar = tqdm(total=len(items), unit="case", file=sys.stderr, disable=None if progress else True)
    with report.open("wb", buffering=0) as lines, bar, closing(outcomes):
        for outcome in outcomes:
            if outcome.row["reason"] == "disk_full":
                raise OSError(errno.ENOSPC, outcome.row["message"])
            outcome_of[outcome.row["id"]] = outcome
            lines.write(outcome.line())
            bar.update()
            if progress and len(outcome_of) == PROJECTION < len(items):
                text = _projection(outcome_of.values(), len(items), report.parent, bar.format_dict["elapsed"])
                bar.write(text, file=sys.stderr)
            if fail_fast and outcome.bad:
                break
    return [outcome_of.get(item.id) or not_done(item, "not_run", "not run: stopped by `fail_fast`") for item in items]


def _worker_died(item: Item, how: str) -> Outcome:
    return not_done(item, "unexpected:WorkerDied", how)


def _projection(outcomes: Sequence[Outcome], total: int, store: Path, elapsed: float) -> str:
    """How much disk and time all cases will take, from those that are done."""
    size = sum(outcome.n_bytes for outcome in outcomes) / len(outcomes) * total / 1e9
    stat = os.statvfs(store) if hasattr(os, "statvfs") else None
    free = "" if stat is None else f", {stat.f_bavail * stat.f_frsize / 1e9:.1f} GB free now"
    return f"projected: {size:.1f} GB in the store{free}; {elapsed / len(outcomes) * total / 60:.1f} min in all"


def _earlier(outcome: Outcome, item: Item, job: Callable[..., Outcome]) -> Outcome:
    """A case that was not reached because of `fail_fast` stays in the store where an earlier run finished it."""
    if outcome.row["reason"] != "not_run":
        return outcome
    earlier = job(item, redo=False, only_done=True)
    return earlier if earlier.done else outcome


def _finish(
    store: Path, collection: Collection, config: Config, outcomes: list[Outcome], earlier: Earlier, notes: list[str]
) -> list[dict]:
    """Write the index, delete what is taken out, return the entries; ValueError where no input could be used."""
    outcome_of = dict(zip((item.id for item in collection.items), outcomes, strict=True))
    done = {id: outcome for id, outcome in outcome_of.items() if outcome.done}
    staying = earlier.entries_beside(outcome_of, store)
    entries = [entry_of(item, done[item.id]) for item in collection.items if item.id in done] + staying
    entries.sort(key=lambda entry: entry["id"])
    if entries:
        values = [value for outcome in done.values() for value in outcome.label_values]
        labels = class_names(collection, config, [*values, *(earlier.labels if staying else ())], notes, earlier.labels)
        regions = region_classes(collection, config, labels, earlier.regions) if labels else {}
        raw_values = {value for outcome in done.values() for value in outcome.raw_label_values}
        raw_values |= earlier.raw_values if staying else set()
        write_index(store, collection.channels, config.with_values(raw_values), labels, entries, regions)
    if not done:
        row = outcomes[0].row
        raise ValueError(f"none of {len(outcomes)} inputs could be used; the first: {row['reason']}: {row['message']}")
    if earlier.prune:
        _delete(store, earlier.listed - {entry["id"] for entry in entries})
    return entries


def _delete(store: Path, ids: Iterable[str]) -> None:
    """Delete the arrays and records of cases that the index does not list any more."""
    for id in ids:
        for path in case_files(store, id):
            path.unlink(missing_ok=True)
