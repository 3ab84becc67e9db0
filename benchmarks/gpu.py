"""One GPU, one command, under nine minutes: pretraining steps, the whole loop, objectives, MedNeXt, inference.

    python benchmarks/gpu.py [--json gpu.json] [--only pretraining loop] [--profile]
    python benchmarks/gpu.py --quick --device cpu

A row is one measurement. Every section has its share of --seconds. Rows that come after it is used up are recorded as
not measured, those that do not fit into the GPU's memory as "out of memory". --quick measures tiny networks on tiny
patches: it shows that the script works, and nothing else. On the CPU, --only objectives --patch-size 64 --repeats 1
gives numbers of use. The step is that of train_pretrain.py: augmentation, masking, forward and backward pass in bf16
autocast, optimizer; "plain" is the published form of the network (train_step.py, models.py). Memory is the peak on a
GPU, and what autograd keeps on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from models import build, kept_bytes, operators, plain_copy, seconds
from models import memory as step_memory
from torch import nn
from train_step import device_name, write_store

from amaes import cli, hardware
from amaes.data.loader import loader
from amaes.data.order import Batches, Share
from amaes.data.patches import Patches
from amaes.data.store import Store
from amaes.files import write_json
from amaes.inference import sliding_window
from amaes.models import build_network, build_segmenter
from amaes.models.ops import up_conv
from amaes.objectives import OBJECTIVES
from amaes.training.benchmark import seconds_per_step, training_flop
from amaes.training.checks import check_patch_size
from amaes.training.optim import build_optimizer
from amaes.training.run_folder import commit, versions

MODES = ("compiled", "eager")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}


class Section:
    """Rows of one kind, measured until the time is used up."""

    def __init__(self, limit: float, args: argparse.Namespace, device: torch.device) -> None:
        self.until, self.args, self.device, self.rows = time.monotonic() + limit, args, device, []

    def row(self, measure: Callable[..., dict], **label) -> None:
        """Add the row `measure(section, **label)`."""
        result = {"result": "not measured: time used up"}
        if time.monotonic() < self.until:
            try:
                result = measure(self, **label)
            except torch.OutOfMemoryError:
                result = {"result": "out of memory"}
            torch.compiler.reset()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        self.rows.append(label | result)
        print("  " + ", ".join(f"{name} {_short(value)}" for name, value in self.rows[-1].items()), flush=True)

    @property
    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def seconds(self, step: Callable[[], None]) -> float:
        """Mean of a few steps, after warming up."""
        return seconds_per_step(step, self.args.repeats, self.device)

    def memory(self, step: Callable[[], None]) -> float:
        """GB at the peak of a step that has run before (CUDA), or kept by autograd (CPU)."""
        if self.device.type != "cuda":
            return kept_bytes(step) / 1e9
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e9


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).split("\n")[0]


# Pretraining ----------------------------------------------------------------------------------------------------------


class Pretraining:
    """What train_pretrain.py does in a step, on a batch of random windows."""

    def __init__(
        self, section: Section, arch: str, batch: int, layout: str, mode: str, objective: str = "amaes"
    ) -> None:
        self.device, self.autocast, self.arch = section.device, section.autocast, arch
        self.objective = OBJECTIVES[objective](section.args.patch_size, seed=0, augment="all", augment_options={})
        torch.manual_seed(0)
        network = self.build()
        network = plain_copy(network) if mode == "plain" else network
        self.network = network.to(self.device, memory_format=LAYOUTS[layout])
        self.optimizer = build_optimizer(self.network.parameters(), 1e-4, 3e-5, amsgrad=True)
        self.model = torch.compile(self.network) if mode == "compiled" else self.network
        self.layout, self.shape = LAYOUTS[layout], (self.objective.views, 1, *section.args.patch_size)
        image = torch.rand(batch, 1, *self.objective.window_size, dtype=torch.float16)
        image = image.pin_memory() if self.device.type == "cuda" else image
        cases = list(range(batch))
        self.batches = ({"image": image, "epoch": [epoch] * batch, "case": cases} for epoch in itertools.count())

    def build(self) -> nn.Module:
        """A new network."""
        return build_network(self.objective.task, {"arch": self.arch, **self.objective.build})

    def prepare(self, batch: dict) -> tuple:
        """Augmented and masked inputs, and their targets."""
        inputs, targets = self.objective.prepare(batch, self.device)
        return inputs.contiguous(memory_format=self.layout), targets

    def step(self, read: Callable[[], tuple]) -> None:
        """Forward and backward pass, update."""
        inputs, targets = read()
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            outputs = self.model(inputs)
        sum(self.objective.losses(outputs, targets).values()).backward()
        self.optimizer.step()

    def times(self, section: Section, batches=None) -> dict:
        """Seconds of a step: of the network alone, with augmentation, and with reading where there are batches."""
        ready = self.prepare(next(self.batches))
        result = {"network": section.seconds(partial(self.step, lambda: ready))}
        result["augmentation"] = section.seconds(partial(self.step, lambda: self.prepare(next(self.batches))))
        if batches is not None:
            result["data"] = section.seconds(partial(self.step, lambda: self.prepare(next(batches))))
        return result


def pretraining(section: Section) -> None:
    """U-Net B and XL: batch sizes, layouts, eager, compiled and the published form."""
    row = partial(section.row, _pretraining_row)
    large, batches = ("unet_tiny", (2,)) if section.args.quick else ("unet_xl", (2, 8))
    row(arch=large, batch=2, layout="contiguous", mode="plain")  # the budget of memory compares with this one
    for mode, layout, batch in itertools.product(MODES[1:] if section.args.quick else MODES, LAYOUTS, batches):
        row(arch=large, batch=batch, layout=layout, mode=mode)
    for arch, batch in () if section.args.quick else (("unet_b", 8), ("unet_xl", 12), ("unet_b", 16), ("unet_b", 32)):
        row(arch=arch, batch=batch, layout="channels_last_3d", mode="compiled")


def _pretraining_row(section: Section, **label) -> dict:
    run = Pretraining(section, **label)
    times = run.times(section)
    ready = run.prepare(next(run.batches))
    gb = section.memory(partial(run.step, lambda: ready))
    with torch.device("meta"):
        flop = training_flop(run.build(), run.shape)
    result = {"ms": 1000 * times["network"], "ms_with_augmentation": 1000 * times["augmentation"], "gb": gb}
    result["patches_per_s"] = label["batch"] / times["augmentation"]
    result["augmentation_share"] = 1 - times["network"] / times["augmentation"]
    result["tflops"] = flop * label["batch"] / times["network"] / 1e12
    if section.args.profile:
        result["operators"] = operators(run.model, ready[0], half=True)
        print(result["operators"])
    return result


def objectives(section: Section) -> None:
    """AMAES with three encoders, and SwinUNETR's self-supervision, which has two views of a patch in a network."""
    rows = [("amaes", "unet_b"), ("amaes", "unet_xl"), ("amaes", "swin_unetr"), ("swin", "swin_unetr")]
    rows = [("swin", "swin_tiny")] if section.args.quick else rows
    mode = "compiled" if section.device.type == "cuda" else "eager"
    for objective, arch in rows:
        batch = 1 if section.args.quick else 2
        section.row(_pretraining_row, objective=objective, arch=arch, batch=batch, layout="contiguous", mode=mode)


