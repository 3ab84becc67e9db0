"""The picture of the README, made from synthetic heads. Needs matplotlib.

python -m amaes.phantom --out heads --subjects 1 --fov 96
python -m amaes.preprocess --images heads/images --out heads/store
python docs/img/make.py --data heads/store --out docs/img
"""

from __future__ import annotations

import argparse
from pathlib import Path

from amaes import cli
from amaes.augment import PretrainAugment
from amaes.data.patches import Patches
from amaes.data.store import Store
from amaes.pictures import Panel, Row, middle_slices, write_sheet

PATCH = (96, 96, 96)
EPOCHS = range(5)  # draws that are shown


def parse_options() -> argparse.Namespace:
    parser = cli.Parser(description="Make the picture of the README.")
    parser.add_argument("--data", type=Path, required=True, metavar="STORE", help="of synthetic heads")
    parser.add_argument("--out", type=Path, default=Path("docs/img"), metavar="FOLDER", help="where the PNG file goes")
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    """One patch five times, without augmentation, under spatial transforms, and under all."""
    store, rows = Store(args.data), []
    for preset in ("none", "spatial", "all"):
        augment = PretrainAugment(PATCH, preset, seed=3)
        window = Patches(store, PATCH, augment.window_size)[0, 0]["image"]
        images = window.expand(len(EPOCHS), *window.shape).contiguous()
        inputs, _ = augment(images, augment.draw(list(EPOCHS), [0] * len(EPOCHS), 1))
        shown = inputs[:1] if preset == "none" else inputs
        rows.append(Row(preset, [Panel(middle_slices(image)[0]) for image in shown[:, 0].numpy()]))
    write_sheet(args.out / "augmentation.png", "The input of the network under --augment none, spatial, all", rows)
    return cli.EXIT_OK


if __name__ == "__main__":
    cli.run(main, parse_options())
