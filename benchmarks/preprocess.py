"""Preprocessing of a clinical scan on one core, compared with the same steps written with nibabel and SciPy's filters.

    python benchmarks/preprocess.py

Both read the file, turn it to RAS, crop, clip at the 99th percentile, scale to [0, 1] and resample to 1 mm.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from amaes.cli import Parser, positive_int, run
from amaes.preprocess.case import preprocess_case
from amaes.preprocess.config import Config

BUDGET = 0.35  # seconds for 320 x 320 x 40 on one core; Yucca 1.1.7 needs 1.0
SPACING = (0.72, 0.72, 3.0)  # mm


def write_scan(path: Path, shape: tuple[int, int, int], seed: int = 0) -> None:
    """A noisy ellipsoid in noisy air: 12-bit values as uint16, stored with axes L-P-S as scanners do."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    head = sum(axis**2 for axis in axes) < 0.8
    smooth = ndimage.zoom(rng.random((12, 12, 6)), [n / m for n, m in zip(shape, (12, 12, 6), strict=True)], order=1)
    values = head * (600 + 1500 * smooth) + rng.rayleigh(12, shape) * (rng.random(shape) < 0.7)
    image = nib.Nifti1Image(values.clip(0, 4095).astype(np.uint16), np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1]))
    nib.save(image, path)


def with_scipy(path: Path) -> np.ndarray:
    """The same steps with SciPy's filters: (X, Y, Z) float32."""
    image = nib.as_closest_canonical(nib.load(path))
    x = image.get_fdata(dtype=np.float32)
    box = ndimage.find_objects((x > 0).astype(np.uint8))[0]
    x = x[box]
    low = x.min()
    top = np.float32(np.quantile(x[x != low], np.array(0.99)))
    x = (np.minimum(x, top) - low) / (top - low)
    shape = [max(1, round(s * n)) for s, n in zip(image.header.get_zooms(), x.shape, strict=True)]
    f = np.array(x.shape) / np.array(shape)
    smooth = ndimage.gaussian_filter(x, np.maximum(0, (f - 1) / 2), mode="mirror")
    y = ndimage.zoom(smooth, 1 / f, order=3, mode="mirror", grid_mode=True)
    return np.clip(y, x.min(), x.max())


def fastest(function: Callable[[], np.ndarray], repeats: int) -> tuple[float, np.ndarray]:
    """Seconds of the fastest of several calls, and the result."""
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        result = function()
        best = min(best, time.perf_counter() - began)
    return best, result


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Time the preprocessing of one synthetic scan on one core.")
    parser.add_argument("--shape", nargs=3, type=positive_int, default=[320, 320, 40], help="voxels of the scan")
    parser.add_argument("--repeats", type=positive_int, default=5, help="number of calls; the fastest counts")
    return parser.parse_args()


def main() -> int:
    """Measure and print; the exit status, 1 where the budget is missed or the results differ."""
    args = parse_options()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scan.nii.gz"
        write_scan(path, tuple(args.shape))
        began = time.perf_counter()
        preprocess_case([path], Config())  # builds the operators, as the first case of a folder does
        first_seconds = time.perf_counter() - began
        seconds, image = fastest(lambda: preprocess_case([path], Config()).image[0], args.repeats)
        scipy_seconds, reference = fastest(lambda: with_scipy(path), max(1, args.repeats // 2))
    difference = float(np.abs(image - reference).max())
    shape = " x ".join(map(str, args.shape))
    print(f"{shape} voxels, uint16 gz, to {' x '.join(map(str, image.shape))}, one core")
    print(f"amaes           {seconds:.3f} s   (first case {first_seconds:.3f} s)")
    print(f"plain SciPy     {scipy_seconds:.3f} s")
    print(f"ratio           {scipy_seconds / seconds:.1f}")
    print(f"largest difference {difference:.1e}")
    print(f"budget          {BUDGET:.2f} s: {'met' if seconds <= BUDGET else 'MISSED'}")
    return 0 if seconds <= BUDGET and difference <= 1e-6 else 1


if __name__ == "__main__":
    run(main)
