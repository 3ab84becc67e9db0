"""What preprocessing recorded of a case, checked where it is read: the file may come from anywhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

MAX_SIDE = 1 << 31  # voxels; more is no side of a volume


def check_record(path: Path, record: Mapping, needed: tuple[str, ...] = ()) -> None:
    """Refuse a record with a field of another kind than preprocessing writes.

    Args:
        path: its file, for messages.
        record: its content.
        needed: fields that must be there.

    Raises:
        ValueError: names the file, the field, its value and what is expected.
    """
    for name in needed:
        if name not in record:
            raise ValueError(f"{path}: has no {name!r}; preprocess the case again")
    for name, (is_right, expected) in FIELDS.items():
        if name in record and not is_right(record[name]):
            raise ValueError(f"{path}: its {name!r} is {record[name]!r:.80}, expected {expected}")


def _whole(low: int, high: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_length(value: object) -> bool:
    return _is_number(value) and value > 0


def _may_be_none(is_right: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or is_right(value)


def _many(is_right: Callable[[object], bool], *counts: int) -> Callable[[object], bool]:
    """A list of such values, of one of these lengths; of any where none is given."""
    return lambda value: isinstance(value, list) and (not counts or len(value) in counts) and all(map(is_right, value))


def _is_counts(value: object) -> bool:
    """{"1": voxels, ...}"""
    return isinstance(value, dict) and all(key.isdecimal() and _number(count) for key, count in value.items())


def _is_warning(value: object) -> bool:
    """ "code: text" """
    return isinstance(value, str) and ":" in value


def _is_stamp(value: object) -> bool:
    """[path, bytes, time of change in ns] of a file, [volume, volumes] of a 4-D one; None where there was none."""
    kinds = tuple(map(type, value)) if isinstance(value, list) else ()
    return value is None or kinds in ((str, int, int), (int, int))


def _is_header(value: object) -> bool:
    """The fields from which `nifti.write_like` rebuilds a header."""
    return isinstance(value, dict) and all(is_right(value.get(name)) for name, is_right in HEADER.items())


_number, _side = _whole(0, MAX_SIDE), _whole(1, MAX_SIDE)
_sides = _many(_side, 3)
_finite_or_none = _may_be_none(_is_number)
HEADER = {
    "version": _whole(1, 2),
    "shape": _many(_side, 3, 4, 5, 6, 7),
    "pixdim": _many(_finite_or_none, 8),
    "quatern": _many(_finite_or_none, 3),
    "qoffset": _many(_finite_or_none, 3),
    "srow": _many(_many(_finite_or_none, 4), 3),
    "xyzt_units": _whole(0, 255),
}
FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {  # those that are read: whether a value is right, and which
    "label_file": (_may_be_none(_is_text), "the name of a file"),
    **dict.fromkeys(("label_values", "raw_label_values"), (_many(_whole(-(1 << 63), 1 << 64)), "whole numbers")),
    "warnings": (_many(_is_warning), "texts, each with its code"),
    "source_stamps": (_many(_is_stamp), "path, bytes and time of each file"),
    "label_counts": (_is_counts, "label values and how many voxels have them"),
    "channel_sha256": (_many(_is_text), "a list of texts"),
    **dict.fromkeys(("sform_code", "qform_code"), (_whole(0, 5), "a number from 0 to 5")),
    "ras_ornt": (_many(_many(_whole(-1, 2), 2), 3), "three pairs of axis and direction"),
    **dict.fromkeys(("shape", "ras_shape", "cropped_shape", "resampled_shape"), (_sides, "three numbers of voxels")),
    "ras_spacing": (_many(_is_length, 3), "three lengths"),
    "crop_box": (_many(_many(_number, 2), 3), "three pairs of voxels, begin and end"),
    "header": (_is_header, "the fields of a NIfTI header"),
}
OF_GRID = ("ras_ornt", "ras_shape", "crop_box", "cropped_shape")  # needed to go back to the grid of the file
OF_FILE = (*OF_GRID, "header", "sform_code", "qform_code")  # needed to write a file like it
