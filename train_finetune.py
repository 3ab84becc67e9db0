"""Fine-tune a pretrained encoder, or train from scratch, for segmentation with few labels; one network per fold.

    python train_finetune.py --data STORE --arch unet_xl --weights CKPT --out RUN

The same command again continues the run. Read it from top to bottom: options, setup, folds, loop.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from amaes import cli
from amaes.augment.options import FINETUNE_PRESETS
from amaes.choices import ALL, SCRATCH, WINDOWS
from amaes.models.build import SEGMENTATION_DECODERS
from amaes.paper.protocols import PROTOCOLS
from amaes.training import options
from amaes.training.fold_options import add_fold_options, check_folds, fold_contradictions


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    examples = ["--data STORE --weights PRETRAINED --out RUN", "--data STORE --splits folds.csv --patience 5 --out RUN"]
    description = "Train a segmentation network on a few labelled cases of a store, one per fold."
    parser = cli.Parser(examples, description=description)
    add = parser.add_argument_group("data").add_argument
    add("--data", required=True, metavar="STORE", help="folder written by amaes.preprocess --labels")
    explanation = "transforms (default: spatial with --weights CKPT, else all)"
    add("--augment", choices=list(FINETUNE_PRESETS), help=explanation)
    options.add_augment_options(add)
    add("--foreground", type=cli.fraction, default=0.33, help="share of patches placed around a foreground voxel")
    explanation = "weights of single classes in the cross-entropy, e.g. 2:5 (default: 1 for each)"
    add("--class-weights", type=options.class_weight, nargs="+", metavar="CLASS:WEIGHT", help=explanation)
    add = options.add_weights_options(parser, "encoder")
    add("--pretrain-data", nargs="+", metavar="STORE", help="stores they were trained on (default: as CKPT says)")
    add("--strict-leakage", action="store_true", help="refuse to train where pretraining saw test cases")
    explanation = "also look for test scans that pretraining saw in another form: correlation >= R, e.g. 0.98"
    add("--near-duplicates", type=cli.correlation, metavar="R", help=explanation)
    add("--decoder", choices=list(SEGMENTATION_DECODERS), default="unet", help="starts new unless --transfer all")
    add("--deep-supervision", action="store_true", help="also train on the outputs of coarser stages")
    add_fold_options(parser, protocols=list(PROTOCOLS))
    options.add_model_options(parser, arch="unet_xl")
    options.add_rate_options(parser)
    options.add_run_options(parser, out="runs/finetune", save_every=250)
    add = options.add_published_options(parser)
    explanation = "margin read for rotations; official: as the published code; parity: as that, or one voxel more"
    add("--window", choices=WINDOWS, default="parity", help=explanation)
    args = options.parse(parser, "finetune", argv)
    contradictions = options.weights_contradictions(args) + fold_contradictions(args)
    contradictions += options.class_weights_contradictions(args)
    for name in ("pretrain_data", "strict_leakage", "near_duplicates"):
        if getattr(args, name) and args.weights == SCRATCH:
            contradictions.append(f"--{name.replace('_', '-')}: accepted with --weights CKPT, scratch has seen nothing")
    parser.refuse(contradictions + options.rate_contradictions(args))
    args.augment = args.augment or ("all" if args.weights == SCRATCH else "spatial")
    args.fold = args.fold if args.fold == "all" else str(int(args.fold))
    return args


if __name__ == "__main__":
    ARGS = parse_options()  # before torch is imported: --help and a mistyped option answer at once

import torch

from amaes import checkpoint, distributed, hardware
from amaes.augment import FinetuneAugment
from amaes.data.loader import training_batches
from amaes.data.order import Batches, Share
from amaes.data.patches import Patches
from amaes.data.split_files import read_splits
from amaes.data.splits import all_cases, fold_splits, hold_out_validation, saved_split
from amaes.data.store import Store
from amaes.evaluation import leakage
from amaes.files import write_json
from amaes.models import build_network
from amaes.objectives.supervised import SupervisedSegmentation
from amaes.paper.protocols import check_store, saved_folds
from amaes.training import verdict
from amaes.training.checks import check_batch, check_patch_size, describe_batch, notes_on_patch, settle_compilation
from amaes.training.optim import FinetuneRates, build_optimizer, optimizer_step
from amaes.training.progress import Progress
from amaes.training.run_folder import RunFolder
from amaes.training.stopping import Stop
from amaes.training.weights import find_weights, identity
from amaes.training.whole_scans import BestOnValidation


@dataclass
class Run:
    """What all folds share."""

    objective: SupervisedSegmentation
    store: Store
    share: Share  # how a batch is shared out
    autocast: torch.autocast
    compiler: Callable
    stop: Stop


def main(args: argparse.Namespace) -> int:
    ranks = distributed.setup(args.device)
    log = cli.logger(ranks.is_main)
    for line in hardware.known_defects(ranks.device):
        log(line)

    # What contradicts itself is refused before any work.
    check_batch(args.batch_size, ranks.world, args.accumulate)
    check_patch_size(args.patch_size, args.arch)
    bf16 = hardware.use_bf16(ranks.device, args.precision)
    augment_options = {"window": args.window, **dict(args.augment_options)}
    augment = FinetuneAugment(args.patch_size, args.augment, args.seed, **augment_options)
    head = {"decoder": args.decoder, "deep_supervision": args.deep_supervision, "foreground": args.foreground}
    objective = SupervisedSegmentation(augment, **head, class_weights=dict(args.class_weights or ()))

    # Data and network
    args.data = str(Path(args.data).absolute())  # so that config.json finds it from any working folder
    store = Store(args.data)
    if args.protocol is not None:
        check_store(store, args.protocol)
    objective.see(store)
    build = {"arch": args.arch, "in_channels": len(store.channels), **objective.build}
    build |= options.given(merging=args.merging, grn=args.grn)
    pretraining = [Store(name) for name in args.pretrain_data or ()]
    with torch.device("meta"):
        on_meta = build_network("segment", build, args.checkpoint_activations)
    if args.weights != SCRATCH:
        args.weights = find_weights(args.weights, store, log)
        checkpoint.load_encoder(on_meta, Path(args.weights), args.stem, args.allow_partial, args.transfer)
    splits = distributed.from_main(splits_of(store, args, log) if ranks.is_main else None)
    check_folds(args, splits)

    # Run
    kept = {"options": options.as_plain(vars(args)), "patch_size": args.patch_size, "keep": args.keep}
    folder = RunFolder(args.out, "segment", ranks, task="segment", build=build, store=store, **kept)
    folds = {i: replace(folder, path=args.out / f"fold{i}") for i in range(len(splits)) if args.fold in ("all", str(i))}
    finished = not args.overwrite and all(fold.is_finished(args.steps) for fold in folds.values())
    compiler, compiled = settle_compilation(ranks.device, args.compile, finished)
    accumulate = folder.settle_micro_steps(
        args.accumulate, on_meta, args.batch_size, bf16=bf16, begin_anew=args.overwrite
    )
    record = {"store": store.fingerprint, "build": build, "splits": splits, "weights": identity(args.weights)}
    part = None if args.fold == "all" else f"fold{int(args.fold)}"
    folder.open(record, accumulate, resume=args.resume, overwrite=args.overwrite, log=log, part=part)
    if args.weights != SCRATCH:
        report_leakage(args, store, splits, pretraining, ranks, log)
    share = Share(args.batch_size, accumulate, ranks.rank, ranks.world)
    log(f"{describe_batch(share, ranks.device, args.steps)}, {args.augment} augmentation")
    for line in (compiled, *notes_on_patch(args.patch_size, [case.shape for case in store.cases], args.arch)):
        log(line)
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16)
    run = Run(objective, store, share, autocast, compiler, Stop(ranks, args.save_minutes))
    for i, fold in folds.items():
        log(f"fold {i}: {len(splits[i]['train'])} cases to train on, {len(splits[i]['test'])} to test on")
        with hardware.out_of_memory_explained(ranks.device, accumulate, args.patch_size, share.of_rank):
            train_fold(args, run, fold, splits[i], ranks, log)
    distributed.shutdown()
    tested = any(split["test"] for split in splits)
    log(f"done; next: {cli.command('evaluate') if tested else cli.command('predict') + ' --weights'} {args.out}")
    return cli.EXIT_OK


def train_fold(args, run: Run, folder: RunFolder, split: dict, ranks: distributed.Ranks, log: Callable) -> None:
    """Train on split["train"] from the start, or from the newest checkpoint in the fold's folder, to the last step."""
    objective, store, share, stop = run.objective, run.store, run.share, run.stop
    network, rates, optimizer = network_to_train(args, folder.build, ranks.device, log)
    if ranks.is_main:
        write_json(folder.path / "config.json", split)
    step = folder.load_newest(network, optimizer, log)
    model = distributed.wrap(network, ranks, run.compiler)

    train = [store.index(id) for id in split["train"]]
    spare = train if args.on_bad_case == "skip" else None
    sizes = {"patch_size": args.patch_size, "window_size": objective.window_size}
    patches = Patches(store, **sizes, seed=args.seed, replace_by=spare, **objective.reading)
    order = Batches(train, share, seed=args.seed, start=step, stop=args.steps, drop_last=False)
    batches = training_batches(patches, order, workers=args.workers, ranks=ranks, log=log)
    dice = verdict.TrainingDice(store.num_classes, ranks.device)
    progress = Progress(folder.path, ranks, network, order, store, objective.draw, args.log_every, dice.read)
    clock = progress.clock
    often = {"every": args.val_every, "patience": args.patience, "last": args.steps}
    validation = BestOnValidation(folder, split.get("validation", ()), **often, precision=args.precision)
    if validation.due(step):  # cut short when the run was stopped
        validation.measure(step, network, progress, stop)
    stop.saved()
    while step < args.steps and not (stop.agreed or validation.exhausted):
        clock.start()  # what comes between steps does not count
        lr = rates.set(optimizer, step)
        optimizer.zero_grad(set_to_none=True)
        for micro in range(share.accumulate):
            batch = next(batches)
            clock.lap("data", on_host=True)
            inputs, targets = objective.prepare(batch, ranks.device)  # augment image and label
            clock.lap("augment")
            with distributed.sync_gradients(model, last=micro == share.accumulate - 1):
                with run.autocast:
                    outputs = model(inputs)
                losses = objective.losses(outputs, targets)
                (sum(losses.values()) / share.accumulate).backward()
            progress.add(losses, batch["bad"])
            dice.add(outputs, targets[0])
            clock.lap("forward_backward")
        skipped = optimizer_step(optimizer, network, args.on_nan)
        clock.lap("optimizer")
        step += 1
        progress.step(lr, skipped)  # writes a line every --log-every steps; raises where the loss is not finite
        if validation.due(step):  # on whole scans; keeps the best network
            validation.measure(step, network, progress, stop)
        if stop.ask(step) or step % args.save_every == 0 or step == args.steps or validation.exhausted:
            progress.check_finite()
            folder.save(step, network, optimizer)
            stop.saved()
    batches.close()  # ends the workers
    progress.close()
    if stop.agreed:
        raise KeyboardInterrupt(f"saved at step {step}; the same command continues")
    if ranks.is_main:
        if validation.exhausted:
            write_json(folder.path / "config.json", {**split, "ended_at": step})
        if best := validation.summary():
            log(best)
        log(verdict.of_finetuning(folder.path / "metrics.jsonl", {0: "background"} | store.labels))


