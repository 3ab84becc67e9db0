"""A folder of cases into a store: each case alone in a worker process, everything reported, restartable."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from amaes.cli import EXIT_OK, EXIT_REJECTED
from amaes.files import locked, written_whole
from amaes.preprocess.case import Case, hinted, preprocess_case
from amaes.preprocess.config import Config
from amaes.preprocess.find_cases import Collection, Item
from amaes.preprocess.nifti import RejectedInput
from amaes.preprocess.processes import in_processes
from amaes.preprocess.store_index import case_files, class_names, prepare, remove_temporary, write_index

FOREGROUND_SAMPLES = 10_000  # voxels remembered per class, to place patches on
PROJECTION = 20  # cases after which disk and time are projected
STATUSES = ("ok", "skipped", "rejected", "failed")


@dataclass(frozen=True)
class Outcome:
    """What became of one input: its line of the report, and what the store's index needs of it."""

    row: dict
    label_values: list[int] = field(default_factory=list)
    raw_label_values: list[int] = field(default_factory=list)  # of the file, before mapping
    n_bytes: int = 0

    @property
    def done(self) -> bool:
        """The case is in the store."""
        return self.row["status"] in ("ok", "skipped") and self.row["reason"] is None

    @property
    def bad(self) -> bool:
        return self.row["status"] in ("rejected", "failed")


@dataclass(frozen=True)
class Result:
    """What became of all inputs, in the order of their ids."""

    store: Path
    items: list[Item]
    outcomes: list[Outcome]
    notes: list[str]
    seconds: float
    report: str = "report.jsonl"

    def count(self, status: str) -> int:
        return sum(outcome.row["status"] == status for outcome in self.outcomes)

    def status(self, allow_rejects: bool = False) -> int:
        """Exit status: 1 with failed inputs, or with rejected ones unless they are allowed."""
        rejected = 0 if allow_rejects else self.count("rejected")
        return EXIT_REJECTED if rejected + self.count("failed") else EXIT_OK

    def summary(self) -> str:
        """One screen of text."""
        counts = ", ".join(f"{self.count(status)} {status}" for status in STATUSES)
        lines = [f"{len(self.items)} inputs: {counts}, in {self.seconds:.0f} s"]
        without = [outcome.row for outcome in self.outcomes if not outcome.done]
        for reason, number in Counter(row["reason"] for row in without).most_common(12):
            example = next(row for row in without if row["reason"] == reason)
            lines.append(f"  {number:6d} {reason}: {example['id']}: {example['message']}")
        warnings = []  # one of each kind per input
        for outcome in self.outcomes:
            warnings += {text.split(":")[0]: text for text in reversed(outcome.row["warnings"])}.values()
        for code, number in Counter(text.split(":")[0] for text in warnings).most_common(8):
            example = next(text for text in warnings if text.startswith(f"{code}:"))
            lines.append(f"  {number:6d} with warning {hinted(code, example)}")
        lines += [f"  note: {note}" for note in self.notes]
        done = [(item, outcome) for item, outcome in zip(self.items, self.outcomes, strict=True) if outcome.done]
        subjects = sorted({item.subject for item, _ in done})
        shown = ", ".join(subjects[:3]) + (", ..." if len(subjects) > 3 else "")
        labelled = sum(item.label is not None for item, _ in done)
        size = sum(outcome.n_bytes for _, outcome in done) / 1e9
        lines.append(
            f"{self.store}: {len(done)} cases of {len(subjects)} subjects ({shown}), {labelled} labelled, {size:.2f} GB"
        )
        if sources := Counter(item.subject.split("/")[0] for item, _ in done if "/" in item.subject):
            lines.append("  of " + ", ".join(f"{name} {count}" for name, count in sorted(sources.items())))
        lines.append(f"one line per input in {self.store / self.report}")
        return ("\n".join(lines) + "\n").encode(errors="backslashreplace").decode()  # names may be no valid text


def write_store(
    collection: Collection,
    store: str | Path,
    config: Config,
    *,
    workers: int = 0,
    overwrite: bool = False,
    fail_fast: bool = False,
    progress: bool = False,
    shard: tuple[int, int] | None = None,
) -> Result:
    """Preprocess every item into a store; what is done there already is kept.

    Args:
        collection: of `collect`.
        store: folder to write.
        config: how.
        workers: processes of one thread each; 0 = this process. The arrays do not depend on it.
        overwrite: redo cases that are done, and accept a store of other settings.
        fail_fast: stop at the first input that is rejected or fails.
        progress: a bar on stderr.
        shard: (i, n): only the items i, i + n, i + 2n, ..., while other processes do the others; writes no index. The
            same call without it then finds those cases done, does what is missing and writes the index.

    Raises:
        ValueError: the folder is a store of other settings or not ours or being written by others, or not one input
            could be used.
        OSError: the disk is full; what was written is whole, and the same call continues.
    """
    store, began = Path(store), time.perf_counter()
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{store}: cannot be made a folder ({error.strerror})") from error
    items, report = collection.items, "report.jsonl"
    if shard is not None:
        if overwrite:
            raise ValueError("--shard and --overwrite exclude each other: a shard started again would redo its cases")
        items, report = items[shard[0] :: shard[1]], f"report-shard-{shard[0]}-of-{shard[1]}.jsonl"
    with _alone(store, shard), _disk_full_explained(store):
        own = None if shard is None else items
        notes = [*collection.notes, *prepare(store, collection, config, overwrite, own)]
        job = partial(_process, store=store, config=config, collection=_without_items(collection), redo=overwrite)
        try:
            outcomes = _run(items, job, workers, store / report, fail_fast, progress)
        finally:
            remove_temporary(store, own)
        outcomes = [_earlier(outcome, item, job) for outcome, item in zip(outcomes, items, strict=True)]
        with written_whole(store / report) as file:
            file.writelines(_line(outcome.row) for outcome in outcomes)
        if shard is None:
            _finish(store, collection, config, outcomes, notes)
    result = Result(store, items, outcomes, notes, time.perf_counter() - began, report)
    assert len(items) == len(outcomes) == sum(result.count(status) for status in STATUSES)
    return result


