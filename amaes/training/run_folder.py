"""The folder of a training run: its configuration, its metrics, and what its checkpoints hold."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import nn

import amaes
from amaes import checkpoint, distributed, hardware
from amaes.data.splits import first_difference
from amaes.files import hold, parse_json, read_json, write_json, write_text
from amaes.training.earlier import with_later_options

if TYPE_CHECKING:
    from amaes.data.order import Batches
    from amaes.data.several_stores import SeveralStores
    from amaes.data.store import Store

# What may differ when a run is continued: none of it changes the sequence of patches, draws and masks, but for what is
# done about a case or a loss that would have ended the run.
MAY_CHANGE = frozenset(
    (
        *("out", "data", "weights", "fold", "resume", "overwrite", "keep", "log_every", "save_every", "val_every"),
        *("save_minutes", "workers", "device", "compile", "accumulate", "checkpoint_activations"),
        *("on_nan", "on_bad_case", "panels_every", "benchmark", "pretrain_data", "strict_leakage", "near_duplicates"),
        *("splits_file", "patience"),
    )
)


RUN_FORMAT = "amaes-run-1"
LOCK = ".training.lock"


@dataclass(frozen=True)
class RunFolder:
    """A run as it lies on disk. Rank 0 writes; all ranks call the same methods.

    Attributes:
        path: the folder, or that of a fold.
        kind: "pretrain" or "segment"; a run of the other kind is never touched.
        ranks: this process among all.
        task, build: what rebuilds the network (`amaes.models.build_network`).
        store: trained on.
        patch_size: (X, Y, Z), voxels.
        options: every option of the script, plain data.
        keep: newest checkpoints that are kept.
    """

    path: Path
    kind: str
    ranks: distributed.Ranks
    task: str
    build: dict
    store: Store | SeveralStores
    patch_size: Sequence[int]
    options: dict
    keep: int
    _locks: list[BinaryIO | None] = field(default_factory=list, repr=False)

    def settle_micro_steps(
        self,
        accumulate: int | str,
        network: nn.Module,
        batch_size: int,
        *,
        bf16: bool,
        views: int = 1,
        begin_anew: bool = False,
    ) -> int:
        """Micro-steps per step: as asked for, else as this run began with on as many ranks, else as memory needs.

        Args:
            accumulate: a number, or "auto".
            network: on the meta device.
            batch_size: patches per step over all ranks.
            bf16: autocast to bfloat16 is on.
            views: inputs of the network per patch. Where there are several, the loss compares the patches of a
                micro-step: it needs all of them in one.
            begin_anew: no run is continued.

        Raises:
            ValueError: one patch alone needs more memory than there is.
        """
        fitting = hardware.fit_micro_batch(network, self.patch_size, batch_size, self.ranks, bf16, views)
        if accumulate != "auto":
            return int(accumulate)
        if views > 1:
            return 1
        begin_anew = begin_anew and not self.ranks.restarts  # by torchrun: the run that began anew continues
        earlier = None if begin_anew or not self.ranks.is_main else _read_config(self.path / "config.json", self.kind)
        recorded = {} if earlier is None else earlier["machine_choice"]
        same = recorded.get("world") == self.ranks.world
        return distributed.from_main(recorded["accumulate"] if same else fitting)

    def open(
        self,
        record: dict,
        accumulate: int,
        *,
        resume: str,
        overwrite: bool,
        log: Callable[[str], None],
        part: str | None = None,
    ) -> None:
        """Create the folder, or check that the run found there is the same one. A restart by torchrun continues.

        Args:
            record: further plain data for config.json (fingerprint of the store, splits, ...), compared as well.
            accumulate: micro-steps per step, recorded for this number of ranks.
            resume: "auto" continues a run found there, "never" refuses it.
            overwrite: delete what a run left there, and start over.
            log: is told what a user should know of the run that continues.
            part: the one folder in it that is trained, such as "fold0"; other processes may train the others.

        Raises:
            ValueError: a run with other options is there (shows both values), the folder holds something else, or
                `resume` is "never" and the folder is not empty, or another process trains in it.
        """
        if not self.ranks.is_main:
            return
        if self.ranks.restarts:
            resume, overwrite = "auto", False
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"`out` {self.path}: a file, expected a folder")
        config_file = self.path / "config.json"
        if _read_config(config_file, self.kind) is None:
            _refuse_other_content(self.path)
        self._hold(part)
        old = _read_config(config_file, self.kind)
        if old is not None and overwrite:
            _clear(self.path)
            old = None
        started = {"time": _now(), "command": [Path(sys.executable).name, *sys.argv]}
        machine_choice = {"accumulate": accumulate, "world": self.ranks.world}
        if old is None:
            self._write_config(record, machine_choice, started)
            return
        if resume == "never":
            raise ValueError(
                f"`out` {self.path}: holds a run already; take another folder, `overwrite`, or `resume` auto"
            )
        now = json.loads(json.dumps(self.options))
        _lengthen(old, now, record, log)
        _refuse_changes(self.path, with_later_options(old["options"], now), now, "`{}`")
        _refuse_changes(self.path, old["record"], json.loads(json.dumps(record)), "{}")
        ranks_before = old["machine_choice"]["world"]
        if ranks_before != self.ranks.world:
            log(
                f"the run had {ranks_before} ranks, now {self.ranks.world}: cases, draws and masks stay the same, sums "
                "of gradients are rounded differently"
            )
            old["machine_choice"] = machine_choice
        old["starts"].append(started)
        write_json(config_file, old)

    def _write_config(self, record: dict, machine_choice: dict, started: dict) -> None:
        content = {
            "format": RUN_FORMAT,
            "task": self.kind,
            "options": self.options,
            "record": record,
            "machine_choice": machine_choice,
            "versions": versions(),
            "commit": commit(),
            "starts": [started],
        }
        write_json(self.path / "config.json", content)

    def _hold(self, part: str | None) -> None:
        """Keep other training processes out of the folder, or out of a part of it, as long as this one lives."""
        text = "another process trains here; wait for it, stop it, or take another `out`"
        self._locks.append(hold(self.path, text, name=LOCK, shared=part is not None))
        if part is not None:
            self._locks.append(hold(self.path / part, text, name=LOCK))

    def is_finished(self, steps: int) -> bool:
        """Whether the last of so many steps has a sound checkpoint. (A fold that `patience` ended has none.)"""
        path = self.path / "checkpoints" / f"step-{steps}.pt"
        is_there = self.ranks.is_main and path.is_file()
        return distributed.from_main(is_there and checkpoint.latest(path.parent, to_continue=True)[1] == path)

    def load_newest(self, network: nn.Module, optimizer: torch.optim.Optimizer, log: Callable[[str], None]) -> int:
        """Load the newest sound checkpoint, on every rank; the step it was made at, 0 where there is none."""
        folder, is_main = self.path / "checkpoints", self.ranks.is_main
        content, path, damaged = checkpoint.latest(folder, to_continue=True) if is_main else (None, None, [])
        for line in damaged:
            log(line)
        path = distributed.from_main(path)
        if path is None:
            return 0
        if content is None:
            content = checkpoint.read(path)
        checkpoint.load_weights(network, path, content["model"])
        try:
            optimizer.load_state_dict(content["optimizer"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: its optimizer does not fit the network ({error}); delete the file") from None
        log(f"continuing at step {content['step']} from {path}")
        return content["step"]

    def save(self, step: int, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write `checkpoints/step-N.pt`: weights, optimizer, what rebuilds the network and prepares a scan.

        Args:
            step: steps done.
            network, optimizer: the network without what DDP and compilation put around it.

        Raises:
            ValueError: the store was changed since training began to read it.
        """
        if self.ranks.is_main:
            content = {**self._content(step, network), "optimizer": optimizer.state_dict()}
            checkpoint.save(self.path / "checkpoints", content, self.keep)

    def save_best(self, step: int, network: nn.Module, dice: float) -> None:
        """Write `checkpoints/best.pt`: as `save`, without the optimizer, with the Dice on the validation cases."""
        if self.ranks.is_main:
            content = {**self._content(step, network), "validation_dice": dice}
            checkpoint.save_best(self.path / "checkpoints", content)

    def _content(self, step: int, network: nn.Module) -> dict:
        try:
            self.store.check_unchanged()
        except ValueError as error:
            text = "not saved, what was saved before is sound; take another `out`, or write the store as it was"
            raise ValueError(f"step {step}: {error}; {text}") from None
        labels = self.store.labels.items() if self.task == "segment" else ()
        return {
            "task": self.task,
            "model": network.state_dict(),
            "step": step,
            "build": self.build,
            "preprocess": self.store.config,
            "channels": self.store.channels,
            "labels": {str(value): name for value, name in labels},
            "patch_size": list(self.patch_size),
            "provenance": {
                "options": self.options,
                "store": self.store.fingerprint,
                "versions": versions(),
                "commit": commit(),
            },
        }


