"""Training steps of the networks: time, memory and arithmetic, beside plain PyTorch modules of the same mathematics.

    python benchmarks/models.py --arch mednext_b mednext_l mednext_v2_base --patch-size 64
    python benchmarks/models.py --device cuda --patch-size 128 --compile both --profile --json models.json

The plain modules are as they are usually written. U-Net: the upsampled map is written and convolved, instance norm,
leaky ReLU in place. MedNeXt: depthwise and 1x1x1 Conv3d, GroupNorm, GELU, response norm as separate operations. Swin:
softmax of the whole attention matrix.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from amaes.choices import DEVICES
from amaes.cli import Parser, positive_int, run
from amaes.distributed import pick_device
from amaes.files import write_json
from amaes.models import ARCHITECTURES, build_autoencoder, build_segmenter
from amaes.models.mednext import Block
from amaes.models.swin_unetr import WindowAttention
from amaes.models.unet import ConvUnit

DECODERS = ("light", "unet", "mednext")


# Plain modules --------------------------------------------------------------------------------------------------------


class PlainUnit(nn.Module):
    """Convolution, instance norm and an in-place leaky ReLU, with the weights of ours; an upsampled map is written."""

    def __init__(self, unit: ConvUnit) -> None:
        super().__init__()
        self.conv, self.norm = unit.conv, unit.norm
        self.activation = nn.LeakyReLU(0.01, inplace=True)

    def forward(self, x: torch.Tensor, up: nn.Module | None = None) -> torch.Tensor:
        return self.activation(self.norm(self.conv(x if up is None else up(x))))

    def pooled(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self(x)
        return y, F.max_pool3d(y, 2)


class PlainBlock(nn.Module):
    """A MedNeXt block out of PyTorch's modules, with the weights of ours."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.depthwise, self.norm, self.expand = block.depthwise, block.norm, block.expand
        self.grn, self.project, self.shortcut = block.grn, block.project, block.shortcut
        self.front = (1, 0, 1, 0, 1, 0) if block.resample == "up" else (0,) * 6
        if block.resample != "same":
            self.depthwise.stride = (2, 2, 2)
        self.depthwise.padding = tuple(side // 2 for side in self.depthwise.kernel_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()  # our stem writes channels-last tensors, with which PyTorch's depthwise convolution is slow
        h = F.gelu(self.expand(self.norm(self.depthwise(x))))
        if self.grn is not None:
            h = plain_response_norm(h, self.grn)
        residual = x if self.shortcut is None else F.pad(self.shortcut(x), self.front)
        return F.pad(self.project(h), self.front) + residual


def plain_response_norm(h: torch.Tensor, grn: nn.Module) -> torch.Tensor:
    """Global response normalisation as it is published."""
    g = torch.norm(h, p=2, dim=(-3, -2, -1), keepdim=True)
    total = g.mean(1, keepdim=True) if grn.divisor == "mean" else g.sum(1, keepdim=True)
    return grn.gamma * (h * (g / (total + 1e-6))) + grn.beta + h


class PlainAttention(nn.Module):
    """Window attention that writes the whole attention matrix, with the weights of ours."""

    def __init__(self, attention: WindowAttention) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj, self.bias = attention.heads, attention.qkv, attention.proj, attention.bias
        self.register_buffer("index", attention.index, persistent=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        count, n, channels = x.shape
        q, k, v = self.qkv(x).view(count, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + self.bias[self.index[:n, :n]].permute(2, 0, 1)
        logits = logits if mask is None else logits + mask
        return self.proj((logits.softmax(-1).to(v.dtype) @ v).transpose(1, 2).reshape(count, n, channels))


PLAIN = {ConvUnit: PlainUnit, Block: PlainBlock, WindowAttention: PlainAttention}


def plain_copy(network: nn.Module) -> nn.Module:
    """The network with every unit, block and attention replaced by its plain form, with the same weights."""
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child) in PLAIN:
                setattr(parent, name, PLAIN[type(child)](child))
    return network


# Measurements ---------------------------------------------------------------------------------------------------------


def build(arch: str, decoder: str) -> nn.Module:
    """A reconstruction network with the light decoder, or a segmentation network of one class."""
    return build_autoencoder(arch) if decoder == "light" else build_segmenter(arch, num_classes=1, decoder=decoder)


def forward_flops(arch: str, decoder: str, side: int) -> int:
    """Multiply-adds of one forward pass of a cube, times two; computed from shapes alone."""
    with torch.device("meta"), torch.no_grad():
        network = plain_copy(build(arch, decoder))
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 1, side, side, side))
    return counter.get_total_flops()


def step(network: nn.Module, image: torch.Tensor, half: bool) -> None:
    """One forward and backward pass."""
    network.zero_grad()
    with torch.autocast(image.device.type, torch.bfloat16, enabled=half):
        outputs = network(image)
    outputs = outputs if isinstance(outputs, tuple | list) else [outputs]
    sum(output.float().square().mean() for output in outputs).backward()


