"""Batches of patches, read ahead by worker processes."""

from __future__ import annotations

import atexit
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader, default_collate

from amaes import hardware
from amaes.data.order import Batches
from amaes.data.patches import Patches
from amaes.data.workers import Watch, ignore_job_signals
from amaes.distributed import Ranks
from amaes.files import first_line


def loader(patches: Patches, batches: Batches | Sequence, workers: int, pin_memory: bool) -> Iterator[dict]:
    """Batches of patches, read ahead by `workers` processes.

    Returns:
        {"image": (B, C, *window), "epoch", "case", "read", "bad": lists} and with labels "label": (B, *window), per
        batch; "bad" has a line for each case that could not be read and was replaced (`Patches`).

    Raises:
        ValueError: (while iterating) names the case that could not be read.
        ChildProcessError: (while iterating) a worker was killed; says by what, what was read, what may help.
        OSError: (while iterating) a batch does not fit into shared memory.
    """
    asked: deque[list[tuple[int, int]]] = deque()  # batches that have not arrived

    source = DataLoader(
        patches,
        batch_sampler=_noting(batches, asked),
        num_workers=workers,
        worker_init_fn=ignore_job_signals,
        collate_fn=_collate,
        pin_memory=pin_memory,
        prefetch_factor=hardware.PREFETCH if workers else None,
    )
    with Watch():
        arriving = iter(source)
    try:
        while True:
            try:
                batch = next(arriving, None)
            except Exception as error:
                reading = dict.fromkeys(patches.store.cases[case].id for batch in asked for _, case in batch)
                raise Watch.explained(error, getattr(arriving, "_workers", []), list(reading)) from error
            if batch is None:
                return
            if isinstance(batch, Exception):
                raise batch
            asked.popleft()
            yield batch
    finally:
        del arriving  # ends the workers now, whoever still holds this frame


def training_batches(
    patches: Patches, order: Batches, *, workers: int, ranks: Ranks, log: Callable[[str], None] = lambda line: None
) -> Generator[dict, None, None]:
    """The batches of a training run (`loader`); the log is told what may go wrong with them.

    Args:
        patches: of the cases.
        order: which of them, and when.
        workers: processes of this rank that read ahead.
        ranks: this process among all; for CUDA the batches lie in pinned memory.
        log: takes a line.
    """
    if (coverage := patches.crop_coverage(order.indices)) < 0.5:
        log(
            f"`crop` window, as published: patches come from {100 * coverage:.1f} % of the places in their volumes, "
            "the middle ones; `crop` patch takes them from anywhere, as validation does"
        )
    micro_step_bytes = order.share.of_micro_step * patches.sample_bytes()
    if line := hardware.check_shared_memory(workers, micro_step_bytes, local_world=ranks.local_world):
        log(line)
    batches = loader(patches, order, workers, pin_memory=ranks.device.type == "cuda")
    # At exit an error may still hold the batches; multiprocessing would wait for their workers for half a minute.
    atexit.register(_end, weakref.ref(batches))
    return batches


def _end(batches: weakref.ref[Generator]) -> None:
    if (generator := batches()) is not None:
        generator.close()


def _noting(batches: Iterable, asked: deque) -> Iterator[list[tuple[int, int]]]:
    """The batches, each added to `asked` when it is asked for."""
    for batch in batches:
        asked.append(batch)
        yield batch


def _collate(items: list[dict | Exception]) -> dict | Exception:
    for item in items:
        if isinstance(item, Exception):
            return item
    batch = {key: [item[key] for item in items] for key in items[0]}
    batch["bad"] = [text for texts in batch["bad"] for text in texts]
    try:
        return {key: _stack(values) if key in ("image", "label") else values for key, values in batch.items()}
    except (RuntimeError, MemoryError) as error:  # of a worker that may not have the memory it asks for
        return OSError(f"no memory for a batch of patches ({first_line(error)}); {hardware.memory_advice()}")


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """(B, ...); in a worker straight into shared memory, so that a lack of it is an error here and not later."""
    if len({tensor.dtype for tensor in tensors}) > 1:  # float16 and float32 stores, in one batch
        tensors = [tensor.float() for tensor in tensors]
    return default_collate(tensors)
