"""Pretraining: masked autoencoder with augmentation reversal (AMAES, arXiv 2408.00640), or another objective.

    torchrun --nproc_per_node=2 train_pretrain.py --arch unet_xl --data STORE --out RUN

The same command again continues the run. Read it from top to bottom: options, setup, loop.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from amaes import cli
from amaes.augment.options import PRETRAIN_PRESETS
from amaes.choices import SCRATCH, SPLIT_BY
from amaes.objectives import OBJECTIVES, Objective, options_of
from amaes.training import options


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    examples = ["--data STORE --out RUN", "--data STORE --arch mednext_m --patch-size 96 --steps 100000 --out RUN"]
    parser = cli.Parser(examples, description="Pretrain an encoder on the volumes of a store.")
    explanation = "amaes: rebuild masked, augmented patches; swin: SwinUNETR's self-supervision; supervised: segment"
    parser.add_argument("--objective", choices=list(OBJECTIVES), default="amaes", help=explanation)
    add = parser.add_argument_group("data").add_argument
    explanation = "written by amaes.preprocess, several are read as one; demo: synthetic heads, made in --out"
    add("--data", nargs="+", default=["demo"], metavar="STORE", help=explanation)
    add("--val-fraction", type=cli.fraction, default=0.01, help="share of the volumes kept for validation")
    explanation = "transforms; those of intensities change the input, not the target"
    add("--augment", choices=list(PRETRAIN_PRESETS), default="all", help=explanation)
    options.add_augment_options(add)
    options.add_objective_options(parser)
    length = parser.add_argument_group("length")
    add = length.add_mutually_exclusive_group().add_argument
    add("--epochs", type=cli.epochs, default=100, help="passes over the volumes, one patch of each")
    add("--steps", type=cli.positive_int, help="optimizer steps, instead of --epochs")
    add = length.add_argument
    add("--warmup", type=cli.fraction, default=0.05, help="fraction of the run in which the learning rate rises")
    explanation = "steps between validations (default: an epoch, or 1 %% of the run if that is longer)"
    add("--val-every", type=cli.positive_int, metavar="STEPS", help=explanation)
    options.add_weights_options(parser, "encoder")
    options.add_model_options(parser, arch="unet_xl")
    add = options.add_run_options(parser, out="runs/pretrain", save_every=500)
    explanation = "epochs between pictures of what the network makes of fixed patches (needs matplotlib; default: none)"
    add("--panels-every", type=cli.epochs, metavar="EPOCHS", help=explanation)
    add = parser.add_argument_group("measuring").add_argument
    explanation = "time N steps of each kind, print a table and a verdict; begins no run in --out"
    add("--benchmark", type=cli.positive_int, metavar="N", help=explanation)
    add = options.add_published_options(parser)
    add("--split-by", choices=SPLIT_BY, default="subject", help="what stays on one side of that split")
    args = options.parse(parser, "pretrain", argv)
    options.settle_objective_options(parser, args)
    parser.refuse(options.weights_contradictions(args))
    if "demo" in args.data and len(args.data) > 1:
        parser.error(f"--data {' '.join(args.data)}: demo stands alone; a store in a folder of that name is ./demo")
    return args


if __name__ == "__main__":
    ARGS = parse_options()  # before torch is imported: --help and a mistyped option answer at once

import torch
from torch import nn

from amaes import checkpoint, distributed, hardware
from amaes.data.loader import training_batches
from amaes.data.order import Share, order_of
from amaes.data.pretrain_data import PretrainData, split_for_pretraining
from amaes.data.several_stores import open_stores
from amaes.data.store import Store
from amaes.mask import check_mask_ratio
from amaes.models import build_network
from amaes.pictures import check_matplotlib
from amaes.training import benchmark, verdict
from amaes.training.checks import check_batch, check_patch_size, describe_batch, notes_on_patch, settle_compilation
from amaes.training.optim import build_optimizer, optimizer_step, set_lr, warmup_cosine
from amaes.training.panels import draw_panels
from amaes.training.presets import remark
from amaes.training.progress import Progress
from amaes.training.run_folder import RunFolder
from amaes.training.stopping import Stop
from amaes.training.validation import validate
from amaes.training.weights import find_weights, identity


@dataclass
class Run:
    """What follows from the options and the data."""

    objective: Objective
    data: PretrainData
    share: Share  # how a batch is shared out
    steps: int
    warmup_steps: int
    val_every: int  # steps
    panels_every: int  # steps, 0 = never
    autocast: torch.autocast

    def validates_after(self, step: int) -> bool:
        return bool(self.data.validation) and step > 0 and (step % self.val_every == 0 or step == self.steps)

    def draws_after(self, step: int) -> bool:
        return self.panels_every > 0 and (step % self.panels_every == 0 or step == self.steps)


def main(args: argparse.Namespace) -> int:
    ranks = distributed.setup(args.device)
    log = cli.logger(ranks.is_main)
    for line in hardware.known_defects(ranks.device):
        log(line)

    # What contradicts itself is refused before any work.
    objective, build = check(args, ranks)
    bf16 = hardware.use_bf16(ranks.device, args.precision)

    data = open_data(args, objective, ranks, log)
    steps_per_epoch = max(1, len(data.train) // args.batch_size)
    steps = args.steps or args.epochs * steps_per_epoch

    build |= {**objective.build, "in_channels": len(data.store.channels)}
    torch.manual_seed(args.seed)
    network = build_network(objective.task, build, args.checkpoint_activations)
    args.weights = find_weights(args.weights, data.store, log)
    if args.weights != SCRATCH:
        taken = checkpoint.load_encoder(network, Path(args.weights), args.stem, args.allow_partial, args.transfer)
        log(f"{args.transfer} from {args.weights}:\n{taken.table()}")
    network.to(ranks.device)
    optimizer = build_optimizer(network.parameters(), args.lr, args.weight_decay, args.amsgrad)
    kept = {"options": options.as_plain(vars(args)), "patch_size": args.patch_size, "keep": args.keep}
    folder = RunFolder(args.out, "pretrain", ranks, task=objective.task, build=build, store=data.store, **kept)
    with torch.device("meta"):
        on_meta = build_network(objective.task, build, args.checkpoint_activations)
    begin_anew = args.overwrite or bool(args.benchmark)
    accumulate = folder.settle_micro_steps(
        args.accumulate, on_meta, args.batch_size, bf16=bf16, views=objective.views, begin_anew=begin_anew
    )
    run = Run(
        objective,
        data,
        Share(args.batch_size, accumulate, ranks.rank, ranks.world),
        steps=benchmark.steps_needed(args.benchmark) if args.benchmark else steps,
        warmup_steps=round(args.warmup * steps),
        val_every=args.val_every or max(steps_per_epoch, steps // 100),
        panels_every=(args.panels_every or 0) * steps_per_epoch,
        autocast=torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16),
    )
    finished = not begin_anew and folder.is_finished(run.steps)
    compiler, compiled = settle_compilation(ranks.device, args.compile, finished)
    head = f"{args.decoder} decoder" if args.decoder else f"{args.reconstruction_head} head"
    log(f"{args.arch}, {head}, {sum(p.numel() for p in network.parameters()):,} parameters")
    log(compiled)
    log_start(args, run, log)

    model = distributed.wrap(network, ranks, compiler)
    with hardware.out_of_memory_explained(ranks.device, accumulate, args.patch_size, run.share.of_rank):
        if args.benchmark:
            measure(args, run, ranks, on_meta, model, optimizer, log)
        else:
            train(args, run, ranks, folder, network, model, optimizer, log)
    distributed.shutdown()
    return cli.EXIT_OK


def log_start(args: argparse.Namespace, run: Run, log: Callable) -> None:
    """What a user should know of the options and the data before the first step."""
    objective, data = run.objective, run.data
    if published := remark(vars(args)):
        log(published)
    log(f"{args.objective}: {len(data.train)} volumes to train on, {len(data.validation)} to validate on")
    shapes = [case.shape for case in data.store.cases]
    for line in notes_on_patch(args.patch_size, shapes, args.arch, args.token_size or 1):
        log(line)
    if few := verdict.few_volumes(len(data.validation)):
        log(f"WARNING: {few}")
    if objective.views > 1 and run.share.of_micro_step < 2:
        log("WARNING: one patch per rank and micro-step: the contrastive loss is 0, there is nothing to tell it from")


def check(args: argparse.Namespace, ranks: distributed.Ranks) -> tuple[Objective, dict]:
    """The objective, and the arguments that build the network as far as they do not follow from the data."""
    check_batch(args.batch_size, ranks.world, args.accumulate)
    check_patch_size(args.patch_size, args.arch, args.token_size or 1)
    if args.mask_ratio is not None:
        check_mask_ratio(args.patch_size, args.token_size, args.mask_ratio, args.loss_over)
    if args.panels_every:
        check_matplotlib("panels_every")
    settings = {name: getattr(args, name) for name in options_of(args.objective)}
    make = OBJECTIVES[args.objective]
    objective = make(args.patch_size, args.seed, args.augment, dict(args.augment_options), **settings)
    build = {"arch": args.arch, **options.given(merging=args.merging, grn=args.grn)}
    with torch.device("meta"):
        build_network(objective.task, {**build, **objective.build})
    return objective, build


def open_data(args: argparse.Namespace, objective: Objective, ranks: distributed.Ranks, log: Callable) -> PretrainData:
    """The stores of --data, split; the demo's is made first, by rank 0."""
    if args.data == ["demo"]:
        from amaes import phantom  # what it needs takes a second to import

        folder = args.out / "demo"
        log(f"--data demo: training on SYNTHETIC head phantoms, kept in {folder}; for real scans give --data STORE")
        made = phantom.make_demo_data(folder, labels=objective.labels) if ranks.is_main else None
        store = Store(distributed.from_main(made))
    else:
        args.data = [str(Path(path).absolute()) for path in args.data]  # config.json finds it from any working folder
        store = open_stores(args.data)
    objective.see(store)
    return split_for_pretraining(
        store,
        args.patch_size,
        objective.window_size,
        fraction=args.val_fraction,
        split_by=args.split_by,
        seed=args.seed,
        reading=objective.reading,
        skip_bad_cases=args.on_bad_case == "skip",
    )


