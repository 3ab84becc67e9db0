"""One case into a store: preprocess and save it, unless the store holds it already; every fault becomes an outcome."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from amaes.files import is_disk_full, read_json, written_whole
from amaes.preprocess.case import PreprocessedCase, preprocess_case
from amaes.preprocess.case_record import check_record
from amaes.preprocess.config import IGNORED
from amaes.preprocess.nifti_header import RejectedInput
from amaes.preprocess.report import Outcome, not_done, with_remedy
from amaes.preprocess.store_index import case_files

if TYPE_CHECKING:
    from collections.abc import Sequence

    from amaes.preprocess.collection import Collection, Item
    from amaes.preprocess.config import Config

FOREGROUND_SAMPLES = 10_000  # voxels remembered per class, to place patches on


def store_case(
    item: Item,
    *,
    store: Path,
    config: Config,
    collection: Collection,
    redo: bool,
    listed: frozenset[str] = frozenset(),
    only_done: bool = False,
) -> Outcome:
    """Preprocess and save one case; whatever goes wrong becomes its line of the report.

    Args:
        item: the files of the case.
        store: folder of the store.
        config: the settings.
        collection: for its channels and classes.
        redo: preprocess a case again that is in the store.
        listed: ids in the index of the store; such a case is not replaced by another image or label.
        only_done: preprocess nothing; say only whether the case is in the store.
    """
    began = time.perf_counter()
    row = {"id": item.id, "files": item.files, "status": "ok", "reason": None, "message": "", "warnings": []}
    row["shape"] = None
    try:
        if item.problem is not None:
            reason, message = item.problem
            row |= {"status": "rejected", "reason": reason, "message": with_remedy(reason, message), "seconds": 0.0}
            return Outcome(row)
        stamps = _stamps(item)
        properties = None if redo else _properties_if_done(store, item, config, collection.channels, stamps)
        if properties is not None:
            row["status"] = "skipped"
        elif only_done:
            return not_done(item, "not_run", "not run")
        else:
            case = _preprocessed(item, config, collection)
            if item.id in listed and not redo:
                _check_same_content(store, item, case)
            properties = _save(store, item, case, np.dtype(config.dtype), stamps, ignores=config.ignores)
        row |= {"warnings": properties["warnings"], "shape": properties["shape"]}
        row["seconds"] = round(time.perf_counter() - began, 3)
        files = [path for path in case_files(store, item.id) if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        return Outcome(row, properties["label_values"], properties.get("raw_label_values", []), size)
    except RejectedInput as error:
        row |= {"status": "rejected", "reason": error.code, "message": with_remedy(error.code, str(error))}
        if item.corpus_filter and error.code in ("corpus_filter", "bad_ndim", "too_small"):
            row |= {"status": "skipped", "reason": "corpus_filter", "message": str(error)}
    except Exception as error:
        reason = "disk_full" if is_disk_full(error) else f"unexpected:{type(error).__name__}"
        row |= {"status": "failed", "reason": reason, "message": " ".join(f"{item.id}: {error}".split())}
    return Outcome({**row, "seconds": round(time.perf_counter() - began, 3)})


def _preprocessed(item: Item, config: Config, collection: Collection) -> PreprocessedCase:
    volume, volumes_in_file = item.volume or (None, None)
    return preprocess_case(
        item.images,
        config,
        item.label,
        case_id=item.id,
        channels=collection.channels,
        classes=list(collection.classes),
        volumes=None if volume is None else [volume],
        volumes_in_file=volumes_in_file,
        corpus_filter=item.corpus_filter,
    )


def _check_same_content(store: Path, item: Item, case: PreprocessedCase) -> None:
    """Refuse to replace a case of the store by other images or another label.

    Raises:
        RejectedInput: "changed"; a case whose record or label is damaged is taken.
    """
    _, label, record = case_files(store, item.id)
    try:
        before = read_json(record)
        made_with = before["config_hash"], before["channels"]
        digests = before["channel_sha256"]
        stored = np.load(label, allow_pickle=False) if label.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return
    if made_with != (case.properties["config_hash"], case.properties["channels"]):
        return
    if digests != _digests(case.image):
        raise RejectedInput("changed", item.files[0], "not the image that the store has")
    if stored is not None and case.label is not None and not np.array_equal(stored, case.label):
        raise RejectedInput("changed", item.files[-1], "not the label that the store has")


def _digests(image: np.ndarray) -> list[str]:
    """SHA-256 of each channel, float32 in C order."""
    return [hashlib.sha256(channel).hexdigest() for channel in image]


def _stamps(item: Item) -> list[list | None]:
    """[path, bytes, time of change in ns] of each file, and which volume; a case is redone where they differ."""
    stamps: list[list | None] = []
    for path in (*item.images, item.label):
        try:
            stat = None if path is None else path.stat()
        except OSError:  # preprocess_case says what is wrong with it
            stat = None
        stamps.append(None if stat is None else [os.path.normpath(path.absolute()), stat.st_size, stat.st_mtime_ns])
    return stamps if item.volume is None else [*stamps, list(item.volume)]


def _properties_if_done(store: Path, item: Item, config: Config, channels: Sequence[str], stamps: list) -> dict | None:
    """The properties of a case that is complete and made from these files with these settings, else None."""
    image, label, record = case_files(store, item.id)
    try:
        properties = read_json(record)
        expected = (config.hash(), list(channels), stamps)
        if (properties["config_hash"], properties["channels"], properties["source_stamps"]) != expected:
            return None
        check_record(record, properties, ("warnings", "label_values"))
        if item.corpus_filter and not properties["corpus_filter"]:  # the filter was never applied to it
            return None
        shape = tuple(properties["shape"])
        array = np.load(image, mmap_mode="r", allow_pickle=False)
        complete = array.shape == (len(channels), *shape) and array.dtype == config.dtype
        if item.label is not None:
            complete = complete and np.load(label, mmap_mode="r", allow_pickle=False).shape == shape
        return properties if complete else None
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _save(store: Path, item: Item, case: PreprocessedCase, dtype: np.dtype, stamps: list, ignores: bool) -> dict:
    """Write the arrays, then the record that says they are complete; returns the record."""
    image, label, record = case_files(store, item.id)
    record.unlink(missing_ok=True)
    foreground = {}
    if case.label is None:
        label.unlink(missing_ok=True)
    else:
        foreground = _foreground(case.label)
        if ignores:
            foreground.pop(str(IGNORED), None)  # no patch is placed around it
        _write_array(label, case.label)
    _write_array(image, case.image.astype(dtype, copy=False))
    properties = {
        **case.properties,
        "subject": item.subject,
        "session": item.session,
        "sequence": item.sequence,
        "shape": list(case.image.shape[1:]),
        "foreground": foreground,
        "channel_sha256": _digests(case.image),
        "corpus_filter": item.corpus_filter,
        "source_stamps": stamps,
    }
    with written_whole(record, sync=False) as file:
        file.write(json.dumps(properties).encode())
    return properties


def _write_array(path: Path, array: np.ndarray) -> None:
    """np.save, but an error of a full disk keeps its number."""
    array = np.ascontiguousarray(array)
    with written_whole(path, sync=False) as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


def _foreground(label: np.ndarray) -> dict[str, list[int]]:
    """{value: sorted C-order indices into the (X, Y, Z) label}; of large classes a random subset, always the same."""
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
