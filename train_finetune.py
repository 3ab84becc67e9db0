"""Fine-tune a pretrained encoder, or train from scratch, for segmentation with few labels; one network per fold.

    python train_finetune.py --data STORE --arch unet_xl --weights CKPT --out RUN

The same command again continues the run. Read it from top to bottom: options, setup, folds, loop.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from amaes import checkpoint, cli, distributed, hardware
from amaes.augment import FINETUNE_PRESETS as AUGMENTATIONS
from amaes.augment import FinetuneAugment
from amaes.data.loader import loader
from amaes.data.order import Batches
from amaes.data.patches import Patches
from amaes.data.splits import fold_splits, saved_split
from amaes.data.store import Store
from amaes.evaluation import leakage
from amaes.files import sha256, write_json
from amaes.losses import segmentation_loss
from amaes.models import SEGMENTATION_DECODERS, build_network
from amaes.paper.protocols import FOLDS, PROTOCOLS, TRAIN_CASES, check_store, saved_folds
from amaes.training import options
from amaes.training.optim import build_optimizer, set_lr, skip_if_not_finite, stretched_cosine
from amaes.training.progress import Progress
from amaes.training.run_folder import checkpoint_content, describe_step, open_run, restore
from amaes.training.stopping import SavePoints, StopRequest

SCRATCH = "scratch"


def _split_seed(text: str) -> int:
    """argparse type: integer from 0 to 4 million (the folds' generator takes 1000 times it, 32 bits)."""
    value = cli.non_negative_int(text)
    if value > 4_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to 4000000")
    return value


def _correlation(text: str) -> float:
    """argparse type: number above 0, at most 1."""
    value = cli.positive_float(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, at most 1")
    return value


def parse_options() -> argparse.Namespace:
    parser = cli.Parser(description="Train a segmentation network on a few labelled cases of a store, one per fold.")
    add = parser.add_argument_group("data").add_argument
    add("--data", required=True, metavar="STORE", help="folder written by amaes.preprocess --labels")
    add("--augment", choices=list(AUGMENTATIONS), help="transforms (default: spatial with --weights CKPT, else all)")
    options.add_augment_options(add)
    add(
        "--window",
        choices=["parity", "official", "none"],
        default="parity",
        help="margin read for rotations; none: no margin",
    )
    add("--foreground", type=cli.fraction, default=0.33, help="share of patches placed around a foreground voxel")
    add = parser.add_argument_group("weights").add_argument
    add("--weights", default=SCRATCH, metavar="CKPT", help="checkpoint whose encoder is taken, or scratch")
    add("--transfer", choices=checkpoint.TRANSFERS, default="encoder", help="all: the decoder too, but for new heads")
    add("--stem", choices=checkpoint.STEMS, default="repeat", help="first convolution, where the channels differ")
    add("--allow-partial", action="store_true", help="take a file that gives less than 95 %% of the encoder")
    add("--pretrain-data", nargs="+", metavar="STORE", help="what they saw (default: as CKPT says), for leakage.json")
    add("--strict-leakage", action="store_true", help="refuse to train where pretraining saw test cases")
    add("--near-duplicates", type=_correlation, metavar="R", help="also look for scans of correlation >= R, e.g. 0.98")
    add("--decoder", choices=list(SEGMENTATION_DECODERS), default="unet", help="new, but with --transfer all")
    add("--deep-supervision", action="store_true", help="also train on the outputs of coarser stages")
    add = parser.add_argument_group("folds: train on few cases, test on all others").add_argument
    add("--protocol", choices=list(PROTOCOLS), help="task of the paper: sets the folds, checks the store")
    add("--allow-incomplete", action="store_true", help="with --protocol: fewer cases than its release has")
    add("--folds", type=cli.positive_int, default=6, help="number of folds")
    add("--train-cases", type=cli.positive_int, default=20, help="labelled cases a fold trains on")
    add("--split-seed", type=_split_seed, default=0, help="of the drawing of folds")
    add("--fold", default="all", metavar="K|all", help="the fold to train, counted from 0")
    add("--steps", type=cli.positive_int, default=2500, help="optimizer steps of each fold")
    options.add_model_options(parser, arch="unet_xl")
    options.add_run_options(parser, out="runs/finetune", save_every=250)
    args = options.parse(parser, "finetune")
    if args.augment is None:
        args.augment = "all" if args.weights == SCRATCH else "spatial"
    for name in ("pretrain_data", "strict_leakage", "near_duplicates"):
        if getattr(args, name) and args.weights == SCRATCH:
            parser.error(f"--{name.replace('_', '-')}: accepted with --weights CKPT, scratch has seen nothing")
    if args.transfer == "all" and args.weights == SCRATCH:
        parser.error("--transfer all: accepted with --weights CKPT")
    if args.allow_incomplete and args.protocol is None:
        parser.error("--allow-incomplete: accepted with --protocol")
    for name, value in (("folds", FOLDS), ("train_cases", TRAIN_CASES), ("split_seed", 0)):
        if args.protocol is not None and getattr(args, name) != value:
            option = name.replace("_", "-")
            parser.error(f"--{option} {getattr(args, name)}: --protocol {args.protocol} has {value}; leave one out")
    if args.fold != "all" and not (args.fold.isdecimal() and int(args.fold) < args.folds):
        parser.error(f"--fold {args.fold}: accepted: all, or 0 to {args.folds - 1} (--folds {args.folds})")
    args.fold = args.fold if args.fold == "all" else str(int(args.fold))
    if args.fold != "all" and args.overwrite:
        parser.error(
            f"--overwrite --fold {args.fold}: would delete all folds; delete {args.out}/fold{args.fold} instead"
        )
    if args.weights != SCRATCH and Path(args.weights).resolve().is_relative_to(args.out.resolve()):
        parser.error(f"--weights {args.weights}: lies in --out {args.out}; take another --out")
    return args


def main() -> int:
    args = parse_options()
    ranks = distributed.setup(args.device)
    log = tqdm.write if ranks.is_main else lambda line: None

    # What contradicts itself is refused before any work.
    options.check_batch(args.batch_size, ranks.world, args.accumulate)
    options.check_patch_size(args.patch_size, args.arch)
    half = hardware.use_bf16(ranks.device, args.precision)
    compiler, how = hardware.compiler(ranks.device, args.compile)
    extra = options.unique(args.augment_options, window=args.window)
    augment = FinetuneAugment(args.patch_size, args.augment, args.seed, **extra)
    args.data = str(Path(args.data).absolute())  # so that config.json finds it from any working folder
    store = Store(args.data)
    if args.protocol is not None:
        check_store(store, args.protocol)
    if store.num_classes < 2:
        raise ValueError(f"--data {args.data}: its labels are all background; there is nothing to learn")
    build = {
        "arch": args.arch,
        "in_channels": len(store.channels),
        "num_classes": store.num_classes,
        "decoder": args.decoder,
        "deep_supervision": args.deep_supervision,
        **options.encoder_options(args),
    }
    pretraining = [Store(name) for name in args.pretrain_data or ()]
    if args.weights != SCRATCH:
        check_preprocessing(Path(args.weights), store)
        with torch.device("meta"):
            trial = build_network("segment", build)
        checkpoint.load_encoder(trial, Path(args.weights), args.stem, args.allow_partial, args.transfer)
    splits = distributed.from_main(splits_of(store, args) if ranks.is_main else None)
    make = partial(build_network, "segment", build, args.checkpoint_activations)
    fitting = hardware.fit_micro_batch(make, args.patch_size, args.batch_size, ranks, half)
    chosen = {"accumulate": fitting if args.accumulate == "auto" else args.accumulate, "world": ranks.world}

    if ranks.is_main:
        weights = SCRATCH if args.weights == SCRATCH else sha256(args.weights)  # another file under the name shows
        record = {"store": store.fingerprint, "build": build, "splits": splits, "weights": weights}
        how_to_open = ("auto", False) if ranks.restarts else (args.resume, args.overwrite)
        chosen = open_run(args.out, "segment", options.as_plain(args), record, chosen, *how_to_open, log)
    if args.weights != SCRATCH:
        refuse_leakage(args, store, splits, pretraining, ranks, log)
    accumulate = distributed.from_main(chosen)["accumulate"] if args.accumulate == "auto" else args.accumulate
    log(f"{options.describe_batch(args.batch_size, accumulate, ranks, args.steps)}, {args.augment} augmentation, {how}")
    for line in hardware.complaints(ranks.device):
        log(line)
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=half)
    plan = Plan(store, build, accumulate, autocast, compiler, augment, StopRequest())
    for fold, split in enumerate(splits):
        if args.fold in ("all", str(fold)):
            log(f"fold {fold}: {len(split['train'])} cases to train on, {len(split['test'])} to test on")
            share = args.batch_size // ranks.world
            with hardware.out_of_memory_explained(ranks.device, accumulate, args.patch_size, share):
                train_fold(args, plan, split, args.out / f"fold{fold}", ranks, log)
    distributed.shutdown()
    log(f"done; next: python evaluate.py {args.out}")
    return cli.EXIT_OK


@dataclass
class Plan:
    """What all folds share."""

    store: Store
    build: dict  # arguments of build_segmenter
    accumulate: int  # micro-steps per step
    autocast: torch.autocast
    compiler: Callable
    augment: FinetuneAugment
    stop: StopRequest


def train_fold(args: argparse.Namespace, plan: Plan, split: dict, folder: Path, ranks: distributed.Ranks, log) -> None:
    """Train on split["train"] from the start, or from the newest checkpoint in `folder`, to the last step."""
    store, device = plan.store, ranks.device
    torch.manual_seed(args.seed)  # the decoder starts the same from scratch and with weights
    network = build_network("segment", plan.build, args.checkpoint_activations)
    if args.weights != SCRATCH:
        report = checkpoint.load_encoder(network, Path(args.weights), args.stem, args.allow_partial, args.transfer)
        log(f"encoder from {args.weights}:\n{report.table()}")
    network.to(device)
    optimizer = build_optimizer(network.parameters(), args.lr, args.weight_decay, args.amsgrad)
    if ranks.is_main:
        write_json(folder / "config.json", split)
    step = restore(folder / "checkpoints", network, optimizer, ranks, log)
    model, gradients, all_reduce_ms = distributed.wrap(network, ranks, plan.compiler)
    log(f"{args.arch}, {args.decoder} decoder, {sum(p.numel() for p in network.parameters()):,} parameters")

    augment = plan.augment
    sizes = (args.patch_size, augment.window_size)
    train = [store.index(id) for id in split["train"]]
    how = {"seed": args.seed, "replace_by": train if args.on_bad_case == "skip" else None}
    patches = Patches(store, *sizes, labels=True, foreground=args.foreground, **how)
    shares = (plan.accumulate, ranks.rank, ranks.world)
    order = Batches(train, args.batch_size, args.seed, step, args.steps, *shares, drop_last=False)
    at_once = args.batch_size // (ranks.world * plan.accumulate) * patches.sample_bytes()
    if line := hardware.check_shared_memory(args.workers, at_once, local_world=ranks.local_world):
        log(line)
    batches = loader(patches, order, args.workers, pin_memory=device.type == "cuda")
    describe = partial(describe_step, order, store, augment.draw)
    sizes = (args.log_every, args.batch_size, plan.accumulate)
    progress = Progress(folder, ranks, step, args.steps, *sizes, describe, all_reduce_ms)
    saving = SavePoints(plan.stop, ranks, args.save_every, args.save_minutes, args.steps)
    clock = progress.clock
    network.train()
    while step < args.steps:
        lr = stretched_cosine(step, args.lr, args.steps)
        set_lr(optimizer, lr)
        optimizer.zero_grad(set_to_none=True)
        for micro in range(plan.accumulate):
            batch = next(batches)
            clock.lap("data", on_host=True)
            progress.bad_cases(batch["bad"], tqdm.write)  # of every rank
            windows = [batch[name].to(device, non_blocking=True) for name in ("image", "label")]
            image, label = augment(*windows, augment.draw(batch["epoch"], batch["case"], len(store.channels)))
            clock.lap("augment")
            with gradients(sync=micro == plan.accumulate - 1):
                with plan.autocast:
                    outputs = model(image)
                loss = segmentation_loss(outputs, label)
                (loss / plan.accumulate).backward()
            progress.add(step, {"segmentation": loss})
            clock.lap("forward_backward")
        if args.on_nan == "skip":
            progress.skip(step, skip_if_not_finite(optimizer, network))
        optimizer.step()
        step += 1
        clock.lap("optimizer")
        progress.report(step, lr, network)
        if saving.due(step):
            progress.check_before_saving(step, network)
            if ranks.is_main:
                content = checkpoint_content("segment", step, network, optimizer, store, plan.build, args)
                checkpoint.save(folder / "checkpoints", content, args.keep)
            clock.start()
        if saving.stopping:
            raise KeyboardInterrupt(f"saved at step {step}; the same command continues")
    progress.close()


def splits_of(store: Store, args: argparse.Namespace) -> list[dict[str, list[str]]]:
    """The folds, written to the store the first time."""
    if args.protocol is not None:
        return saved_folds(store, args.protocol, args.allow_incomplete)
    name = f"{args.folds} folds, {args.train_cases} training cases, seed {args.split_seed}"
    make = partial(fold_splits, store, args.folds, args.train_cases, args.split_seed)
    return saved_split(store, name, make)


def refuse_leakage(
    args: argparse.Namespace,
    store: Store,
    splits: list[dict],
    pretraining: list[Store],
    ranks: distributed.Ranks,
    log: Callable[[str], None],
) -> None:
    """Say which test cases pretraining saw, as far as that can be known; refuse them where it was asked for."""
    test = {id for split in splits for id in split["test"]}
    how = (Path(args.weights), pretraining, args.near_duplicates)
    told = leakage.check_run(args.out, store, test, *how) if ranks.is_main else None
    seen, text = distributed.from_main(told)
    if seen and args.strict_leakage:
        raise ValueError(f"--strict-leakage: {text.removeprefix('WARNING: ')}")
    log(text)


def check_preprocessing(weights: Path, store: Store) -> None:
    """Refuse weights that were pretrained on volumes prepared in another way than the store's."""
    saw = checkpoint.read(weights).get("preprocess")
    if not isinstance(saw, dict):  # a published file, which does not tell
        return
    for name in ("spacing", "normalization"):
        if saw.get(name) != store.config[name]:
            raise ValueError(
                f"--weights {weights}: pretrained on volumes with {name} {saw.get(name)}, {store.path} has "
                f"{store.config[name]}; preprocess with the same --{name}, or pretrain again"
            )


if __name__ == "__main__":
    cli.run(main)
