"""One GPU, one command, under five minutes: operations, training steps, the whole loop, inference, and the budgets.

    python benchmarks/gpu.py [--json gpu.json] [--only operations steps] [--profile]
    python benchmarks/gpu.py --quick --device cpu

A row is one measurement. A row that fails holds its error, and the others go on; the exit status is 1 then. Where a
fault of a kernel takes the GPU away from the process, the script starts itself anew with --resume and goes on with the
next row. Rows that come after a section's share of --seconds are "not measured". "plain" is the published form: the
same network out of PyTorch's modules (models.py), eager, or compiled where a row says so. --quick measures tiny
networks on tiny patches: it shows that the script works, and nothing else. On the CPU, --only objectives --patch-size
64 --repeats 1 gives numbers of use; memory is the peak on a GPU, and what autograd keeps on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from gpu_budgets import judge
from gpu_operations import OPERATIONS, SIZES, Clock, measure, tiny
from models import kept_bytes, operators, plain_copy
from train_step import device_name, write_store

from amaes import cli, hardware
from amaes.data.loader import loader
from amaes.data.order import Batches, Share
from amaes.data.patches import Patches
from amaes.data.store import Store
from amaes.files import first_line, read_json, write_json
from amaes.inference import sliding_window
from amaes.models import build_network, build_segmenter, ops
from amaes.objectives import OBJECTIVES
from amaes.training.benchmark import seconds_per_step, steps_needed, training_flop
from amaes.training.checks import check_patch_size
from amaes.training.optim import build_optimizer
from amaes.training.run_folder import commit, versions

LATE = "not measured: time used up"


class Section:
    """Rows of one kind, measured until the time is used up, and printed as a table.

    Args:
        name: key of SECTIONS.
        run: options, device and result of the run; rows that it holds from earlier are not measured again.
        until: `time.monotonic()` after which no row begins.
    """

    def __init__(self, name: str, run: Run, until: float) -> None:
        self.run, self.args, self.device, self.until = run, run.args, run.device, until
        self.columns = SECTIONS[name].columns
        self.content = run.result["sections"].setdefault(name, {"seconds": 0.0, "rows": []})
        self.earlier = [row for row in self.content["rows"] if row.get("result") != LATE]
        self.rows = self.content["rows"] = []
        print(f"\n{name}: {SECTIONS[name].function.__doc__.strip()}")
        print("  ".join(f"{heading:>{width}}" for heading, width in self.columns.values()))

    def row(self, measure: Callable[..., dict], **label) -> None:
        """Add the row `measure(section, **label)`, or what is left of it."""
        label = json.loads(json.dumps(label))  # as it is read from a file
        row = next((row for row in self.earlier if label.items() <= row.items()), None)
        row = label | self._measured(measure, label) if row is None else row
        self.rows.append(row)
        cells = [_short(row.get(name, "-")).rjust(width) for name, (_, width) in self.columns.items()]
        remark = row.get("error") or row.get("result") or ""
        print("  ".join([*cells, remark]).rstrip(), flush=True)
        self.run.write()
        if "error" in row and self._is_lost():
            self.run.start_again()

    def _measured(self, measure: Callable[..., dict], label: dict) -> dict:
        if time.monotonic() >= self.until:
            return {"result": LATE}
        began = time.monotonic()
        try:
            self._clean()
            result = measure(self, **label)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # a fault of a kernel may show only here
        except torch.OutOfMemoryError:
            result = {"error": "out of memory"}
        except Exception as error:  # whatever it is, the other rows are worth measuring
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {first_line(error)}"}
        self.content["seconds"] += time.monotonic() - began
        return result

    def _clean(self) -> None:
        """Give back what earlier rows had of the GPU."""
        if self.device.type == "cuda":
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()

    def _is_lost(self) -> bool:
        """Whether a fault of a kernel has taken the GPU from this process."""
        if self.device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            return True
        return False

    @property
    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def seconds(self, step: Callable[[], object]) -> float:
        """Mean of the steps that fit into two seconds, 2 to --repeats, after two to warm up; host time included."""
        if self.args.quick:
            return self._mean(step, 1)
        step()
        fit = int(2 / self._mean(step, 1))
        return self._mean(step, min(max(fit, 2), self.args.repeats))

    def _mean(self, step: Callable[[], object], count: int) -> float:
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda device: None
        wait(self.device)
        began = time.perf_counter()
        for _ in range(count):
            step()
        wait(self.device)
        return (time.perf_counter() - began) / count

    def memory(self, step: Callable[[], object]) -> float:
        """GB at the peak of a step that has run before (CUDA), or kept by autograd (CPU)."""
        if self.device.type != "cuda":
            return kept_bytes(step) / 1e9
        torch.cuda.reset_peak_memory_stats(self.device)
        step()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) / 1e9


def _short(value: object) -> str:
    if isinstance(value, list):
        return " x ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# Operations -----------------------------------------------------------------------------------------------------------


def operations(section: Section) -> None:
    """Every operation beside its plain form; "x" is a time as a multiple of the floor (gpu_operations.py)."""
    done = []
    for name, sizes in SIZES:
        sizes = tiny(sizes) if section.args.quick else sizes
        if (name, sizes) not in done:
            done.append((name, sizes))
            for form in ("ours", "plain"):
                section.row(_operation_row, operation=name, form=form, **sizes)


def _operation_row(section: Section, operation: str, form: str, **sizes) -> dict:
    clock, limits = section.run.clock, section.run.result["limits"]
    ms, work = measure(OPERATIONS[operation], sizes, form, section.device, clock.milliseconds)
    sizes_in_words = " ".join(f"{name} {value}" for name, value in sizes.items() if value is not None)
    result = {"sizes": sizes_in_words}
    for name in ms:
        floor = work[name].milliseconds(1e12 * limits["copy_tb_per_s"], 1e12 * limits["matrix_tflops"])
        result |= {f"{name}_ms": ms[name], f"{name}_floor_ms": floor, f"{name}_of_floor": ms[name] / floor}
    return result


# Training steps -------------------------------------------------------------------------------------------------------


class Training:
    """What the training scripts do in a step, on a batch of random windows.

    Args:
        section: of the row.
        arch: a key of ARCHITECTURES; MedNeXt is trained to segment, with its own decoder.
        batch: patches per step.
        form: "ours", or "plain", the published form.
        mode: "eager", "compiled", or for ours "default": as the training scripts choose.
        objective: a key of OBJECTIVES.
    """

    def __init__(
        self,
        section: Section,
        arch: str,
        batch: int,
        form: str = "ours",
        mode: str = "default",
        objective: str = "amaes",
    ) -> None:
        self.device, self.autocast = section.device, section.autocast
        self.patch = (16, 16, 32) if section.args.quick and "swin" not in arch else section.args.patch_size
        options = {"decoder": "mednext"} if objective == "supervised" else {}
        self.objective = OBJECTIVES[objective](self.patch, 0, "all", {}, **options)
        if self.objective.labels:
            with tempfile.TemporaryDirectory() as folder:
                write_store(Path(folder), count=1, side=16, labels={"0": "background", "1": "one"})
                self.objective.see(Store(folder))
        self.arguments = {"arch": arch, **self.objective.build}
        torch.manual_seed(0)
        network = build_network(self.objective.task, self.arguments)
        network = (plain_copy(network) if form == "plain" else network).to(self.device)
        self.optimizer = build_optimizer(network.parameters(), 1e-4, 3e-5, amsgrad=True)
        choice = {"compiled": "on", "eager": "off", "default": "auto"}[mode]
        compiler, self.mode = hardware.compiler(
            self.device, "off" if section.args.quick else choice, ops.are_fused(self.device)
        )
        self.model = compiler(network)
        self.batches = self._random_batches(batch)

    def _random_batches(self, batch: int) -> Iterator[dict]:
        read = {"image": torch.rand(batch, 1, *self.objective.window_size, dtype=torch.float16)}
        if self.objective.labels:
            read["label"] = torch.randint(0, 2, (batch, *self.objective.window_size), dtype=torch.uint8)
        if self.device.type == "cuda":
            read = {name: tensor.pin_memory() for name, tensor in read.items()}
        return (read | {"epoch": [epoch] * batch, "case": list(range(batch))} for epoch in itertools.count())

    def step(self, prepared: tuple) -> None:
        """Forward and backward pass, update."""
        inputs, targets = prepared
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            outputs = self.model(inputs)
        sum(self.objective.losses(outputs, targets).values()).backward()
        self.optimizer.step()

    def step_with(self, batches: Iterator[dict]) -> None:
        """The same, with augmentation, and with reading where `batches` are read."""
        self.step(self.objective.prepare(next(batches), self.device))

    def flop(self) -> float:
        """Of one patch, forward and backward."""
        with torch.device("meta"):
            network = build_network(self.objective.task, self.arguments)
        return training_flop(network, (self.objective.views, 1, *self.patch))


def steps(section: Section) -> None:
    """A training step with augmentation, beside the published form."""
    if section.args.quick:
        rows = [("unet_tiny", 2, "amaes", "eager"), ("mednext_s", 1, "supervised", "compiled")]
    else:
        rows = [("unet_xl", 8, "amaes", "eager"), ("unet_b", 8, "amaes", "eager")]
        rows += [("mednext_v2_base", 2, "supervised", "eager"), ("mednext_b", 8, "supervised", "compiled")]
        rows += [("mednext_l", 2, "supervised", "eager"), ("swin_unetr", 2, "amaes", "eager")]
    for arch, batch, objective, plain_mode in rows:
        for form, mode in (("ours", "default"), ("plain", plain_mode)):
            section.row(_step_row, arch=arch, objective=objective, batch=batch, form=form, mode=mode)


def objectives(section: Section) -> None:
    """AMAES with three encoders, and SwinUNETR's self-supervision, which has two views of a patch in a network."""
    rows = [("amaes", "unet_b"), ("amaes", "unet_xl"), ("amaes", "swin_unetr"), ("swin", "swin_unetr")]
    for objective, arch in [("amaes", "unet_tiny")] if section.args.quick else rows:  # of Swin a step takes seconds
        batch = 1 if section.args.quick else 2
        section.row(_step_row, arch=arch, objective=objective, batch=batch, form="ours", mode="default")


