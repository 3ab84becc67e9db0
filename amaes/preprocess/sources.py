"""Data sets as they are distributed: which file of a release is which volume, by its path alone.

Every volume is a case of one channel, called dataset/subject/visit/sequence[-run]. The order of the steps:
`find_source` for each folder, then `leave_out_test`, `take_sequences` and `take_labels`, then `collect_sources`.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from amaes.preprocess.collection import Collection, Item
from amaes.preprocess.file_names import sequence_of, stem_of
from amaes.preprocess.source_report import duplicates, notes
from amaes.preprocess.source_tables import SOURCES, Source, source_name

DICOM_CHECKS = 8  # files without extension that are opened to see whether they are DICOM, per source


# Reading a folder -----------------------------------------------------------------------------------------------------


@dataclass
class SourceFolder:
    """The files of a folder that holds one source; paths are relative to the folder unless said otherwise.

    Attributes:
        name: key of `SOURCES`.
        root: the folder.
        items: one per volume, in the order of the files; with whole paths.
        excluded: reason to the paths that were left out for it.
        unmatched: NIfTI files that fit no layout.
        dicom: files that must be converted first.
        labels: label files of a case, by its subject and visit in small letters.
    """

    name: str
    root: Path
    items: list[Item] = field(default_factory=list)
    excluded: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    unmatched: list[str] = field(default_factory=list)
    dicom: list[str] = field(default_factory=list)
    labels: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def source(self) -> Source:
        """How the data set is distributed."""
        return SOURCES[self.name]

    @cached_property
    def folder_name(self) -> str:
        """The name of the folder as it was given, wherever a link leads."""
        return Path(os.path.normpath(self.root.absolute())).name

    @cached_property
    def dataset(self) -> str:
        """The first part of the ids."""
        return self.source.dataset or _id_part(self.folder_name)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Subjects, visits and volumes."""
        visits = {(item.subject, item.session) for item in self.items}
        return len({subject for subject, _ in visits}), len(visits), len(self.items)


def find_source(name: str, root: str | Path) -> SourceFolder:
    """The volumes of one source, by their paths; of files without extension, a few are opened to recognise DICOM.

    What is left out by default, such as a test part, is taken where its own folder is given as `root`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no such source.
    """
    folder = SourceFolder(source_name(name), Path(root))
    if not folder.root.is_dir():
        raise FileNotFoundError(f"`source` {name}={root}: no such folder")
    source = folder.source
    layouts, label_layouts = _compiled(source.layouts), _compiled(source.labels)
    excluded = [(reason, re.compile(rule, re.IGNORECASE)) for reason, rule in source.excluded]
    unreadable: list[str] = []
    n_checks = 0
    for path in _walk(folder.root, unreadable):
        stem = stem_of(path)
        if stem == path:  # not a NIfTI file
            extension = PurePosixPath(path).suffix.lower()
            n_checks += not extension
            to_check = not extension and n_checks <= DICOM_CHECKS
            if extension in (".dcm", ".ima", ".dicom") or (to_check and _is_dicom(folder.root / path)):
                folder.dicom.append(path)
            continue
        reason = next((reason for reason, rule in excluded if rule.search(stem)), None)
        rules = {None: layouts, "label": label_layouts}.get(reason, [])
        match = next(filter(None, (rule.fullmatch(f"{folder.folder_name}/{stem}") for rule in rules)), None)
        if reason == "label" and match is not None:
            subject, visit = _subject_and_visit(folder.dataset, match.groupdict())
            folder.labels[subject.lower(), visit.lower()].append(path)
        elif match is not None and not _wanted_description(source, match.groupdict()):
            reason = "description"
        if reason is not None:
            folder.excluded[reason].append(path)
        elif match is None:
            folder.unmatched.append(path)
        else:
            folder.items += _items(folder, match.groupdict(), folder.root / path)
    if unreadable:
        folder.excluded["unreadable"] = unreadable
    return folder


def _compiled(rules: Sequence[str]) -> list[re.Pattern]:
    return [re.compile(f"(?:.*/)?{rule}", re.IGNORECASE) for rule in rules]


