"""A run while it runs: how long each part of a step takes, when to save, and the lines that tell."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from amaes import distributed
from amaes.files import write_json
from amaes.training.run_folder import Metrics

try:
    import resource
except ImportError:  # Windows
    resource = None


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


def resident_gb() -> float:
    """Memory of this process in use now, GB (0 where the system does not tell)."""
    table = Path("/proc/self/statm")
    return int(table.read_text().split()[1]) * resource.getpagesize() / 1e9 if table.is_file() else 0.0


class Progress:
    """The loss so far, where the time goes, and the lines that say so: tqdm and `metrics.jsonl`, on rank 0.

    Args:
        folder: where metrics.jsonl is.
        ranks: this process among all.
        step, total: where the run begins and ends.
        every: steps between lines.
        batch_size: patches per step over all ranks.
        accumulate: micro-steps per step.
        describe: what a step was made of, as plain data, for the report of a loss that is not finite.
        all_reduce_ms: see `amaes.distributed.Wrapped`.
    """

    def __init__(
        self,
        folder: Path,
        ranks: distributed.Ranks,
        step: int,
        total: int,
        every: int,
        batch_size: int,
        accumulate: int = 1,
        describe: Callable[[int], dict] = lambda step: {},
        all_reduce_ms: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._folder, self._ranks, self._every, self._batch_size = folder, ranks, every, batch_size
        self._accumulate, self._describe, self._all_reduce_ms = accumulate, describe, all_reduce_ms
        self._names: list[str] = []  # of the terms of the loss
        self._window: torch.Tensor | None = None  # (steps since the last line, terms and whether it was skipped)
        self._began = self._since = step
        self._skipped = 0
        self._bad: Counter[str] = Counter()  # cases that this rank could not read: how often
        self._bad_everywhere = self._bad  # on all ranks, at the last line
        self._metrics = Metrics(folder / "metrics.jsonl", step) if ranks.is_main else None
        self._total = total
        self._terminal = ranks.is_main and sys.stderr.isatty()
        self._said = 0.0  # when the last line went to a log file
        self._bar = tqdm(total=total, initial=step, unit="step", disable=not self._terminal, dynamic_ncols=True)
        self.clock = Clock(ranks.device)

    def add(self, step: int, terms: dict[str, torch.Tensor]) -> None:
        """Count a (micro-)step's share of the terms of the loss, without waiting for it."""
        row = torch.stack([term.detach().float() for term in terms.values()])
        if self._window is None:
            self._names = list(terms)
            longest = min(self._every, self._total - self._began)
            self._window = torch.zeros(longest, len(terms) + 1, device=row.device)
        self._window[step - self._since, :-1] += row / self._accumulate

    def skip(self, step: int, flag: torch.Tensor) -> None:
        """Note whether a step was left out (`amaes.training.optim.skip_if_not_finite`), without waiting for it."""
        self._window[step - self._since, -1] = flag

    def report(self, step: int, lr: float, network: nn.Module) -> None:
        """End a step; every so many, write the mean loss since the last line, gradient norm, speed and memory.

        Raises:
            ValueError: the loss is not finite.
        """
        self.clock.step()
        self._bar.update()
        if step - self._since < self._every and step % self._every and step != self._total:
            return
        terms = self._read(step)
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        self._bad_everywhere = sum(distributed.gather(self._bad), Counter())
        parts = self.clock.read()
        if (exchange := self._all_reduce_ms()) is not None:
            parts["all_reduce"] = exchange  # beside the backward pass: not a part of the sum
        speed = 1000 * self._batch_size / parts["wall"]
        loss = sum(terms.values())
        self.write(
            step=step,
            loss=loss,
            **({f"loss_{name}": value for name, value in terms.items()} if len(terms) > 1 else {}),
            lr=lr,
            grad_norm=norm,
            patches_per_s=speed,
            gb=peak_gb(self._ranks.device),
            resident_gb=resident_gb(),
            **{f"{part}_ms": value for part, value in parts.items()},
            **({"skipped_steps": self._skipped} if self._skipped else {}),
            **({"bad_cases": self._bad_everywhere.total()} if self._bad_everywhere else {}),
        )
        self._say(step, loss, speed, parts)
        self._window.zero_()
        self._since = step

    def _rows(self, step: int) -> list[list[float]]:
        """Every step since the last line: the means of its terms over ranks, and whether it was skipped. Waits."""
        rows = distributed.sum_over_ranks(self._window[: step - self._since] / self._ranks.world).tolist()
        for i, (*terms, skipped) in enumerate(rows):
            if not skipped and not math.isfinite(sum(terms)):
                self._fail(self._since + i + 1, f"the loss is {sum(terms)}")
        return rows

    def _read(self, step: int) -> dict[str, float]:
        """The mean terms since the last line, over the steps that were not skipped; NaN where there are none."""
        rows = self._rows(step)
        skipped = [self._since + i + 1 for i, row in enumerate(rows) if row[-1]]
        for number in skipped:
            self._report_bad(number)
        self._skipped += len(skipped)
        allowed = SKIP_AT_LEAST + SKIP_SHARE * (step - self._began)
        if self._skipped > allowed:
            self._fail(step, f"{self._skipped} steps were skipped since step {self._began}, at most {allowed:.0f} may")
        kept = [row for row in rows if not row[-1]]
        if not kept:
            return dict.fromkeys(self._names, math.nan)
        return {name: sum(row[i] for row in kept) / len(kept) for i, name in enumerate(self._names)}

    def _report_bad(self, step: int) -> Path:
        path = self._folder / f"not-finite-step-{step}.json"
        if self._ranks.is_main:
            write_json(path, {"step": step, **self._describe(step)})
        return path

    def _fail(self, step: int, what: str) -> None:
        """Raise, and leave what the step was made of in the run's folder."""
        path = self._report_bad(step)
        raise ValueError(
            f"step {step}: {what}; not saved, what was saved before is sound; the step's cases and draws are in "
            f"{path}; --on-nan skip leaves such steps out, a lower --lr may help"
        )

    def _say(self, step: int, loss: float, speed: float, parts: dict[str, float]) -> None:
        waiting = 100 * parts.get("data", 0.0) / parts["wall"]
        line = f"loss {loss:.4f}, {speed:.1f} patches/s, waiting for data {waiting:.0f} %"
        if waiting > 20:
            line += " (DATA-BOUND: raise --workers, or move the store to a local disk)"
        if self._skipped:
            line += f", {self._skipped} steps skipped"
        if self._bad_everywhere:
            bad = self._bad_everywhere
            line += f", {len(bad)} unreadable cases replaced {bad.total()} times"
        self._bar.set_postfix_str(line)
        if not self._ranks.is_main or self._terminal:
            return
        if time.monotonic() - self._said > 10 or step == self._total:
            hours = (self._total - step) * parts["wall"] / 3.6e6
            line += f", {timedelta(seconds=round(3600 * hours))} left"
            if self._ranks.device.type == "cuda":
                line += f" = {hours * self._ranks.world:.1f} GPU-hours"
            tqdm.write(f"step {step} of {self._total}: {line}")
            self._said = time.monotonic()

    def check_before_saving(self, step: int, network: nn.Module) -> None:
        """Refuse to save what has gone wrong since the last line. Waits for the device.

        Raises:
            ValueError: the loss or a weight is not finite.
        """
        if step > self._since:
            self._rows(step)
        # The largest and not the root of the sum of squares, which overflows where weights are finite.
        largest = torch.nn.utils.get_total_norm(list(network.parameters()), norm_type=math.inf).item()
        if not math.isfinite(largest):
            self._fail(step, f"the largest weight is {largest}")

    def bad_cases(self, complaints: list[str], log: Callable[[str], None]) -> None:
        """Count cases that this rank could not read and replaced; say so of each once."""
        for text in complaints:
            case = text.rsplit("; ", 1)[0]  # the end of the line tells which one took its place this time
            if case not in self._bad:
                log(f"replaced by another case: {text}")
            self._bad[case] += 1

    def write(self, **values) -> None:
        """A line of metrics.jsonl, on rank 0."""
        if self._metrics is not None:
            self._metrics.write(**values)

    def has(self, name: str) -> bool:
        """Whether `name` was written for the step that the run continues from; on rank 0."""
        return self._metrics is not None and name in self._metrics.names

    def close(self) -> None:
        """End the progress bar."""
        self._bar.close()


SKIP_AT_LEAST, SKIP_SHARE = 10, 0.01  # steps that --on-nan skip may leave out: so many, and this share of all
