"""What the name of a file says: the id of a case, its subject, session, sequence and channel."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from amaes.preprocess.other_formats import kind_by_name

SEQUENCES = (  # the first match wins; between T1 and T2 the one named first
    ("FLAIR", r"flair"),
    ("T1ce", r"t1ce|t1gd|gado|t1c|post"),
    ("ADC", r"adc"),
    ("SWI", r"swi|minip"),
    ("T2star", r"t2\*|t2star|gre|fl2d.*hemo"),
    ("TOF", r"angio|tof"),
    ("DWI", r"dwi|dti|trace|diff"),
    ("PD", r"pd|dp|proton"),
    ("T1", r"^(?:(?!t2).)*?(?:t1|mprage|spgr|bravo)"),
    ("T2", r"t2"),
)

VISIT = r"^(.*[_-]\d{5,})[_-]\d{1,3}(?:[_-][A-Za-z].*)?$"


def stem_of(name: str) -> str:
    """A file name without `.nii` or `.nii.gz`, in upper or lower case."""
    return re.sub(r"\.nii(\.gz)?$", "", name, flags=re.IGNORECASE)


def is_nifti(name: str) -> bool:
    """The name ends in `.nii` or `.nii.gz` and has something before that."""
    return stem_of(name) not in (name, "")


def id_of(root: Path, path: Path) -> str:
    """The path below `root` without its ending, such as "sub-01/T1"."""
    return path.relative_to(root).with_name(stem_of(path.name)).as_posix()


def fault_of_id(id: object) -> str | None:
    """Why a store cannot hold a case of this id: it names its files, and is written in lists; None where it can."""
    if not isinstance(id, str) or not id:
        return "expected a name"
    if unprintable := [character for character in id if not character.isprintable()]:
        return f"holds {unprintable[0]!a}, which cannot be printed"
    # A drive ("C:...") is a way out on Windows.
    if id.startswith("/") or "\\" in id or id[1:2] == ":" or ".." in PurePosixPath(id).parts:
        return "leads out of the store"
    return None


def printable(text: str) -> str:
    """The text on one line, with escapes for what cannot be printed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def sequence_of(text: str) -> str | None:
    """The sequence that a file name or the description of a series names; None where it names none."""
    return next((name for name, rule in SEQUENCES if re.search(rule, text.lower())), None)


def session_of(id: str) -> str | None:
    """The part ses-XX (or sess-XX) of an id; None where there is none."""
    match = re.search(r"(?:^|[/_])(sess?-[A-Za-z0-9]+)", id)
    return match[1] if match else None


def subject_of(id: str, pattern: str | None = None) -> str:
    """The entity sub of an id, as sub-01, else its first folder, else the id itself, without the number of a visit.

    A visit's number stands behind the patient's, which has five digits or more: BraTS-GLI-00005-100 and
    BraTS-GLI-00005-101-t1c are of BraTS-GLI-00005.

    Args:
        id: of the case.
        pattern: a regular expression instead of that rule; its group "subject" or first group is the subject.

    Returns:
        The subject; "" where the pattern does not match.

    Raises:
        ValueError: `pattern` is not a regular expression with a group.
    """
    if pattern is None:
        match = re.search(r"(?:^|[/_])(sub-[A-Za-z0-9]+)", id)
        return match[1] if match else re.sub(VISIT, r"\1", id.split("/")[0])
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"`subject` {pattern!r} is not a regular expression: {error}") from error
    if not compiled.groups:
        raise ValueError(f"`subject` {pattern!r} has no group: put the subject's part in parentheses")
    match = compiled.search(id)
    return "" if match is None else match["subject" if "subject" in compiled.groupindex else 1] or ""


def channel_prefix(path: Path, names: Sequence[str]) -> tuple[str, str] | None:
    """(name, what stands before it) of a file called NAME, *_NAME or *-NAME, in upper or lower case.

    The longest of several fitting names is taken; None where no name fits.
    """
    stem = stem_of(path.name)
    for name in sorted(names, key=len, reverse=True):
        if stem.lower() == name.lower():
            return name, ""
        if stem.lower().endswith((f"_{name.lower()}", f"-{name.lower()}")):
            return name, stem[: -len(name) - 1]
    return None


def shorten(names: Sequence[str | Path]) -> str:
    """Up to five of the names (of paths the last part), for a message."""
    shown = [printable(name.name if isinstance(name, Path) else name) for name in names[:5]]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def no_file_message(option: str, folder: Path, pattern: str, present: Sequence[Path]) -> str:
    """The message of an error: no file of a folder is called as `option` says; `present` is what lies there."""
    found = f"found {shorten(present)}" if present else "found no file"
    return f"`{option}`: no file called {pattern} in {folder}; {found}{kind_by_name(present)}"
