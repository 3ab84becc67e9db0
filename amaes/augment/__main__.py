"""Sheets of pictures of what the augmentation does to one scan: python -m amaes.augment IMAGE --out FOLDER

FOLDER/transforms.png  each transform alone, at a weak and at its strongest setting, with what it changes
FOLDER/draws.png       ten draws of everything: target, input, mask and masked input side by side
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from amaes.cli import Parser, fraction, run, seed, side


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser(description="Draw what the augmentation does to one scan.")
    parser.add_argument("image", type=Path, metavar="IMAGE", help="scan, .nii or .nii.gz")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the PNG files go")
    parser.add_patch_size(parser.add_argument)
    parser.add_argument("--order", type=int, choices=(1, 3), default=1, help="interpolation: 1 trilinear, 3 cubic")
    parser.add_argument("--token-size", type=side, default=4, help="side of a hidden cube, voxels")
    parser.add_argument("--mask-ratio", type=fraction, default=0.6, help="fraction of cubes hidden")
    parser.add_argument("--seed", type=seed, default=0, help="of the ten draws and their masks")
    args = parser.parse_args(argv)
    args.patch_size = parser.three_sides(args.patch_size)
    if any(side % args.token_size for side in args.patch_size):
        sides = " ".join(map(str, args.patch_size))
        parser.error(f"--token-size {args.token_size}: does not divide every side of --patch-size {sides}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Write the sheets of one scan; the exit status."""
    args = parse_options(argv)
    import torch

    from amaes.augment.pipeline import PretrainAugment
    from amaes.augment.sheets import draw_rows, transform_rows
    from amaes.pictures import centred, check_matplotlib, write_sheet
    from amaes.preprocess.case import preprocess_case
    from amaes.preprocess.config import Config

    check_matplotlib("out")
    if not args.image.is_file():
        raise FileNotFoundError(f"{args.image}: no such file")
    augment = PretrainAugment(args.patch_size, seed=args.seed, order=args.order)
    volume = preprocess_case([args.image], Config()).image[0]  # (X, Y, Z)
    window = torch.from_numpy(centred(volume, augment.window_size, fill=volume.min()))[None, None]
    heading = f"{args.image.name}, middle axial slice of a {' x '.join(map(str, augment.patch_size))} patch"
    sheets = {
        "transforms.png": transform_rows(augment, window),
        "draws.png": draw_rows(augment, window, args.token_size, args.mask_ratio),
    }
    for name, rows in sheets.items():
        write_sheet(args.out / name, heading, rows, zoom=max(1, round(224 / max(args.patch_size))))
        sys.stdout.write(f"{args.out / name}\n")
    return 0


if __name__ == "__main__":
    run(main)
