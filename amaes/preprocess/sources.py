"""Data sets as they are distributed: which file of a release is which volume, by its path alone.

Every volume is a sample of one channel, called dataset/subject/visit/sequence[-run].
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from amaes.preprocess.find_cases import Collection, Item, sequence_of, stem_of
from amaes.preprocess.source_tables import ALIASES, SOURCES, Source

CORPUS_FILTER = ("auto", "on", "off")
DICOM_LOOKS = 8  # files without extension that are looked into, per source


# Reading a folder -----------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What the folder of one source holds; paths are relative to it.

    Attributes:
        name: key of `SOURCES`.
        root: the folder.
        items: one per volume, in the order of the files.
        excluded: reason to paths.
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
        return SOURCES[self.name]

    @cached_property
    def folder(self) -> str:
        """The name of the folder as it was given, wherever a link leads."""
        return Path(os.path.normpath(self.root.absolute())).name

    @cached_property
    def dataset(self) -> str:
        """The first part of the ids."""
        return self.source.dataset or _plain(self.folder)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Subjects, visits and volumes."""
        visits = {(item.subject, item.session) for item in self.items}
        return len({subject for subject, _ in visits}), len(visits), len(self.items)


def source_name(text: str) -> str:
    """The key of a source by its name in any capitals.

    Raises:
        ValueError: no such source; lists them.
    """
    name = ALIASES.get(text.lower(), text.lower())
    if name not in SOURCES:
        raise ValueError(f"source {text!r} is unknown; choose from {', '.join(SOURCES)}")
    return name


def find(name: str, root: str | Path) -> Found:
    """The volumes of one source, by their paths; nothing is opened but a few files without an extension (DICOM?).

    What is left out by default, such as a test part, is taken where its own folder is given as `root`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no such source.
    """
    found = Found(source_name(name), Path(root))
    if not found.root.is_dir():
        raise FileNotFoundError(f"--source {name}={root}: no such folder")
    layouts, labels = map(_compiled, (found.source.layouts, found.source.labels))
    excluded = [(reason, re.compile(rule, re.IGNORECASE)) for reason, rule in found.source.excluded]
    looks, unreadable = DICOM_LOOKS, []
    for path in _walk(found.root, unreadable):
        stem = stem_of(path)
        if stem == path:
            extension = PurePosixPath(path).suffix.lower()
            looks -= not extension
            if extension in (".dcm", ".ima", ".dicom") or (not extension and looks >= 0 and _is_dicom(root, path)):
                found.dicom.append(path)
            continue
        reason = next((reason for reason, rule in excluded if rule.search(stem)), None)
        rules = {None: layouts, "label": labels}.get(reason, ())
        match = next(filter(None, (rule.fullmatch(f"{found.folder}/{stem}") for rule in rules)), None)
        if reason == "label" and match is not None:
            subject, visit = _case(found.dataset, match.groupdict())
            found.labels[subject.lower(), visit.lower()].append(path)
        elif match is not None:
            reason = _left_out(found.source, match.groupdict())
        if reason is not None:
            found.excluded[reason].append(path)
        elif match is None:
            found.unmatched.append(path)
        else:
            found.items += _items(found, match.groupdict(), found.root / path)
    if unreadable:
        found.excluded["unreadable"] = unreadable
    return found


def _compiled(rules: Sequence[str]) -> list[re.Pattern]:
    return [re.compile(f"(?:.*/)?{rule}", re.IGNORECASE) for rule in rules]


def _walk(root: Path, unreadable: list[str]) -> Iterator[str]:
    """Files below a folder, relative and with "/", sorted within each folder; hidden and resource files left out.

    A folder that links lead to as well is walked under its own name, which rules may leave out. Folders below it that
    cannot be read, such as lost+found of a disk, go into `unreadable`.
    """
    pending, links, seen = [""], deque(), set()
    while pending or links:
        folder = pending.pop() if pending else links.popleft()
        try:
            state = (root / folder).stat()
            if (state.st_dev, state.st_ino) in seen:  # links in a circle are walked once
                continue
            seen.add((state.st_dev, state.st_ino))
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


def _is_dicom(root: str | Path, path: str) -> bool:
    try:
        with Path(root, path).open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _left_out(source: Source, groups: Mapping) -> str | None:
    description = (groups.get("description") or "").lower()
    return "description" if re.search(source.drop, description) or not re.search(source.keep, description) else None


def _case(dataset: str, groups: Mapping) -> tuple[str, str]:
    """Subject and visit."""
    subject = "_".join(_plain(groups[name]) for name in ("site", "scanner", "subject") if groups.get(name))
    return f"{dataset}/{subject}", _plain(groups.get("visit") or "ses-1")


