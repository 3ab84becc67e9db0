"""The cases to preprocess, as file names; no image is opened."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Item:
    """The files of one case.

    Attributes:
        id: name in the store; may contain "/".
        images: one file per channel (None = missing), or one 4-D file that holds all channels.
        label: the label file, or None.
        subject, session, sequence: read from the names; only a case of one channel has a sequence.
        problem: (reason code, message) of a case that must not be processed.
        volume: (k, n): the case is volume k of a 4-D file of n volumes; None: the whole file.
        corpus_filter: skip the case unless it meets the rules of the published corpus.
    """

    id: str
    images: tuple[Path | None, ...]
    label: Path | None = None
    subject: str = ""
    session: str | None = None
    sequence: str | None = None
    problem: tuple[str, str] | None = None
    volume: tuple[int, int] | None = None
    corpus_filter: bool = False

    @property
    def files(self) -> list[str]:
        """All files of the case, the label last."""
        return [str(path) for path in (*self.images, self.label) if path is not None]


@dataclass(frozen=True)
class Collection:
    """The cases of a folder or of several sources.

    Attributes:
        items: sorted by id; no id occurs twice.
        channels: names, in the order of `Item.images`.
        classes: declared label values and their names; empty where none are declared.
        notes: what the user should know, such as files that were not used.
        foreground_name: name of a single foreground class where no classes are declared.
        unused: files that belong to no case; filled only where cases are collected for a network, else they are a note.
        names: of label values as the files hold them, given by the user; they go before all others.
        regions: name to label values, as the files hold them, that are scored as one; empty: every value is.
    """

    items: list[Item]
    channels: list[str]
    classes: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    foreground_name: str | None = None
    unused: list[Path] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def left_out(self) -> list[int]:
        """Label values that are declared to take part in no loss and no score: nnU-Net's "ignore"."""
        return [value for value, name in self.classes.items() if name == "ignore"]

    def summary(self) -> str:
        """One line: how many cases of what."""
        n_subjects = len({item.subject for item in self.items})
        n_labelled = sum(item.label is not None for item in self.items)
        counts = sorted(Counter(item.sequence or "UNKNOWN" for item in self.items).items())
        content = ", ".join(f"{name} {count}" for name, count in counts)
        content = content if len(self.channels) == 1 else f"channels {' '.join(self.channels)}"
        return f"{len(self.items)} cases of {n_subjects} subjects, {n_labelled} labelled; {content}"
