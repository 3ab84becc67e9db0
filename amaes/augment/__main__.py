"""Contact sheets of the augmentation for one scan: python -m amaes.augment IMAGE --out FOLDER

FOLDER/transforms.png  each transform alone at a weak and at its strongest setting, with what it changes
FOLDER/draws.png       ten full draws: target, input, mask and masked input side by side
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from amaes import rng
from amaes.augment.draws import Draws
from amaes.augment.pipeline import PretrainAugment
from amaes.cli import Parser, fraction, non_negative_int, positive_int, run

DRAWS = 10


def settings(sides: tuple[int, int, int]) -> dict[str, tuple[dict, dict]]:
    """A weak and the strongest setting of each transform, as fields of Draws for one sample of one channel."""
    middle, whole = [side // 2 for side in sides], list(sides)
    return {
        "rotation": ({"rotation_degrees": [[0, 0, 3]]}, {"rotation_degrees": [[30, 30, 30]]}),
        "scale": ({"scale_factor": [0.99]}, {"scale_factor": [1.1]}),
        "elastic": (
            {"elastic_alpha": [200.0], "elastic_sigma": [30.0]},
            {"elastic_alpha": [600.0], "elastic_sigma": [20.0]},
        ),
        "additive_noise": ({"additive_noise_sigma": [[1e-4]]}, {"additive_noise_sigma": [[1e-3]]}),
        "blur": ({"blur_sigma": [[0.2]]}, {"blur_sigma": [[1.0]]}),
        "multiplicative_noise": ({"multiplicative_noise_sigma": [[1e-4]]}, {"multiplicative_noise_sigma": [[1e-3]]}),
        "ghosting": (
            {"ghosting_alpha": [[0.95]], "ghosting_repetitions": [[10]], "ghosting_axis": [[0]]},
            {"ghosting_alpha": [[0.85]], "ghosting_repetitions": [[2]], "ghosting_axis": [[0]]},
        ),
        "gibbs_ringing": (
            {"gibbs_ringing_lines": [[sides[0] - 2]], "gibbs_ringing_axis": [[0]]},
            {"gibbs_ringing_lines": [[round(0.75 * sides[0])]], "gibbs_ringing_axis": [[0]]},
        ),
        "low_resolution": (
            {"low_resolution_lengths": [[[round(0.9 * sides[0]), *whole[1:]]]]},
            {"low_resolution_lengths": [[[max(round(0.5 * side), 1) for side in sides]]]},
        ),
        "bias_field": ({"bias_field_centre": [[middle]]}, {"bias_field_centre": [[[0, 0, 0]]]}),
        "gamma": (
            {"gamma_value": [[0.9]], "gamma_inversion": [[False]]},
            {"gamma_value": [[2.0]], "gamma_inversion": [[False]]},
        ),
    }


def central_window(volume: np.ndarray, sides: tuple[int, int, int]) -> torch.Tensor:
    """The middle of a volume, filled with its minimum where it is smaller: (X, Y, Z) -> (1, 1, *sides)."""
    window = np.full(sides, volume.min(), dtype=np.float32)
    target, source = [], []
    for size, side in zip(volume.shape, sides, strict=True):
        length, gap = min(size, side), (side - size) // 2
        target.append(slice(max(gap, 0), max(gap, 0) + length))
        source.append(slice(max(-gap, 0), max(-gap, 0) + length))
    window[tuple(target)] = volume[tuple(source)]
    return torch.from_numpy(window)[None, None]


def transform_rows(
    augment: PretrainAugment, window: torch.Tensor
) -> list[tuple[str, list[tuple[str, np.ndarray, float]]]]:
    """One row per transform: title and panels (caption, slice, largest grey value)."""
    blank, rows = augment.draw([0], [0]).only(), []
    plain = middle_slice(augment(window, blank)[0])
    for name, pair in settings(augment.patch_size).items():
        panels = [("untouched", plain, 1.0)]
        for label, fields in zip(("weak", "strongest"), pair, strict=True):
            draws = replace(blank.only(name), **{key: np.asarray(value) for key, value in fields.items()})
            result = middle_slice(augment(window, draws)[0])
            change = np.abs(result - plain)
            panels.append((f"{label}: {parameters(draws, name)}", result, 1.0))
            panels.append((f"|change|, white = {change.max():.2g}", change, max(float(change.max()), 1e-6)))
        rows.append((name.replace("_", " "), panels))
    return rows


def draw_rows(
    augment: PretrainAugment, window: torch.Tensor, token_size: int, mask_ratio: float
) -> list[tuple[str, list[tuple[str, np.ndarray, float]]]]:
    """One row per full draw: target, input, mask, masked input."""
    from amaes.mask import apply_mask, token_mask

    draws = augment.draw([0] * DRAWS, range(DRAWS))
    source, target = augment(window.expand(DRAWS, -1, -1, -1, -1), draws)
    mask = token_mask(source, token_size, mask_ratio, keys=rng.keys(augment.seed, [0] * DRAWS, range(DRAWS), "mask"))
    masked = apply_mask(source, mask)
    rows = []
    for row in range(DRAWS):
        images = {"target": target, "input": source, "mask, white = hidden": mask.float(), "masked input": masked}
        panels = [(caption, middle_slice(image[row : row + 1]), 1.0) for caption, image in images.items()]
        rows.append((f"{row}: {draws.summary(row)}", panels))
    return rows


def parameters(draws: Draws, name: str) -> str:
    """What the transform `name` drew for the first sample, as a caption."""
    return draws.summary(0).removeprefix(name).strip(" ()")


def middle_slice(volume: torch.Tensor) -> np.ndarray:
    """The axial slice in the middle, anterior up, left of the subject on the left: (1, 1, X, Y, Z) -> (Y, X)."""
    return volume[0, 0, :, :, volume.shape[-1] // 2].flip(1).T.numpy()


def save_sheet(path: Path, heading: str, rows: list) -> None:
    """Write rows of grey panels, each row under its title, as a PNG."""
    from matplotlib.figure import Figure

    from amaes.files import written_whole

    columns = len(rows[0][1])
    figure = Figure(figsize=(2.6 * columns, 3.0 * len(rows) + 0.6), layout="constrained")
    figure.suptitle(heading, fontsize=10)
    for part, (title, panels) in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        part.suptitle(title, fontsize=8, x=0.01, ha="left", weight="bold")
        for axes, (caption, image, white) in zip(part.subplots(1, columns), panels, strict=True):
            axes.imshow(image, cmap="gray", vmin=0, vmax=white, interpolation="nearest")
            axes.set_title(caption, fontsize=6)
            axes.set_axis_off()
    with written_whole(path) as file:
        figure.savefig(file, format="png", dpi=100)


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser(prog="python -m amaes.augment", description="Draw contact sheets of the augmentation for one scan.")
    parser.add_argument("image", type=Path, metavar="IMAGE", help="scan, .nii or .nii.gz")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the PNG files go")
    parser.add_argument(
        "--patch-size", type=positive_int, nargs=3, default=[128] * 3, metavar="N", help="voxels (1 mm)"
    )
    parser.add_argument("--order", type=int, choices=(1, 3), default=1, help="interpolation: 1 trilinear, 3 cubic")
    parser.add_argument("--token-size", type=positive_int, default=4, help="side of a hidden cube, voxels")
    parser.add_argument("--mask-ratio", type=fraction, default=0.6, help="fraction of cubes hidden")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the ten draws and their masks")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Write the contact sheets of one scan; the exit status."""
    args = parse_options(argv)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("the contact sheets need matplotlib: pip install 'amaes[plots]'") from None
    from amaes.preprocess.case import preprocess_case
    from amaes.preprocess.config import Config

    augment = PretrainAugment(args.patch_size, seed=args.seed, order=args.order)
    if any(side % args.token_size for side in augment.patch_size):
        raise ValueError(f"--token-size {args.token_size}: does not divide --patch-size {args.patch_size}")
    if not args.image.is_file():
        raise FileNotFoundError(f"{args.image}: no such file")
    window = central_window(preprocess_case([args.image], Config()).image[0], augment.window_size)
    args.out.mkdir(parents=True, exist_ok=True)
    heading = f"{args.image.name}, middle axial slice of a {' x '.join(map(str, augment.patch_size))} patch"
    for name, rows in (
        ("transforms.png", transform_rows(augment, window)),
        ("draws.png", draw_rows(augment, window, args.token_size, args.mask_ratio)),
    ):
        save_sheet(args.out / name, heading, rows)
        sys.stdout.write(f"{args.out / name}\n")
    return 0


if __name__ == "__main__":
    run(main)