def loop(section: Section) -> None:
    """End to end from a store on the disk: reading by worker processes, augmentation, step."""
    arch = "unet_tiny" if section.args.quick else "unet_xl"
    for workers in (2,) if section.args.quick else (8, 4):
        section.row(_loop_row, arch=arch, batch=2 if section.args.quick else 8, workers=workers)


def _loop_row(section: Section, arch: str, batch: int, workers: int) -> dict:
    mode = "eager" if section.args.quick else "compiled"
    run = Pretraining(section, arch, batch, "contiguous", mode)
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder), count=2 * batch, side=int(1.2 * max(run.shape[2:])))
        store = Store(folder)
        patches = Patches(store, run.shape[2:], run.objective.window_size, crop="window")
        order = Batches(range(len(store.cases)), Share(batch), seed=0, start=0, stop=20)
        batches = loader(patches, order, workers, pin_memory=section.device.type == "cuda")
        times = run.times(section, batches)
        batches.close()  # ends the workers before the folder goes
    whole = times["data"]
    shares = {"data_share": (whole - times["augmentation"]) / whole}
    shares["augmentation_share"] = (times["augmentation"] - times["network"]) / whole
    return {"mode": mode, "patches_per_s": batch / whole, "ms": 1000 * whole, **shares}


# MedNeXt, upsampling, inference ---------------------------------------------------------------------------------------


def mednext(section: Section) -> None:
    """MedNeXt with its own decoder, beside plain modules; eager, then compiled."""
    archs = ("mednext_s",) if section.args.quick else ("mednext_b", "mednext_v2_base", "mednext_l")
    modes = MODES[1:] if section.args.quick else MODES
    for mode, arch, form in itertools.product(modes, archs, ("ours", "plain")):
        section.row(_mednext_row, arch=arch, mode=mode, form=form)


def _mednext_row(section: Section, arch: str, mode: str, form: str) -> dict:
    network = build(arch, "mednext").to(section.device)
    network = plain_copy(network) if form == "plain" else network
    model = torch.compile(network) if mode == "compiled" else network
    sides = (32, 32, 32) if section.args.quick else section.args.patch_size
    image = torch.rand(1, 1, *sides, device=section.device)
    gb = step_memory(model, image, half=True)
    return {"ms": 1000 * min(seconds(model, image, half=True) for _ in range(1 if section.args.quick else 3)), "gb": gb}


