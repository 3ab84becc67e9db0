"""Fine-tune a pretrained encoder, or train from scratch, for segmentation with few labels; one network per fold.

    python train_finetune.py --data STORE --arch unet_xl --weights CKPT --out RUN

The same command again continues the run. Read it from top to bottom: options, setup, folds, loop.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from amaes import backend, checkpoint, cli, distributed, options
from amaes.augment import FINETUNE_PRESETS as AUGMENTATIONS
from amaes.augment import FinetuneAugment
from amaes.data import Batches, Patches, Store, fold_splits, loader, saved_split
from amaes.losses import segmentation_loss
from amaes.models import SEGMENTATION_DECODERS, build_segmenter
from amaes.optim import build_optimizer, set_lr, stretched_cosine
from amaes.run import Progress, StopRequest, checkpoint_content, open_run, restore

SCRATCH = "scratch"


def parse_options() -> argparse.Namespace:
    parser = cli.Parser(description="Train a segmentation network on a few labelled cases of a store, one per fold.")
    add = parser.add_argument_group("data").add_argument
    add("--data", required=True, metavar="STORE", help="folder written by amaes.preprocess --labels")
    add("--augment", choices=list(AUGMENTATIONS), help="transforms (default: spatial with --weights CKPT, else all)")
    add(
        "--window",
        choices=["parity", "official", "none"],
        default="parity",
        help="margin read for rotations; none: no margin",
    )
    add("--foreground", type=cli.fraction, default=0.33, help="share of patches placed around a foreground voxel")
    add = parser.add_argument_group("weights").add_argument
    add("--weights", default=SCRATCH, metavar="CKPT", help="checkpoint whose encoder is taken, or scratch")
    add("--stem", choices=checkpoint.STEMS, default="repeat", help="first convolution, where the channels differ")
    add("--allow-partial", action="store_true", help="take a file that gives less than 95 %% of the encoder")
    add("--decoder", choices=list(SEGMENTATION_DECODERS), default="unet", help="new in any case")
    add("--deep-supervision", action="store_true", help="also train on the outputs of coarser stages")
    add = parser.add_argument_group("folds: train on few cases, test on all others").add_argument
    add("--folds", type=cli.positive_int, default=6, help="number of folds")
    add("--train-cases", type=cli.positive_int, default=20, help="labelled cases a fold trains on")
    add("--split-seed", type=cli.non_negative_int, default=0, help="of the drawing of folds")
    add("--fold", default="all", metavar="K|all", help="the fold to train, counted from 0")
    add("--steps", type=cli.positive_int, default=2500, help="optimizer steps of each fold")
    options.add_model_options(parser, arch="unet_xl")
    options.add_run_options(parser, out="runs/finetune", save_every=250)
    args = options.parse(parser, "finetune")
    if args.augment is None:
        args.augment = "all" if args.weights == SCRATCH else "spatial"
    if args.fold != "all" and not (args.fold.isdecimal() and int(args.fold) < args.folds):
        parser.error(f"--fold {args.fold}: accepted: all, or 0 to {args.folds - 1} (--folds {args.folds})")
    return args


def main() -> int:
    args = parse_options()
    ranks = distributed.setup(args.device)
    log = tqdm.write if ranks.is_main else lambda line: None

    # What contradicts itself is refused before any work.
    options.check_batch(args.batch_size, ranks.world, args.accumulate)
    options.check_patch_size(args.patch_size, args.arch)
    store = Store(args.data)
    build = {
        "arch": args.arch,
        "in_channels": len(store.channels),
        "num_classes": store.num_classes,
        "decoder": args.decoder,
        "deep_supervision": args.deep_supervision,
    }
    if args.weights != SCRATCH:
        check_preprocessing(Path(args.weights), store)
        with torch.device("meta"):
            trial = build_segmenter(**build)
        checkpoint.load_encoder(trial, Path(args.weights), args.stem, args.allow_partial)
    splits = distributed.from_main(splits_of(store, args) if ranks.is_main else None)

    if ranks.is_main:
        record = {"store": store.fingerprint, "build": build}
        open_run(args.out, options.as_plain(args), record, args.resume, args.overwrite)
    distributed.barrier()
    for fold, split in enumerate(splits):
        if args.fold in ("all", str(fold)):
            log(f"fold {fold}: {len(split['train'])} cases to train on, {len(split['test'])} to test on")
            train_fold(args, store, build, split, args.out / f"fold{fold}", ranks, log)
    distributed.shutdown()
    log(f"done; next: python evaluate.py {args.out}")
    return cli.EXIT_OK


def train_fold(
    args: argparse.Namespace,
    store: Store,
    build: dict,
    split: dict[str, list[str]],
    folder: Path,
    ranks: distributed.Ranks,
    log: Callable[[str], None],
) -> None:
    """Train on split["train"] from the start, or from the newest checkpoint in `folder`, to the last step."""
    half = backend.use_bf16(ranks.device, args.precision)
    compiler, how = backend.compiler(ranks.device, args.compile)
    make = partial(build_segmenter, **build)
    fitting = backend.fit_micro_batch(make, args.patch_size, args.batch_size, ranks, half)
    accumulate = fitting if args.accumulate == "auto" else args.accumulate
    torch.manual_seed(args.seed)  # the decoder starts the same from scratch and with weights
    network = make()
    if args.weights != SCRATCH:
        report = checkpoint.load_encoder(network, Path(args.weights), args.stem, args.allow_partial)
        log(f"encoder from {args.weights}:\n{report.table()}")
    network.to(ranks.device)
    optimizer = build_optimizer(network.parameters(), args.lr, args.weight_decay, args.amsgrad)
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(folder / "config.json", split)
    step = restore(folder / "checkpoints", network, optimizer, ranks, log)
    model, gradients = distributed.wrap(network, ranks, compiler)
    log(f"{args.arch}, {args.decoder} decoder, {sum(p.numel() for p in network.parameters()):,} parameters, {how}")
    log(f"{options.describe_batch(args.batch_size, accumulate, ranks, args.steps)}, {args.augment} augmentation")

    train = [store.index(id) for id in split["train"]]
    augment = FinetuneAugment(args.patch_size, preset=args.augment, seed=args.seed, window=args.window)
    patches = Patches(
        store, args.patch_size, augment.window_size, seed=args.seed, labels=True, foreground=args.foreground
    )
    order = Batches(
        train, args.batch_size, args.seed, step, args.steps, accumulate, ranks.rank, ranks.world, drop_last=False
    )
    batches = loader(patches, order, args.workers, pin_memory=ranks.device.type == "cuda")
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=half)
    stop = StopRequest()
    progress = Progress(folder, ranks, step, args.steps, args.log_every, args.batch_size)
    clock = progress.clock
    network.train()
    while step < args.steps:
        lr = stretched_cosine(step, args.lr, args.steps)
        set_lr(optimizer, lr)
        optimizer.zero_grad(set_to_none=True)
        for micro in range(accumulate):
            batch = next(batches)
            clock.lap("data", on_host=True)
            windows = [batch[name].to(ranks.device, non_blocking=True) for name in ("image", "label")]
            image, label = augment(*windows, augment.draw(batch["epoch"], batch["case"], len(store.channels)))
            clock.lap("augment")
            with gradients(sync=micro == accumulate - 1):
                with autocast:
                    outputs = model(image)
                loss = segmentation_loss(outputs, label) / accumulate
                loss.backward()
            progress.add(loss)
        optimizer.step()
        step += 1
        clock.lap("step")
        progress.report(step, lr, network)
        interrupted = stop.agreed(step, args.log_every, ranks)
        if step % args.save_every == 0 or step == args.steps or interrupted:
            if ranks.is_main:
                content = checkpoint_content("segment", step, network, optimizer, store, build, args)
                checkpoint.save(folder / "checkpoints", content, args.keep)
            clock.start()
        if interrupted and step < args.steps:
            raise KeyboardInterrupt
    progress.close()


def splits_of(store: Store, args: argparse.Namespace) -> list[dict[str, list[str]]]:
    """The folds, written to the store the first time."""
    name = f"{args.folds} folds, {args.train_cases} training cases, seed {args.split_seed}"
    make = partial(fold_splits, store, args.folds, args.train_cases, args.split_seed)
    return saved_split(store, name, make, checkpoint.write_json)


def check_preprocessing(weights: Path, store: Store) -> None:
    """Refuse weights that were pretrained on volumes prepared in another way than the store's."""
    saw = checkpoint.read(weights).get("preprocess")
    for name in ("spacing", "normalization"):
        if saw is not None and saw[name] != store.config[name]:
            raise ValueError(
                f"--weights {weights}: pretrained on volumes with {name} {saw[name]}, {store.path} has "
                f"{store.config[name]}; preprocess with the same --{name}, or pretrain again"
            )


if __name__ == "__main__":
    cli.run(main)