def _items(found: Found, groups: Mapping, path: Path) -> list[Item]:
    """The volumes of one file: one, or those of a 4-D file."""
    source, (subject, visit) = found.source, _case(found.dataset, groups)
    text = groups.get("sequence") or groups.get("suffix") or groups.get("description")
    runs = [groups.get("run"), *(groups.get("entities") or "").split("_")]
    if text is None:
        names = source.volumes
    else:
        own = (name for name, rule in source.sequences if re.search(rule, text.lower()))
        names = (next(own, None) or sequence_of(text) or "UNKNOWN",)
        if (suffix := groups.get("suffix")) and suffix.lower() not in (names[0].lower(), f"{names[0]}w".lower()):
            runs.append(suffix)  # T1map and T1w are both T1
    run = "".join(f"-{_plain(run)}" for run in runs if run)
    return [
        Item(
            id=f"{subject}/{visit}/{name}{run}",
            images=(path,),
            subject=subject,
            session=visit,
            sequence=name,
            volume=(k, len(names)) if text is None else None,
        )
        for k, name in enumerate(names)
    ]


def _plain(text: str) -> str:
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


def leave_out_test(found: Sequence[Found], name: str) -> None:
    """Move the published test cases of a source from the items to `excluded["hold_out"]`.

    Raises:
        ValueError: the source was not given or has no such split, or not all cases are there, of which it is made.
    """
    name = source_name(name)
    if SOURCES[name].held_out is None:
        known = ", ".join(key for key, source in SOURCES.items() if source.held_out)
        raise ValueError(f"--hold-out {name}: no test cases were published; choose from {known}")
    seed, expected = SOURCES[name].held_out
    parts = [part for part in found if part.name == name]
    if not parts:
        raise ValueError(f"--hold-out {name}: no --source {name}=DIR is given")
    subjects = {item.subject.lower() for part in parts for item in part.items}  # sorted as if written in one way
    if len(subjects) != expected:
        text = f"the published split is a permutation of all {expected} cases, found {len(subjects)}"
        raise ValueError(f"--hold-out {name}: {text}")
    test = set(hold_out(list(subjects), seed)[1])
    for part in parts:
        _leave_out(part, "hold_out", lambda item: item.subject.lower() in test)


def take_sequences(found: Sequence[Found], names: Sequence[str]) -> None:
    """Move volumes of other sequences from the items to `excluded["sequence"]`."""
    for part in found:
        _leave_out(part, "sequence", lambda item: item.sequence not in names)


def _leave_out(part: Found, reason: str, unwanted: Callable[[Item], bool]) -> None:
    left = [item for item in part.items if unwanted(item)]
    part.items = [item for item in part.items if not unwanted(item)]
    part.excluded[reason] += [item.images[0].relative_to(part.root).as_posix() for item in left]


def take_labels(found: Sequence[Found]) -> dict[int, int]:
    """Give every volume the label of its case; a volume without one cannot be used.

    Returns:
        The label map of the release.

    Raises:
        ValueError: a source whose labels are not known here, sources of different labels, or two labels of one case.
    """
    known = [name for name, source in SOURCES.items() if source.labels]
    names = list(dict.fromkeys(part.name for part in found))
    if len(names) > 1 or names[0] not in known:
        raise ValueError(f"--with-labels: expected one of {', '.join(known)}, found {' and '.join(names)}")
    for part in found:
        part.items = [_labelled(part, item) for item in part.items]
        used = {item.label for item in part.items}
        part.excluded["label"] = [path for path in part.excluded["label"] if part.root / path not in used]
    return dict(SOURCES[names[0]].label_map)


def _labelled(part: Found, item: Item) -> Item:
    paths = part.labels.get((item.subject.lower(), item.session.lower()), [])
    if not paths:
        text = f"{item.id}: expected the label of {item.subject} below {part.root}, found none"
        return replace(item, problem=("missing_label", text))
    if len(paths) > 1:
        raise ValueError(f"id_collision: {paths[0]} and {paths[1]} in {part.root} are both the label of {item.subject}")
    return replace(item, label=part.root / paths[0])


def gather(found: Sequence[Found], corpus_filter: str = "auto") -> Collection:
    """One collection of the volumes of all sources.

    Args:
        found: of `find`.
        corpus_filter: "auto" as each source says, "on", "off".

    Raises:
        ValueError: nothing was found, two files have one id, two sources take one file, or two folders that name the
            data set have one name.
    """
    _check_apart(found)
    items = []
    for part in found:
        chosen = part.source.corpus_filter if corpus_filter == "auto" else corpus_filter == "on"
        items += [replace(item, corpus_filter=True) for item in part.items] if chosen else part.items
    if not items:
        raise ValueError("no volume was found; " + " ".join(note for part in found for note in notes(part)))
    if same := duplicates(found):
        shown = "; ".join(f"{first} and {second} both map to {name!r}" for name, first, second in same[:3])
        raise ValueError(f"id_collision: {len(same)} ids come from two files: {shown}")
    told = [note for part in found for note in notes(part)]
    return Collection(sorted(items, key=lambda item: item.id), ["image"], notes=told)


