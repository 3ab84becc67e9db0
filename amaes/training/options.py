"""Options that both training scripts have, and the checks that need no data."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from amaes import cli
from amaes.augment import Options
from amaes.distributed import Ranks
from amaes.hardware import COMPILE_CHOICES, PRECISIONS
from amaes.models import ARCHITECTURES, ENCODER_OPTIONS, build_encoder
from amaes.training.optim import PRESETS, hyperparameters


def add_model_options(parser: cli.Parser, arch: str) -> None:
    """--arch, --preset, --patch-size and the hyper-parameters whose defaults the preset sets."""
    add = parser.add_argument_group("network and optimizer").add_argument
    add("--arch", choices=list(ARCHITECTURES), default=arch, help="network")
    for name, explanation in _ENCODER_OPTIONS.items():
        add(f"--{name}", choices=ENCODER_OPTIONS[name][1], help=explanation)
    add("--preset", choices=list(PRESETS), default="appendix_r1", help="published values; sets the next four defaults")
    add("--lr", type=cli.positive_float, help="base learning rate of AdamW")
    add("--batch-size", type=cli.positive_int, help="global batch: patches per step over all ranks")
    add("--weight-decay", type=cli.non_negative_float, help="of AdamW")
    add("--amsgrad", action=argparse.BooleanOptionalAction, help="variant of AdamW")
    add(
        "--patch-size",
        type=cli.positive_int,
        nargs="+",
        default="128",
        metavar="N",
        help="voxels: N for a cube, or X Y Z",
    )
    add(
        "--accumulate", type=_accumulate, default="auto", metavar="N", help="micro-steps per step; auto: as memory asks"
    )


_ENCODER_OPTIONS = {
    "merging": "order of sub-grids in Swin encoders (default: fixed; legacy: weights from before MONAI 1.5)",
    "grn": "what MedNeXt-v2's response norm divides by, over channels (default: mean, as the authors' code)",
}


def encoder_options(args: argparse.Namespace) -> dict[str, str]:
    """The options of the encoder that were given, as arguments of `build_encoder`."""
    return {name: getattr(args, name) for name in _ENCODER_OPTIONS if getattr(args, name) is not None}


def _accumulate(text: str) -> int | str:
    return text if text == "auto" else cli.positive_int(text)


def add_augment_options(add: Callable) -> None:
    """--augment-options, where `add` adds an option."""
    add(
        "--augment-options",
        type=augment_option,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="of amaes.augment.Options, e.g. order=3 bias=exp rotation_degrees=-15,15 mirror=0.5",
    )


def augment_option(text: str) -> tuple[str, object]:
    """argparse type: NAME=VALUE for a field of `amaes.augment.Options`, a range as LOW,HIGH."""
    name, _, value = text.partition("=")
    defaults = {field.name: field.default for field in dataclasses.fields(Options)}
    if name not in defaults:
        raise argparse.ArgumentTypeError(
            f"{text!r}: no such option of the augmentation; accepted: {', '.join(defaults)}"
        )
    try:
        return name, _AS_DEFAULT[type(defaults[name])](value)
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a value like {name}={defaults[name]}") from None


def unique(pairs: list[tuple[str, object]], **taken: object) -> dict:
    """NAME=VALUE options as keyword arguments, together with those that have an option of their own.

    Raises:
        ValueError: a name was given twice.
    """
    given = dict(taken)
    for name, value in pairs:
        if name in given:
            raise ValueError(f"--augment-options {name}={value}: {name} is {given[name]} already")
        given[name] = value
    return given


def _number_or_name(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


_AS_DEFAULT = {
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    int: int,
    float: float,
    str: _number_or_name,  # `fill` takes both
    tuple: lambda text: tuple(float(part) for part in text.strip("()").split(",")),
}


def add_run_options(parser: cli.Parser, out: str, save_every: int) -> Callable:
    """Where the run goes, what it runs on, and what it writes; returns what adds an option to these."""
    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, default=Path(out), metavar="RUN", help="folder of the run")
    add("--resume", choices=["auto", "never"], default="auto", help="continue the run found in --out, or refuse it")
    add("--overwrite", action="store_true", help="delete the run found in --out and start over")
    add("--seed", type=cli.seed, default=0, help="of weights, order, crops, augmentation, masks, validation split")
    add("--workers", type=cli.non_negative_int, default=2, help="processes per rank that read patches")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is a GPU")
    add("--precision", choices=PRECISIONS, default="auto", help="auto: bf16 autocast on CUDA, fp32 on the CPU")
    add("--on-nan", choices=["stop", "skip"], default="stop", help="a step whose gradient is not finite (few may be)")
    add(
        "--on-bad-case",
        choices=["stop", "skip"],
        default="stop",
        help="a case that cannot be read; skip: another one takes its place, counted, as long as they are few",
    )
    add("--checkpoint-activations", action="store_true", help="less memory, more time: run stages again to go back")
    add("--compile", choices=COMPILE_CHOICES, default="auto", help="torch.compile; auto: on CUDA where it works")
    add("--log-every", type=cli.positive_int, default=10, metavar="STEPS", help="steps between lines of metrics.jsonl")
    add("--save-every", type=cli.positive_int, default=save_every, metavar="STEPS", help="steps between checkpoints")
    add(
        "--save-minutes",
        type=cli.positive_float,
        default=15.0,
        metavar="MINUTES",
        help="longest time between checkpoints",
    )
    add("--keep", type=cli.positive_int, default=2, metavar="N", help="newest checkpoints that are kept")
    return add


def parse(parser: cli.Parser, task: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; --arch and --preset set the published defaults first, so that --help shows them.

    Args:
        parser: has the options of `add_model_options`.
        task: "pretrain" or "finetune".
        argv: the command line without the program's name, by default this process's.
    """
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--arch", default=parser.get_default("arch"))
    first.add_argument("--preset", default=parser.get_default("preset"))
    try:
        known, _ = first.parse_known_args(argv)
    except argparse.ArgumentError as error:
        parser.error(str(error))
    if known.preset in PRESETS:
        parser.set_defaults(**hyperparameters(known.preset, task, known.arch))
    args = parser.parse_args(argv)
    if isinstance(args.patch_size, int):  # the default, which argparse converts but does not wrap
        args.patch_size = [args.patch_size]
    if len(args.patch_size) not in (1, 3):
        parser.error(f"--patch-size {_words(args.patch_size)}: {len(args.patch_size)} numbers, accepted: N or X Y Z")
    args.patch_size = tuple(args.patch_size * 3 if len(args.patch_size) == 1 else args.patch_size)
    return args