def _step_row(section: Section, **label) -> dict:
    training, batch = Training(section, **label), label["batch"]
    ready = training.objective.prepare(next(training.batches), section.device)
    whole = section.seconds(partial(training.step_with, training.batches))
    gb = section.memory(partial(training.step, ready))
    result = {"way": training.mode, "ms": 1000 * whole, "patches_per_s": batch / whole}
    result |= {"gb": gb, "gb_per_patch": gb / batch}
    if label["form"] == "ours":
        alone = section.seconds(partial(training.step, ready))
        result |= {"ms_without_augmentation": 1000 * alone, "tflops": training.flop() * batch / alone / 1e12}
    if section.args.profile:
        result["operators"] = operators(training.model, ready[0], half=True)
        print(result["operators"])
    return result


def store(section: Section) -> None:
    """End to end from a store on the disk: reading by worker processes, augmentation, step."""
    rows = [("unet_tiny", 2)] if section.args.quick else [("unet_xl", 8), ("unet_b", 8)]
    for arch, batch in rows:
        section.row(_store_row, arch=arch, batch=batch, workers=section.args.workers)


def _store_row(section: Section, arch: str, batch: int, workers: int) -> dict:
    training, repeats = Training(section, arch, batch), (1 if section.args.quick else 8) * section.args.repeats
    ready = training.objective.prepare(next(training.batches), section.device)
    alone = section.seconds(partial(training.step, ready))
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder), count=2 * batch, side=int(1.2 * max(training.patch)))
        data = Store(folder)
        patches = Patches(data, training.patch, training.objective.window_size, crop="window")
        order = Batches(range(len(data.cases)), Share(batch), seed=0, start=0, stop=steps_needed(repeats))
        batches = loader(patches, order, workers, pin_memory=section.device.type == "cuda")
        whole = seconds_per_step(partial(training.step_with, batches), repeats, section.device)
        batches.close()  # ends the workers before the folder goes
    return {"way": training.mode, "patches_per_s": batch / whole, "ms": 1000 * whole, "share": 1 - alone / whole}