def _check_apart(found: Sequence[Found]) -> None:
    """Refuse sources that overlap, and data sets whose subjects would become one."""
    taken: dict[tuple[int, int], tuple[Found, Path]] = {}
    datasets: dict[str, Found] = {}
    for part in found:
        other = datasets.setdefault(part.dataset.lower(), part)
        for path in {item.images[0]: None for item in part.items} if len(found) > 1 else ():
            with suppress(OSError):  # preprocessing says what is wrong with it
                state = path.stat()
                first, same = taken.setdefault((state.st_dev, state.st_ino), (part, path))
                if first is not part:
                    given = f"--source {first.name}={first.root} and --source {part.name}={part.root}"
                    raise ValueError(f"{given} both take one file, {same} and {path}; give each folder once")
        if other is not part and not (part.source.dataset and other.source.dataset):
            given = f"--source {other.name}={other.root} and --source {part.name}={part.root}"
            raise ValueError(
                f"{given}: ids of both would begin with {part.dataset!r}; give one by a link of another name"
            )


def duplicates(found: Sequence[Found]) -> list[tuple[str, Path, Path]]:
    """(id, first file, other file) of ids that several files have."""
    taken: dict[str, Path] = {}
    same = []
    for part in found:
        for item in part.items:
            first = taken.setdefault(item.id, item.images[0])
            if first is not item.images[0]:
                same.append((item.id, first, item.images[0]))
    return same


# Telling --------------------------------------------------------------------------------------------------------------


def notes(found: Found) -> list[str]:
    """What the user should know of one source, one line each."""
    told = []
    for reason, paths in ((reason, paths) for reason, paths in found.excluded.items() if paths):
        where = "; give its folder as DIR to take it" if reason == "other_part" else ""
        told.append(f"{found.name}: {len(paths)} volumes or files left out, {reason} ({_some(paths)}){where}")
    if found.unmatched:
        told.append(f"{found.name}: {len(found.unmatched)} NIfTI files match no rule ({_some(found.unmatched)})")
    elif not found.items and not any(found.excluded.values()):
        told.append(f"{found.name}: no .nii or .nii.gz file in {found.root}")
    if found.dicom:
        told.append(f"{found.name}: DICOM files ({_some(found.dicom)}): convert them first, with dcm2niix for one")
    labelled = sum(item.label is not None for item in found.items)  # of a task, to which its test cases belong
    without = sum(item.problem is not None for item in found.items)
    if labelled or without:
        told.append(f"{found.name}: {labelled} volumes have a label, {without} have none and will be rejected")
    if found.source.corpus_is_pool and "hold_out" not in found.excluded and found.items and not labelled:
        told.append(f"{found.name}: {_hold_out_note(found)}")
    if found.source.remark and found.items:
        told.append(f"{found.name}: {found.source.remark}")
    return told


def _hold_out_note(found: Found) -> str:
    subjects, _, volumes = found.counts
    expected = found.source.held_out[1]
    text = "THE TEST CASES ARE AMONG THESE; for the published experiment add --hold-out " + found.name
    if subjects != expected:
        return f"{text}, which needs all {expected} cases (found {subjects})"
    kept, per_subject = subjects - math.ceil(subjects / 4), volumes / subjects
    return f"{text}: {subjects} subjects and {volumes} volumes become {kept} and {kept * per_subject:.0f}"


def describe(found: Sequence[Found]) -> str:
    """What each source holds beside Table 1, and what was left out and why: a dry run's report."""
    lines = []
    for part in found:
        published = part.source.published or ("-",) * 3
        lines += [f"{part.name}: {part.root}", f"  {'':10} {'found':>7} {'Table 1':>8}"]
        for kind, here, there in zip(("subjects", "visits", "volumes"), part.counts, published, strict=True):
            lines.append(f"  {kind:10} {here:7} {there:>8}")
        sequences = sorted(Counter(item.sequence for item in part.items).items())
        listed = f"  (Table 1: {part.source.listed})" if part.source.listed else ""
        lines.append("  sequences  " + ", ".join(f"{name} {count}" for name, count in sequences) + listed)
        lines += [f"  note: {note}" for note in notes(part)]
    totals = [sum(column) for column in zip(*(part.counts for part in found), strict=True)]
    tabled = [SOURCES[name].published for name in {part.name: None for part in found} if SOURCES[name].published]
    expected = [sum(column) for column in zip(*tabled, strict=True)] or [0, 0, 0]
    lines.append("total: {} subjects, {} visits, {} volumes".format(*totals))
    lines.append("Table 1 of these sources: {} subjects, {} visits, {} volumes".format(*expected))
    same = duplicates(found)
    lines += [f"id_collision: {first} and {second} both map to {name!r}" for name, first, second in same[:20]]
    if len(same) > 20:
        lines.append(f"id_collision: {len(same) - 20} more")
    return "\n".join(lines) + "\n"


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
