"""What the hardware allows: precision, compilation, memory."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from amaes.choices import COMPILE, PRECISIONS
from amaes.distributed import Ranks, gather_from_ranks
from amaes.files import first_line

try:
    import resource
except ImportError:  # Windows
    resource = None

GB = 1e9  # bytes


def use_bf16(device: torch.device, precision: str) -> bool:
    """Whether to compute in bfloat16 autocast: for "bf16", and for "auto" on CUDA.

    Raises:
        ValueError: the precision is none of PRECISIONS.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` {precision} is unknown; accepted: {', '.join(PRECISIONS)}")
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def compiler(device: torch.device, choice: str, fused: bool = False) -> tuple[Callable[[nn.Module], nn.Module], str]:
    """The function that compiles a network, and one line that says what it does and why.

    Args:
        device: where the network runs.
        choice: "auto" compiles on CUDA where a small graph compiles and runs, "on" insists, "off" never.
        fused: the network has fused operations, with which "auto" does not compile: U-Net XL is faster without.

    Returns:
        `torch.compile`, or a function that returns the network as it is; and the line.

    Raises:
        ValueError: the choice is none of COMPILE; or it is "on", and the small graph does not compile.
    """
    if choice not in COMPILE:
        raise ValueError(f"`compile` {choice} is unknown; accepted: {', '.join(COMPILE)}")
    if choice == "off":
        return _as_it_is, "eager"
    if choice == "auto" and device.type != "cuda":
        return _as_it_is, "eager (auto compiles on CUDA only)"
    if choice == "auto" and fused:
        return _as_it_is, "eager (auto does not compile fused operations)"
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever is missing: Triton, a C compiler, headers, a recent enough GPU
        reason = first_line(error)
        if choice == "on":
            raise ValueError(f"`compile` on: torch.compile does not work here ({reason}); take auto or off") from error
        return _as_it_is, f"eager: torch.compile does not work here ({reason})"
    return torch.compile, "compiled"


def _as_it_is(network: nn.Module) -> nn.Module:
    return network


def known_defects(device: torch.device) -> list[str]:
    """One line for every known defect of this PyTorch and cuDNN in 3D convolutions, with the remedy; CUDA only."""
    if device.type != "cuda":
        return []
    return convolution_defects(str(torch.__version__), torch.backends.cudnn.version())


def convolution_defects(torch_version: str, cudnn_version: int | None) -> list[str]:
    """Known defects of 3D convolutions in bf16, by version (github.com/pytorch/pytorch, issues 163539 and 166643).

    cuDNN 9.8 to 9.10 computes large ones wrongly. PyTorch 2.9.0 therefore does without cuDNN, later versions do so
    until cuDNN 9.15.

    Args:
        torch_version: such as "2.9.1+cu128".
        cudnn_version: such as 91002 for 9.10.2; None without cuDNN.
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", torch_version)[:3])
    cudnn = cudnn_version or 0
    if numbers < (2, 9) and 90800 <= cudnn < 91100:
        effect = "large 3D convolutions in bf16 may be wrong"
    elif numbers == (2, 9, 0) or (numbers > (2, 9, 0) and 90800 <= cudnn < 91500):
        effect = "3D convolutions in bf16 take 3 times the memory and 4 times as long"
    else:
        return []
    remedy = "install torch 2.9.1 or newer with cuDNN 9.15 or newer (pip install 'nvidia-cudnn-cu12>=9.15')"
    return [f"WARNING: torch {torch_version} with cuDNN {cudnn_version}: {effect}; {remedy}"]


# Memory ---------------------------------------------------------------------------------------------------------------

# Bytes per parameter while training in fp32: weight, gradient, two moments, the largest second moment (amsgrad).
_BYTES_PER_PARAMETER = 20


def saved_bytes(network: nn.Module, shape: Sequence[int]) -> int:
    """Bytes that autograd keeps for the backward pass of a float32 input of `shape`; `network` must be on "meta".

    The meta device computes shapes alone, so this takes no memory and little time. Of stages that the backward pass
    runs again, the inputs count, and the one that keeps most while it runs.
    """
    sums = [0]  # bytes kept throughout, then bytes that each such stage keeps
    current = 0  # index into sums

    def count(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            sums[current] += tensor.numel() * tensor.element_size()
        return tensor

    def begin(stage: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        nonlocal current
        count(inputs[0])
        sums.append(0)
        current = -1

    def end(stage: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal current
        current = 0

    stages = network.checkpointed_stages() if hasattr(network, "checkpointed_stages") else []
    hooks = [stage.register_forward_pre_hook(begin) for stage in stages]
    hooks += [stage.register_forward_hook(end) for stage in stages]
    if stages:
        network.checkpoint_activations(False)  # what a stage keeps while it runs shows when it runs as usual
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        network(torch.empty(tuple(shape), device="meta"))
    if stages:
        network.checkpoint_activations(True)
    for hook in hooks:
        hook.remove()
    return sums[0] + max(sums[1:], default=0)


def fit_micro_batch(
    network: nn.Module, patch_size: Sequence[int], batch_size: int, ranks: Ranks, bf16: bool, views: int = 1
) -> int:
    """How many micro-steps a rank's share of the batch must be cut into to fit into its free memory.

    Args:
        network: on the meta device.
        patch_size: (X, Y, Z).
        batch_size: patches per step over all ranks; divides by their number.
        ranks: this process among all; CPU ranks on one machine share its memory.
        bf16: autocast to bfloat16 is on.
        views: inputs of the network per patch.

    Returns:
        The smallest number that divides the share and is expected to fit on every rank.

    Raises:
        ValueError: one patch alone needs more memory than the device has.
    """
    kept = saved_bytes(network, (views, network.in_channels, *patch_size)) * (0.6 if bf16 else 1.0)
    fixed = sum(p.numel() for p in network.parameters()) * _BYTES_PER_PARAMETER
    total, free = memory_of(ranks.device, ranks.local_world)
    if total is None:
        return 1
    if fixed + 0.5 * kept > total:  # compilation may save as much as half, no more
        raise ValueError(
            f"`patch_size` {' '.join(map(str, patch_size))}: one patch takes about {(fixed + kept) / GB:.0f} GB, "
            f"{ranks.device.type} has {total / GB:.0f} GB for each process; take a smaller `patch_size` or `arch`"
        )
    share = batch_size // ranks.world
    pieces = (n for n in range(1, share + 1) if share % n == 0)
    needed = next((n for n in pieces if fixed + 1.25 * kept * share / n < free), share)  # a quarter for work space
    return max(gather_from_ranks(needed))


def memory_of(device: torch.device, local_world: int = 1) -> tuple[float | None, float | None]:
    """Total and free bytes for one process on `device`; (None, None) where the system does not say."""
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


def check_shared_memory(workers: int, batch_bytes: int, local_world: int = 1) -> str | None:
    """One line, with what helps, where memory may not hold the batches that workers read ahead; None where it does.

    Each worker reads PREFETCH batches ahead; beside them there is the one in use.

    Args:
        workers: processes per rank that read; without any, nothing is shared.
        batch_bytes: of what a rank takes at once: one micro-step.
        local_world: ranks on this machine, which share its memory.
    """
    if not workers:
        return None
    needed = local_world * (workers * PREFETCH + 1) * batch_bytes
    batches = f"{workers} `workers` of {local_world} ranks hold up to {needed / GB:.1f} GB of batches"
    shared = free_shared_memory()
    if shared is not None and needed > shared:
        return (
            f"WARNING: {batches}, {SHARED_MEMORY} has {shared / GB:.1f} GB free: a worker may be killed; in a "
            f"container docker run --shm-size={needed // 2**30 + 1}g or --ipc=host, else take fewer `workers`"
        )
    free = memory_of(torch.device("cpu"))[1]
    if free is not None and needed > free:
        return (
            f"WARNING: {batches}, {free / GB:.1f} GB of memory are free: a worker may be killed; take fewer `workers`"
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
    sizes = (("memory", memory_of(torch.device("cpu"))[1]), (SHARED_MEMORY, free_shared_memory()))
    free = " and ".join(f"{size / GB:.1f} GB of {name}" for name, size in sizes if size is not None)
    return (
        f"free now: {free or 'unknown'}; what helps: fewer `workers` or 0, in a container docker run --shm-size=8g or "
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
        lowest = root / group.lstrip("/")
        for folder in (lowest, *lowest.parents):
            try:
                limit, used = ((folder / name).read_text().strip() for name in names)
            except OSError:
                continue
            if limit != "max":
                yield float(limit), float(used)


# In the text of errors that have no class of their own: those of the CPU's allocator, cuDNN and cuBLAS.
_OUT_OF_MEMORY = ("can't allocate memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")


@contextlib.contextmanager
def out_of_memory_explained(
    device: torch.device, accumulate: int, patch_size: Sequence[int], share: int | None = None
) -> Iterator[None]:
    """Turn running out of memory in training into a ValueError that says what was measured and which parameters help.

    Args:
        device: where the network runs.
        accumulate: micro-steps per step.
        patch_size: (X, Y, Z).
        share: patches of a rank per step, which must divide by the number of micro-steps; None: any number will do.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        has_own_class = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not has_own_class and not any(text in str(error) for text in _OUT_OF_MEMORY):
            raise
        total, free = memory_of(device)
        size = "unknown" if total is None else f"{total / GB:.1f} GB, {free / GB:.1f} GB of them free"
        peak = (
            f"{torch.cuda.max_memory_allocated(device) / GB:.1f} GB in use at most; " if device.type == "cuda" else ""
        )
        sides = " ".join(map(str, patch_size))
        possible = (n for n in range(accumulate + 1, (share or 0) + 1) if share % n == 0)
        more = 2 * accumulate if share is None else next(possible, None)
        cut = "`accumulate` can cut no finer" if more is None else f"`accumulate` {more}"
        raise ValueError(
            f"out of memory on {device}: {peak}memory {size}; what helps: {cut} (now {accumulate}), "
            f"`checkpoint_activations`, or a smaller `patch_size` (now {sides})"
        ) from error


def peak_gb(device: torch.device) -> float:
    """Largest memory so far, GB: of the GPU, or of this process on the CPU (0 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GB
    if resource is None:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB


def resident_gb() -> float:
    """Memory of this process in use now, GB (0 where the system does not tell)."""
    table = Path("/proc/self/statm")
    return int(table.read_text().split()[1]) * resource.getpagesize() / GB if table.is_file() else 0.0