def _refuse_other_content(folder: Path) -> None:
    others = sorted(entry.name for entry in folder.iterdir() if not _may_lie_in(entry)) if folder.is_dir() else []
    if others:
        raise ValueError(f"`out` {folder}: not a run, and holds {others[0]}; take an empty or a new folder")


def _read_config(path: Path, kind: str) -> dict | None:
    """config.json of a run of this kind; None where there is none."""
    if not path.is_file():
        return None
    try:
        config = read_json(path)
    except ValueError:
        config = None
    if not isinstance(config, dict) or config.get("format") != RUN_FORMAT:
        raise ValueError(f"`out` {path.parent}: its config.json is not of a run ({RUN_FORMAT}); take another folder")
    if "chosen" in config:  # its name in earlier versions
        config["machine_choice"] = config.pop("chosen")
    for name, (is_right, expected) in ENTRIES.items():
        if not is_right(config.get(name)):
            text = f"its config.json is damaged: {name!r} is {config.get(name)!r:.80}, expected {expected}"
            raise ValueError(f"`out` {path.parent}: {text}; take another folder")
    if config["task"] != kind:
        raise ValueError(f"`out` {path.parent}: holds a run of task {config['task']!r}, this is {kind!r}; take another")
    return config


def _is_machine_choice(value: object) -> bool:
    numbers = [value.get(name) for name in ("accumulate", "world")] if isinstance(value, dict) else [None]
    return all(type(number) is int and number >= 1 for number in numbers)