@contextmanager
def _alone(store: Path, shard: tuple[int, int] | None) -> Iterator[None]:
    """Shards keep a whole run out, and each a second process for the same shard."""
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


def _finish(store: Path, collection: Collection, config: Config, outcomes: list[Outcome], notes: list[str]) -> None:
    """Write the index; ValueError where nothing could be used."""
    done = [(item, outcome) for item, outcome in zip(collection.items, outcomes, strict=True) if outcome.done]
    if not done:
        row = outcomes[0].row
        raise ValueError(f"none of {len(outcomes)} inputs could be used; the first: {row['reason']}: {row['message']}")
    names = class_names(collection, config, [value for _, outcome in done for value in outcome.label_values], notes)
    raw = {value for _, outcome in done for value in outcome.raw_label_values}
    write_index(store, collection, config.with_values(raw), names, done)


# One case -------------------------------------------------------------------------------------------------------------


def _process(
    item: Item, store: Path, config: Config, collection: Collection, redo: bool, only_done: bool = False
) -> Outcome:
    """Preprocess and save one item (unless `only_done`); whatever goes wrong becomes its line of the report."""
    began = time.perf_counter()
    row = {"id": item.id, "files": item.files, "status": "ok", "reason": None, "message": "", "warnings": []}
    row["shape"] = None
    try:
        if item.problem is not None:
            reason, message = item.problem
            row |= {"status": "rejected", "reason": reason, "message": hinted(reason, message), "seconds": 0.0}
            return Outcome(row)
        stamps = _stamps(item)
        properties = None if redo else _finished(store, item, config, collection.channels, stamps)
        if properties is not None:
            row["status"] = "skipped"
        elif only_done:
            return _not_done(item, "not_run", "not run")
        else:
            options = {"case_id": item.id, "channels": collection.channels, "classes": list(collection.classes)}
            if item.volume is not None:
                options |= {"volumes": item.volume[:1], "volumes_in_file": item.volume[1]}
            case = preprocess_case(item.images, config, item.label, corpus_filter=item.corpus_filter, **options)
            properties = _save(store, item, case, np.dtype(config.dtype), stamps)
        row |= {"warnings": properties["warnings"], "shape": properties["shape"]}
        row["seconds"] = round(time.perf_counter() - began, 3)
        files = [path for path in case_files(store, item.id) if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        return Outcome(row, properties["label_values"], properties.get("raw_label_values", []), size)
    except RejectedInput as error:
        row |= {"status": "rejected", "reason": error.code, "message": hinted(error.code, str(error))}
        if item.corpus_filter and error.code in ("corpus_filter", "bad_ndim", "too_small"):
            row |= {"status": "skipped", "reason": "corpus_filter", "message": str(error)}
    except Exception as error:
        reason = "disk_full" if _is_disk_full(error) else f"unexpected:{type(error).__name__}"
        row |= {"status": "failed", "reason": reason, "message": " ".join(f"{item.id}: {error}".split())}
    return Outcome({**row, "seconds": round(time.perf_counter() - began, 3)})


def _stamps(item: Item) -> list[list | None]:
    """[path, bytes, time of change in ns] of each file, and which volume: a case is redone when one is another."""
    stamps: list[list | None] = []
    for path in (*item.images, item.label):
        try:
            stat = None if path is None else path.stat()
        except OSError:  # preprocess_case says what is wrong with it
            stat = None
        stamps.append(None if stat is None else [os.path.normpath(path.absolute()), stat.st_size, stat.st_mtime_ns])
    return stamps if item.volume is None else [*stamps, list(item.volume)]


def _finished(store: Path, item: Item, config: Config, channels: Sequence[str], stamps: list) -> dict | None:
    """The properties of a case that is whole and made from these files in this way, else None."""
    image, label, record = case_files(store, item.id)
    try:
        properties = json.loads(record.read_text(encoding="utf-8"))
        expected = (config.hash(), list(channels), stamps)
        if (properties["config_hash"], properties["channels"], properties["source_stamps"]) != expected:
            return None
        if item.corpus_filter and not properties["corpus_filter"]:  # never looked at in this way
            return None
        shape = tuple(properties["shape"])
        stored = np.load(image, mmap_mode="r", allow_pickle=False)
        whole = stored.shape == (len(channels), *shape) and stored.dtype == config.dtype
        if item.label is not None:
            whole = whole and np.load(label, mmap_mode="r", allow_pickle=False).shape == shape
        return properties if whole else None
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _save(store: Path, item: Item, case: Case, dtype: np.dtype, stamps: list) -> dict:
    """Write the arrays, then the record that says they are whole; returns the record."""
    image, label, record = case_files(store, item.id)
    record.unlink(missing_ok=True)
    foreground = {}
    if case.label is None:
        label.unlink(missing_ok=True)
    else:
        foreground = _foreground(case.label)
        _write_array(label, case.label)
    _write_array(image, case.image.astype(dtype, copy=False))
    properties = {
        **case.properties,
        "subject": item.subject,
        "session": item.session,
        "sequence": item.sequence,
        "shape": list(case.image.shape[1:]),
        "foreground": foreground,
        "channel_sha256": [hashlib.sha256(channel).hexdigest() for channel in case.image],  # of the float32, C order
        "corpus_filter": item.corpus_filter,
        "source_stamps": stamps,
    }
    with written_whole(record, sync=False) as file:
        file.write(json.dumps(properties).encode())
    return properties


def _write_array(path: Path, array: np.ndarray) -> None:
    """np.save, with a full disk reported as such (its own error has no number)."""
    array = np.ascontiguousarray(array)
    with written_whole(path, sync=False) as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


def _foreground(label: np.ndarray) -> dict[str, list[int]]:
    """{value: sorted C-order indices into the (X, Y, Z) label}, a random subset of large classes, always the same."""
    flat = label.ravel()
    result = {}
    for value in np.flatnonzero(np.bincount(flat))[:256]:
        if value:
            index = np.flatnonzero(flat == value)
            if index.size > FOREGROUND_SAMPLES:
                generator = np.random.Generator(np.random.Philox(int(value)))
                index = np.sort(generator.choice(index, FOREGROUND_SAMPLES, replace=False))
            result[str(value)] = index.tolist()
    return result


# All cases ------------------------------------------------------------------------------------------------------------


def _run(
    items: list[Item], job: Callable[[Item], Outcome], workers: int, report: Path, fail_fast: bool, progress: bool
) -> list[Outcome]:
    """The outcomes in the order of the items; each line of the report is written as soon as its case ends."""
    done: dict[str, Outcome] = {}
    source = (
        in_processes(items, job, min(workers, len(items)), _worker_died) if workers else (job(item) for item in items)
    )
    bar = tqdm(total=len(items), unit="case", file=sys.stderr, disable=None if progress else True)
    with report.open("wb", buffering=0) as lines, bar, closing(source):
        for outcome in source:
            if outcome.row["reason"] == "disk_full":
                raise OSError(errno.ENOSPC, outcome.row["message"])
            done[outcome.row["id"]] = outcome
            lines.write(_line(outcome.row))
            bar.update()
            if progress and len(done) == PROJECTION < len(items):
                text = _projection(done.values(), len(items), report.parent, bar.format_dict["elapsed"])
                bar.write(text, file=sys.stderr)
            if fail_fast and outcome.bad:
                break
    return [done.get(item.id) or _not_done(item, "not_run", "not run: stopped by --fail-fast") for item in items]


def _earlier(outcome: Outcome, item: Item, job: Callable[..., Outcome]) -> Outcome:
    """A case that --fail-fast did not come to, but that an earlier run finished, stays in the store."""
    if outcome.row["reason"] != "not_run":
        return outcome
    earlier = job(item, redo=False, only_done=True)
    return earlier if earlier.done else outcome


def _worker_died(item: Item, how: str) -> Outcome:
    return _not_done(item, "unexpected:WorkerDied", how)


def _not_done(item: Item, reason: str, message: str) -> Outcome:
    row = {"id": item.id, "files": item.files, "status": "failed", "reason": reason, "message": f"{item.id}: {message}"}
    return Outcome({**row, "warnings": [], "shape": None, "seconds": 0.0})


def _projection(outcomes: Sequence[Outcome], total: int, store: Path, elapsed: float) -> str:
    size = sum(outcome.n_bytes for outcome in outcomes) / len(outcomes) * total / 1e9
    stat = os.statvfs(store) if hasattr(os, "statvfs") else None
    free = "" if stat is None else f", {stat.f_bavail * stat.f_frsize / 1e9:.1f} GB free now"
    return f"projected: {size:.1f} GB in the store{free}; {elapsed / len(outcomes) * total / 60:.1f} min in all"


def _without_items(collection: Collection) -> Collection:
    """What a worker needs of it."""
    return Collection([], collection.channels, collection.classes)


@contextmanager
def _disk_full_explained(store: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not _is_disk_full(error):
            raise
        text = "the disk is full; what was written is whole, free some space and run the same command again to go on"
        raise OSError(f"{store}: {text}") from error


def _line(row: dict) -> bytes:
    return (json.dumps(row) + "\n").encode()


def _is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
