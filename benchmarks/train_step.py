"""Speed and memory of a pretraining step: the whole loop from a store, and the step alone beside a plain one.

    python benchmarks/train_step.py [--arch unet_xl --patch-size 128 --batch-size 8 --steps 40 --json FILE]

"Plain" is the same U-Net written as the published one is: in-place leaky ReLU after instance norm, eager mode.
Both are timed in turns in one process, so that the ratio means something where the machine's speed varies.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from models import kept_bytes, plain_copy
from torch import nn

from amaes import cli, hardware, rng
from amaes.choices import DEVICES
from amaes.distributed import pick_device
from amaes.files import write_json
from amaes.losses import reconstruction_loss
from amaes.mask import apply_mask, token_mask
from amaes.models import build_autoencoder
from amaes.models.build import UNETS
from amaes.training.optim import build_optimizer
from amaes.training.run_folder import commit, versions

ROOT = Path(__file__).parent.parent


def main() -> int:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", choices=list(UNETS), help="U-Net (default: unet_xl on CUDA, unet_tiny on the CPU)")
    parser.add_argument("--patch-size", type=cli.positive_int, help="cube (default: 128 on CUDA, 64 on the CPU)")
    parser.add_argument("--batch-size", type=cli.positive_int, help="(default: 8 on CUDA, 2 on the CPU)")
    parser.add_argument("--steps", type=cli.positive_int, help="of the whole loop (default: 60 on CUDA, 6 on the CPU)")
    parser.add_argument("--workers", type=cli.non_negative_int, default=2, help="processes that read patches")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: CUDA if possible")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    args = parser.parse_args()
    device = pick_device(args.device)
    fast = device.type == "cuda"
    arch = args.arch or ("unet_xl" if fast else "unet_tiny")
    patch = args.patch_size or (128 if fast else 64)
    batch = args.batch_size or (8 if fast else 2)
    steps = args.steps or (60 if fast else 6)

    result = {"device": device_name(device), "versions": versions(), "commit": commit()}
    result |= {"arch": arch, "patch_size": patch, "batch_size": batch}
    print(f"{arch}, light decoder, {patch}^3, batch {batch} on {result['device']}")
    result["loop"] = whole_loop(arch, patch, batch, steps, args.workers, device)
    result["step"] = steps_beside(arch, patch, min(batch, 2), device)
    if args.json:
        write_json(args.json, result)
    return cli.EXIT_OK


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def whole_loop(arch: str, patch: int, batch: int, steps: int, workers: int, device: torch.device) -> dict:
    """train_pretrain.py on a store of random volumes: reading, augmentation, masking, logging included."""
    with tempfile.TemporaryDirectory() as folder:
        store, out = Path(folder, "store"), Path(folder, "run")
        write_store(store, count=2 * batch, side=int(1.2 * patch))
        every = max(1, steps // 3)
        command = [sys.executable, "train_pretrain.py", "--data", store, "--arch", arch, "--patch-size", patch]
        command += ["--batch-size", batch, "--steps", 3 * every, "--log-every", every, "--workers", workers]
        command += ["--save-every", 10**6, "--val-fraction", 0, "--device", device.type, "--out", out]
        subprocess.run([str(word) for word in command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    share = (last["data_ms"] + last["augment_ms"]) / last["wall_ms"]
    print(f"whole loop          {last['patches_per_s']:8.2f} patches/s   (budget on one H200, unet_xl: 80)")
    print(f"data + augmentation {100 * share:8.1f} % of the step  (budget on a GPU: 5)")
    print(f"peak memory         {last['gb']:8.2f} GB")
    return {"patches_per_s": last["patches_per_s"], "data_and_augmentation_share": share, "line": last}


def write_store(path: Path, count: int, side: int, labels: dict[str, str] | None = None) -> None:
    """A store of smooth random volumes, sides a little different; `labels` are declared, and not there."""
    (path / "cases").mkdir(parents=True)
    shape = (side, side + 10, side - 6)
    cases = []
    for i in range(count):
        coarse = torch.rand(1, 1, 12, 12, 12, generator=torch.Generator().manual_seed(i))
        volume = torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0].half().numpy()
        np.save(path / "cases" / f"case{i:03d}.npy", volume)
        cases.append({"id": f"case{i:03d}", "subject": f"s{i:03d}", "labelled": False, "shape": shape})
    content = {"format": "amaes-store-1", "config": {"normalization": "unit", "spacing": [1.0, 1.0, 1.0]}}
    content |= {"config_hash": "synthetic", "channels": ["random"], "labels": labels or {}, "cases": cases}
    (path / "dataset.json").write_text(json.dumps(content))


def steps_beside(arch: str, patch: int, batch: int, device: torch.device) -> dict:
    """Milliseconds and peak memory of a step: plain, ours, and on CUDA ours compiled."""
    torch.manual_seed(0)
    x = torch.rand(batch, 1, patch, patch, patch, device=device)
    mask = token_mask(x, keys=rng.keys(0, [0] * batch, range(batch), "mask"))
    networks = {"plain": plain_copy(build_autoencoder(arch)), "ours": build_autoencoder(arch)}
    if device.type == "cuda":
        compiler, mode = hardware.compiler(device, "auto")
        networks[f"ours, {mode}"] = compiler(build_autoencoder(arch))
    half = hardware.use_bf16(device, "auto")
    runs = {name: Step(network.to(device), x, mask, half) for name, network in networks.items()}
    for run in runs.values():
        run.measure(warm=2)
    for _ in range(5):
        for run in runs.values():
            run.measure()
    base = runs["plain"].result()
    results = {}
    print(f"step alone, batch {batch}:      ms   against plain     {runs['plain'].memory_name}   against plain")
    for name, run in runs.items():
        ms, gb = run.result()
        results[name] = {"ms": ms, "gb": gb, "time_ratio": ms / base[0], "memory_ratio": gb / base[1]}
        print(f"  {name:20s} {ms:8.1f} {ms / base[0]:13.2f} {gb:18.3f} {gb / base[1]:13.2f}")
    return results


class Step:
    """A training step, its times and its memory."""

    def __init__(self, network: nn.Module, x: torch.Tensor, mask: torch.Tensor, half: bool) -> None:
        self.network, self.x, self.mask, self.half = network, x, mask, half
        self.optimizer = build_optimizer(network.parameters(), 1e-4, 3e-5, amsgrad=True)
        self.cuda = x.is_cuda
        self.memory_name = "peak GB" if self.cuda else "kept GB"  # on the CPU: what autograd keeps
        self.times: list[float] = []
        self.bytes = 0

    def once(self) -> None:
        """Forward, backward, update."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.half):
            prediction = self.network(apply_mask(self.x, self.mask))
        reconstruction_loss(prediction, self.x).backward()
        self.optimizer.step()

    def measure(self, warm: int = 0) -> None:
        """Time one step (after `warm` that are not counted) and read its memory."""
        for _ in range(warm):
            self.once()
        if warm:
            self.bytes = 0 if self.cuda else self._kept()
            return
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        began = time.perf_counter()
        self.once()
        if self.cuda:
            torch.cuda.synchronize()
            self.bytes = max(self.bytes, torch.cuda.max_memory_allocated())
        self.times.append(1000 * (time.perf_counter() - began))

    def _kept(self) -> int:
        def forward() -> torch.Tensor:
            with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.half):
                return self.network(apply_mask(self.x, self.mask))

        return kept_bytes(forward)

    def result(self) -> tuple[float, float]:
        """Median milliseconds and GB."""
        return statistics.median(self.times), self.bytes / 1e9


if __name__ == "__main__":
    cli.run(main)