def kept_bytes(step: Callable[[], object]) -> int:
    """What autograd keeps for the backward pass of a step; parameters and views of them do not count."""
    kept = {}  # storage to bytes: what is kept under two names counts once

    def count(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor if tensor._base is None else tensor._base
        if not isinstance(base, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        step()
    return sum(kept.values())


def memory(network: nn.Module, image: torch.Tensor, half: bool) -> float:
    """GB at the peak of a step (CUDA), or kept by autograd between its passes (CPU)."""
    if image.device.type != "cuda":
        return kept_bytes(partial(step, network, image, half)) / 1e9
    step(network, image, half)  # compiles, picks algorithms
    torch.cuda.reset_peak_memory_stats()
    step(network, image, half)
    return torch.cuda.max_memory_allocated() / 1e9


def seconds(network: nn.Module, image: torch.Tensor, half: bool) -> float:
    """Duration of a step."""
    wait = torch.cuda.synchronize if image.device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    step(network, image, half)
    wait()
    return time.perf_counter() - began


def operators(network: nn.Module, image: torch.Tensor, half: bool, rows: int = 12) -> str:
    """Table of the operators that take the most time in a step."""
    cuda = image.device.type == "cuda"
    step(network, image, half)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        step(network, image, half)
    key = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=rows, max_name_column_width=60)


def compare(arch: str, args: argparse.Namespace, device: torch.device, half: bool) -> dict:
    """Measure one network, ours and plain, eager and compiled as asked; prints a line per measurement."""
    torch.manual_seed(0)
    network = build(arch, args.decoder).to(device)
    plain = None if args.no_plain else plain_copy(network)
    image = torch.rand(args.batch_size, 1, *[args.patch_size] * 3, device=device)
    result = {
        "arch": arch,
        "decoder": args.decoder,
        "parameters": sum(p.numel() for p in network.parameters()),
        "forward_gflop_128": forward_flops(arch, args.decoder, 128) / 1e9,
    }
    if plain is not None:
        with torch.no_grad():
            ours, theirs = network(image), plain(image)
        result["difference"] = ((ours - theirs).norm() / (theirs - theirs.mean()).norm()).item()  # both float32
    print(
        f"{arch}, {args.decoder}: {result['parameters']:,} parameters, {result['forward_gflop_128']:.1f} GFLOP at 128^3"
    )
    for mode in ("eager", "compiled"):
        if args.compile not in ("both", "on" if mode == "compiled" else "off"):
            continue
        torch.compiler.reset()
        candidates = {"ours": network} if plain is None else {"ours": network, "plain": plain}
        if mode == "compiled":
            candidates = {name: torch.compile(candidate) for name, candidate in candidates.items()}
        gb = {name: memory(candidate, image, half) for name, candidate in candidates.items()}
        rounds = [{n: seconds(c, image, half) for n, c in candidates.items()} for _ in range(args.repeats)]  # in turns
        for name, candidate in candidates.items():
            best = min(round_[name] for round_ in rounds)
            result[f"{name}_{mode}"] = {"seconds": best, "gb": gb[name]}
            print(f"  {name:5s} {mode:8s} {1000 * best:8.0f} ms  {gb[name]:6.2f} GB", flush=True)
            if args.profile:
                print(operators(candidate, image, half))
    if plain is not None:
        print(f"  float32 outputs differ by {result['difference']:.1e} of their spread")
    return result


def parse_options() -> argparse.Namespace:
    parser = Parser(description="Time a training step of the networks, beside plain PyTorch modules.")
    add = parser.add_argument
    add("--arch", nargs="+", choices=list(ARCHITECTURES), default=["mednext_b", "mednext_l", "mednext_v2_base"])
    add("--decoder", choices=DECODERS, default="light", help="light: reconstruction; the others: segmentation")
    add("--patch-size", type=positive_int, default=64, help="side of the cube, voxels")
    add("--batch-size", type=positive_int, default=1, help="cubes per step")
    add("--repeats", type=positive_int, default=3, help="steps that are timed, the fastest counts")
    add("--device", choices=DEVICES, default="auto", help="auto: CUDA where there is a GPU")
    add("--precision", choices=["bf16", "fp32"], default="bf16", help="bf16: autocast")
    add("--threads", type=positive_int, help="of PyTorch on the CPU (default: its own)")
    add("--compile", choices=["off", "on", "both"], default="off", help="eager, torch.compile, or one after the other")
    add("--no-plain", action="store_true", help="leave the plain modules out")
    add("--profile", action="store_true", help="table of operators for each measurement")
    add("--json", type=Path, metavar="FILE", help="write the numbers there")
    return parser.parse_args()


def main() -> int:
    args = parse_options()
    device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    half = args.precision == "bf16"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    side = args.patch_size
    print(f"{where}, {args.precision}, {args.batch_size} x {side}^3, forward and backward, torch {torch.__version__}")
    print(f"memory: {'peak' if device.type == 'cuda' else 'kept for the backward pass, weights excluded'}")
    results = [compare(arch, args, device, half) for arch in args.arch]
    if args.json:
        content = {"device": where, "torch": str(torch.__version__), "precision": args.precision}
        write_json(args.json, content | {"patch_size": side, "batch_size": args.batch_size, "results": results})
    # Rounding alone gives 3e-4, with kernel 5 up to 2e-3, most of it in the plain modules.
    return 1 if any(result.get("difference", 0) > 5e-3 for result in results) else 0


if __name__ == "__main__":
    run(main)
