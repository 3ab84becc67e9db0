"""Processes that read ahead, and what to say when the system kills one of them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess

from amaes import hardware
from amaes.files import first_line

_USUAL_CAUSES = {
    "SIGKILL": "as the system does when memory runs out",
    "SIGBUS": "as happens when /dev/shm is full, or when a file shrinks or its disk fails while it is read",
}


def ignore_job_signals(worker: int) -> None:
    """Start of a worker: signals sent to all processes of a job are for the training, which still needs batches.

    SIGTERM may also come from the training itself as it ends: the worker ends some seconds later, if it still runs.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # ends the process
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(SIGTERM_GRACE_SECONDS))


SIGTERM_GRACE_SECONDS = 30  # as many as torchrun gives


class Watch:
    """Keeps torch from interrupting the training for workers that are started inside the `with`; explains their end.

    torch's DataLoader raises from a signal handler, wherever the main thread is at that moment. With the handler put
    back, its own check of the workers (every five seconds while it waits for a batch) raises where the batch is asked
    for.
    """

    def __enter__(self) -> Watch:
        self._handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        return self

    def __exit__(self, *exception: object) -> None:
        if self._handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, self._handler)

    @staticmethod
    def explained(error: Exception, workers: Sequence[BaseProcess], reading: list[str]) -> Exception:
        """`error` itself while the workers are well, else one that says how a worker ended.

        Args:
            error: what asking for a batch raised.
            workers: the processes, also those that have ended.
            reading: ids of the cases of the batches that were asked for.
        """
        ended = connection.wait([worker.sentinel for worker in workers], timeout=5) if workers else []
        for worker in workers:
            if worker.sentinel in ended:
                worker.join(5)  # a process lets go of its sentinel a moment before its status is there
        dead = sorted((worker.pid, worker.exitcode) for worker in workers if worker.exitcode not in (None, 0))
        if not dead and "DataLoader worker" not in str(error):
            return error
        for worker in workers:
            worker.kill()  # the others may wait for ever for a lock that was the dead one's
        if not dead:  # torch says so, and no more is known
            how = f"ended ({first_line(error)})"
        elif dead[0][1] > 0:
            how = "(pid {}) ended with status {}".format(*dead[0])
        else:
            name = signal.Signals(-dead[0][1]).name
            how = f"(pid {dead[0][0]}) was killed by {name}" + (
                f", {_USUAL_CAUSES[name]}" if name in _USUAL_CAUSES else ""
            )
        shown = ", ".join(reading[:8]) + (f" and {len(reading) - 8} more" if len(reading) > 8 else "")
        return ChildProcessError(f"a process that reads patches {how}; being read: {shown}; {hardware.memory_advice()}")
