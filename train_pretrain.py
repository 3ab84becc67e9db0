"""Masked-autoencoder pretraining with augmentation reversal (AMAES, arXiv 2408.00640).

    torchrun --nproc_per_node=2 train_pretrain.py --arch unet_xl --data STORE --out RUN

The same command again continues the run. Read it from top to bottom: options, setup, loop, validation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from amaes import backend, checkpoint, cli, distributed, options, rng
from amaes.augment import PRESETS as AUGMENTATIONS
from amaes.augment import PretrainAugment
from amaes.data import CROPS, Batches, Patches, Store, loader, pretrain_split, saved_split
from amaes.losses import RECONSTRUCTION_MEANS, reconstruction_loss
from amaes.mask import apply_mask, token_mask
from amaes.models import RECONSTRUCTION_DECODERS, build_network
from amaes.optim import build_optimizer, set_lr, warmup_cosine
from amaes.phantom import make_demo_data
from amaes.run import Progress, StopRequest, checkpoint_content, open_run, restore


def parse_options() -> argparse.Namespace:
    parser = cli.Parser(description="Pretrain an encoder: reconstruct masked, augmented patches of a store's volumes.")
    add = parser.add_argument_group("data").add_argument
    add(
        "--data",
        default="demo",
        metavar="STORE",
        help="written by amaes.preprocess; demo: synthetic heads, made in --out",
    )
    add("--val-fraction", type=cli.fraction, default=0.01, help="share of the volumes kept for validation")
    add("--split-by", choices=["subject", "volume"], default="subject", help="what stays on one side of that split")
    add("--augment", choices=list(AUGMENTATIONS), default="all", help="transforms; of intensity: the input's alone")
    add(
        "--augment-options",
        type=options.augment_option,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help=options.AUGMENT_HELP,
    )
    add("--crop", choices=CROPS, default="window", help="place the window uniformly (as published) or the patch in it")
    add = parser.add_argument_group("objective").add_argument
    add("--mask-ratio", type=cli.fraction, default=0.6, help="fraction of tokens hidden")
    add("--token-size", type=cli.positive_int, default=4, help="side of a token, voxels")
    add("--loss-over", choices=RECONSTRUCTION_MEANS, default="all", help="voxels of the mean squared error")
    add("--decoder", choices=list(RECONSTRUCTION_DECODERS), default="light", help="light: half the convolutions")
    add("--skips", action="store_true", help="connect encoder and decoder")
    length = parser.add_argument_group("length")
    add = length.add_mutually_exclusive_group().add_argument
    add("--epochs", type=cli.positive_int, default=100, help="passes over the volumes, one patch of each")
    add("--steps", type=cli.positive_int, help="optimizer steps, instead of --epochs")
    add = length.add_argument
    add("--warmup", type=cli.fraction, default=0.05, help="fraction of the run in which the learning rate rises")
    add(
        "--val-every",
        type=cli.positive_int,
        metavar="STEPS",
        help="between validations (default: epoch, or 1 %% of the run)",
    )
    options.add_model_options(parser, arch="unet_xl")
    options.add_run_options(parser, out="runs/pretrain", save_every=500)
    return options.parse(parser, "pretrain")


@dataclass
class Plan:
    """What follows from the options and the data."""

    store: Store
    train: list[int]  # positions in the store
    validation: list[int]
    build: dict  # arguments of build_autoencoder
    steps_per_epoch: int
    steps: int
    accumulate: int  # micro-steps per step
    autocast: torch.autocast
    augment: PretrainAugment


def main() -> int:
    args = parse_options()
    ranks = distributed.setup(args.device)
    log = tqdm.write if ranks.is_main else lambda line: None

    # What contradicts itself is refused before any work.
    options.check_batch(args.batch_size, ranks.world, args.accumulate)
    options.check_patch_size(args.patch_size, args.arch, args.token_size)
    options.check_mask(args.patch_size, args.token_size, args.mask_ratio, args.loss_over)
    half = backend.use_bf16(ranks.device, args.precision)
    compiler, how = backend.compiler(ranks.device, args.compile)
    augment = PretrainAugment(args.patch_size, args.augment, args.seed, **options.unique(args.augment_options))

    # Data
    store = open_store(args, ranks, log)
    split = distributed.from_main(split_of(store, args) if ranks.is_main else None)
    train, validation = ([store.index(id) for id in split[side]] for side in ("train", "validation"))
    steps_per_epoch = max(1, len(train) // args.batch_size)
    steps = args.steps or args.epochs * steps_per_epoch

    # Network
    build = {"arch": args.arch, "in_channels": len(store.channels), "decoder": args.decoder, "skips": args.skips}
    build |= options.encoder_options(args)
    make = partial(build_network, "pretrain", build, args.checkpoint_activations)
    fitting = backend.fit_micro_batch(make, args.patch_size, args.batch_size, ranks, half)
    chosen = {"accumulate": fitting if args.accumulate == "auto" else args.accumulate, "world": ranks.world}
    torch.manual_seed(args.seed)
    network = make().to(ranks.device)
    optimizer = build_optimizer(network.parameters(), args.lr, args.weight_decay, args.amsgrad)

    # Run
    if ranks.is_main:
        record = {"store": store.fingerprint, "validation": split["validation"], "build": build, "total_steps": steps}
        chosen = open_run(args.out, "pretrain", options.as_plain(args), record, chosen, args.resume, args.overwrite)
    accumulate = distributed.from_main(chosen)["accumulate"] if args.accumulate == "auto" else args.accumulate
    step = restore(args.out / "checkpoints", network, optimizer, ranks, log)
    model, gradients = distributed.wrap(network, ranks, compiler)
    log(f"{args.arch}, {args.decoder} decoder, {sum(p.numel() for p in network.parameters()):,} parameters, {how}")
    log(f"{len(train)} volumes to train on, {len(validation)} to validate on")
    log(options.describe_batch(args.batch_size, accumulate, ranks, steps))
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=half)
    plan = Plan(store, train, validation, build, steps_per_epoch, steps, accumulate, autocast, augment)
    loop(args, plan, ranks, network, model, gradients, optimizer, step, log)
    log(f"done: {args.out}/checkpoints/step-{steps}.pt")
    distributed.shutdown()
    return cli.EXIT_OK


def loop(args, plan: Plan, ranks, network: nn.Module, model: Callable, gradients: Callable, optimizer, step: int, log):
    """From `step` to the last: read, augment, mask, predict, update, now and then report, validate and save."""
    device, channels = ranks.device, len(plan.store.channels)
    augment = plan.augment
    patches = Patches(plan.store, args.patch_size, augment.window_size, seed=args.seed, crop=args.crop)
    order = Batches(plan.train, args.batch_size, args.seed, step, plan.steps, plan.accumulate, ranks.rank, ranks.world)
    batches = loader(patches, order, args.workers, pin_memory=device.type == "cuda")
    val_every = args.val_every or max(plan.steps_per_epoch, plan.steps // 100)
    stop = StopRequest()
    progress = Progress(args.out, ranks, step, plan.steps, args.log_every, args.batch_size)
    clock = progress.clock
    network.train()
    while step < plan.steps:
        lr = warmup_cosine(step, args.lr, round(args.warmup * plan.steps), plan.steps)
        set_lr(optimizer, lr)
        optimizer.zero_grad(set_to_none=True)
        for micro in range(plan.accumulate):
            batch = next(batches)
            clock.lap("data", on_host=True)
            window = batch["image"].to(device, non_blocking=True)
            source, target = augment(window, augment.draw(batch["epoch"], batch["case"], channels))
            keys = rng.keys(args.seed, batch["epoch"], batch["case"], "mask")
            mask = token_mask(source, args.token_size, args.mask_ratio, keys)
            clock.lap("augment")
            with gradients(sync=micro == plan.accumulate - 1):
                with plan.autocast:
                    prediction = model(apply_mask(source, mask))
                loss = reconstruction_loss(prediction, target, mask, args.loss_over) / plan.accumulate
                loss.backward()
            progress.add(loss)
        optimizer.step()
        step += 1
        clock.lap("step")
        progress.report(step, lr, network)
        if plan.validation and (step % val_every == 0 or step == plan.steps):
            loss, baseline = validate(network, plan, args, ranks)
            progress.write(step=step, val_loss=loss, val_loss_of_the_mean=baseline)
            log(f"step {step}: validation loss {loss:.5f} (predicting the visible mean: {baseline:.5f})")
            clock.start()
        interrupted = stop.agreed(step, ranks)
        if step % args.save_every == 0 or step == plan.steps or interrupted:
            progress.check_before_saving(step, network)
            if ranks.is_main:
                content = checkpoint_content("pretrain", step, network, optimizer, plan.store, plan.build, args)
                checkpoint.save(args.out / "checkpoints", content, args.keep)
            clock.start()
        if interrupted and step < plan.steps:
            raise KeyboardInterrupt
    progress.close()


@torch.no_grad()
def validate(network: nn.Module, plan: Plan, args: argparse.Namespace, ranks: distributed.Ranks) -> tuple[float, float]:
    """Mean loss over the validation volumes, one fixed patch and mask of each, and that of predicting the visible mean.

    Ranks share the volumes; each counts once.
    """
    network.eval()
    sums = torch.zeros(3, device=ranks.device)  # loss, that of the mean, volumes
    patches = Patches(plan.store, args.patch_size, seed=args.seed, purpose="validation")
    mine = [[(0, case)] for case in plan.validation[ranks.rank :: ranks.world]]
    for batch in loader(patches, mine, workers=0, pin_memory=False):
        target = batch["image"].to(ranks.device).float()
        keys = rng.keys(args.seed, [0], batch["case"], "validation mask")
        mask = token_mask(target, args.token_size, args.mask_ratio, keys)
        with plan.autocast:
            prediction = network(apply_mask(target, mask))
        mean = target.masked_fill(mask, 0).sum() / ((~mask).sum() * target.shape[1])
        sums[0] += reconstruction_loss(prediction, target, mask, args.loss_over)
        sums[1] += reconstruction_loss(mean.expand_as(target), target, mask, args.loss_over)
        sums[2] += 1
    loss, baseline, count = distributed.sum_over_ranks(sums).tolist()
    network.train()
    return loss / count, baseline / count


def open_store(args: argparse.Namespace, ranks: distributed.Ranks, log: Callable[[str], None]) -> Store:
    """The store of --data; the demo's is made first, by rank 0."""
    if args.data != "demo":
        args.data = str(Path(args.data).absolute())  # so that config.json finds it from any working folder
        return Store(args.data)
    folder = args.out / "demo"
    if ranks.is_main:
        log(f"--data demo: training on SYNTHETIC head phantoms, kept in {folder}; for real scans give --data STORE")
    path = distributed.from_main(make_demo_data(folder) if ranks.is_main else None)
    return Store(path)


def split_of(store: Store, args: argparse.Namespace) -> dict[str, list[str]]:
    """Training and validation volumes, written to the store the first time."""
    name = f"pretrain, {args.val_fraction} of volumes by {args.split_by}, seed {args.seed}"
    make = partial(pretrain_split, store, args.val_fraction, args.seed, args.split_by)
    return saved_split(store, name, make, by_subject=args.split_by == "subject")


if __name__ == "__main__":
    cli.run(main)
