"""The folder of a training run: its configuration, its metrics, and what its checkpoints hold."""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import scipy
import torch
from torch import nn

import amaes
from amaes import checkpoint, distributed
from amaes.data.order import Batches
from amaes.data.store import Store
from amaes.files import write_json, write_text
from amaes.training.options import as_plain

# What may differ when a run is continued: none of it changes the sequence of patches, draws and masks, but for what is
# done about a case or a loss that would have ended the run.
MAY_CHANGE = frozenset(
    (
        *("out", "data", "weights", "fold", "resume", "overwrite", "keep", "log_every", "save_every", "val_every"),
        *("save_minutes", "workers", "device", "compile", "accumulate", "checkpoint_activations"),
        *("on_nan", "on_bad_case", "panels_every", "benchmark", "pretrain_data", "strict_leakage", "near_duplicates"),
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
    log: Callable[[str], None] = lambda line: None,
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
        log: is told what a user should know of the run that continues.

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
            log(
                f"the run had {old['chosen']['world']} ranks, now {chosen['world']}: cases, draws and masks stay the "
                "same, sums of gradients are rounded differently"
            )
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
    for sub in (folder / "checkpoints", folder / "panels", *folder.glob("fold[0-9]*")):
        if sub.is_symlink():
            sub.unlink()
        elif sub.is_dir():
            shutil.rmtree(sub)
    for pattern in ("not-finite-step-*.json", "summary*.json", "summary*.md"):
        for left in folder.glob(pattern):
            left.unlink()
    for name in ("metrics.jsonl", "leakage.json", "config.json"):
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
    """`metrics.jsonl`: one JSON object a line. Lines past the step that a run continues from are dropped.

    Attributes:
        names: of what was written for that very step.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept, self.names = [], set()
        if path.is_file():
            for line in path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # a line cut short when the run was killed
                    continue
                if isinstance(entry, dict) and entry["step"] <= step:
                    kept.append(line + "\n")
                    self.names.update(entry if entry["step"] == step else ())
        write_text(path, "".join(kept))
        self._path = path

    def write(self, **values) -> None:
        """Append one line; floats are kept to six significant digits, null where they are not finite."""
        line = {k: _short(v) if isinstance(v, float) else v for k, v in values.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


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


def describe_step(order: Batches, store: Store, draw: Callable[..., object], step: int) -> dict:
    """What a step was made of: its samples, and the draws of their augmentation, as plain data.

    Args:
        order: of the run.
        store: the cases.
        draw: what is drawn for a batch of (epochs, positions of cases in the store, channels): an object with fields.
        step: counted from 1, as in metrics.jsonl.
    """
    samples = order.of_step(step - 1)
    draws = draw([epoch for epoch, _ in samples], [case for _, case in samples], len(store.channels))
    return {
        "seed": order.seed,
        "store": str(store.path),
        "samples": [{"epoch": epoch, "case": store.cases[case].id} for epoch, case in samples],
        "draws": {name: np.asarray(value).tolist() for name, value in vars(draws).items()},
    }
