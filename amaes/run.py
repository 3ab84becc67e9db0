"""The folder of a training run: its configuration, its metrics, and how long each part of a step takes."""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import scipy
import torch
from torch import nn
from tqdm import tqdm

import amaes
from amaes import checkpoint, distributed
from amaes.data import Store
from amaes.files import write_json, write_text
from amaes.options import as_plain

try:
    import resource
except ImportError:  # Windows
    resource = None

# What may differ when a run is continued: none of it changes the sequence of patches, draws and masks.
MAY_CHANGE = frozenset(
    (
        *("out", "data", "weights", "fold", "resume", "overwrite", "keep", "log_every", "save_every", "val_every"),
        *("workers", "device", "compile", "accumulate", "checkpoint_activations"),
    )
)


RUN_FORMAT = "amaes-run-1"


def open_run(
    folder: Path,
    task: str,
    options: dict,
    record: dict,
    chosen: dict,
    resume: str = "auto",
    overwrite: bool = False,
) -> dict:
    """Create the folder of a run, or check that a run found there is the same one.

    Args:
        folder: RUN.
        task: "pretrain" or "segment"; a run of the other task is never touched.
        options: every option of the script, by name.
        record: further plain data for config.json (store fingerprint, splits, ...), compared as well.
        chosen: what was settled for this machine at the first start and holds as long as the number of ranks does.
        resume: "auto" continues a run found there, "never" refuses it.
        overwrite: delete what a run left there, and start over.

    Returns:
        `chosen`, or that of the run being continued if it has the same "world".

    Raises:
        ValueError: a run with other options is there (shows both values), the folder holds something else, or
            `resume` is "never" and the folder is not empty.
    """
    path = folder / "config.json"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: a file, expected a folder")
    old = _read_config(path, task)
    if old is not None and overwrite:
        _clear(folder)
        old = None
    started = {"time": _now(), "command": [Path(sys.executable).name, *sys.argv]}
    if old is not None:
        if resume == "never":
            raise ValueError(f"--out {folder}: holds a run already; take another folder, --overwrite, or --resume auto")
        _compare(folder, old["options"], json.loads(json.dumps(options)), "--{}")
        _compare(folder, old["record"], json.loads(json.dumps(record)), "{}")
        if old["chosen"]["world"] != chosen["world"]:
            old["chosen"] = chosen
        old["starts"].append(started)
        write_json(path, old)
        return old["chosen"]
    strangers = sorted(entry.name for entry in folder.iterdir() if not _may_lie_in(entry)) if folder.is_dir() else []
    if strangers:
        raise ValueError(f"--out {folder}: not a run, and holds {strangers[0]}; take an empty or a new folder")
    write_json(
        path,
        {
            "format": RUN_FORMAT,
            "task": task,
            "options": options,
            "record": record,
            "chosen": chosen,
            "versions": versions(),
            "commit": commit(),
            "starts": [started],
        },
    )
    return chosen


def _read_config(path: Path, task: str) -> dict | None:
    """config.json of a run of this task; None where there is none."""
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
    except ValueError:
        config = None
    if not isinstance(config, dict) or config.get("format") != RUN_FORMAT:
        raise ValueError(f"--out {path.parent}: its config.json is not of a run ({RUN_FORMAT}); take another folder")
    if config["task"] != task:
        raise ValueError(f"--out {path.parent}: holds a run of task {config['task']!r}, this is {task!r}; take another")
    return config


def _may_lie_in(entry: Path) -> bool:
    """What a new run may find in its folder: the demo's data, and what a killed start left."""
    return entry.name == "demo" or (entry.name.startswith(".") and entry.name.endswith(".tmp"))


def _clear(folder: Path) -> None:
    """Delete what a run leaves, config.json last: killed on the way, the folder is still a run."""
    for sub in (folder / "checkpoints", *folder.glob("fold[0-9]*")):
        if sub.is_symlink():
            sub.unlink()
        elif sub.is_dir():
            shutil.rmtree(sub)
    for name in ("metrics.jsonl", "summary.json", "summary.md", "config.json"):
        (folder / name).unlink(missing_ok=True)


