"""A folder of cases into a store: each case alone in a worker process, everything reported, restartable."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from tqdm import tqdm

from amaes.cli import EXIT_OK, EXIT_REJECTED
from amaes.collect import STORE_FORMAT, Collection, Item
from amaes.files import locked, written_whole
from amaes.nifti import RejectedInput
from amaes.preprocess import Case, Config, hinted, preprocess_case

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
        return self.row["status"] in ("ok", "skipped")


@dataclass(frozen=True)
class Result:
    """What became of all inputs, in the order of their ids."""

    store: Path
    items: list[Item]
    outcomes: list[Outcome]
    notes: list[str]
    seconds: float

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
        bad = [outcome.row for outcome in self.outcomes if not outcome.done]
        for reason, number in Counter(row["reason"] for row in bad).most_common(12):
            example = next(row for row in bad if row["reason"] == reason)
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
        lines.append(f"one line per input in {self.store / 'report.jsonl'}")
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

    Raises:
        ValueError: the folder is a store of other settings or not ours, or not one input could be used.
        OSError: the disk is full; what was written is whole, and the same call continues.
    """
    store, began = Path(store), time.perf_counter()
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{store}: cannot be made a folder ({error.strerror})") from error
    with locked(store, "another process is writing this store"), _disk_full_explained(store):
        notes = [*collection.notes, *_prepare(store, collection, config, overwrite)]
        job = partial(_process, store=store, config=config, collection=_without_items(collection), redo=overwrite)
        outcomes = _run(collection.items, job, workers, store, fail_fast, progress)
        outcomes = [_earlier(outcome, item, job) for outcome, item in zip(outcomes, collection.items, strict=True)]
        with written_whole(store / "report.jsonl") as file:
            file.writelines(_line(outcome.row) for outcome in outcomes)
        done = [(item, outcome) for item, outcome in zip(collection.items, outcomes, strict=True) if outcome.done]
        if not done:
            row = outcomes[0].row
            raise ValueError(
                f"none of {len(outcomes)} inputs could be used; the first: {row['reason']}: {row['message']}"
            )
        names = _class_names(
            collection, config, [value for _, outcome in done for value in outcome.label_values], notes
        )
        raw = {value for _, outcome in done for value in outcome.raw_label_values}
        _write_index(store, collection, config.with_values(raw), names, done)
    result = Result(store, collection.items, outcomes, notes, time.perf_counter() - began)
    assert len(collection.items) == len(outcomes) == sum(result.count(status) for status in STATUSES)
    return result


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
            case = preprocess_case(item.images, config, item.label, **options)
            properties = _save(store, item, case, np.dtype(config.dtype), stamps)
        row |= {"warnings": properties["warnings"], "shape": properties["shape"]}
        row["seconds"] = round(time.perf_counter() - began, 3)
        files = [path for path in _files(store, item.id) if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        return Outcome(row, properties["label_values"], properties.get("raw_label_values", []), size)
    except RejectedInput as error:
        row |= {"status": "rejected", "reason": error.code, "message": hinted(error.code, str(error))}
    except Exception as error:
        reason = "disk_full" if _is_disk_full(error) else f"unexpected:{type(error).__name__}"
        row |= {"status": "failed", "reason": reason, "message": " ".join(f"{item.id}: {error}".split())}
    return Outcome({**row, "seconds": round(time.perf_counter() - began, 3)})


def _files(store: Path, name: str) -> tuple[Path, Path, Path]:
    return tuple(store / "cases" / f"{name}{suffix}" for suffix in (".npy", "_label.npy", ".json"))


def _stamps(item: Item) -> list[list | None]:
    """[path, bytes, time of change in ns] of each file: a case is redone when one is another or was changed."""
    stamps: list[list | None] = []
    for path in (*item.images, item.label):
        try:
            stat = None if path is None else path.stat()
        except OSError:  # preprocess_case says what is wrong with it
            stat = None
        stamps.append(None if stat is None else [os.path.normpath(path.absolute()), stat.st_size, stat.st_mtime_ns])
    return stamps


def _finished(store: Path, item: Item, config: Config, channels: Sequence[str], stamps: list) -> dict | None:
    """The properties of a case that is whole and made from these files in this way, else None."""
    image, label, record = _files(store, item.id)
    try:
        properties = json.loads(record.read_text(encoding="utf-8"))
        expected = (config.hash(), list(channels), stamps)
        if (properties["config_hash"], properties["channels"], properties["source_stamps"]) != expected:
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
    image, label, record = _files(store, item.id)
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
    items: list[Item], job: Callable[[Item], Outcome], workers: int, store: Path, fail_fast: bool, progress: bool
) -> list[Outcome]:
    """The outcomes in the order of the items; each line of the report is written as soon as its case ends."""
    done: dict[str, Outcome] = {}
    source = _in_processes(items, job, min(workers, len(items))) if workers else (job(item) for item in items)
    bar = tqdm(total=len(items), unit="case", file=sys.stderr, disable=None if progress else True)
    try:
        with (store / "report.jsonl").open("wb", buffering=0) as report, bar, closing(source):
            for outcome in source:
                if outcome.row["reason"] == "disk_full":
                    raise OSError(errno.ENOSPC, outcome.row["message"])
                done[outcome.row["id"]] = outcome
                report.write(_line(outcome.row))
                bar.update()
                if progress and len(done) == PROJECTION < len(items):
                    bar.write(
                        _projection(done.values(), len(items), store, bar.format_dict["elapsed"]), file=sys.stderr
                    )
                if fail_fast and not outcome.done:
                    break
    finally:
        _remove_temporary(store)
    return [done.get(item.id) or _not_done(item, "not_run", "not run: stopped by --fail-fast") for item in items]


