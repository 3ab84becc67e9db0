"""The command line of the synthetic heads: writes them as NIfTI files."""

from __future__ import annotations

import sys
from pathlib import Path

from amaes.cli import Parser, non_negative_int, positive_int, real, run, seed
from amaes.phantom.tables import FOV, SIGNAL


def main() -> int:
    """Write the heads that the command line asks for."""
    parser = Parser(description="Write synthetic heads as NIfTI files.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--subjects", type=positive_int, default=8, help="number of heads")
    parser.add_argument("--sequences", nargs="+", choices=list(SIGNAL), default=list(SIGNAL), help="scans of each head")
    parser.add_argument("--labels", action="store_true", help="also write label maps: 1 lesion, 2 ventricle")
    parser.add_argument("--fov", type=real(*FOV), default=64.0, help="field of view, mm; 200 holds an adult head")
    parser.add_argument("--first", type=non_negative_int, default=1, help="number of the first subject")
    parser.add_argument("--seed", type=seed, default=0, help="of the whole set")
    args = vars(parser.parse_args())
    from amaes.phantom.write import write_phantoms  # needs torch, without which --help answers at once

    folder = write_phantoms(args.pop("out"), **args)
    sys.stdout.write(f"{len(args['sequences']) * args['subjects']} scans of {args['subjects']} heads in {folder}\n")
    return 0


if __name__ == "__main__":
    run(main)
