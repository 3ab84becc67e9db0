"""Augmentation on one CPU core and, where there is one, on a GPU; against the published pipeline in NumPy and SciPy.

    python benchmarks/augment.py --json augment.json

The NumPy version does the published steps in the published order for the same draws: cubic interpolation of every
patch, elastic noise filtered at full resolution, 3-D Fourier transforms. Times on the CPU are seconds of processor time
of one thread, so that other programs on the machine count little. Peak memory is the rise of the resident set of the
process (VmHWM, reset before) during the timed calls, one patch at a time, input not counted.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from amaes.augment import Draws, PretrainAugment
from amaes.augment.options import INTENSITY
from amaes.augment.spatial import coordinate_matrices
from amaes.cli import Parser, positive_int, run
from amaes.files import write_json

BUDGET = 0.12  # seconds per patch of 128 on one core, mean over draws, preset all


def head(sides: tuple[int, int, int], seed: int = 0) -> torch.Tensor:
    """A textured ellipsoid in [0, 1] on zero background: (1, 1, X, Y, Z)."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, side) for side in sides), indexing="ij", sparse=True)
    texture = ndimage.zoom(rng.random([16] * 3), [side / 16 for side in sides], order=1)
    image = (sum(axis**2 for axis in axes) < 0.7) * (0.2 + 0.8 * texture)
    return torch.from_numpy(image.astype(np.float32))[None, None]


# --- the published pipeline, written down directly ---


