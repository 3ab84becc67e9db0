"""What the folders of sources hold, as text: for a dry run, and for the notes of a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from amaes.preprocess.source_tables import SOURCES

if TYPE_CHECKING:
    from pathlib import Path

    from amaes.preprocess.sources import SourceFolder


def notes(folder: SourceFolder) -> list[str]:
    """What the user should know of one source, one line each."""
    lines = []
    for reason, paths in folder.excluded.items():
        if paths:
            remedy = "; give its folder as DIR to take it" if reason == "other_part" else ""
            lines.append(f"{len(paths)} volumes or files left out, {reason} ({_some(paths)}){remedy}")
    if folder.unmatched:
        lines.append(f"{len(folder.unmatched)} NIfTI files match no rule ({_some(folder.unmatched)})")
    elif not folder.items and not any(folder.excluded.values()):
        lines.append(f"no .nii or .nii.gz file in {folder.root}")
    if folder.dicom:
        lines.append(f"DICOM files ({_some(folder.dicom)}): convert them first, for example with dcm2niix")
    n_labelled = sum(item.label is not None for item in folder.items)
    n_unlabelled = sum(item.problem is not None for item in folder.items)
    if n_labelled or n_unlabelled:
        lines.append(f"{n_labelled} volumes have a label, {n_unlabelled} have none and will be rejected")
    # The test cases belong to the store of a task, whose volumes have labels, but not to a pretraining corpus.
    if folder.source.corpus_is_pool and "hold_out" not in folder.excluded and folder.items and not n_labelled:
        lines.append(_hold_out_note(folder))
    if folder.source.remark and folder.items:
        lines.append(folder.source.remark)
    return [f"{folder.name}: {line}" for line in lines]


def _hold_out_note(folder: SourceFolder) -> str:
    n_subjects, _, n_volumes = folder.counts
    expected = folder.source.held_out[1]
    text = f"THE TEST CASES ARE AMONG THESE; for the published experiment add `hold_out` {folder.name}"
    if n_subjects != expected:
        return f"{text}, which needs all {expected} cases (found {n_subjects})"
    n_kept = n_subjects - math.ceil(n_subjects / 4)
    volumes_kept = n_kept * n_volumes / n_subjects
    return f"{text}: {n_subjects} subjects and {n_volumes} volumes become {n_kept} and {volumes_kept:.0f}"


def describe(folders: Sequence[SourceFolder]) -> str:
    """What each source holds beside Table 1, and what was left out and why: the text of a dry run."""
    lines = []
    for folder in folders:
        published = folder.source.published or ("-",) * 3
        lines += [f"{folder.name}: {folder.root}", f"  {'':10} {'found':>7} {'Table 1':>8}"]
        for kind, count, in_table in zip(("subjects", "visits", "volumes"), folder.counts, published, strict=True):
            lines.append(f"  {kind:10} {count:7} {in_table:>8}")
        sequences = sorted(Counter(item.sequence for item in folder.items).items())
        listed = f"  (Table 1: {folder.source.listed})" if folder.source.listed else ""
        lines.append("  sequences  " + ", ".join(f"{name} {count}" for name, count in sequences) + listed)
        lines += [f"  note: {note}" for note in notes(folder)]
    totals = [sum(column) for column in zip(*(folder.counts for folder in folders), strict=True)]
    names = {folder.name: None for folder in folders}  # each source once
    in_table = [SOURCES[name].published for name in names if SOURCES[name].published]
    expected = [sum(column) for column in zip(*in_table, strict=True)] or [0, 0, 0]
    lines.append("total: {} subjects, {} visits, {} volumes".format(*totals))
    lines.append("Table 1 of these sources: {} subjects, {} visits, {} volumes".format(*expected))
    same = duplicates(folders)
    lines += [f"id_collision: {first} and {second} both map to {id!r}" for id, first, second in same[:20]]
    if len(same) > 20:
        lines.append(f"id_collision: {len(same) - 20} more")
    return "\n".join(lines) + "\n"


def duplicates(folders: Sequence[SourceFolder]) -> list[tuple[str, Path, Path]]:
    """(id, first file, other file) of ids that several files have."""
    first_of: dict[str, Path] = {}
    same = []
    for folder in folders:
        for item in folder.items:
            first = first_of.setdefault(item.id, item.images[0])
            if first is not item.images[0]:
                same.append((item.id, first, item.images[0]))
    return same


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