def _compare(folder: Path, old: dict, new: dict, form: str) -> None:
    for name in sorted(set(old) | set(new)):
        if name not in MAY_CHANGE and old.get(name) != new.get(name):
            shown = form.format(name.replace("_", "-"))
            values = [str(config.get(name)) for config in (new, old)]
            values = [value if len(value) <= 80 else value[:77] + "..." for value in values]
            raise ValueError(
                f"{shown} {values[0]}: the run in {folder} has {values[1]}; take another --out, or --overwrite"
            )


def checkpoint_content(
    task: str,
    step: int,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    store: Store,
    build: dict,
    args: argparse.Namespace,
) -> dict:
    """A checkpoint: weights, optimizer, what rebuilds the network, what prepares a scan, where it comes from."""
    return {
        "task": task,
        "model": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "build": build,
        "preprocess": store.config,
        "channels": store.channels,
        "labels": {str(value): name for value, name in store.labels.items()} if task == "segment" else {},
        "patch_size": list(args.patch_size),
        "provenance": {
            "options": as_plain(args),
            "store": store.fingerprint,
            "versions": versions(),
            "commit": commit(),
        },
    }


def versions() -> dict[str, str]:
    """Versions of everything that computes."""
    return {
        "amaes": amaes.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a class of its own, which a checkpoint must not hold
        "cudnn": str(torch.backends.cudnn.version()),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "nibabel": nibabel.__version__,
    }


