"""Options that both training scripts have, and the checks that need no data."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from amaes import cli, objectives
from amaes.augment.options import Options
from amaes.choices import (
    COMPILE,
    CROPS,
    DEVICES,
    FREEZES,
    ON_ERROR,
    PRECISIONS,
    RECONSTRUCTION_MEANS,
    SCRATCH,
    STEMS,
    TARGETS,
    TRANSFERS,
)
from amaes.models.build import (
    ARCHITECTURES,
    ENCODER_OPTIONS,
    RECONSTRUCTION_DECODERS,
    RECONSTRUCTION_HEADS,
    SEGMENTATION_DECODERS,
)
from amaes.training.earlier import options_of_earlier_runs
from amaes.training.presets import OF_OBJECTIVE, PRESETS, hyperparameters


def add_model_options(parser: cli.Parser, arch: str) -> None:
    """--arch, --preset, --patch-size and the hyper-parameters whose defaults the preset sets."""
    add = parser.add_argument_group("network and optimizer").add_argument
    add("--arch", choices=list(ARCHITECTURES), default=arch, help="network")
    add("--preset", choices=list(PRESETS), default="appendix_r1", help=_PRESET_HELP)
    add("--lr", type=cli.learning_rate, help="base learning rate of AdamW")
    add("--batch-size", type=cli.batch, help="global batch: patches per step over all ranks")
    add("--weight-decay", type=cli.non_negative_float, help="weight decay of AdamW")
    add("--amsgrad", action=argparse.BooleanOptionalAction, help="AdamW divides by the largest second moment so far")
    parser.add_patch_size(add)
    add(
        "--accumulate",
        type=_accumulate,
        default="auto",
        metavar="N",
        help="micro-steps per step; auto: as few as fit into memory",
    )


def add_published_options(parser: cli.Parser) -> Callable:
    """What only repeats published numbers or reads old weights; returns what adds an option to these, the last."""
    add = parser.add_argument_group("only to repeat published results, or for old weights").add_argument
    for name, explanation in _ENCODER_OPTIONS.items():
        add(f"--{name}", choices=ENCODER_OPTIONS[name][1], help=explanation)
    return add


def add_weights_options(parser: cli.Parser, what: str) -> Callable:
    """Weights to begin with; returns what adds an option to these.

    Args:
        parser: of the script.
        what: is taken from them by default.
    """
    add = parser.add_argument_group("weights").add_argument
    add("--weights", default=SCRATCH, metavar="CKPT|RUN", help=f"file or run whose {what} is taken, or scratch")
    add("--transfer", choices=TRANSFERS, default="encoder", help="all: also the decoder, except heads of other classes")
    add("--stem", choices=STEMS, default="repeat", help="weights of the first convolution, where the channels differ")
    add("--allow-partial", action="store_true", help="take a file that gives less than 95 %% of the encoder")
    return add


def add_rate_options(parser: cli.Parser) -> None:
    """How fine-tuning treats the weights that it begins with (`amaes.training.optim.FinetuneRates`)."""
    add = parser.add_argument_group("learning rates over the run").add_argument
    add("--warmup", type=cli.fraction, default=0.0, help="fraction of the run in which the learning rate rises")
    explanation = "first steps, in which the encoder keeps its weights; --warmup then begins for it"
    add("--decoder-warmup", type=cli.non_negative_int, default=0, metavar="STEPS", help=explanation)
    add("--encoder-lr", type=cli.positive_float, metavar="LR", help="of the encoder (default: --lr)")
    add("--freeze", choices=FREEZES, help="keep the encoder's weights for the whole run")


def weights_contradictions(args: argparse.Namespace) -> list[str]:
    """What the options of `add_weights_options` say against each other and against --out."""
    found = []
    if args.weights == SCRATCH:
        if args.transfer == "all":
            found.append("--transfer all: accepted with --weights CKPT")
    elif Path(args.weights).resolve().is_relative_to(args.out.resolve()):
        found.append(f"--weights {args.weights}: lies in --out {args.out}; take another --out")
    return found


def rate_contradictions(args: argparse.Namespace) -> list[str]:
    """Options of `add_rate_options` that exclude one another, and a warm-up that never ends."""
    found = []
    if args.freeze and (args.encoder_lr is not None or args.decoder_warmup):
        given = "--decoder-warmup" if args.decoder_warmup else "--encoder-lr"
        found.append(f"--freeze {args.freeze}: the encoder is not trained, {given} says how it is; leave one out")
    if args.decoder_warmup >= args.steps:
        text = f"accepted: below --steps {args.steps}; --freeze encoder trains the decoder alone"
        found.append(f"--decoder-warmup {args.decoder_warmup}: {text}")
    return found


_PRESET_HELP = "published values that the next four options have by default; paper: those of --objective amaes, too"
_ENCODER_OPTIONS = {
    "merging": "order of sub-grids in Swin encoders (default: fixed; legacy: weights from before MONAI 1.5)",
    "grn": "what MedNeXt-v2's response norm divides by, over channels (default: mean, as the authors' code)",
}


def given(**options: object) -> dict:
    """Those of the options that were given, as keyword arguments; None = not given."""
    return {name: value for name, value in options.items() if value is not None}


def _accumulate(text: str) -> int | str:
    return text if text == "auto" else cli.batch(text)


def class_weight(text: str) -> tuple[int, float]:
    """argparse type: CLASS:WEIGHT."""
    number, colon, weight = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r}: expected CLASS:WEIGHT, such as 2:5")
    return cli.integer(0, 255)(number), cli.real(0, 1e6, above=True)(weight)


def class_weights_contradictions(args: argparse.Namespace) -> list[str]:
    """The classes that --class-weights gives more than once."""
    counts = Counter(number for number, _ in args.class_weights or ())
    return [f"--class-weights: class {number} is given {count} times" for number, count in counts.items() if count > 1]


def add_augment_options(add: Callable) -> None:
    """--augment-options, where `add` adds an option."""
    add(
        "--augment-options",
        type=augment_option,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="changes of the transforms (the fields of amaes.augment.Options), e.g. order=3 bias=exp "
        "rotation_degrees=-15,15 mirror=0.5",
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


_OBJECTIVE_HELP = {  # of every option that only some objectives read
    "crop": "amaes: place uniformly the window that is read (as published), or the patch in it",
    "mask_ratio": "amaes: fraction of tokens hidden",
    "token_size": "amaes: side of a token, voxels",
    "loss_over": "amaes: which voxels the mean squared error is over",
    "target": "amaes: standardized by the visible voxels of each patch, or absolute, as published",
    "decoder": "amaes: light (half the convolutions) or standard; supervised: unet or mednext",
    "skips": "amaes: connect encoder and decoder",
    "corruption": "swin: the largest share of a view that is replaced, by noise and again by another view",
    "reconstruction_head": "swin: head that rebuilds the view",
    "deep_supervision": "supervised: also train on the outputs of coarser stages",
    "foreground": "supervised: share of patches around a foreground voxel",
}
_OBJECTIVE_TYPES: dict[str, dict] = {
    "crop": {"choices": CROPS},
    "mask_ratio": {"type": cli.fraction},
    "token_size": {"type": cli.side},
    "loss_over": {"choices": RECONSTRUCTION_MEANS},
    "target": {"choices": TARGETS},
    "decoder": {"choices": [*RECONSTRUCTION_DECODERS, *SEGMENTATION_DECODERS]},
    "skips": {"action": "store_const", "const": True},
    "corruption": {"type": cli.fraction},
    "reconstruction_head": {"choices": list(RECONSTRUCTION_HEADS)},
    "deep_supervision": {"action": "store_const", "const": True},
    "foreground": {"type": cli.fraction},
}


def add_objective_options(parser: cli.Parser) -> None:
    """What only some of the objectives read; None where not given, so that it can be refused with another."""
    add = parser.add_argument_group("objective: the options of one are refused with another").add_argument
    for name, text in _OBJECTIVE_HELP.items():
        of_all = [objectives.options_of(objective) for objective in objectives.OBJECTIVES]
        defaults = [str(options[name]) for options in of_all if options.get(name, False) is not False]
        shown = f" (default: {', '.join(defaults)})" if defaults else ""
        add(f"--{name.replace('_', '-')}", help=text + shown, **_OBJECTIVE_TYPES[name])


def settle_objective_options(parser: cli.Parser, args: argparse.Namespace) -> None:
    """Fill in the defaults of the chosen objective's options, and refuse those of the others.

    They are those of the preset, and in a run that began before there was such an option, what it did then.
    """
    defaults = objectives.options_of(args.objective)
    published = OF_OBJECTIVE.get((args.preset, args.objective), {}) | options_of_earlier_runs(args)
    defaults |= {name: value for name, value in published.items() if name in defaults}
    for name in _OBJECTIVE_HELP:
        given = getattr(args, name)
        if given is None:
            setattr(args, name, defaults.get(name))
        elif name not in defaults:
            shown = name.replace("_", "-") if given is True else f"{name.replace('_', '-')} {given}"
            parser.error(f"--{shown}: is not read with --objective {args.objective}")
    decoders = {"amaes": RECONSTRUCTION_DECODERS, "supervised": SEGMENTATION_DECODERS}.get(args.objective, {})
    if args.decoder is not None and args.decoder not in decoders:
        parser.error(f"--decoder {args.decoder}: --objective {args.objective} takes {' or '.join(decoders)}")


def add_run_options(parser: cli.Parser, out: str, save_every: int) -> Callable:
    """Where the run goes, what it runs on, and what it writes; returns what adds an option to these."""
    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, default=Path(out), metavar="RUN", help="folder of the run")
    add("--resume", choices=["auto", "never"], default="auto", help="continue the run found in --out, or refuse it")
    add("--overwrite", action="store_true", help="delete the run found in --out and start over")
    add("--seed", type=cli.seed, default=0, help="of weights, order, crops, augmentation, masks, validation split")
    add("--workers", type=cli.workers, default=2, help="processes per rank that read patches")
    add("--device", choices=DEVICES, default="auto", help="auto: CUDA where there is a GPU")
    add("--precision", choices=PRECISIONS, default="auto", help="auto: bf16 autocast on CUDA, fp32 on the CPU")
    add(
        "--on-nan",
        choices=ON_ERROR,
        default="stop",
        help="a step whose gradient is not finite: end the run, or leave the step out (a few at most)",
    )
    add(
        "--on-bad-case",
        choices=ON_ERROR,
        default="stop",
        help="a case that cannot be read: end the run, or read another one instead (a few in a row at most)",
    )
    add(
        "--checkpoint-activations",
        action="store_true",
        help="less memory, more time: compute stages again in the backward pass",
    )
    add(
        "--compile",
        choices=COMPILE,
        default="auto",
        help="torch.compile; auto: on CUDA without Triton kernels, if it works",
    )
    add("--log-every", type=cli.positive_int, default=10, metavar="STEPS", help="steps between lines of metrics.jsonl")
    add("--save-every", type=cli.positive_int, default=save_every, metavar="STEPS", help="steps between checkpoints")
    add(
        "--save-minutes",
        type=cli.positive_float,
        default=15.0,
        metavar="MINUTES",
        help="longest time between checkpoints",
    )
    add("--keep", type=cli.positive_int, default=2, metavar="N", help="how many of the newest checkpoints are kept")
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
    args.patch_size = parser.three_sides(args.patch_size)
    names = [name for name, _ in args.augment_options]
    for name in names:
        if names.count(name) > 1:
            parser.error(f"--augment-options {name}: given twice")
        if hasattr(args, name):
            parser.error(f"--augment-options {name}: is the option --{name} here")
    return args


def as_plain(options: Mapping[str, object]) -> dict:
    """The options (`vars` of the parsed command line) as plain data, for config.json and checkpoints."""
    plain = {}
    for name, value in sorted(options.items()):
        plain[name] = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    return plain