def upsampling(section: Section) -> None:
    """An upsampling and the convolution after it, forward and backward: two operations, or their composition."""
    for channels, side in ((4, 8),) if section.args.quick else ((64, 64), (128, 32)):  # of U-Net XL's finest stages
        for form in UPSAMPLINGS:
            section.row(_upsampling_row, channels=channels, coarse_side=side, batch=2, form=form)


UPSAMPLINGS = {"two": lambda x, up, conv: conv(up(x)), "one": up_conv}


def _upsampling_row(section: Section, channels: int, coarse_side: int, batch: int, form: str) -> dict:
    up = nn.ConvTranspose3d(2 * channels, channels, kernel_size=2, stride=2).to(section.device)
    conv = nn.Conv3d(channels, channels, kernel_size=3, padding=1).to(section.device)
    x = torch.rand(batch, 2 * channels, *[coarse_side] * 3, device=section.device).bfloat16().requires_grad_()

    def step() -> None:
        with section.autocast:
            y = UPSAMPLINGS[form](x, up, conv)
        y.float().square().mean().backward()

    return {"ms": 1000 * section.seconds(step), "gb": section.memory(step)}


def inference(section: Section) -> None:
    """Sliding window over a scan, U-Net with skip connections, windows overlapping by half."""
    shape, patch = (40, 72, 36) if section.args.quick else (182, 218, 182), section.args.patch_size
    archs = ("unet_tiny",) if section.args.quick else ("unet_b", "unet_xl", "mednext_b")
    for arch in archs:
        section.row(_inference_row, arch=arch, shape=shape, patch=patch)


def _inference_row(section: Section, arch: str, shape: tuple[int, int, int], patch: tuple) -> dict:
    network = build_segmenter(arch).to(section.device).eval()
    image = torch.rand(1, *shape, device=section.device)

    def scan() -> None:
        sliding_window(network, image, patch)

    scan()
    gb = {"gb": section.memory(scan)} if section.device.type == "cuda" else {}
    return {"seconds": seconds_per_step(scan, 2, section.device), **gb}


# name -> (function, share of --seconds)
SECTIONS: dict[str, tuple[Callable[[Section], None], float]] = {
    "pretraining": (pretraining, 0.4),
    "loop": (loop, 0.15),
    "objectives": (objectives, 0.1),
    "mednext": (mednext, 0.2),
    "upsampling": (upsampling, 0.05),
    "inference": (inference, 0.1),
}


def parse_options() -> argparse.Namespace:
    parser = cli.Parser(description="Measure training and inference on one GPU.")
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the script")
    add("--quick", action="store_true", help="tiny networks and patches: seconds, and no meaning")
    add("--patch-size", type=cli.positive_int, metavar="N", help="cube (default: 128; with --quick 64 x 32 x 32)")
    add("--repeats", type=cli.positive_int, help="steps that are timed (default: 12; with --quick 1)")
    add("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="sections to measure")
    add("--seconds", type=cli.positive_int, default=300, help="for all sections; a row that has begun runs to its end")
    add("--profile", action="store_true", help="table of operators for each pretraining row")
    add("--json", type=Path, metavar="FILE", default=Path("gpu.json"), help="where the numbers go")
    args = parser.parse_args()
    args.repeats = args.repeats or (1 if args.quick else 12)
    args.patch_size = (args.patch_size,) * 3 if args.patch_size else (64, 32, 32) if args.quick else (128,) * 3
    check_patch_size(args.patch_size, "swin_unetr")
    return args


def main() -> int:
    args = parse_options()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device here; this script needs one GPU, or --quick --device cpu")
    device = torch.device(args.device)
    result = {"device": device_name(device), "cores": os.cpu_count(), "quick": args.quick, "commit": commit()}
    result |= {"patch_size": args.patch_size, "repeats": args.repeats}
    result["versions"] = versions() | {"cuda": torch.version.cuda}
    if args.device == "cuda":
        result["gb"] = torch.cuda.get_device_properties(device).total_memory / 1e9
    print(f"{result['device']}, torch {torch.__version__}, bf16 autocast{', QUICK' if args.quick else ''}")
    for line in hardware.known_defects(device):
        print(line)
    result["sections"] = {}
    for name in args.only:
        measure, share = SECTIONS[name]
        print(f"{name}: {measure.__doc__.strip()}")
        section, began = Section(share * args.seconds, args, device), time.monotonic()
        measure(section)
        result["sections"][name] = {"seconds": time.monotonic() - began, "rows": section.rows}
        write_json(args.json, result)
    return cli.EXIT_OK


if __name__ == "__main__":
    cli.run(main)