@cache
def commit() -> str | None:
    """The commit of the source tree this package is in, "-dirty" added when files differ; None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Metrics:
    """`metrics.jsonl`: one JSON object a line. Lines past the step that a run continues from are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        kept = []
        if path.is_file():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # a line cut short when the run was killed
                    continue
                if isinstance(entry, dict) and entry["step"] <= step:
                    kept.append(line + "\n")
        write_text(path, "".join(kept))
        self._path = path

    def write(self, **values) -> None:
        """Append one line; floats are kept to six significant digits, null where they are not finite."""
        line = {k: _short(v) if isinstance(v, float) else v for k, v in values.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


class Clock:
    """Milliseconds per part of a step, measured without synchronising the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._host: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._steps = 0
        self._wall = 0.0
        self.start()

    def start(self) -> None:
        """Go on measuring from here; what was done since the last step does not count."""
        self._began = self._last = time.perf_counter()
        self._mark = self._record()

    def lap(self, part: str, on_host: bool = False) -> None:
        """Add the time since the last call to `part`; `on_host` for what the host waits for, on CUDA too."""
        now, mark = time.perf_counter(), self._record()
        if self._cuda and not on_host:
            self._events.append((part, self._mark, mark))
        else:
            self._host[part] = self._host.get(part, 0.0) + now - self._last
        self._last, self._mark = now, mark

    def step(self) -> None:
        """A step has ended."""
        now = time.perf_counter()
        self._wall += now - self._began
        self._began = now
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Mean milliseconds per step and part, and "wall" over all, since the last reading. Synchronises CUDA."""
        parts = dict(self._host)
        wall = self._wall
        if self._cuda:
            torch.cuda.synchronize()
            for part, begin, end in self._events:
                parts[part] = parts.get(part, 0.0) + begin.elapsed_time(end) / 1000
            wall += time.perf_counter() - self._began  # the device finishes what the host has asked for
        parts["wall"] = wall
        means = {part: 1000 * seconds / max(1, self._steps) for part, seconds in parts.items()}
        self._host, self._events, self._steps, self._wall = {}, [], 0, 0.0
        self.start()
        return means

    def _record(self) -> torch.cuda.Event | None:
        if not self._cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def peak_gb(device: torch.device) -> float:
    """Largest memory so far, GB: of the GPU, or of this process on the CPU (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        return 0.0
    kilo = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 1e9


class StopRequest:
    """Ctrl-C or SIGTERM as a flag, so that the step under way is finished and saved."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested:  # asked twice: stop at once
            raise KeyboardInterrupt
        self.requested = True

    def agreed(self, step: int, ranks: distributed.Ranks) -> bool:
        """Whether to stop after this step. Several ranks must agree: after every step on the CPU, every tenth on CUDA,
        where asking waits for the device."""
        if ranks.world == 1:
            return self.requested
        if ranks.device.type == "cuda" and step % 10:
            return False
        self.requested = bool(distributed.sum_over_ranks(torch.tensor(float(self.requested), device=ranks.device)))
        return self.requested


def restore(
    folder: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: distributed.Ranks,
    log: Callable[[str], None],
) -> int:
    """Load the newest sound checkpoint of `folder` into network and optimizer, on every rank; the step it was made at.

    Returns:
        0 where there is none.
    """
    content, path, complaints = checkpoint.latest(folder) if ranks.is_main else (None, None, [])
    for line in complaints:
        log(line)
    path = distributed.from_main(path)
    if path is None:
        return 0
    if content is None:
        content = checkpoint.read(path)
    network.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    log(f"continuing at step {content['step']} from {path}")
    return content["step"]


def _not_finite(step: int, what: str) -> str:
    return f"step {step}: {what}; not saved, what was saved before is sound; a lower --lr may help"


class Progress:
    """The loss so far, where the time goes, and the lines that say so: tqdm and `metrics.jsonl`, on rank 0.

    Args:
        folder: where metrics.jsonl is.
        ranks: this process among all.
        step, total: where the run begins and ends.
        every: steps between lines.
        batch_size: patches per step over all ranks.
    """

    def __init__(
        self, folder: Path, ranks: distributed.Ranks, step: int, total: int, every: int, batch_size: int
    ) -> None:
        self._ranks, self._every, self._batch_size = ranks, every, batch_size
        self._loss = torch.zeros((), device=ranks.device)
        self._since = step
        self._metrics = Metrics(folder / "metrics.jsonl", step) if ranks.is_main else None
        self._total = total
        self._terminal = ranks.is_main and sys.stderr.isatty()
        self._said = 0.0  # when the last line went to a log file
        self._bar = tqdm(total=total, initial=step, unit="step", disable=not self._terminal, dynamic_ncols=True)
        self.clock = Clock(ranks.device)

    def add(self, loss: torch.Tensor) -> None:
        """Count a (micro-)step's share of the loss, without waiting for the device."""
        self._loss += loss.detach()

    def report(self, step: int, lr: float, network: nn.Module) -> None:
        """End a step; every so many, write the mean loss since the last line, gradient norm, speed and memory.

        Raises:
            ValueError: the loss is not finite.
        """
        self.clock.step()
        self._bar.update()
        if step % self._every and step != self._total:
            return
        loss = (distributed.sum_over_ranks(self._loss) / self._ranks.world / (step - self._since)).item()
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        parts = self.clock.read()
        speed = 1000 * self._batch_size / parts["wall"]
        self.write(
            step=step,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            patches_per_s=speed,
            gb=peak_gb(self._ranks.device),
            **{f"{part}_ms": value for part, value in parts.items()},
        )
        waiting = 100 * parts.get("data", 0.0) / parts["wall"]
        line = f"loss {loss:.4f}, {speed:.1f} patches/s, waiting for data {waiting:.0f} %"
        self._bar.set_postfix_str(line)
        if self._ranks.is_main and not self._terminal and (time.monotonic() - self._said > 10 or step == self._total):
            left = timedelta(seconds=round((self._total - step) * parts["wall"] / 1000))
            tqdm.write(f"step {step} of {self._total}: {line}, {left} left")
            self._said = time.monotonic()
        self._loss = torch.zeros_like(self._loss)
        self._since = step
        if not math.isfinite(loss):
            raise ValueError(_not_finite(step, f"the loss is {loss}"))

    def check_before_saving(self, step: int, network: nn.Module) -> None:
        """Refuse to save what has gone wrong since the last line. Waits for the device.

        Raises:
            ValueError: the loss or a weight is not finite.
        """
        loss = distributed.sum_over_ranks(self._loss.clone()).item()
        size = torch.nn.utils.get_total_norm(list(network.parameters())).item()
        if not math.isfinite(loss) or not math.isfinite(size):
            raise ValueError(_not_finite(step, f"sum of losses {loss}, norm of weights {size}"))

    def write(self, **values) -> None:
        """A line of metrics.jsonl, on rank 0."""
        if self._metrics is not None:
            self._metrics.write(**values)

    def close(self) -> None:
        """End the progress bar."""
        self._bar.close()
