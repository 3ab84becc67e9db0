"""Worker processes that preprocess cases: one that dies, of lack of memory for example, costs its case alone."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnContext, SpawnProcess

Input, Output = TypeVar("Input"), TypeVar("Output")


def in_processes(
    items: Sequence[Input], job: Callable[[Input], Output], workers: int, worker_died: Callable[[Input, str], Output]
) -> Iterator[Output]:
    """The results of `job` for all items, in the order in which they are ready.

    A worker process that dies costs the item it had; another process takes its place.

    Args:
        items: arguments of `job`, plain data.
        job: a function that can be pickled.
        workers: number of processes.
        worker_died: gives the result of an item whose worker died, from the item and a text that says how it died.
    """
    context = multiprocessing.get_context("spawn")
    waiting, idle, busy = deque(items), [], {}  # busy: connection to (process, item)
    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                process, connection = idle.pop() if idle else _start(context, job)
                busy[connection] = process, waiting.popleft()
                with suppress(OSError):  # it died while idle: `recv` below finds the connection at its end
                    connection.send(busy[connection][1])
            for connection in wait(list(busy)):
                process, item = busy.pop(connection)
                try:
                    yield connection.recv()
                    idle.append((process, connection))
                except (EOFError, OSError):
                    process.join()
                    connection.close()
                    yield worker_died(item, _describe_exit(process.exitcode))
    finally:
        for process, connection in [*idle, *((process, connection) for connection, (process, _) in busy.items())]:
            connection.close()
            process.terminate()
            process.join()


def _start(context: SpawnContext, job: Callable) -> tuple[SpawnProcess, Connection]:
    """A new worker process, and the parent's end of the connection to it."""
    parent_end, worker_end = context.Pipe()
    process = context.Process(target=_serve, args=(worker_end, job), daemon=True)
    with _interrupt_later():
        process.start()
    worker_end.close()  # so that the death of the process ends the connection
    return process, parent_end


@contextmanager
def _interrupt_later() -> Iterator[None]:
    """Delay Ctrl-C until a process has started, since it would leave half a process; the process itself ignores it."""
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    resource_tracker.ensure_running()  # starting it inside would unblock the signal
    arrived = []
    # Another thread may receive the signal although this one blocks it; the handler then notes it for later.
    previous = signal.signal(signal.SIGINT, lambda number, frame: arrived.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by the process
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, previous)
    if arrived:
        signal.raise_signal(signal.SIGINT)


def _serve(connection: Connection, job: Callable) -> None:
    """The loop of a worker process: receives items and sends results until the parent closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    with suppress(EOFError, OSError):
        while True:
            connection.send(job(connection.recv()))


def _describe_exit(status: int | None) -> str:
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        remedy = "; probably out of memory, try fewer `workers`" if name == "SIGKILL" else ""
        return f"the worker process was ended by {name}{remedy}"
    return f"the worker process ended with status {status}"