def as_plain(args: argparse.Namespace) -> dict:
    """The options as plain data, for config.json and checkpoints."""
    plain = {}
    for name, value in sorted(vars(args).items()):
        plain[name] = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    return plain


def check_patch_size(patch_size: tuple[int, int, int], arch: str, token_size: int = 1) -> None:
    """Refuse a patch that the network or the mask cannot divide, or of which the coarsest stage keeps too few voxels.

    Raises:
        ValueError: names sizes that are accepted.
    """
    with torch.device("meta"):
        encoder = build_encoder(arch)
    stride, fewest = encoder.strides[-1], encoder.fewest_voxels
    unit = math.lcm(stride, token_size)
    takes = f"{arch} with tokens of {token_size} takes multiples of {unit}"
    for side in patch_size:
        if side % unit or side < unit:
            below = max(side // unit, -(-2 * stride // unit)) * unit
            raise ValueError(
                f"--patch-size {_words(patch_size)}: {side} is not accepted; {takes}, e.g. {below} or {below + unit}"
            )
    left = math.prod(side // stride for side in patch_size)
    if left < fewest:
        raise ValueError(
            f"--patch-size {_words(patch_size)}: leaves {left} voxels at the coarsest stage, too few for its norms; "
            f"{takes} that leave {fewest} or more, one for {stride} x {stride} x {stride}"
        )


def check_batch(batch_size: int, world: int, accumulate: int | str) -> None:
    """Refuse a global batch that ranks and micro-steps cannot share out evenly."""
    pieces = world * (1 if accumulate == "auto" else accumulate)
    if batch_size % pieces:
        shares = f"{world} ranks" + ("" if accumulate == "auto" else f" x --accumulate {accumulate}")
        raise ValueError(
            f"--batch-size {batch_size}: cannot be split over {shares}; accepted: multiples of {pieces}, "
            f"e.g. {max(1, batch_size // pieces) * pieces}"
        )


def check_mask(patch_size: tuple[int, int, int], token_size: int, mask_ratio: float, loss_over: str) -> None:
    """Refuse a mask that hides every token, or none where only hidden voxels count."""
    tokens = math.prod(side // token_size for side in patch_size)
    kept = int(tokens * (1 - mask_ratio))
    if kept == 0 or (kept == tokens and loss_over != "all"):
        raise ValueError(
            f"--mask-ratio {mask_ratio}: keeps {kept} of {tokens} tokens of {token_size} voxels; at least one must be "
            "kept, and with --loss-over masked at least one hidden"
        )


def describe_batch(batch_size: int, accumulate: int, ranks: Ranks, steps: int) -> str:
    """One line: how the global batch is cut."""
    micro = batch_size // (ranks.world * accumulate)
    return (
        f"{steps} steps of {batch_size} patches = {ranks.world} ranks x {accumulate} micro-steps x {micro} "
        f"on {ranks.device.type}"
    )


def _words(numbers: tuple[int, ...] | list[int]) -> str:
    return " ".join(map(str, numbers))