ENTRIES = {  # of config.json that are read: whether a value is right, and which are
    "task": (lambda value: isinstance(value, str), "a text"),
    **dict.fromkeys(("options", "record"), (lambda value: isinstance(value, dict), "an object")),
    "machine_choice": (_is_machine_choice, "numbers accumulate and world"),
    "starts": (lambda value: isinstance(value, list), "a list"),
}


def _may_lie_in(entry: Path) -> bool:
    """What a new run may find in its folder: the demo's data, and what a killed start left."""
    return entry.name in ("demo", LOCK) or (entry.name.startswith(".") and entry.name.endswith(".tmp"))


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


def _lengthen(old: dict, options: dict, record: dict, log: Callable[[str], None]) -> None:
    """Take over a larger number of steps into the old configuration, and say so."""
    before, now, name = old["options"], options, "steps"
    if "total_steps" in record:  # of pretraining, where epochs may be given instead
        before |= {key: options.get(key) for key in ("steps", "epochs")}
        before, now, name = old["record"], record, "total_steps"
    if type(before.get(name)) is int and before[name] < now[name]:
        text = "from here on the learning rate is that of a run of this length"
        log(f"the run is made longer, {now[name]} instead of {before[name]} steps; {text}")
        before[name] = now[name]


def _refuse_changes(folder: Path, old: dict, new: dict, form: str) -> None:
    for name in sorted(set(old) | set(new)):
        if name not in MAY_CHANGE and old.get(name) != new.get(name):
            if name == "splits" and (difference := first_difference(old.get(name, []), new[name])):
                raise ValueError(
                    f"the folds differ from those of the run in {folder}: {difference}; take another `out`"
                )
            shown = form.format(name)
            values = [str(config.get(name)) for config in (new, old)]
            values = [value if len(value) <= 80 else value[:77] + "..." for value in values]
            raise ValueError(
                f"{shown} {values[0]}: the run in {folder} has {values[1]}; take another `out`, or `overwrite`"
            )


def versions() -> dict[str, str]:
    """Versions of everything that computes."""
    return {
        "amaes": amaes.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a class of its own, which a checkpoint must not hold
        "cudnn": str(torch.backends.cudnn.version()),
        "numpy": np.__version__,
        "scipy": metadata.version("scipy"),
        "nibabel": metadata.version("nibabel"),
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


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line. Lines past the step that a run continues from are dropped.

    Attributes:
        validated: that step, if a validation was written for it, else None.
        skipped: steps that were left out up to that step.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept, self.validated, self.skipped = [], None, 0
        if path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = parse_json(line)
                except ValueError:  # a line cut short when the run was killed
                    continue
                at = entry.get("step") if isinstance(entry, dict) else None
                if type(at) is int and at <= step:
                    kept.append(line + "\n")
                    if type(entry.get("skipped_steps")) is int:
                        self.skipped = entry["skipped_steps"]
                    if at == step and "val_loss" in entry:
                        self.validated = step
        write_text(path, "".join(kept))
        self._path = path

    def write(self, **values) -> None:
        """Append one line, whole or not at all; floats to six significant digits, null where they are not finite."""
        line = {k: _short(v) if isinstance(v, float) else v for k, v in values.items()}
        content = (json.dumps(line) + "\n").encode()
        try:
            with self._path.open("ab", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                try:
                    if file.write(content) < len(content):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(end)
                    raise
        except OSError as error:
            raise OSError(
                f"{self._path}: could not be written ({error.strerror}); the same command continues"
            ) from error


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def describe_step(step: int, order: Batches, store: Store | SeveralStores, draw: Callable[..., object]) -> dict:
    """What a step was made of: its samples, and the draws of their augmentation, as plain data.

    Args:
        step: counted from 1, as in metrics.jsonl.
        order: of the run.
        store: the cases.
        draw: what is drawn for a batch of (epochs, positions of cases in the store, channels): an object with fields.
    """
    samples = order.of_step(step - 1)
    draws = draw([epoch for epoch, _ in samples], [case for _, case in samples], len(store.channels))
    return {
        "seed": order.seed,
        "store": str(store.path),
        "samples": [{"epoch": epoch, "case": store.cases[case].id} for epoch, case in samples],
        "draws": {name: np.asarray(value).tolist() for name, value in vars(draws).items()},
    }
