"""What a store holds: python -m amaes.data STORE [--json]"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from amaes.cli import EXIT_OK, Parser, run


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    description = "Say what a store holds: cases, subjects, sequences, classes, shapes, spacings, size, splits."
    parser = Parser(description=description, examples=["stores/hippocampus"])
    parser.add_argument("store", type=Path, metavar="STORE", help="folder written by amaes.preprocess")
    parser.add_argument("--json", action="store_true", help="print plain data instead of text")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print what the store holds; the exit status."""
    args = parse_options(argv)
    from amaes.data.contents import as_text, contents
    from amaes.data.store import Store

    found = contents(Store(args.store))
    sys.stdout.write(json.dumps(found, indent=1) + "\n" if args.json else as_text(found))
    return EXIT_OK


if __name__ == "__main__":
    run(main)