def inference(section: Section) -> None:
    """Sliding window over a scan, U-Net with skip connections and MedNeXt, windows overlapping by half."""
    archs, shape = ("unet_b", "unet_xl", "mednext_b"), (182, 218, 182)
    if section.args.quick:
        archs, shape = ("unet_tiny",), (20, 36, 32)
    for arch, form in itertools.product(archs, ("ours", "plain")):
        section.row(_inference_row, arch=arch, form=form, shape=shape)


def _inference_row(section: Section, arch: str, form: str, shape: list[int]) -> dict:
    network = build_segmenter(arch)
    network = (plain_copy(network) if form == "plain" else network).to(section.device).eval()
    image = torch.rand(1, *shape, device=section.device)
    patch = (16, 16, 32) if section.args.quick else section.args.patch_size
    scan = partial(sliding_window, network, image, patch, precision="bf16")
    return {"seconds": section.seconds(scan), "gb": section.memory(scan)}


class Kind(NamedTuple):
    """A section: what measures it, its share of --seconds, and what its table shows: field -> (heading, width)."""

    function: Callable[[Section], None]
    share: float
    columns: dict[str, tuple[str, int]]


_STEP = {"arch": ("network", 16), "objective": ("objective", 10), "batch": ("batch", 5), "form": ("form", 5)}
_STEP |= {"mode": ("mode", 8), "ms": ("ms", 7), "ms_without_augmentation": ("not augmented", 13)}
_STEP |= {"patches_per_s": ("patches/s", 9), "gb_per_patch": ("GB/patch", 8), "tflops": ("TFLOP/s", 7)}
_OPERATION = {"operation": ("operation", 16), "form": ("form", 5)}
for _pass in ("forward", "backward", "weight"):
    _OPERATION |= {f"{_pass}_ms": (f"{_pass} ms", 11), f"{_pass}_of_floor": ("x", 6)}
