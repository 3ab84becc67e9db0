"""How fast a training step is, what of it waits for what, and how near it comes to the hardware's limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from amaes import distributed
from amaes.hardware import peak_gb

if TYPE_CHECKING:
    from amaes.data.order import Share
    from amaes.objectives import Objective

# Dense bf16 matrix products, TFLOP/s, from the makers' data sheets; the first name that is part of the GPU's is taken.
PEAK_TFLOPS = {
    **{"B200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "A40": 150.0},
    **{"L4": 121.0, "RTX A6000": 155.0, "RTX 6000 Ada": 364.0, "RTX 4090": 165.0, "RTX 3090": 71.0},
}


def seconds_per_step(step: Callable[[], None], count: int, device: torch.device) -> float:
    """Mean seconds of `count` calls after a tenth of them (at least 2) to warm up."""
    for _ in range(_warm_up(count)):
        step()
    _finish(device)
    began = time.perf_counter()
    for _ in range(count):
        step()
    _finish(device)
    return (time.perf_counter() - began) / count


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_training(
    model: Callable,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    batches: Iterator[dict],
    share: Share,
    autocast: torch.autocast,
    ranks: distributed.Ranks,
    *,
    count: int,
) -> dict[str, float]:
    """Seconds per training step, with less and less left out. The weights change; nothing is written.

    Args:
        model: of `amaes.distributed.wrap`.
        optimizer: of its network.
        objective: what it is trained for.
        batches: of `amaes.data.loader`, for `steps_needed(count)` steps.
        share: how a batch is shared out.
        autocast: context of the forward pass.
        ranks: this process among all.
        count: steps that are timed of each kind.

    Returns:
        By what a step included: "network", "augmentation" (and the network), "data" (and both), and with several ranks
        "alone" (the network without the exchange of gradients).
    """
    batch = next(batches)
    prepared = objective.prepare(batch, ranks.device)

    def step(micro_batches: Iterable[tuple], exchange: bool = True) -> None:
        optimizer.zero_grad(set_to_none=True)
        for micro, (inputs, targets) in enumerate(micro_batches):
            with distributed.sync_gradients(model, last=exchange and micro == share.accumulate - 1):
                with autocast:
                    outputs = model(inputs)
                losses = objective.losses(outputs, targets)
                (sum(losses.values()) / share.accumulate).backward()
        optimizer.step()

    micro_steps = range(share.accumulate)
    kinds: dict[str, Callable[[], None]] = {
        "network": lambda: step(prepared for _ in micro_steps),
        "augmentation": lambda: step(objective.prepare(batch, ranks.device) for _ in micro_steps),
        "data": lambda: step(objective.prepare(next(batches), ranks.device) for _ in micro_steps),
    }
    if ranks.world > 1:
        kinds["alone"] = lambda: step((prepared for _ in micro_steps), exchange=False)
    seconds = {}
    for name, one_step in kinds.items():
        distributed.barrier()
        seconds[name] = seconds_per_step(one_step, count, ranks.device)
    return seconds


def steps_needed(count: int) -> int:
    """Steps that `time_training` reads batches for: one kind of step reads all of its own, the others share one."""
    return 1 + count + _warm_up(count)


def _warm_up(count: int) -> int:
    return max(2, count // 10)


def training_flop(network: nn.Module, shape: Sequence[int]) -> float:
    """Floating-point operations of a forward and backward pass of an input of `shape`; `network` must be on "meta".

    Layers count one by one, as published, also where `up_conv_norm_act` needs less for two of them.

    A multiplication and an addition count as two. The backward pass counts twice the forward: gradients of inputs and
    of weights. (torch's counter multiplies depthwise weight gradients by the number of groups, so only the forward
    pass is counted with it.)
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(tuple(shape), device="meta"))
    return 3.0 * counter.get_total_flops()


def peak_tflops(device: torch.device) -> tuple[str, float | None]:
    """Name of the device and its limit in TFLOP/s (bf16 matrix products), None where it is not known."""
    if device.type != "cuda":
        return "CPU", None
    name = torch.cuda.get_device_name(device)
    return name, next((limit for part, limit in PEAK_TFLOPS.items() if part in name), None)


def timing_table(seconds: dict[str, float], share: Share, flop: float, device: torch.device) -> list[str]:
    """What was measured, a line each, the verdict last.

    Args:
        seconds: of `time_training`.
        share: how a batch is shared out.
        flop: of one patch, forward and backward.
        device: where it ran.
    """
    rows = {
        "network alone": seconds["network"],
        "with augmentation": seconds["augmentation"],
        "with reading of data": seconds["data"],
    }
    if "alone" in seconds:
        rows = {"network, gradients not exchanged": seconds["alone"], **rows}
    lines = [f"{'per step':34s} {'ms':>9s} {'patches/s':>10s}"]
    lines += [f"{name:34s} {1000 * s:9.1f} {share.batch_size / s:10.2f}" for name, s in rows.items()]
    name, limit = peak_tflops(device)
    rate = flop * share.of_rank / seconds["network"] / 1e12
    of_limit = "" if limit is None else f", {100 * rate / limit:.1f} % of the {limit:.0f} of {name} in bf16"
    per = "GPU" if device.type == "cuda" else "rank"
    lines.append(f"network alone: {rate:.3g} TFLOP/s per {per}{of_limit}, counting every layer by itself")
    lines.append(f"peak memory: {peak_gb(device):.2f} GB on {name}")
    return [*lines, verdict(seconds)]


def verdict(seconds: dict[str, float]) -> str:
    """One line: what to do first to be faster."""
    whole = seconds["data"]
    reading = (whole - seconds["augmentation"]) / whole
    augmenting = (seconds["augmentation"] - seconds["network"]) / whole
    exchanging = (seconds["network"] - seconds.get("alone", seconds["network"])) / whole
    if reading > LARGE_SHARE:
        return f"verdict: DATA-BOUND, {100 * reading:.0f} % waits for data: raise `workers`, or use a local disk"
    if exchanging > LARGE_SHARE:
        return f"verdict: {100 * exchanging:.0f} % exchanges gradients: raise `batch_size`, or use a faster network"
    if augmenting > LARGE_SHARE:
        return f"verdict: {100 * augmenting:.0f} % augments: `augment` spatial is faster, and order=1 than order=3"
    return f"verdict: the network sets the pace, {min(100, 100 * seconds['network'] / whole):.0f} % of the step"


LARGE_SHARE = 0.1  # of a step, that something beside the network may take (the budget)
