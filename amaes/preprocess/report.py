"""What became of each input: the lines of report.jsonl, and the summary of a run."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from amaes.cli import EXIT_OK, EXIT_REJECTED, as_options
from amaes.preprocess.file_names import printable
from amaes.preprocess.store_index import case_files, entry_of

if TYPE_CHECKING:
    from amaes.preprocess.collection import Item

STATUSES = ("ok", "skipped", "rejected", "failed")
REMEDIES = {  # of a reason or warning: which setting helps
    "singular_affine": "`assume_ras` takes the stored axes as RAS",
    "label_values": "see `label_map`",
    "channel_geometry": "see `on_geometry_mismatch`",
    "label_geometry": "see `on_geometry_mismatch`",
    "missing_channel": "`missing_channel` zeros fills",
    "background_not_min": "see `background_to_min`",
    "nonfinite_many": "`nan_background` zero takes NaN as 0, as SPM and statistics packages mean it",
    "changed": "`overwrite` takes the new one",
    "overflow": "`dtype` float32 holds them",
}


def with_remedy(code: str, message: str) -> str:
    """The message of a reason or warning, with the setting that helps where there is one."""
    return f"{message}; {REMEDIES[code]}" if code in REMEDIES else message


@dataclass(frozen=True)
class Outcome:
    """What became of one input.

    Attributes:
        row: its line of the report.
        label_values: that occur in the stored label.
        raw_label_values: that occur in the label file, before mapping.
        n_bytes: size of the files in the store.
    """

    row: dict
    label_values: list[int] = field(default_factory=list)
    raw_label_values: list[int] = field(default_factory=list)
    n_bytes: int = 0

    @property
    def done(self) -> bool:
        """The case is in the store."""
        return self.row["status"] in ("ok", "skipped") and self.row["reason"] is None

    @property
    def bad(self) -> bool:
        """The case was rejected or failed."""
        return self.row["status"] in ("rejected", "failed")

    def line(self) -> bytes:
        """The line of the report, which names options of the command line."""
        return (json.dumps({**self.row, "message": as_options(self.row["message"])}) + "\n").encode()


def not_done(item: Item, reason: str, message: str) -> Outcome:
    """The outcome of an input that did not come to its end."""
    row = {"id": item.id, "files": item.files, "status": "failed", "reason": reason, "message": f"{item.id}: {message}"}
    return Outcome({**row, "warnings": [], "shape": None, "seconds": 0.0})


@dataclass(frozen=True)
class Result:
    """What became of all inputs, in the order of their ids.

    Attributes:
        store: the folder.
        items: the inputs.
        outcomes: one per input.
        notes: what the user should know.
        seconds: that the run took.
        report: name of the report's file.
        entries: of the whole index; None where none was written.
        listed: ids that the index had before.
    """

    store: Path
    items: list[Item]
    outcomes: list[Outcome]
    notes: list[str]
    seconds: float
    report: str = "report.jsonl"
    entries: list[dict] | None = None
    listed: frozenset[str] = frozenset()

    def count(self, status: str) -> int:
        """How many inputs have this status."""
        return sum(outcome.row["status"] == status for outcome in self.outcomes)

    def status(self, allow_rejects: bool = False) -> int:
        """Exit status: 1 with failed inputs, or with rejected ones unless they are allowed."""
        n_rejected = 0 if allow_rejects else self.count("rejected")
        return EXIT_REJECTED if n_rejected + self.count("failed") else EXIT_OK

    def summary(self) -> str:
        """One screen of text; it names settings in backquotes, as `assume_ras`."""
        counts = ", ".join(f"{self.count(status)} {status}" for status in STATUSES)
        lines = [f"{len(self.items)} inputs: {counts}, in {self.seconds:.0f} s"]
        lines += [*self._reasons(), *self._warnings(), *(f"  note: {note}" for note in self.notes), *self._content()]
        lines.append(f"one line per input in {self.store / self.report}")
        return ("\n".join(lines) + "\n").encode(errors="backslashreplace").decode()  # names may be invalid Unicode

    def _reasons(self) -> list[str]:
        """How many inputs are not in the store for which reason, each with an example."""
        lines, rows = [], [outcome.row for outcome in self.outcomes if not outcome.done]
        for reason, number in Counter(row["reason"] for row in rows).most_common(12):
            example = next(row for row in rows if row["reason"] == reason)
            lines.append(f"  {number:6d} {reason}: {printable(example['id'])}: {printable(example['message'])}")
        return lines

    def _warnings(self) -> list[str]:
        """How many inputs have which warning, each with an example and what helps."""
        lines, warnings = [], []
        for outcome in self.outcomes:  # one of each kind per input, the first
            warnings += {text.split(":")[0]: text for text in reversed(outcome.row["warnings"])}.values()
        for code, number in Counter(text.split(":")[0] for text in warnings).most_common(8):
            example = next(text for text in warnings if text.startswith(f"{code}:"))
            lines.append(f"  {number:6d} with warning {printable(with_remedy(code, example))}")
        return lines

    def _content(self) -> list[str]:
        """What is in the store now, and where it had cases before, what became of these."""
        done = [(item, outcome) for item, outcome in zip(self.items, self.outcomes, strict=True) if outcome.done]
        entries = [entry_of(*pair) for pair in done] if self.entries is None else self.entries
        subjects = sorted({entry["subject"] for entry in entries})
        shown = ", ".join(subjects[:3]) + (", ..." if len(subjects) > 3 else "")
        n_labelled = sum(bool(entry["labelled"]) for entry in entries)
        files = [path for entry in entries for path in case_files(self.store, entry["id"]) if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        text = f"{len(entries)} cases of {len(subjects)} subjects ({shown}), {n_labelled} labelled, {size / 1e9:.2f} GB"
        lines = [f"{self.store}: {text}"]
        if sources := Counter(entry["subject"].split("/")[0] for entry in entries if "/" in entry["subject"]):
            lines.append("  of " + ", ".join(f"{name} {count}" for name, count in sorted(sources.items())))
        if self.listed and self.entries is not None:
            lines.append(f"  {self._growth({item.id: outcome for item, outcome in done})}")
        return lines

    def _growth(self, done: dict[str, Outcome]) -> str:
        """What became of the cases that the store had before the run."""
        ids = {entry["id"] for entry in self.entries}
        again = sum(outcome.row["status"] == "ok" for id, outcome in done.items() if id in self.listed)
        numbers = {
            "added": len(ids - self.listed),
            "done again": again,
            "kept": len(ids & self.listed) - again,
            "taken out": len(self.listed - ids),
        }
        return "cases: " + ", ".join(f"{number} {what}" for what, number in numbers.items())