def _earlier(outcome: Outcome, item: Item, job: Callable[..., Outcome]) -> Outcome:
    """A case that --fail-fast did not come to, but that an earlier run finished, stays in the store."""
    if outcome.row["reason"] != "not_run":
        return outcome
    earlier = job(item, redo=False, only_done=True)
    return earlier if earlier.done else outcome


def _in_processes(items: Sequence[Item], job: Callable[[Item], Outcome], workers: int) -> Iterator[Outcome]:
    """Outcomes as they come. A worker that dies costs its item alone: another takes its place."""
    context = multiprocessing.get_context("spawn")
    waiting, idle, busy = deque(items), [], {}
    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                process, connection = idle.pop() if idle else _start(context, job)
                busy[connection] = process, waiting.popleft()
                with suppress(OSError):  # died while idle: seen below as a connection at its end
                    connection.send(busy[connection][1])
            for connection in wait(list(busy)):
                process, item = busy.pop(connection)
                try:
                    yield connection.recv()
                    idle.append((process, connection))
                except (EOFError, OSError):
                    process.join()
                    connection.close()
                    yield _not_done(item, "unexpected:WorkerDied", _obituary(process.exitcode))
    finally:
        for process, connection in [*idle, *((process, connection) for connection, (process, _) in busy.items())]:
            connection.close()
            process.terminate()
            process.join()


def _start(context: multiprocessing.context.SpawnContext, job: Callable[[Item], Outcome]) -> tuple:
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, job), daemon=True)
    with _interrupt_later():
        process.start()
    theirs.close()  # so that the death of the process ends the connection
    return process, ours


@contextmanager
def _interrupt_later() -> Iterator[None]:
    """Hold Ctrl-C back while a process starts, which would else leave half of one; the process itself never sees it."""
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    resource_tracker.ensure_running()  # its own start would lift the mask
    arrived = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: arrived.append(number))  # by way of another thread
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by the process
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, previous)
    if arrived:
        signal.raise_signal(signal.SIGINT)


def _serve(connection: multiprocessing.connection.Connection, job: Callable[[Item], Outcome]) -> None:
    """A worker process: items in, outcomes out, until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with suppress(EOFError, OSError):
        while True:
            connection.send(job(connection.recv()))


def _obituary(status: int | None) -> str:
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        hint = "; probably out of memory, try fewer --workers" if name == "SIGKILL" else ""
        return f"the worker process was ended by {name}{hint}"
    return f"the worker process ended with status {status}"


def _not_done(item: Item, reason: str, message: str) -> Outcome:
    row = {"id": item.id, "files": item.files, "status": "failed", "reason": reason, "message": f"{item.id}: {message}"}
    return Outcome({**row, "warnings": [], "shape": None, "seconds": 0.0})


def _projection(outcomes: Sequence[Outcome], total: int, store: Path, elapsed: float) -> str:
    size = sum(outcome.n_bytes for outcome in outcomes) / len(outcomes) * total / 1e9
    stat = os.statvfs(store) if hasattr(os, "statvfs") else None
    free = "" if stat is None else f", {stat.f_bavail * stat.f_frsize / 1e9:.1f} GB free now"
    return f"projected: {size:.1f} GB in the store{free}; {elapsed / len(outcomes) * total / 60:.1f} min in all"


# The store ------------------------------------------------------------------------------------------------------------


def _prepare(store: Path, collection: Collection, config: Config, overwrite: bool) -> list[str]:
    """Refuse a folder that is not ours or of other settings; remove what an ended run left half-done. Returns notes."""
    index = store / "dataset.json"
    if not index.is_file():
        _remove_temporary(store)
        return []
    try:
        old = json.loads(index.read_text(encoding="utf-8"))
        ours, listed = old["format"] == STORE_FORMAT, {case["id"] for case in old["cases"]}
        before = {**Config.from_dict(old["config"]).settings(), "channels": old["channels"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise ValueError(f"{index}: not the index of a store ({STORE_FORMAT}); give another folder as --out")
    _remove_temporary(store)
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


def _write_index(store: Path, collection: Collection, config: Config, names: dict[int, str], done: list) -> None:
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


def _class_names(collection: Collection, config: Config, found: Sequence[int], notes: list[str]) -> dict[int, str]:
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


def _remove_temporary(store: Path) -> None:
    """Half-written files of a store, and nothing else: the folder may hold more."""
    ours = [path for name in ("dataset.json", "report.jsonl") for path in store.glob(f".{name}.*.tmp")]
    for path in [*ours, *(store / "cases").rglob(".*.tmp")]:
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)


def _line(row: dict) -> bytes:
    return (json.dumps(row) + "\n").encode()


def _is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
