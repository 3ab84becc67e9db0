"""Whether pretraining has seen what fine-tuning is tested on: subjects, equal images, near-duplicates.

Begin with `check_run`, which train_finetune.py calls, and `find_leakage`. There are three kinds of evidence: names,
hashes of the preprocessed channels, and thumbnails. A hash finds the same scan only where it was prepared in the same
way: another crop, as of several channels cropped together, gives another array.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from amaes import checkpoint
from amaes.data.store import Case, Store
from amaes.files import write_json

THUMBNAIL = 32  # voxels a side
BLOCK = 256  # thumbnails of pretraining in memory at a time: 32 MB
SEEN_BY_PUBLISHED = {  # part of a data set's name: what the paper says of it (arXiv 2408.00640, Table 1)
    "isles": "all 250 public cases of ISLES 2022 were seen, unlabelled",
    "wmh": "the training scans of the WMH challenge were seen, unlabelled; its test scans come from the same scanners",
    "brats": "BraTS 2021 without a quarter of its cases was seen, unlabelled, and so were scans of the MSD brain "
    "tumours, whose patients occur in BraTS under other names",
    "msseg": "the 15 training cases of MSSEG 2016 were seen, unlabelled",
}


@dataclass
class Leakage:
    """What pretraining has seen of the test cases, as plain data that `write_json` takes.

    Attributes:
        subjects: subjects of test cases that pretraining has too, with the evidence.
        same_images: channels of test cases that are equal to channels of pretraining cases in every voxel.
        near: the best match of a test channel, where its correlation reaches the threshold.
        unclear: subjects of equal names that are too short to tell (s01), where it is not known whether the data sets
            are the same; they are not counted.
        test_cases: ids that were looked for.
        not_compared: number of cases that cannot be read, or that have no hash and none can be computed.
    """

    subjects: list[dict] = field(default_factory=list)
    same_images: list[dict] = field(default_factory=list)
    near: list[dict] = field(default_factory=list)
    unclear: list[dict] = field(default_factory=list)
    test_cases: list[str] = field(default_factory=list)
    not_compared: int = 0

    @property
    def seen(self) -> set[str]:
        """The ids of the test cases concerned."""
        by_subject = (id for entry in self.subjects for id in entry["test_cases"])
        return {*by_subject, *(entry["test"] for entry in (*self.same_images, *self.near))}

    def __str__(self) -> str:
        counts = [
            f"{len(self.subjects)} subjects",
            f"{len(self.same_images)} equal images",
            f"{len(self.near)} near-duplicates",
        ]
        text = f"{len(self.seen)} of {len(self.test_cases)} test cases seen in pretraining ({', '.join(counts)})"
        if self.subjects:
            first = self.subjects[0]
            text += f"; first: subject {first['test']} is {first['pretraining']} there ({first['evidence']})"
        elif first := next(iter((*self.same_images, *self.near)), None):
            text += f"; first: case {first['test']} is {first['pretraining']} there"
        text += f"; {len(self.unclear)} subjects of equal but short names not counted" if self.unclear else ""
        text += f"; {self.not_compared} cases without hash" if self.not_compared else ""
        return text


def find_leakage(
    store: Store, test: Collection[str], pretraining: Sequence[Store], near: float | None = None, progress: bool = False
) -> Leakage:
    """Look for the test cases of a store in the stores of pretraining.

    Reads the index of every store, and the small JSON of the cases that have the shape of a test case, as only those
    can be equal. Where the JSON has no hash, the array is read; it must be float32. With `near` every array is read.

    Args:
        store: of fine-tuning.
        test: ids of cases in it.
        pretraining: the stores.
        near: correlation of 32^3 thumbnails, in (0, 1], from which two scans count as near-duplicates; None: thumbnails
            are not compared.
        progress: show progress bars on stderr.
    """
    leakage = Leakage(test_cases=sorted(test))
    cases = [store.cases[store.index(id)] for id in leakage.test_cases]
    hashes = _hashes_of(store, cases, leakage)
    channels, thumbnails = ([], None) if near is None else _thumbnails(store, cases, leakage)
    for other in pretraining:
        _compare_subjects(store, cases, other, leakage)
        _compare_hashes(hashes, {case.shape for case in cases}, other, leakage, progress)
        if thumbnails is not None:
            _compare_thumbnails(channels, thumbnails, other, near, leakage, progress)
    return leakage


# Subjects -------------------------------------------------------------------------------------------------------------


def _compare_subjects(store: Store, cases: Sequence[Case], other: Store, leakage: Leakage) -> None:
    """Add the subjects of the test cases that the other store has too."""
    same_store = store.path.resolve() == other.path.resolve() or store.fingerprint == other.fingerprint
    known = defaultdict(set)
    for case in other.cases:
        known[_subject_parts(case.subject)[-1]].add(case.subject)
    members = defaultdict(list)
    for case in cases:
        members[case.subject].append(case.id)
    for subject, ids in members.items():
        for candidate in sorted(known.get(_subject_parts(subject)[-1], ())):
            sure, evidence = _same_subject(_subject_parts(subject), _subject_parts(candidate), same_store)
            entry = {"test": subject, "pretraining": candidate, "store": str(other.path), "evidence": evidence}
            if evidence:
                (leakage.subjects if sure else leakage.unclear).append(entry | {"test_cases": ids})


def _subject_parts(subject: str) -> tuple[str, ...]:
    """The components of a subject (DATASET/NAME), without capitals, "sub-" and the kind of separator."""
    parts = [re.sub(r"[^a-z0-9]+", "-", part.casefold()).removeprefix("sub-") for part in subject.split("/")]
    return tuple(parts)


def _same_subject(one: tuple[str, ...], two: tuple[str, ...], same_store: bool) -> tuple[bool, str]:
    """Whether two subjects whose last components are equal are one person, and why; no reason where they are not."""
    dataset = one[0] == two[0] if len(one) > 1 and len(two) > 1 else None
    if one == two and (same_store or dataset):
        return True, "same store" if same_store else "same data set and name"
    if dataset is False:
        return False, ""
    if is_distinctive(one[-1]):
        return True, "same data set, same long name" if dataset else "same long name, the data set of one is not known"
    return False, "" if dataset else "same short name, the data set of one is not known"


def is_distinctive(name: str) -> bool:
    """Whether unrelated data sets are unlikely to share a subject's name: OAS30001 is, patient01, s01 and 3001 are not.

    It must have four digits, and six letters and digits after a word that any data set may use, and zeros.
    """
    rest = re.sub(r"^(subject|subj|sub|patient|pat|case|scan|image|img|id|[spc](?=[-0-9]))?-?0*", "", name)
    return sum(map(str.isdigit, name)) >= 4 and sum(map(str.isalnum, rest)) >= 6


# Equal images ---------------------------------------------------------------------------------------------------------


def _compare_hashes(
    hashes: dict[str, list[tuple[Case, str]]],
    shapes: set[tuple[int, int, int]],
    other: Store,
    leakage: Leakage,
    progress: bool,
) -> None:
    """Add the channels whose hashes occur among `hashes`, those of the test cases."""
    cases = [case for case in other.cases if case.shape in shapes]
    for case in _progress_bar(cases, "hashes", progress):
        for digest, members in _hashes_of(other, [case], leakage).items():
            for test, test_channel in hashes.get(digest, ()):
                if digest == _hash_of_zeros(case.shape):  # a missing channel, equal in all cases of a shape
                    continue
                for _, channel in members:
                    entry = {"test": test.id, "channel": test_channel, "pretraining": case.id}
                    leakage.same_images.append(entry | {"pretraining_channel": channel, "store": str(other.path)})


def _hashes_of(store: Store, cases: Sequence[Case], leakage: Leakage) -> dict[str, list[tuple[Case, str]]]:
    """{SHA-256 of a channel's float32 array in C order: (case, channel) that have it}."""
    result = defaultdict(list)
    for case in cases:
        try:
            digests = store.properties(case.id).get("channel_sha256")
            if not isinstance(digests, list) or len(digests) != len(store.channels):
                digests = _hashes_of_array(store.image(case.id))
        except (OSError, ValueError):  # not our task to report: fine-tuning names the case when it reads it
            digests = []
        leakage.not_compared += not digests
        for digest, channel in zip(digests, store.channels, strict=False):
            result[digest].append((case, channel))
    return result


def _hashes_of_array(image: np.ndarray) -> list[str]:
    """The hash of each channel; none where the array was rounded to float16."""
    if image.dtype != np.float32:
        return []
    return [hashlib.sha256(np.ascontiguousarray(channel)).hexdigest() for channel in image]


@lru_cache(maxsize=64)
def _hash_of_zeros(shape: tuple[int, int, int]) -> str:
    return hashlib.sha256(bytes(4 * math.prod(shape))).hexdigest()


# Near-duplicates ------------------------------------------------------------------------------------------------------


def _compare_thumbnails(
    channels: list[tuple[Case, str]],
    thumbnails: np.ndarray,
    other: Store,
    near: float,
    leakage: Leakage,
    progress: bool,
) -> None:
    """Add the best match of every test channel, a row of `thumbnails` (N, 32^3), where it reaches `near`."""
    best, match = np.full(len(channels), -np.inf, np.float32), [("", "")] * len(channels)
    per_block = max(1, BLOCK // len(other.channels))
    bar = _progress_bar(other.cases, "thumbnails", progress)
    while block := list(islice(bar, per_block)):
        other_channels, other_thumbnails = _thumbnails(other, block, leakage)
        if not other_channels:
            continue
        correlation = thumbnails @ other_thumbnails.T  # (N, block)
        winner = correlation.argmax(axis=1)
        for row in np.flatnonzero(correlation.max(axis=1) > best):
            case, channel = other_channels[winner[row]]
            best[row], match[row] = correlation[row, winner[row]], (case.id, channel)
    for row in np.flatnonzero(best >= near - 1e-6):  # a duplicate's correlation may round to below 1
        entry = {"test": channels[row][0].id, "channel": channels[row][1], "pretraining": match[row][0]}
        entry |= {"pretraining_channel": match[row][1], "store": str(other.path)}
        leakage.near.append(entry | {"correlation": round(float(best[row]), 4)})


def _thumbnails(store: Store, cases: Sequence[Case], leakage: Leakage) -> tuple[list[tuple[Case, str]], np.ndarray]:
    """(case, channel) and a row of unit length for each, (N, 32^3) float32; constant channels are left out."""
    channels, rows = [], []
    for case in cases:
        try:
            image = store.image(case.id)
        except (OSError, ValueError):
            leakage.not_compared += 1
            continue
        for channel, volume in zip(store.channels, image, strict=True):
            row = thumbnail(volume).ravel()
            row -= row.mean()
            length = np.linalg.norm(row)
            if np.isfinite(length) and length > 1e-6:
                channels.append((case, channel))
                rows.append(row / length)
    return channels, np.array(rows, np.float32).reshape(len(rows), THUMBNAIL**3)


def thumbnail(volume: np.ndarray) -> np.ndarray:
    """Block means of a volume: (X, Y, Z) -> (32, 32, 32) float32; an axis of fewer voxels repeats them."""
    volume = np.asarray(volume, np.float32)
    for axis, side in enumerate(volume.shape):
        edges = np.arange(THUMBNAIL) * side // THUMBNAIL
        sizes = np.maximum(np.diff(edges, append=side), 1)
        sums = np.add.reduceat(volume, edges, axis=axis)
        volume = sums / sizes.astype(np.float32).reshape([-1 if k == axis else 1 for k in range(3)])
    return volume


def _progress_bar(cases: Sequence[Case], what: str, progress: bool) -> Iterator[Case]:
    return iter(tqdm(cases, what, unit="case", file=sys.stderr, leave=False, disable=None if progress else True))


# A run ----------------------------------------------------------------------------------------------------------------


def trained_on(content: dict) -> list[str]:
    """The stores that a checkpoint says it was trained on; none where it does not say."""
    provenance = content.get("provenance")
    options = provenance.get("options") if isinstance(provenance, dict) else None
    data = options.get("data") if isinstance(options, dict) else None
    names = data if isinstance(data, list) else [data]
    return [name for name in names if isinstance(name, str)]


def check_run(
    folder: Path,
    store: Store,
    test: Collection[str],
    weights: Path,
    pretraining: Sequence[Store] = (),
    near: float | None = None,
) -> tuple[bool, str]:
    """Look for the test cases of a run in what its weights were pretrained on, and write `folder`/leakage.json.

    Args:
        folder: RUN.
        store: of fine-tuning.
        test: ids of its cases that some fold is tested on.
        weights: the checkpoint whose encoder is taken.
        pretraining: the stores that it was trained on; none: those that the checkpoint names.
        near: of `find_leakage`.

    Returns:
        Whether pretraining has seen a test case, and a line that says which, or why it was not checked.
    """
    report = folder / "leakage.json"
    report.unlink(missing_ok=True)  # of an earlier start
    if not pretraining:
        names = trained_on(checkpoint.read(weights))
        absent = [name for name in names if name == "demo" or not (Path(name) / "dataset.json").is_file()]
        if not names or absent:
            remarks = ["`pretrain_data` STORE compares with a store", *([] if names else published_notes(store))]
            return False, (
                f"{_unknown_origin(weights, absent)}: whether they saw the test cases was NOT checked; "
                + "; ".join(remarks)
            )
        pretraining = [Store(name) for name in names]
    leakage = find_leakage(store, test, pretraining, near, progress=True)
    stores = [str(other.path) for other in pretraining]
    write_json(report, {"pretraining": stores, "near_duplicates": near, **asdict(leakage)})
    warning = "WARNING: " if leakage.seen else ""
    return bool(leakage.seen), f"{warning}{leakage}; full list: {report}"


def _unknown_origin(weights: Path, absent: Sequence[str]) -> str:
    """Why it is not known what weights have seen: no store is named, or the first of the absent ones."""
    if not absent:
        return f"{weights} does not tell what its weights were trained on"
    data = "synthetic heads (demo)" if absent[0] == "demo" else f"{absent[0]}, which is not on this machine"
    return f"the weights of {weights} were trained on {data}"


def published_notes(store: Store) -> list[str]:
    """What the paper's corpus holds of the data set that a store seems to be, by its name and the ids of its cases."""
    text = f"{store.path.name} {store.cases[0].id if store.cases else ''}".casefold()
    return [f"the published AMAES weights: {note}" for name, note in SEEN_BY_PUBLISHED.items() if name in text]