def network_to_train(args, build: dict, device: torch.device, log: Callable) -> tuple:
    """The network with the weights it begins with, its learning rates over the run, and its optimizer."""
    torch.manual_seed(args.seed)  # the decoder starts the same from scratch and with weights
    network = build_network("segment", build, args.checkpoint_activations)
    if args.weights != SCRATCH:
        taken = checkpoint.load_encoder(network, Path(args.weights), args.stem, args.allow_partial, args.transfer)
        log(f"encoder from {args.weights}:\n{taken.table()}")
    network.to(device)
    warmup = {"warmup": round(args.warmup * args.steps), "decoder_warmup": args.decoder_warmup}
    rates = FinetuneRates(args.lr, args.steps, **warmup, encoder=args.encoder_lr, freeze=args.freeze)
    optimizer = build_optimizer(rates.groups(network), args.lr, args.weight_decay, args.amsgrad)
    count = sum(p.numel() for p in network.parameters())
    log(f"{args.arch}, {args.decoder} decoder, {count:,} parameters{rates.remark()}")
    return network, rates, optimizer


def splits_of(store: Store, args: argparse.Namespace, log: Callable) -> list[dict[str, list[str]]]:
    """The folds: of --splits, of --protocol, or drawn and written to the store the first time."""
    if args.splits_file is not None:
        return read_splits(args.splits_file, store, log)
    if args.protocol is not None:
        return saved_folds(store, args.protocol, args.allow_incomplete)
    if args.train_cases == ALL:
        return all_cases(store)
    name = f"{args.folds} folds, {args.train_cases} training cases, seed {args.split_seed}"
    folds = saved_split(store, name, partial(fold_splits, store, args.folds, args.train_cases, args.split_seed))
    return [hold_out_validation(fold, store, args.val_cases, args.split_seed) for fold in folds]


def report_leakage(args, store: Store, splits: list[dict], pretraining: list[Store], ranks, log: Callable) -> None:
    """Say which test cases pretraining saw, as far as that can be known; refuse them with --strict-leakage."""
    test = {id for split in splits for id in split["test"]}
    report = None
    if ranks.is_main:
        report = leakage.check_run(args.out, store, test, Path(args.weights), pretraining, args.near_duplicates)
    seen, text = distributed.from_main(report)
    if seen and args.strict_leakage:
        raise ValueError(f"--strict-leakage: {text.removeprefix('WARNING: ')}")
    log(text)


if __name__ == "__main__":
    cli.run(main, ARGS)
