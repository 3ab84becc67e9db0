"""When to stop and when to save."""

from __future__ import annotations

import math
import signal
import time

import torch

from amaes import distributed

try:
    import resource
except ImportError:  # Windows
    resource = None


class StopRequest:
    """Ctrl-C, SIGTERM or SIGUSR1 as a flag, so that the step under way is finished and saved."""

    def __init__(self) -> None:
        self._asked = math.inf  # when, on the monotonic clock
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._handle)

    @property
    def requested(self) -> bool:
        return self._asked < math.inf

    def _handle(self, number: int, frame: object) -> None:
        # Asked again: stop at once. A terminal and torchrun send the same Ctrl-C within moments of each other.
        if time.monotonic() > self._asked + SAME_REQUEST:
            raise KeyboardInterrupt
        self._asked = min(self._asked, time.monotonic())


SAME_REQUEST = 3.0  # seconds in which further signals count as the first


class SavePoints:
    """When to save: every so many steps or minutes, at the end, and when asked to stop. Ranks agree on it.

    Args:
        stop: raised by signals.
        ranks: this process among all.
        every: steps between checkpoints.
        minutes: the longest time without one.
        total: the last step.
    """

    def __init__(self, stop: StopRequest, ranks: distributed.Ranks, every: int, minutes: float, total: int) -> None:
        self._stop, self._ranks, self._every, self._seconds, self._total = stop, ranks, every, 60 * minutes, total
        self._saved = self._asked_at = time.monotonic()
        self._asked, self._ask_from = None, 0  # the step after which hosts asked each other, and will again
        self.stopping = False

    @property
    def stop_requested(self) -> bool:
        """Whether this rank was asked to stop; others may not know yet."""
        return self._stop.requested or self._ranks.abandoned

    def due(self, step: int) -> bool:
        """Whether to save after `step`; then `stopping` tells whether to end there.

        Where there are several ranks, their wishes are summed on the hosts; on CUDA after every tenth step only, so
        that no host, running ahead of its device, waits for another one, or more often where ten steps take long.
        """
        now = time.monotonic()
        wishes = [self.stop_requested, now - self._saved > self._seconds]
        if self._ranks.world > 1:
            asking = self._ranks.device.type == "cpu" or step >= self._ask_from
            wishes = self._ask(step, wishes, now) if asking else [False, False]
        self.stopping, late = wishes
        due = step % self._every == 0 or step == self._total or self.stopping or late
        if due:
            self._saved = time.monotonic()
        return due

    def _ask(self, step: int, wishes: list[bool], now: float) -> list[bool]:
        """What any rank wishes; ranks also agree on the step after which they ask again."""
        *sums, seconds = distributed.sum_over_ranks(torch.tensor([*wishes, now - self._asked_at])).tolist()
        steps = 1 if self._asked is None else step - self._asked
        fitting = ASK_SECONDS * steps * self._ranks.world / max(seconds, 1e-9)
        self._ask_from = step + max(1, min(ASK_STEPS, int(fitting)))
        self._asked, self._asked_at = step, now
        return [total > 0 for total in sums]


ASK_STEPS, ASK_SECONDS = 10, 5.0  # hosts ask each other after so many steps, or this long; torchrun waits 30 seconds
