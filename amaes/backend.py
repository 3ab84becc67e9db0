"""What the hardware allows: precision, compilation, memory."""

from __future__ import annotations

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
    build: Callable[[], nn.Module], patch_size: Sequence[int], batch_size: int, ranks: Ranks, half: bool
) -> int:
    """How many micro-steps a rank's share of the batch must be cut into to fit into its free memory.

    Args:
        build: makes the network; called on the meta device.
        patch_size: (X, Y, Z).
        batch_size: patches per step over all ranks; divides by their number.
        ranks: this process among all; CPU ranks on one machine share its memory.
        half: autocast to bfloat16 is on.

    Returns:
        The smallest number that divides the share and is expected to fit on every rank.

    Raises:
        ValueError: one patch alone needs more memory than the device has.
    """
    with torch.device("meta"):
        network = build()
    kept = saved_bytes(network, (1, network.in_channels, *patch_size)) * (0.6 if half else 1.0)
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
