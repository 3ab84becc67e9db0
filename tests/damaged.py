"""Records with one field missing, null or of another type: what a damaged or foreign file may hold."""

from __future__ import annotations

from collections.abc import Iterator

OTHERS = (None, True, -1, 2.5, 10**19, 10**400, "x", "", [], [None], ["x"], {}, {"x": None})
MISSING = object()


def damaged(record: dict, name: str) -> Iterator[tuple[dict, object]]:
    """The record without the field, and with other values in it: (record, the value or MISSING)."""
    yield {key: value for key, value in record.items() if key != name}, MISSING
    for value in OTHERS:
        yield {**record, name: value}, value
