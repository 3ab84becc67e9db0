"""When a run stops, and when it saves: ranks agree on both, so that none goes on alone."""

from __future__ import annotations

import math
import signal
import time

import torch

from amaes import distributed

REPEAT_SIGNAL_SECONDS = 3.0  # further signals within this time count as the first
ASK_EVERY_STEPS = 10  # on CUDA: hosts run ahead of their devices, and would wait for each other at every step


class Stop:
    """Ctrl-C, SIGTERM or SIGUSR1 as a request, so that the step under way is finished and saved.

    Args:
        ranks: this process among all.
        save_minutes: the longest time without a checkpoint.

    Attributes:
        agreed: all ranks know that one of them was asked to stop.
    """

    def __init__(self, ranks: distributed.Ranks, save_minutes: float) -> None:
        self.agreed = False
        self._ranks, self._save_seconds = ranks, 60 * save_minutes
        self._requested_at = math.inf  # on the monotonic clock
        self.saved()
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._handle)

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop, or has lost its launcher; other ranks may not know yet."""
        return self._requested_at < math.inf or self._ranks.abandoned

    def ask(self, step: int) -> bool:
        """Whether to save after `step`, because a rank was asked to stop or the last checkpoint is too old.

        With several ranks their hosts ask each other: on the CPU at every step, on CUDA at every tenth.
        """
        if self._ranks.world > 1 and self._ranks.device.type == "cuda" and step % ASK_EVERY_STEPS:
            return self.agreed
        wishes = torch.tensor([self.requested, time.monotonic() - self._saved_at > self._save_seconds]).float()
        stop, save = (distributed.sum_over_ranks(wishes) > 0).tolist()
        self.agreed = self.agreed or stop
        return self.agreed or save

    def saved(self) -> None:
        """Note that a checkpoint was written, or that a run begins."""
        self._saved_at = time.monotonic()

    def _handle(self, number: int, frame: object) -> None:
        # Asked again: stop at once. A terminal and torchrun send the same Ctrl-C within moments of each other.
        if time.monotonic() > self._requested_at + REPEAT_SIGNAL_SECONDS:
            raise KeyboardInterrupt
        self._requested_at = min(self._requested_at, time.monotonic())
