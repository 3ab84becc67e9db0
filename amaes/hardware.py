"""What the hardware allows: precision, compilation, memory."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from amaes.distributed import Ranks, gather

GB = 1e9


def use_bf16(device: torch.device, precision: str) -> bool:
    """Whether `--precision auto|bf16|fp32` means bfloat16 autocast: auto does on CUDA."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown; accepted: {', '.join(PRECISIONS)}")
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


PRECISIONS = ("auto", "bf16", "fp32")


def compiler(device: torch.device, choice: str) -> tuple[Callable[[nn.Module], nn.Module], str]:
    """`torch.compile` or the identity, and one line that says which and why.

    Args:
        device: where the network runs.
        choice: "auto" compiles on CUDA where a small graph compiles and runs, "on" insists, "off" never.

    Raises:
        ValueError: "on", and the small graph does not compile.
    """
    if choice not in COMPILE_CHOICES:
        raise ValueError(f"compile {choice!r} is unknown; accepted: {', '.join(COMPILE_CHOICES)}")
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return _identity, "eager" + (" (--compile auto compiles on CUDA only)" if choice == "auto" else "")
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever is missing: Triton, a C compiler, headers, a recent enough GPU
        reason = str(error).strip().split("\n")[0][:160]
        if choice == "on":
            raise ValueError(
                f"--compile on: torch.compile does not work here ({reason}); accepted here: auto, off"
            ) from error
        return _identity, f"eager: torch.compile does not work here ({reason})"
    return torch.compile, "compiled"


COMPILE_CHOICES = ("auto", "on", "off")


def _identity(network: nn.Module) -> nn.Module:
    return network


def complaints(device: torch.device) -> list[str]:
    """One line for every known defect of this PyTorch and cuDNN in 3D convolutions, with the remedy; CUDA only."""
    if device.type != "cuda":
        return []
    return slow_convolutions(str(torch.__version__), torch.backends.cudnn.version())


def slow_convolutions(torch_version: str, cudnn_version: int | None) -> list[str]:
    """Known defects of 3D convolutions in bf16, by version.

    Args:
        torch_version: such as "2.9.1+cu128".
        cudnn_version: such as 91002 for 9.10.2, None without cuDNN.
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", torch_version)[:3])
    remedy = "install torch 2.9.1 or newer with cuDNN 9.15 or newer (pip install nvidia-cudnn-cu12>=9.15)"
    if cudnn_version is None:
        return [f"WARNING: torch {torch_version} has no cuDNN: 3D convolutions are several times slower; {remedy}"]
    if numbers == (2, 9, 0):
        return [
            f"WARNING: torch {torch_version} does not use cuDNN for 3D convolutions in bf16: about 4 times slower, "
            f"3 times the memory; {remedy}"
        ]
    if 90800 <= cudnn_version < 91500:
        effect = (
            "may compute large 3D convolutions in bf16 wrongly"
            if numbers < (2, 9)
            else "is not used for 3D convolutions in bf16, about 4 times slower, as it may compute them wrongly"
        )
        return [f"WARNING: cuDNN {cudnn_version} with torch {torch_version} {effect}; {remedy}"]
    return []


# Memory ---------------------------------------------------------------------------------------------------------------

# Bytes per parameter while training in fp32: weight, gradient, two moments, the largest second moment (amsgrad).
_BYTES_PER_PARAMETER = 20


def saved_bytes(network: nn.Module, shape: Sequence[int]) -> int:
    """Bytes that autograd keeps for the backward pass of a float32 input of `shape`; `network` must be on "meta".

    The meta device computes shapes alone, so this takes no memory and little time. Of stages that the backward pass
    runs again, the inputs count, and the one that keeps most while it runs.
    """
    sums = [0]  # what is kept throughout, then what each such stage keeps
    into = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            sums[into] += tensor.numel() * tensor.element_size()
        return tensor

    def begin(stage: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        nonlocal into
        count(inputs[0])
        sums.append(0)
        into = -1

    def end(stage: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal into
        into = 0

    for stage in network.checkpoint_activations(False) if hasattr(network, "checkpoint_activations") else ():
        stage.register_forward_pre_hook(begin)
        stage.register_forward_hook(end)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        network(torch.empty(tuple(shape), device="meta"))
    return sums[0] + max(sums[1:], default=0)


def fit_micro_batch(
    build: Callable[[], nn.Module], patch_size: Sequence[int], batch_size: int, ranks: Ranks, half: bool, views: int = 1
) -> int:
    """How many micro-steps a rank's share of the batch must be cut into to fit into its free memory.

    Args:
        build: makes the network; called on the meta device.
        patch_size: (X, Y, Z).
        batch_size: patches per step over all ranks; divides by their number.
        ranks: this process among all; CPU ranks on one machine share its memory.
        half: autocast to bfloat16 is on.
        views: inputs of the network per patch.

    Returns:
        The smallest number that divides the share and is expected to fit on every rank.

    Raises:
        ValueError: one patch alone needs more memory than the device has.
    """
    with torch.device("meta"):
        network = build()
    kept = saved_bytes(network, (views, network.in_channels, *patch_size)) * (0.6 if half else 1.0)
    fixed = sum(p.numel() for p in network.parameters()) * _BYTES_PER_PARAMETER
    total, free = memory_of(ranks.device, ranks.local_world)
    if total is None:
        return 1
    if fixed + 0.5 * kept > total:  # compilation may save as much as half, no more
        raise ValueError(
            f"--patch-size {' '.join(map(str, patch_size))}: one patch takes about {(fixed + kept) / GB:.0f} GB, "
            f"{ranks.device.type} has {total / GB:.0f} GB for each process; take a smaller --patch-size or --arch"
        )
    share = batch_size // ranks.world
    pieces = (n for n in range(1, share + 1) if share % n == 0)
    needed = next((n for n in pieces if fixed + 1.25 * kept * share / n < free), share)  # a quarter for work space
    return max(gather(needed))


def memory_of(device: torch.device, local_world: int = 1) -> tuple[float | None, float | None]:
    """Total and free bytes for one process on `device`; (None, None) where the system does not tell."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    table = Path("/proc/meminfo")
    if not table.is_file():
        return None, None
    kilobytes = {line.split(":")[0]: float(line.split()[1]) for line in table.read_text().splitlines() if ":" in line}
    total, free = kilobytes["MemTotal"] * 1024, kilobytes.get("MemAvailable", kilobytes["MemFree"]) * 1024
    for limit, used in _container_memory():
        total, free = min(total, limit), min(free, limit - used)
    return total / local_world, free / local_world