def _walk(root: Path, unreadable: list[str]) -> Iterator[str]:
    """Files below a folder, relative and with "/", sorted within each folder; hidden and resource files left out.

    A folder that links lead to as well is walked under its own name, since rules may leave that name out. Folders that
    cannot be read, such as lost+found of a disk, go into `unreadable`; the root itself must be readable.
    """
    pending, links, visited = [""], deque(), set()
    while pending or links:
        folder = pending.pop() if pending else links.popleft()
        try:
            state = (root / folder).stat()
            if (state.st_dev, state.st_ino) in visited:  # links in a circle are walked once
                continue
            visited.add((state.st_dev, state.st_ino))
            with os.scandir(root / folder) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            if not folder:
                raise
            unreadable.append(folder)
            continue
        entries = [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX"]
        folders = [entry for entry in entries if _is_folder(entry)]
        links += [f"{folder}{entry.name}/" for entry in folders if entry.is_symlink()]
        pending += [f"{folder}{entry.name}/" for entry in reversed(folders) if not entry.is_symlink()]
        inner = {entry.name for entry in folders}
        yield from (folder + entry.name for entry in entries if entry.name not in inner)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _wanted_description(source: Source, groups: Mapping) -> bool:
    """The description of a series, where the path has one, is among those that the source takes."""
    description = (groups.get("description") or "").lower()
    return bool(re.search(source.keep, description)) and not re.search(source.drop, description)


def _subject_and_visit(dataset: str, groups: Mapping) -> tuple[str, str]:
    subject = "_".join(_id_part(groups[name]) for name in ("site", "scanner", "subject") if groups.get(name))
    return f"{dataset}/{subject}", _id_part(groups.get("visit") or "ses-1")


def _items(folder: SourceFolder, groups: Mapping, path: Path) -> list[Item]:
    """The volumes of one file: one, or those of a 4-D file."""
    source, (subject, visit) = folder.source, _subject_and_visit(folder.dataset, groups)
    text = groups.get("sequence") or groups.get("suffix") or groups.get("description")
    runs = [groups.get("run"), *(groups.get("entities") or "").split("_")]
    if text is None:
        sequences = source.volumes
    else:
        by_source = (name for name, rule in source.sequences if re.search(rule, text.lower()))
        sequences = (next(by_source, None) or sequence_of(text) or "UNKNOWN",)
        suffix, name = groups.get("suffix"), sequences[0].lower()
        if suffix and suffix.lower() not in (name, f"{name}w"):
            runs.append(suffix)  # T1map and T1w are both T1
    run = "".join(f"-{_id_part(run)}" for run in runs if run)
    return [
        Item(
            id=f"{subject}/{visit}/{sequence}{run}",
            images=(path,),
            subject=subject,
            session=visit,
            sequence=sequence,
            volume=(k, len(sequences)) if text is None else None,
        )
        for k, sequence in enumerate(sequences)
    ]


def _id_part(text: str) -> str:
    """A part of an id: folder names may hold blanks, dots and more; letters of any alphabet stay."""
    return re.sub(r"[^\w+-]+", "-", text).strip("-") or "-"


# Choosing -------------------------------------------------------------------------------------------------------------


def hold_out(names: Sequence[str], seed: int, fraction: float = 0.25) -> tuple[list[str], list[str]]:
    """The published split of a set of cases into a pool and a test set (that of scikit-learn's train_test_split).

    The names are sorted, so their order does not matter.

    Args:
        names: of all cases.
        seed: 4215532 for BraTS21, 859032 for ISLES22.
        fraction: of the cases that are the test set, rounded up: 313 of the 1251 of BraTS21.

    Returns:
        The pool, in the order of the permutation, and the test set.

    Raises:
        ValueError: a name occurs twice.
    """
    names = sorted(names)
    if len(set(names)) != len(names):
        raise ValueError(f"expected different names, found {len(names) - len(set(names))} of {len(names)} repeated")
    order = np.random.RandomState(seed).permutation(len(names))
    n_test = math.ceil(fraction * len(names))
    return [names[k] for k in order[n_test:]], [names[k] for k in order[:n_test]]


def leave_out_test(folders: Sequence[SourceFolder], name: str) -> None:
    """Move the published test cases of a source from the items to `excluded["hold_out"]`.

    Raises:
        ValueError: the source was not given, or has no published split, or not all of its cases are there (the split is
            a permutation of all).
    """
    name = source_name(name)
    if SOURCES[name].held_out is None:
        known = ", ".join(key for key, source in SOURCES.items() if source.held_out)
        raise ValueError(f"`hold_out` {name}: no test cases were published; choose from {known}")
    seed, expected = SOURCES[name].held_out
    parts = [folder for folder in folders if folder.name == name]
    if not parts:
        raise ValueError(f"`hold_out` {name}: no `source` {name}=DIR is given")
    subjects = {item.subject.lower() for part in parts for item in part.items}  # sorted as if written in one way
    if len(subjects) != expected:
        text = f"the published split is a permutation of all {expected} cases, found {len(subjects)}"
        raise ValueError(f"`hold_out` {name}: {text}")
    test = set(hold_out(list(subjects), seed)[1])
    for part in parts:
        _leave_out(part, "hold_out", {item.id for item in part.items if item.subject.lower() in test})


def take_sequences(folders: Sequence[SourceFolder], names: Sequence[str]) -> None:
    """Move volumes of other sequences from the items to `excluded["sequence"]`."""
    for folder in folders:
        _leave_out(folder, "sequence", {item.id for item in folder.items if item.sequence not in names})


def _leave_out(folder: SourceFolder, reason: str, ids: set[str]) -> None:
    unwanted = [item for item in folder.items if item.id in ids]
    folder.items = [item for item in folder.items if item.id not in ids]
    folder.excluded[reason] += [item.images[0].relative_to(folder.root).as_posix() for item in unwanted]


def take_labels(folders: Sequence[SourceFolder]) -> dict[int, int]:
    """Give every volume the label of its case; a volume without one cannot be used.

    Returns:
        The label map of the release.

    Raises:
        ValueError: a source whose labels are not known here, sources of different labels, or two labels of one case.
    """
    known = [name for name, source in SOURCES.items() if source.labels]
    names = list(dict.fromkeys(folder.name for folder in folders))
    if len(names) > 1 or names[0] not in known:
        raise ValueError(f"`with_labels`: expected one of {', '.join(known)}, found {' and '.join(names)}")
    for folder in folders:
        folder.items = [_with_label(folder, item) for item in folder.items]
        used = {item.label for item in folder.items}
        folder.excluded["label"] = [path for path in folder.excluded["label"] if folder.root / path not in used]
    return dict(SOURCES[names[0]].label_map)


def _with_label(folder: SourceFolder, item: Item) -> Item:
    paths = folder.labels.get((item.subject.lower(), item.session.lower()), [])
    if not paths:
        text = f"{item.id}: expected the label of {item.subject} below {folder.root}, found none"
        return replace(item, problem=("missing_label", text))
    if len(paths) > 1:
        text = f"{paths[0]} and {paths[1]} in {folder.root} are both the label of {item.subject}"
        raise ValueError(f"id_collision: {text}")
    return replace(item, label=folder.root / paths[0])


# All sources together -------------------------------------------------------------------------------------------------


def collect_sources(folders: Sequence[SourceFolder], corpus_filter: str = "auto") -> Collection:
    """One collection of the volumes of all sources.

    Args:
        folders: of `find_source`.
        corpus_filter: "auto" as each source says, "on", "off".

    Raises:
        ValueError: there is no volume, two files have one id, two sources take one file, or the ids of two data sets
            would begin with one folder name.
    """
    _check_no_overlap(folders)
    items = []
    for folder in folders:
        filtered = folder.source.corpus_filter if corpus_filter == "auto" else corpus_filter == "on"
        items += [replace(item, corpus_filter=True) for item in folder.items] if filtered else folder.items
    all_notes = [note for folder in folders for note in notes(folder)]
    if not items:
        raise ValueError("no volume was found; " + " ".join(all_notes))
    if same := duplicates(folders):
        shown = "; ".join(f"{first} and {second} both map to {id!r}" for id, first, second in same[:3])
        raise ValueError(f"id_collision: {len(same)} ids come from two files: {shown}")
    return Collection(sorted(items, key=lambda item: item.id), ["image"], notes=all_notes)


def _check_no_overlap(folders: Sequence[SourceFolder]) -> None:
    """Refuse sources that take one file, and data sets whose subjects would have the same ids."""
    taken: dict[tuple[int, int], tuple[SourceFolder, Path]] = {}  # device and inode to who has the file
    by_dataset: dict[str, SourceFolder] = {}
    for folder in folders:
        other = by_dataset.setdefault(folder.dataset.lower(), folder)
        for path in {item.images[0]: None for item in folder.items} if len(folders) > 1 else ():
            with suppress(OSError):  # preprocessing says what is wrong with it
                state = path.stat()
                first, same = taken.setdefault((state.st_dev, state.st_ino), (folder, path))
                if first is not folder:
                    text = f"both take one file, {same} and {path}; give each folder once"
                    raise ValueError(f"{_both(first, folder)} {text}")
        if other is not folder and not (folder.source.dataset and other.source.dataset):
            text = f"ids of both would begin with {folder.dataset!r}; give one by a link of another name"
            raise ValueError(f"{_both(other, folder)}: {text}")


def _both(first: SourceFolder, second: SourceFolder) -> str:
    return f"`source` {first.name}={first.root} and `source` {second.name}={second.root}"
