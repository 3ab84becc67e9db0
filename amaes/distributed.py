"""Ranks under torchrun, or one process without it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `world`, `local_rank` of `local_world` on this machine, and its device.

    `restarts` counts how often torchrun has started the ranks again (--max-restarts), `launcher` is its process.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    restarts: int = 0
    launcher: int | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def abandoned(self) -> bool:
        """Whether torchrun is gone, and with it who would stop this rank before the same command starts another."""
        return self.launcher is not None and os.getppid() != self.launcher


def setup(device: str = "auto") -> Ranks:
    """Join the process group that torchrun describes (gloo on the CPU, NCCL on CUDA); alone without torchrun.

    Args:
        device: "auto" (CUDA where there is one), "cpu" or "cuda".

    Raises:
        ValueError: "cuda" without a usable GPU, or more processes on this machine than GPUs.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    where = pick_device(device)
    if where.type == "cuda":
        if local_world > torch.cuda.device_count():
            raise ValueError(f"`nproc_per_node` {local_world}: this machine has {torch.cuda.device_count()} GPUs")
        where = torch.device("cuda", local_rank)
        torch.cuda.set_device(where)
    if world > 1:
        # Hosts agree over gloo on CUDA as well: what they ask each other must not wait for the devices.
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        timeout = timedelta(minutes=30)
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        if local_world == world:
            # torchrun's restarts share a store, in which addresses of ranks that are gone may still stand. (Agents on
            # several machines count their restarts differently.)
            store = dist.PrefixStore(f"start {restarts}", store)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)
    return Ranks(rank, world, local_rank, local_world, where, restarts, launcher)


def pick_device(name: str) -> torch.device:
    """The device of "auto" (CUDA where there is a GPU), "cpu" or "cuda"."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device` cuda: no usable GPU found; accepted here: auto, cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def wrap(network: nn.Module, ranks: Ranks, compiler: Callable[[nn.Module], nn.Module]) -> Callable:
    """The network to call in training: with DDP around it where there are several ranks, then compiled."""
    if ranks.world == 1:
        return compiler(network)
    ids = [ranks.local_rank] if ranks.device.type == "cuda" else None
    return compiler(DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True))


def sync_gradients(model: Callable, last: bool) -> AbstractContextManager:
    """Context of a micro-step's forward and backward pass: ranks exchange gradients in the last one only.

    Args:
        model: of `wrap`.
        last: whether it is the last micro-step of the step.
    """
    return nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()


def shutdown() -> None:
    """Leave the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def on_main() -> bool:
    """Whether this is rank 0, or the only process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all ranks, on every rank."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def from_main(value: object) -> object:
    """Rank 0's `value` (plain data), on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_from_ranks(value: object) -> list:
    """Every rank's `value` (plain data), in the order of ranks, on every rank."""
    values: list = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values
