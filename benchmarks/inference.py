"""Sliding-window inference: ours, a plain loop, and MONAI's where MONAI is installed; same network and windows.

    python benchmarks/inference.py

Every run is a process of its own. The programs take turns, and the fastest run of each counts. Budget: at most MONAI's
time for a 182 x 218 x 182 scan at equal overlap and weights. The network is small, so that the time spent around it
shows; with a real network the ratios are closer to 1. CPU seconds are the sum over all threads; other programs on the
machine disturb them less than the seconds on the clock.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from amaes import cli
from amaes.choices import DEVICES
from amaes.distributed import pick_device
from amaes.hardware import peak_gb
from amaes.inference import sliding_window, window_starts, window_weight


def parse_options() -> argparse.Namespace:
    parser = cli.Parser(description="Time and memory of sliding-window inference.")
    parser.add_argument("--shape", type=cli.positive_int, nargs=3, default=[182, 218, 182], help="scan, voxels")
    parser.add_argument("--patch-size", type=cli.positive_int, nargs=3, default=[128, 128, 128], help="window, voxels")
    parser.add_argument("--classes", type=cli.positive_int, default=4, help="output channels")
    parser.add_argument("--features", type=cli.positive_int, default=8, help="channels inside the network")
    parser.add_argument("--overlap", type=cli.fraction, default=0.5, help="of neighbouring windows")
    parser.add_argument("--batch-size", type=cli.positive_int, default=1, help="windows per call, ours and MONAI's")
    parser.add_argument("--repeat", type=cli.positive_int, default=3, help="runs of each")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: CUDA where there is a GPU")
    parser.add_argument("--threads", type=cli.positive_int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--only", choices=list(VARIANTS), help=argparse.SUPPRESS)
    return parser.parse_args()


def ours(network: nn.Module, image: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    return sliding_window(
        network,
        image,
        args.patch_size,
        overlap=args.overlap,
        placement="flush",
        batch_size=args.batch_size,
        precision="fp32",
    )


@torch.inference_mode()
def plain(network: nn.Module, image: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """The simple way: window by window, weights kept for every class, a division into new memory."""
    weight = window_weight(args.patch_size).to(image.device)
    total = torch.zeros(args.classes, *image.shape[1:], device=image.device)
    weights = torch.zeros_like(total)
    starts = [window_starts(n, p, args.overlap, "flush") for n, p in zip(image.shape[1:], args.patch_size, strict=True)]
    for at in itertools.product(*starts):
        box = (slice(None), *(slice(s, s + p) for s, p in zip(at, args.patch_size, strict=True)))
        total[box] += network(image[box][None])[0] * weight
        weights[box] += weight
    return total / weights


@torch.inference_mode()
def monai(network: nn.Module, image: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    from monai.inferers import sliding_window_inference

    return sliding_window_inference(
        image[None], args.patch_size, args.batch_size, network, overlap=args.overlap, mode="gaussian", sigma_scale=0.125
    )[0]


VARIANTS = {"ours": ours, "plain": plain, "monai": monai}


def measure_variant(args: argparse.Namespace) -> dict:
    """Seconds, CPU seconds, memory beyond that of network and image (GB), and some of the logits to compare."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = pick_device(args.device)
    first = nn.Conv3d(1, args.features, 3, padding=1)
    network = nn.Sequential(first, nn.ReLU(), nn.Conv3d(args.features, args.classes, 1)).to(device).eval()
    image = torch.rand(1, *args.shape, device=device)
    with torch.inference_mode():
        network(image[(None, slice(None), *(slice(0, p) for p in args.patch_size))])  # warm up
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6 if device.type == "cpu" else 0.0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e9
    began, busy = time.perf_counter(), time.process_time()
    logits = VARIANTS[args.only](network, image, args)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    some = logits[:, ::37, ::41, ::31].flatten().tolist()
    return {"seconds": seconds, "cpu": busy, "gb": max(0.0, peak_gb(device) - before), "some": some}


def main() -> int:
    args = parse_options()
    args.device = pick_device(args.device).type
    if args.only:
        print(json.dumps(measure_variant(args)))
        return cli.EXIT_OK
    names = [name for name in VARIANTS if name != "monai" or importlib.util.find_spec("monai")]
    runs = {name: [] for name in names}
    for _, name in itertools.product(range(args.repeat), names):
        done = subprocess.run([sys.executable, *sys.argv, "--only", name], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
        runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    sizes = [" x ".join(map(str, sizes)) for sizes in (args.shape, args.patch_size)]
    print(f"{sizes[0]} voxels, windows {sizes[1]}, overlap {args.overlap:g}, {args.classes} classes, {args.device}")
    best = {name: {key: min(run[key] for run in runs[name]) for key in ("seconds", "cpu", "gb")} for name in names}
    for name, row in best.items():
        ratios = [f"{best['ours'][key] / max(row[key], 1e-9):.2f}" for key in ("seconds", "cpu")]
        pairs = zip(runs[name][0]["some"], runs["ours"][0]["some"], strict=True)
        print(
            f"{name:6s} {row['seconds']:6.2f} s, {row['cpu']:6.2f} CPU s, {row['gb']:5.2f} GB beside the network; "
            f"ours / {name}: time {ratios[0]}, CPU time {ratios[1]}; difference {max(abs(a - b) for a, b in pairs):.0e}"
        )
    return cli.EXIT_OK


if __name__ == "__main__":
    cli.run(main)
