"""Worker processes that preprocess cases; one that dies costs its case alone."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any

from amaes.preprocess.find_cases import Item


def in_processes(
    items: Sequence[Item], job: Callable[[Item], Any], workers: int, died: Callable[[Item, str], Any]
) -> Iterator[Any]:
    """What `job` returns for the items, as they end. A worker that dies costs its item alone: another takes its place.

    Args:
        items: what `job` takes, plain data.
        job: a function that can be pickled.
        workers: number of processes.
        died: result for an item whose worker died, given how it ended.
    """
    context = multiprocessing.get_context("spawn")
    waiting, idle, busy = deque(items), [], {}
    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                process, connection = idle.pop() if idle else _start(context, job)
                busy[connection] = process, waiting.popleft()
                with suppress(OSError):  # died while idle: seen below as a connection at its end
                    connection.send(busy[connection][1])
            for connection in wait(list(busy)):
                process, item = busy.pop(connection)
                try:
                    yield connection.recv()
                    idle.append((process, connection))
                except (EOFError, OSError):
                    process.join()
                    connection.close()
                    yield died(item, _describe_exit(process.exitcode))
    finally:
        for process, connection in [*idle, *((process, connection) for connection, (process, _) in busy.items())]:
            connection.close()
            process.terminate()
            process.join()


def _start(context: multiprocessing.context.SpawnContext, job: Callable[[Item], Any]) -> tuple:
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, job), daemon=True)
    with _interrupt_later():
        process.start()
    theirs.close()  # so that the death of the process ends the connection
    return process, ours


@contextmanager
def _interrupt_later() -> Iterator[None]:
    """Hold Ctrl-C back while a process starts, which would else leave half of one; the process itself never sees it."""
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    resource_tracker.ensure_running()  # its own start would lift the mask
    arrived = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: arrived.append(number))  # by way of another thread
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by the process
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, previous)
    if arrived:
        signal.raise_signal(signal.SIGINT)


def _serve(connection: multiprocessing.connection.Connection, job: Callable[[Item], Any]) -> None:
    """A worker process: items in, outcomes out, until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with suppress(EOFError, OSError):
        while True:
            connection.send(job(connection.recv()))


def _describe_exit(status: int | None) -> str:
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        hint = "; probably out of memory, try fewer --workers" if name == "SIGKILL" else ""
        return f"the worker process was ended by {name}{hint}"
    return f"the worker process ended with status {status}"