_OPERATION["sizes"] = ("sizes", 52)
_STORE = {"arch": ("network", 16), "batch": ("batch", 5), "workers": ("workers", 7), "ms": ("ms", 7)}
_STORE |= {"patches_per_s": ("patches/s", 9), "share": ("reading, augmentation", 21)}
_INFERENCE = {"arch": ("network", 16), "form": ("form", 5), "shape": ("scan", 15), "seconds": ("s", 7), "gb": ("GB", 7)}

SECTIONS = {
    "operations": Kind(operations, 0.33, _OPERATION),
    "store": Kind(store, 0.12, _STORE),
    "steps": Kind(steps, 0.42, _STEP),
    "inference": Kind(inference, 0.08, _INFERENCE),
    "objectives": Kind(objectives, 0.05, _STEP),
}


# The run --------------------------------------------------------------------------------------------------------------


class Run:
    """Options, device, and the result, which is written after every row."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        here = {"device": device_name(self.device), "cores": os.cpu_count(), "quick": args.quick, "commit": commit()}
        here |= {"patch_size": list(args.patch_size), "repeats": args.repeats}
        here["versions"] = versions() | {"cuda": torch.version.cuda, "triton": _version("triton")}
        if self.device.type == "cuda":
            here["gb"] = torch.cuda.get_device_properties(self.device).total_memory / 1e9
        self.result = here | {"sections": {}}
        if args.resume and args.json.is_file():
            earlier = read_json(args.json)
            if other := [name for name in here if earlier.get(name) != here[name]]:
                raise ValueError(f"--resume: {args.json} was measured with another {other[0]}; take another --json")
            self.result = earlier
        self.clock = Clock(self.device, args.repeats)

    def measure(self) -> None:
        """All sections that are asked for. Time that one leaves over goes to the next."""
        self.result["limits"] = self.clock.limits()
        limits = self.result["limits"]
        print(f"{self.result['device']}, torch {torch.__version__}, bf16{', QUICK' if self.args.quick else ''}")
        print(f"copy {limits['copy_tb_per_s']:.3g} TB/s, matrix product {limits['matrix_tflops']:.4g} TFLOP/s")
        print("\n".join([ops.describe(self.device), *hardware.known_defects(self.device)]))
        total, until = sum(SECTIONS[name].share for name in self.args.only), time.monotonic()
        for name in self.args.only:
            until += self.args.seconds * SECTIONS[name].share / total
            SECTIONS[name].function(Section(name, self, until))

    def write(self) -> None:
        """Write the result, budgets included."""
        self.result["budgets"] = judge(self.result["sections"])
        write_json(self.args.json, self.result)

    def start_again(self) -> None:
        """Replace this process by a new one, which goes on where this one is."""
        sys.stdout.flush()
        resume = [] if self.args.resume else ["--resume"]
        os.execv(sys.executable, [sys.executable, *sys.argv, *resume])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def parse_options() -> argparse.Namespace:
    parser = cli.Parser(description="Measure operations, training and inference on one GPU.")
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the script")
    add("--quick", action="store_true", help="tiny networks and patches: seconds, and no meaning")
    add("--patch-size", type=cli.side, metavar="N", help="cube (default: 128; with --quick smaller)")
    add("--repeats", type=cli.positive_int, help="calls and steps that are timed (default: 10; with --quick 1)")
    add("--workers", type=cli.workers, help="that read a store (default: 12, or the cores; with --quick 1)")
    add("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="sections to measure")
    add("--seconds", type=cli.positive_int, default=270, help="for all sections; a row that has begun runs to its end")
    add("--profile", action="store_true", help="table of operators for each training step")
    add("--json", type=cli.output_file, metavar="FILE", default=Path("gpu.json"), help="where the numbers go")
    add("--resume", action="store_true", help="keep the rows that FILE has, and measure the others")
    args = parser.parse_args()
    args.repeats = args.repeats or (1 if args.quick else 10)
    if args.workers is None:
        args.workers = 1 if args.quick else min(12, os.cpu_count() or 1)
    args.patch_size = (args.patch_size,) * 3 if args.patch_size else (64, 32, 32) if args.quick else (128,) * 3
    check_patch_size(args.patch_size, "swin_tiny" if args.quick else "swin_unetr")
    return args


def main() -> int:
    args = parse_options()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device here; this script needs one GPU, or --quick --device cpu")
    run = Run(args)
    run.measure()
    print("\nthe sizes of --quick: no number or verdict means anything" if args.quick else "")
    for line in run.result["budgets"]:
        value = "" if line["value"] is None else f"{line['value']:.4g}, "
        print(f"{line['verdict']:>7}  {line['budget']}: {value}{line['limit']}")
    rows = [row for name in args.only for row in run.result["sections"][name]["rows"]]
    failed = sum("error" in row for row in rows)
    print(f"{len(rows)} rows, {failed} failed; {args.json}")
    return cli.EXIT_REJECTED if failed else cli.EXIT_OK


if __name__ == "__main__":
    cli.run(main)