SHARED_MEMORY = Path("/dev/shm")
PREFETCH = 2  # batches that each worker reads ahead


def check_shared_memory(workers: int, batch_bytes: int, prefetch: int = PREFETCH, local_world: int = 1) -> str | None:
    """One line where memory may not hold the batches that workers read ahead, with what helps; None where it does.

    Args:
        workers: processes per rank that read; without any, nothing is shared.
        batch_bytes: of what a rank takes at once: one micro-step.
        prefetch: batches that each worker reads ahead; beside them there is the one in use.
        local_world: ranks on this machine, which share its memory.
    """
    if not workers:
        return None
    needed = local_world * (workers * prefetch + 1) * batch_bytes
    batches = f"{workers} --workers of {local_world} ranks hold up to {needed / GB:.1f} GB of batches"
    shared = free_shared_memory()
    if shared is not None and needed > shared:
        return (
            f"WARNING: {batches}, {SHARED_MEMORY} has {shared / GB:.1f} GB free: a worker may be killed; in a "
            f"container docker run --shm-size={needed // 2**30 + 1}g or --ipc=host, else fewer --workers"
        )
    free = memory_of(torch.device("cpu"))[1]
    if free is not None and needed > free:
        return (
            f"WARNING: {batches}, {free / GB:.1f} GB of memory are free: a worker may be killed; fewer --workers help"
        )
    return None


def free_shared_memory() -> float | None:
    """Free bytes of /dev/shm, through which workers hand over batches; None where there is none."""
    if not SHARED_MEMORY.is_dir():
        return None
    status = os.statvfs(SHARED_MEMORY)
    return status.f_bavail * status.f_frsize


def memory_advice() -> str:
    """How much memory of the host is free, and what helps workers that run out of it."""
    known = (("memory", memory_of(torch.device("cpu"))[1]), (SHARED_MEMORY, free_shared_memory()))
    free = " and ".join(f"{size / GB:.1f} GB of {name}" for name, size in known if size is not None)
    return (
        f"free now: {free or 'unknown'}; what helps: --workers 0 or fewer, in a container docker run --shm-size=8g or "
        "--ipc=host"
    )


def _container_memory() -> Iterator[tuple[float, float]]:
    """Limit and use, bytes, of every control group this process is in (containers, Slurm jobs), versions 1 and 2."""
    table = Path("/proc/self/cgroup")
    for line in table.read_text().splitlines() if table.is_file() else []:
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup", controllers)
        names = (
            ("memory.max", "memory.current") if not controllers else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        here = root / group.lstrip("/")
        for folder in (here, *here.parents):
            try:
                limit, used = ((folder / name).read_text().strip() for name in names)
            except OSError:
                continue
            if limit != "max":
                yield float(limit), float(used)


# Of errors that have no class of their own: the CPU's allocator, cuDNN and cuBLAS.
_OUT_OF_MEMORY = ("can't allocate memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")


@contextlib.contextmanager
def out_of_memory_explained(
    device: torch.device, accumulate: int, patch_size: Sequence[int], share: int | None = None
) -> Iterator[None]:
    """Turn running out of memory while training into a ValueError with what was measured and the options that help.

    Args:
        device: where the network runs.
        accumulate: micro-steps per step.
        patch_size: (X, Y, Z).
        share: patches of a rank per step, which micro-steps must divide; None where any number of them will do.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(sign in str(error) for sign in _OUT_OF_MEMORY):
            raise
        total, free = memory_of(device)
        size = "unknown" if total is None else f"{total / GB:.1f} GB, {free / GB:.1f} GB of them free"
        peak = (
            f"{torch.cuda.max_memory_allocated(device) / GB:.1f} GB in use at most; " if device.type == "cuda" else ""
        )
        sides = " ".join(map(str, patch_size))
        finer = (n for n in range(accumulate + 1, (share or 0) + 1) if share % n == 0)
        more = 2 * accumulate if share is None else next(finer, None)
        cut = "--accumulate can cut no finer" if more is None else f"--accumulate {more}"
        raise ValueError(
            f"out of memory on {device}: {peak}memory {size}; what helps: {cut} (now {accumulate}), "
            f"--checkpoint-activations, or a smaller --patch-size (now {sides})"
        ) from error
