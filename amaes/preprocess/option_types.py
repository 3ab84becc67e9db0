"""What values on the command line of preprocessing mean: argparse types."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from amaes.preprocess.config import IGNORED
from amaes.preprocess.source_tables import source_name


def label_mapping(text: str) -> tuple[int, int]:
    """argparse type: OLD:NEW."""
    old, separator, new = text.partition(":")
    try:
        pair = int(old), IGNORED if new == "ignore" else int(new)
    except ValueError:
        separator = ""
    if not separator or abs(pair[0]) >= 1 << 32 or not 0 <= pair[1] < IGNORED + (new == "ignore"):
        accepted = f"two whole numbers, the new one in 0..{IGNORED - 1} or ignore"
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not OLD:NEW, {accepted}")
    return pair


def label_name(text: str) -> tuple[int, str]:
    """argparse type: VALUE:NAME."""
    value, _, name = text.partition(":")
    if not re.fullmatch(r"-?\d{1,9}", value.strip()) or not name.strip() or not name.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not VALUE:NAME, a whole number and a name")
    return int(value), name.strip()


def region(text: str) -> tuple[str, tuple[int, ...]]:
    """argparse type: VALUES:NAME."""
    values, _, name = text.partition(":")
    matches = re.fullmatch(r"-?\d{1,9}(,-?\d{1,9})*", values.strip())
    if not matches or not re.search("[^0-9]", name.strip()) or not name.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not VALUES:NAME, whole numbers with commas and a name")
    if 0 in (numbers := tuple(map(int, values.split(",")))):
        raise argparse.ArgumentTypeError(f"{text!r:.60}: value 0 is background, in no region")
    return name.strip(), numbers


def source(text: str) -> tuple[str, Path]:
    """argparse type: NAME=DIR."""
    name, separator, folder = text.partition("=")
    try:
        if not separator or not folder:
            raise ValueError(f"{text!r} is not NAME=DIR")
        return source_name(name), Path(folder).expanduser()  # shells do not expand a ~ after "="
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def shard(text: str) -> tuple[int, int]:
    """argparse type: I/N."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not I/N, two whole numbers below a million, I in 0..N-1")
    return int(match[1]), int(match[2])
