"""What a run says of itself: how long each part of a step takes, the loss, and what stops it."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm import tqdm

from amaes import distributed
from amaes.files import write_json
from amaes.hardware import peak_gb, resident_gb
from amaes.training.curves import draw_progress
from amaes.training.run_folder import MetricsFile, describe_step

if TYPE_CHECKING:
    from amaes.data.order import Batches
    from amaes.data.several_stores import SeveralStores
    from amaes.data.store import Store


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


class Progress:
    """The loss so far, where the time goes, and the lines that say so: tqdm and `metrics.jsonl`, on rank 0.

    Args:
        folder: where metrics.jsonl is.
        ranks: this process among all.
        network: whose gradients and weights are watched.
        order: which cases the steps are made of; of it also how a batch is shared out.
        store: of the cases.
        draw: of the objective; with `order` and `store` it describes a step whose loss is not finite.
        log_every: steps between lines.
        measure: further values for a line; all ranks call it together.

    Attributes:
        clock: for the parts of a step.
        validated: the last step that a validation was written for.
    """

    def __init__(
        self,
        folder: Path,
        ranks: distributed.Ranks,
        network: nn.Module,
        order: Batches,
        store: Store | SeveralStores,
        draw: Callable[..., object],
        log_every: int,
        measure: Callable[[], dict[str, float]] = dict,
    ) -> None:
        self._folder, self._ranks, self._network, self._log_every = folder, ranks, network, log_every
        self._order, self._store, self._draw, self._measure = order, store, draw, measure
        self._start, self._total = order.start, order.stop
        self._step = self._last_line = order.start
        self._names: list[str] = []  # of the terms of the loss
        self._window: torch.Tensor | None = None  # (steps since the last line, terms and whether it was skipped)
        self._bad: Counter[str] = Counter()  # cases that this rank could not read: how often
        self._bad_everywhere = self._bad  # on all ranks, at the last line
        self._metrics = MetricsFile(folder / "metrics.jsonl", order.start) if ranks.is_main else None
        known = (self._metrics.validated, self._metrics.skipped) if self._metrics else None
        self.validated, self._skipped = distributed.from_main(known)
        self._terminal = ranks.is_main and sys.stderr.isatty()
        self._logged_at = 0.0  # when the last line went to a log file
        bar = {"unit": "step", "disable": not self._terminal, "dynamic_ncols": True}
        self._bar = tqdm(total=self._total, initial=order.start, **bar)
        self.clock = Clock(ranks.device)

    def add(self, losses: dict[str, torch.Tensor], bad_cases: Sequence[str] = ()) -> None:
        """Count a micro-step's share of the terms of the loss, without waiting for the device.

        Args:
            losses: the terms by name.
            bad_cases: a line for each case of this rank that could not be read and was replaced; each is logged once.
        """
        row = torch.stack([term.detach().float() for term in losses.values()])
        if self._window is None:
            self._names = list(losses)
            longest = min(self._log_every, self._total - self._start)
            self._window = torch.zeros(longest, len(losses) + 1, device=row.device)
        self._window[self._step - self._last_line, :-1] += row / self._order.share.accumulate
        self.replaced(bad_cases)

    def replaced(self, bad_cases: Sequence[str]) -> None:
        """Count cases that could not be read and were replaced; log each once, whichever rank it was."""
        for line in bad_cases:
            case = line.rsplit("; ", 1)[0]  # the end of the line tells which one took its place this time
            if case not in self._bad:
                tqdm.write(f"replaced by another case: {line}")
            self._bad[case] += 1

    def step(self, lr: float, skipped: torch.Tensor | None = None) -> None:
        """End a step; every `log_every`, write the mean loss since the last line, gradient norm, speed and memory.

        Args:
            lr: learning rate of the step.
            skipped: flag of `amaes.training.optim.optimizer_step`.

        Raises:
            ValueError: the loss is not finite, or too many steps were left out.
        """
        if skipped is not None:
            self._window[self._step - self._last_line, -1] = skipped
        self._step += 1
        self.clock.step()
        self._bar.update()
        full = self._step - self._last_line == self._log_every
        if full or self._step % self._log_every == 0 or self._step == self._total:
            self._write_line(lr)

    def _write_line(self, lr: float) -> None:
        terms = self._means()
        gradients = [p.grad for p in self._network.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        self._bad_everywhere = sum(distributed.gather_from_ranks(self._bad), Counter())
        parts = self.clock.read()
        speed = 1000 * self._order.share.batch_size / parts["wall"]
        loss, measured = sum(terms.values()), self._measure()
        self._append(
            step=self._step,
            loss=loss,
            **({f"loss_{name}": value for name, value in terms.items()} if len(terms) > 1 else {}),
            **measured,
            lr=lr,
            grad_norm=norm,
            patches_per_s=speed,
            gb=peak_gb(self._ranks.device),
            resident_gb=resident_gb(),
            **{f"{part}_ms": value for part, value in parts.items()},
            **({"skipped_steps": self._skipped} if self._skipped else {}),
            **({"bad_cases": self._bad_everywhere.total()} if self._bad_everywhere else {}),
        )
        self._show(loss, speed, parts)
        self._window.zero_()
        self._last_line = self._step

    def _rows(self) -> list[list[float]]:
        """Every step since the last line: the means of its terms over ranks, and whether it was skipped. Waits."""
        window = self._window[: self._step - self._last_line]
        rows = distributed.sum_over_ranks(window / self._ranks.world).tolist()
        for i, (*terms, skipped) in enumerate(rows):
            if not skipped and not math.isfinite(sum(terms)):
                self._fail(self._last_line + i + 1, f"the loss is {sum(terms)}")
        return rows

    def _means(self) -> dict[str, float]:
        """The mean terms since the last line, over the steps that were not skipped; NaN where there are none."""
        rows = self._rows()
        skipped = [self._last_line + i + 1 for i, row in enumerate(rows) if row[-1]]
        for step in skipped:
            self._describe(step)
        self._skipped += len(skipped)
        allowed = SKIP_AT_LEAST + SKIP_SHARE * self._step
        if self._skipped > allowed:
            self._fail(self._step, f"{self._skipped} steps were skipped, at most {allowed:.0f} may be")
        kept = [row for row in rows if not row[-1]]
        if not kept:
            return dict.fromkeys(self._names, math.nan)
        return {name: sum(row[i] for row in kept) / len(kept) for i, name in enumerate(self._names)}

    def _describe(self, step: int) -> Path:
        """Leave in the run's folder what a step was made of."""
        path = self._folder / f"not-finite-step-{step}.json"
        if self._ranks.is_main:
            write_json(path, {"step": step, **describe_step(step, self._order, self._store, self._draw)})
        return path

    def _fail(self, step: int, problem: str) -> None:
        path = self._describe(step)
        raise ValueError(
            f"step {step}: {problem}; not saved, what was saved before is sound; the step's cases and draws are in "
            f"{path}; `on_nan` skip leaves such steps out, a lower `lr` may help"
        )

    def _show(self, loss: float, speed: float, parts: dict[str, float]) -> None:
        """The progress bar, or a line of the log every ten seconds."""
        waiting = 100 * parts.get("data", 0.0) / parts["wall"]
        line = f"loss {loss:.4f}, {speed:.1f} patches/s, waiting for data {waiting:.0f} %"
        if waiting > 20:
            line += " (DATA-BOUND: more workers, or a local disk for the store, would help)"
        if self._skipped:
            line += f", {self._skipped} steps skipped"
        if bad := self._bad_everywhere:
            line += f", {len(bad)} unreadable cases replaced {bad.total()} times"
        self._bar.set_postfix_str(line)
        if not self._ranks.is_main or self._terminal:
            return
        if time.monotonic() - self._logged_at > 10 or self._step == self._total:
            hours = (self._total - self._step) * parts["wall"] / 3.6e6
            line += f", {timedelta(seconds=round(3600 * hours))} left"
            if self._ranks.device.type == "cuda":
                line += f" = {hours * self._ranks.world:.1f} GPU-hours"
            tqdm.write(f"step {self._step} of {self._total}: {line}")
            self._logged_at = time.monotonic()

    def write_validation(self, loss: float, baseline: float, trivial: str, volumes: int) -> None:
        """Write and log the loss of a validation of so many volumes, and that of predicting what `trivial` names."""
        self.validated = self._step
        self._append(step=self._step, val_loss=loss, val_baseline=baseline, val_volumes=volumes)
        self._draw_curves()
        if self._ranks.is_main:
            tqdm.write(f"step {self._step}: validation loss {loss:.5f} (predicting {trivial}: {baseline:.5f})")

    def write_dice(self, dice: float, cases: int, best: bool) -> None:
        """Write and log the Dice of whole validation scans."""
        self._append(step=self._step, val_dice=dice, val_cases=cases)
        self._draw_curves()
        if self._ranks.is_main:
            told = ", the best so far: best.pt" if best else ""
            tqdm.write(f"step {self._step}: validation Dice {100 * dice:.2f} % over {cases} cases{told}")

    def check_finite(self) -> None:
        """Refuse to save what has gone wrong since the last line. Waits for the device.

        Raises:
            ValueError: the loss or a weight is not finite.
        """
        if self._step > self._last_line:
            self._rows()
        # The largest and not the root of the sum of squares, which overflows where weights are finite.
        largest = torch.nn.utils.get_total_norm(list(self._network.parameters()), norm_type=math.inf).item()
        if not math.isfinite(largest):
            self._fail(self._step, f"the largest weight is {largest}")

    def _append(self, **values) -> None:
        if self._metrics is not None:
            self._metrics.write(**values)

    def _draw_curves(self) -> None:
        """progress.png anew, where matplotlib is installed."""
        if self._ranks.is_main and (problem := draw_progress(self._folder)):
            tqdm.write(problem)

    def close(self) -> None:
        """End the progress bar, and draw progress.png.

        Raises:
            ValueError: the run is at its end, and so many of its steps were left out that it is not worth its name.
        """
        self._bar.close()
        self._draw_curves()
        if self._step == self._total and self._skipped > SKIP_AT_END * self._total:
            text = f"{self._skipped} of {self._total} steps were skipped, their loss or gradient was not finite"
            raise ValueError(f"{self._folder}: {text}; the saved network is of no use; a lower `lr` may help")


SKIP_AT_END = 0.25  # share of a run's steps that may have been left out when it ends
SKIP_AT_LEAST, SKIP_SHARE = 10, 0.01  # steps that `on_nan` skip may leave out: so many, and this share of all