def train(args, run: Run, ranks, folder: RunFolder, network: nn.Module, model: Callable, optimizer, log) -> None:
    """From the newest checkpoint to the last step: read, augment, mask, predict, update; log, validate and save."""
    objective, data, share = run.objective, run.data, run.share
    record = {"store": data.store.fingerprint, "validation": data.validation_ids, "build": folder.build}
    record |= {"total_steps": run.steps} | ({} if args.weights == SCRATCH else {"weights": identity(args.weights)})
    if objective.views > 1:
        record["patches_per_micro_step"] = share.of_micro_step
    folder.open(record, share.accumulate, resume=args.resume, overwrite=args.overwrite, log=log)
    step = folder.load_newest(network, optimizer, log)
    log(describe_batch(share, ranks.device, run.steps))
    span = {"seed": args.seed, "start": step, "stop": run.steps}
    order = order_of(data.store, data.train, share, **span, balanced=objective.labels)
    batches = training_batches(data.patches, order, workers=args.workers, ranks=ranks, log=log)
    progress = Progress(folder.path, ranks, network, order, data.store, objective.draw, args.log_every)
    stop, clock = Stop(ranks, args.save_minutes), progress.clock
    validating = (network, objective, data, run.autocast, ranks, progress, stop)
    if run.validates_after(step) and progress.validated != step:  # cut short when the run was stopped
        validate(*validating)
    network.train()
    while step < run.steps and not stop.agreed:
        clock.start()  # what comes between steps does not count
        lr = warmup_cosine(step, args.lr, run.warmup_steps, run.steps)
        set_lr(optimizer, lr)
        optimizer.zero_grad(set_to_none=True)
        for micro in range(share.accumulate):
            batch = next(batches)
            clock.lap("data", on_host=True)
            inputs, targets = objective.prepare(batch, ranks.device)  # augment, target, mask
            clock.lap("augment")
            with distributed.sync_gradients(model, last=micro == share.accumulate - 1):
                with run.autocast:
                    outputs = model(inputs)
                losses = objective.losses(outputs, targets)
                (sum(losses.values()) / share.accumulate).backward()
            progress.add(losses, batch["bad"])
            clock.lap("forward_backward")
        skipped = optimizer_step(optimizer, network, args.on_nan)
        clock.lap("optimizer")
        step += 1
        progress.step(lr, skipped)  # writes a line every --log-every steps; raises where the loss is not finite
        if run.validates_after(step):
            validate(*validating)
        if run.draws_after(step) and ranks.is_main:
            path, cases = folder.path / "panels" / f"step-{step}.png", (data.validation or data.train)[:4]
            context = {"device": ranks.device, "autocast": run.autocast}
            heading = f"{folder.path.name}, step {step}"
            draw_panels(path, network, objective, data.fixed_patches, cases, heading=heading, **context)
        if stop.ask(step) or step % args.save_every == 0 or step == run.steps:
            progress.check_finite()
            folder.save(step, network, optimizer)
            stop.saved()
    batches.close()  # ends the workers
    progress.close()
    if step < run.steps or (run.validates_after(step) and progress.validated != step):
        raise KeyboardInterrupt(f"saved at step {step}; the same command continues")
    log(f"done: {folder.path}/checkpoints/step-{run.steps}.pt")
    if ranks.is_main:
        log(verdict.of_pretraining(folder.path / "metrics.jsonl", objective.trivial, vars(args)))


def measure(args, run: Run, ranks, on_meta: nn.Module, model: Callable, optimizer, log: Callable) -> None:
    """--benchmark: time whole steps with less and less left out; trains nothing that is kept, writes nothing."""
    order = order_of(run.data.store, run.data.train, run.share, seed=args.seed, start=0, stop=run.steps)
    batches = training_batches(run.data.patches, order, workers=args.workers, ranks=ranks, log=log)
    seconds = benchmark.time_training(
        model, optimizer, run.objective, batches, run.share, run.autocast, ranks, count=args.benchmark
    )
    flop = benchmark.training_flop(on_meta, (run.objective.views, on_meta.in_channels, *args.patch_size))
    for line in benchmark.timing_table(seconds, run.share, flop, ranks.device):
        log(line)


if __name__ == "__main__":
    cli.run(main, ARGS)