def published(window: np.ndarray, draws: Draws, side: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One sample, one channel: window (W, W, W) -> source and target (side, side, side)."""
    position = np.stack(np.meshgrid(*[np.arange(side) - (side - 1) / 2] * 3, indexing="ij"))
    if draws.elastic[0]:
        for component in position:
            noise = rng.random(component.shape) * 2 - 1
            component += draws.elastic_alpha[0] * ndimage.gaussian_filter(
                noise, draws.elastic_sigma[0], mode="constant"
            )
    degrees = draws.rotation_degrees * draws.rotation[:, None]
    matrix = coordinate_matrices(degrees, np.where(draws.scale, draws.scale_factor, 1.0))[0]
    position = np.tensordot(matrix, position, 1) + (window.shape[0] - 1) / 2
    target = ndimage.map_coordinates(window, position, order=3, mode="constant", cval=window.min())
    target = clip(target, window)
    x = target.copy()
    for name, transform in PUBLISHED.items():
        if getattr(draws, name)[0, 0]:
            values = {field: getattr(draws, f"{name}_{field}")[0, 0] for field in transform[1]}
            x = clip(transform[0](x, rng, **values), x)
    return x, target


def clip(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.clip(y, x.min(), x.max())


def additive(x, rng, sigma):
    return x + rng.normal(0, sigma, x.shape)


def multiplicative(x, rng, sigma):
    return x + x * rng.normal(0, sigma, x.shape)


def blurred(x, rng, sigma):
    return ndimage.gaussian_filter(x, sigma, order=0)


def ghosted(x, rng, alpha, repetitions, axis):
    spectrum = np.fft.fftn(x, s=x.shape)
    np.moveaxis(spectrum, axis, 0)[: x.shape[axis] - 1 : repetitions] *= alpha
    return np.abs(np.fft.ifftn(spectrum, s=x.shape))


def ringing(x, rng, lines, axis):
    spectrum = np.fft.fftshift(np.fft.fftn(x))
    rows, centre, half = np.moveaxis(spectrum, axis, 0), -(-x.shape[axis] // 2), -(-lines // 2)
    rows[: max(centre - half, 0)] = 0
    rows[centre + half :] = 0
    return np.abs(np.fft.ifftn(np.fft.ifftshift(spectrum)))


def coarse(x, rng, lengths):
    small = ndimage.zoom(x, lengths / np.array(x.shape), order=0, mode="nearest", grid_mode=True)
    return clip(ndimage.zoom(small, np.array(x.shape) / lengths, order=3, mode="nearest", grid_mode=True), small)


def biased(x, rng, centre):
    axes = np.meshgrid(*(np.arange(side) for side in x.shape), indexing="ij")
    return x * (1 - sum(((axis - c) / side) ** 2 for axis, c, side in zip(axes, centre, x.shape, strict=True)))


def curved(x, rng, value, inversion):
    x = -x if inversion else x
    low, span = x.min(), np.ptp(x) + 1e-7
    y = ((x - low) / span) ** value * span + low
    return -y if inversion else y


PUBLISHED = {
    "additive_noise": (additive, ("sigma",)),
    "blur": (blurred, ("sigma",)),
    "multiplicative_noise": (multiplicative, ("sigma",)),
    "ghosting": (ghosted, ("alpha", "repetitions", "axis")),
    "gibbs_ringing": (ringing, ("lines", "axis")),
    "low_resolution": (coarse, ("lengths",)),
    "bias_field": (biased, ("centre",)),
    "gamma": (curved, ("value", "inversion")),
}


# --- measurements ---


def mean_seconds(augment: PretrainAugment, window: torch.Tensor, count: int) -> tuple[float, float | None]:
    """Drawing and augmenting `count` patches one by one: seconds per patch, growth of the peak memory in MB."""
    augment(window, augment.draw([0], [0]))  # tables
    before = resident("VmRSS", reset_peak=True)
    began = time.process_time()
    for sample in range(count):
        augment(window, augment.draw([1], [sample]))
    seconds = (time.process_time() - began) / count
    return seconds, None if before is None else resident("VmHWM") - before


def resident(field: str, reset_peak: bool = False) -> float | None:
    """Resident memory now (VmRSS) or at its peak (VmHWM), MB; None on systems other than Linux."""
    try:
        if reset_peak:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.split(f"{field}:")[1].split()[0]) * 1024 / 1e6


def per_transform(augment: PretrainAugment, window: torch.Tensor, repeats: int) -> list[dict]:
    """What each transform adds (ms, median of several draws), the rate at which it is on, its share of the sum.

    Rotation, scaling and elastic deformation are one resampling, so they are two rows: the affine one, and the elastic
    one with whatever rotation and scaling it has.
    """
    drawn = augment.draw([2] * repeats, range(repeats))

    def median(draws: Draws) -> float:
        times = []
        for row in range(repeats):
            began = time.process_time()
            augment(window, draws[[row]])
            times.append(time.process_time() - began)
        return 1e3 * float(np.median(times))

    base, began = median(drawn.only()), time.process_time()
    rates = augment.draw([3] * 4000, range(4000))
    drawing = 1e3 * (time.process_time() - began) / 4000
    rows = [
        {"transform": "drawing", "ms": drawing, "probability": 1.0},
        {"transform": "crop, checks, copy", "ms": base, "probability": 1.0},
    ]
    turned = rates.rotation & (rates.rotation_degrees != 0).any(1)
    gates = {
        "rotation": ("rotation, scaling", (turned | rates.scale) & ~rates.elastic),
        "elastic": ("elastic deformation", rates.elastic),
        **{name: (name.replace("_", " "), getattr(rates, name)) for name in INTENSITY},
    }
    for name, (label, gate) in gates.items():
        ms = max(median(only(drawn, name, augment.patch_size[0])) - base, 0.0)
        rows.append({"transform": label, "ms": ms, "probability": float(gate.mean())})
    total = sum(row["ms"] * row["probability"] for row in rows)
    for row in rows:
        row["share"] = row["ms"] * row["probability"] / total
    return rows


def only(draws: Draws, name: str, side: int) -> Draws:
    """Draws with one transform on, and set so that it does something."""
    changes = {}
    if name == "low_resolution":  # where no axis may have been chosen
        changes["low_resolution_lengths"] = np.full_like(draws.low_resolution_lengths, side)
        changes["low_resolution_lengths"][..., 0] = 3 * side // 4
    if name == "rotation":
        changes["rotation_degrees"] = np.where(draws.rotation_degrees == 0, 5.0, draws.rotation_degrees)
    return replace(draws.only(name), **changes)


def published_seconds(augment: PretrainAugment, count: int) -> float:
    window = head((181,) * 3 if augment.patch_size[0] == 128 else augment.window_size)[0, 0].numpy()
    rng, began = np.random.default_rng(0), time.process_time()
    for sample in range(count):
        published(window, augment.draw([1], [sample]), augment.patch_size[0], rng)
    return (time.process_time() - began) / count


def on_gpu(augment: PretrainAugment, batch: int = 8, steps: int = 30) -> dict:
    """Milliseconds per patch at batch 8, windows already on the device; any wait for the device raises."""
    window = head(augment.window_size).expand(batch, -1, -1, -1, -1).contiguous().cuda()
    draws = [augment.draw([step] * batch, range(batch)) for step in range(steps)]
    augment(window, draws[0])  # tables
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for step in draws:
            augment(window, step)
        end.record()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    milliseconds = start.elapsed_time(end) / (steps * batch)
    return {
        "device": torch.cuda.get_device_name(),
        "batch": batch,
        "ms_per_patch": milliseconds,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "waits_for_the_device": 0,
    }


def megabytes(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0f} MB"


def parse_options() -> argparse.Namespace:
    parser = Parser(description="Time the augmentation (preset all) of single patches on one CPU core, and on a GPU.")
    parser.add_argument("--patch-size", type=positive_int, default=128, help="side of the patch, voxels")
    parser.add_argument("--draws", type=positive_int, default=200, help="patches, trilinear")
    parser.add_argument("--cubic-draws", type=positive_int, default=30, help="patches, cubic (order 3)")
    parser.add_argument("--published-draws", type=positive_int, default=30, help="patches, NumPy version")
    parser.add_argument("--repeats", type=positive_int, default=9, help="calls per transform of the table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    return parser.parse_args()


def main() -> int:
    args = parse_options()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    side = (args.patch_size,) * 3
    augment, cubic = PretrainAugment(side), PretrainAugment(side, order=3)
    window = head(augment.window_size)
    seconds, memory = mean_seconds(augment, window, args.draws)
    print(f"one thread, patch {side[0]}^3, window {augment.window_size[0]}^3, preset all, torch {torch.__version__}")
    verdict = ("met" if seconds <= BUDGET else "MISSED") if side[0] == 128 else "is for 128^3"
    print(f"trilinear         {seconds:.4f} s per patch, mean of {args.draws} draws; budget {BUDGET} s {verdict}")
    print(f"peak memory       {megabytes(memory)} above the input")
    rows = per_transform(augment, window, args.repeats)
    print(f"\n{'transform':<22} {'ms':>8} {'probability':>12} {'share':>7}")
    for row in rows:
        print(f"{row['transform']:<22} {row['ms']:>8.2f} {row['probability']:>12.3f} {row['share']:>7.1%}")
    cubic_seconds, cubic_memory = mean_seconds(cubic, window, args.cubic_draws)
    print(
        f"\ncubic (order 3)   {cubic_seconds:.4f} s per patch, mean of {args.cubic_draws} draws, "
        f"{megabytes(cubic_memory)}"
    )
    plain = published_seconds(augment, args.published_draws)
    print(f"published, NumPy  {plain:.4f} s per patch, mean of the first {args.published_draws} draws")
    matching = mean_seconds(augment, window, args.published_draws)[0]
    matching_cubic = mean_seconds(cubic, window, args.published_draws)[0]
    print(f"ratio, same draws {plain / matching:.1f} (trilinear), {plain / matching_cubic:.1f} (cubic)")
    gpu = on_gpu(augment) if torch.cuda.is_available() else None
    print(f"GPU               {gpu['ms_per_patch']:.2f} ms per patch, {gpu}" if gpu else "GPU               none here")
    if args.json:
        content = {
            "patch_size": side,
            "draws": args.draws,
            "seconds_per_patch": seconds,
            "budget_seconds": BUDGET,
            "peak_mb": memory,
            "transforms": rows,
            "cubic_draws": args.cubic_draws,
            "cubic_peak_mb": cubic_memory,
            "cubic_seconds_per_patch": cubic_seconds,
            "published_draws": args.published_draws,
            "published_seconds_per_patch": plain,
            "ratio": plain / matching,
            "cubic_ratio": plain / matching_cubic,
            "gpu": gpu,
            "machine": platform.processor(),
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        }
        write_json(args.json, content)
    return 0 if side[0] != 128 or seconds <= BUDGET else 1


if __name__ == "__main__":
    run(main)
