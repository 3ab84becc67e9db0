"""Pretraining: masked autoencoder with augmentation reversal (AMAES, arXiv 2408.00640), or another objective.

    torchrun --nproc_per_node=2 train_pretrain.py --arch unet_xl --data STORE --out RUN

The same command again continues the run. Read it from top to bottom: options, objectives, setup, loop, validation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from amaes import checkpoint, cli, distributed, hardware
from amaes.augment import PRESETS as AUGMENTATIONS
from amaes.augment import FinetuneAugment, PretrainAugment
from amaes.data.classes import Classes, labelled
from amaes.data.loader import loader
from amaes.data.order import Batches, MixedBatches
from amaes.data.patches import CROPS, Patches
from amaes.data.several_stores import Pool, open_stores, split_each
from amaes.data.splits import pretrain_split, saved_split
from amaes.data.store import Store
from amaes.losses import RECONSTRUCTION_MEANS
from amaes.models import RECONSTRUCTION_DECODERS, RECONSTRUCTION_HEADS, SEGMENTATION_DECODERS, build_network
from amaes.objectives.masked import MaskedReconstruction
from amaes.objectives.objective import Objective
from amaes.objectives.supervised import SupervisedSegmentation
from amaes.objectives.swin import SwinSelfSupervision
from amaes.phantom import make_demo_data
from amaes.training import benchmark, options
from amaes.training.optim import build_optimizer, set_lr, skip_if_not_finite, warmup_cosine
from amaes.training.panels import check_matplotlib, save_panels
from amaes.training.progress import Progress, peak_gb
from amaes.training.run_folder import checkpoint_content, describe_step, open_run, restore
from amaes.training.stopping import SavePoints, StopRequest


def parse_options() -> argparse.Namespace:
    parser = cli.Parser(
        description="Pretrain an encoder on the volumes of a store, or a network on many labelled ones."
    )
    parser.add_argument(
        "--objective",
        choices=list(OBJECTIVES),
        default="amaes",
        help="amaes: rebuild masked, augmented patches; swin: SwinUNETR's self-supervision; supervised: segment",
    )
    add = parser.add_argument_group("data").add_argument
    add(
        "--data",
        nargs="+",
        default=["demo"],
        metavar="STORE",
        help="written by amaes.preprocess, several are read as one; demo: synthetic heads, made in --out",
    )
    add("--val-fraction", type=cli.fraction, default=0.01, help="share of the volumes kept for validation")
    add("--split-by", choices=["subject", "volume"], default="subject", help="what stays on one side of that split")
    add("--augment", choices=list(AUGMENTATIONS), default="all", help="transforms; of intensity: the input's alone")
    options.add_augment_options(add)
    add_objective_options(parser)
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
    add = options.add_run_options(parser, out="runs/pretrain", save_every=500)
    add(
        "--panels-every",
        type=cli.positive_int,
        metavar="EPOCHS",
        help="between pictures of what the network makes of fixed patches (needs matplotlib; default: none)",
    )
    add = parser.add_argument_group("measuring").add_argument
    add(
        "--benchmark",
        type=cli.positive_int,
        metavar="N",
        help="time N steps of each kind, print a table and a verdict; begins no run in --out",
    )
    args = options.parse(parser, "pretrain")
    choose_defaults(args, parser)
    if args.panels_every:
        check_matplotlib("--panels-every")
    return args


# What each objective's own options are where they are not given.
DEFAULTS: dict[str, dict] = {
    "amaes": {
        **{"crop": "window", "mask_ratio": 0.6, "token_size": 4, "loss_over": "all", "decoder": "light"},
        "skips": False,
    },
    "swin": {"corruption": 0.3, "reconstruction_head": "vae"},
    "supervised": {"decoder": "unet", "deep_supervision": False, "foreground": 0.33},
}


def add_objective_options(parser: cli.Parser) -> None:
    """What only one of the objectives reads; None where not given, so that it can be refused with another."""
    own = {name: value for defaults in DEFAULTS.values() for name, value in defaults.items()}
    add = parser.add_argument_group("objective: the options of one are refused with another").add_argument
    add("--crop", choices=CROPS, help="amaes: place uniformly the window (default, as published) or the patch in it")
    add("--mask-ratio", type=cli.fraction, help=f"amaes: fraction of tokens hidden (default: {own['mask_ratio']})")
    add("--token-size", type=cli.positive_int, help=f"amaes: side of a token, voxels (default: {own['token_size']})")
    add(
        "--loss-over",
        choices=RECONSTRUCTION_MEANS,
        help=f"amaes: voxels of the mean squared error (default: {own['loss_over']})",
    )
    add(
        "--decoder",
        choices=[*RECONSTRUCTION_DECODERS, *SEGMENTATION_DECODERS],
        help="amaes: light (half the convolutions, default) or standard; supervised: unet (default) or mednext",
    )
    add("--skips", action="store_const", const=True, help="amaes: connect encoder and decoder")
    add(
        "--corruption",
        type=cli.fraction,
        help=f"swin: the most of a view that a round damages (default: {own['corruption']})",
    )
    add(
        "--reconstruction-head",
        choices=list(RECONSTRUCTION_HEADS),
        help=f"swin (default: {own['reconstruction_head']})",
    )
    add(
        "--deep-supervision",
        action="store_const",
        const=True,
        help="supervised: also train on the outputs of coarser stages",
    )
    add(
        "--foreground",
        type=cli.fraction,
        help=f"supervised: share of patches around a foreground voxel (default: {own['foreground']})",
    )


def choose_defaults(args: argparse.Namespace, parser: cli.Parser) -> None:
    """Fill in the options of the chosen objective, and refuse those of the others."""
    own = DEFAULTS[args.objective]
    for name in {name for defaults in DEFAULTS.values() for name in defaults}:
        given = getattr(args, name)
        if given is None:
            setattr(args, name, own.get(name))
        elif name not in own:
            shown = name.replace("_", "-") if given is True else f"{name.replace('_', '-')} {given}"
            parser.error(f"--{shown}: is not read with --objective {args.objective}")
    decoders = {"amaes": RECONSTRUCTION_DECODERS, "supervised": SEGMENTATION_DECODERS}.get(args.objective, {})
    if args.decoder is not None and args.decoder not in decoders:
        parser.error(f"--decoder {args.decoder}: --objective {args.objective} takes {' or '.join(decoders)}")
    if args.objective == "swin" and (args.augment != "all" or args.augment_options):
        parser.error("--augment: --objective swin has views of its own and reads neither it nor --augment-options")
    if "demo" in args.data and len(args.data) > 1:
        parser.error(f"--data {' '.join(args.data)}: demo stands alone; a store in a folder of that name is ./demo")


# Objectives: the task and arguments that build the network, and from the data what it is trained for


def amaes(args: argparse.Namespace) -> tuple[str, dict, Callable]:
    options.check_patch_size(args.patch_size, args.arch, args.token_size)
    options.check_mask(args.patch_size, args.token_size, args.mask_ratio, args.loss_over)
    augment = PretrainAugment(args.patch_size, args.augment, args.seed, **options.unique(args.augment_options))
    objective = MaskedReconstruction(augment, args.token_size, args.mask_ratio, args.loss_over)
    return "pretrain", {"decoder": args.decoder, "skips": args.skips}, lambda store: objective


def swin(args: argparse.Namespace) -> tuple[str, dict, Callable]:
    options.check_patch_size(args.patch_size, args.arch)
    objective = SwinSelfSupervision(args.patch_size, args.seed, args.corruption)
    return "swin", {"reconstruction": args.reconstruction_head}, lambda store: objective


def supervised(args: argparse.Namespace) -> tuple[str, dict, Callable]:
    options.check_patch_size(args.patch_size, args.arch)
    augment = FinetuneAugment(args.patch_size, args.augment, args.seed, **options.unique(args.augment_options))
    build = {"decoder": args.decoder, "deep_supervision": args.deep_supervision}
    return "segment", build, lambda store: SupervisedSegmentation(augment, Classes.of(store))


OBJECTIVES: dict[str, Callable] = {"amaes": amaes, "swin": swin, "supervised": supervised}


@dataclass
class Plan:
    """What follows from the options and the data."""

    store: Store | Pool
    objective: Objective
    task: str  # with `build`: what rebuilds the network
    train: list[int]  # positions in the store
    validation: list[int]
    build: dict
    steps_per_epoch: int
    steps: int
    accumulate: int  # micro-steps per step
    autocast: torch.autocast


def main() -> int:
    args = parse_options()
    ranks = distributed.setup(args.device)
    log = tqdm.write if ranks.is_main else lambda line: None

    # What contradicts itself is refused before any work.
    options.check_batch(args.batch_size, ranks.world, args.accumulate)
    half = hardware.use_bf16(ranks.device, args.precision)
    compiler, how = hardware.compiler(ranks.device, args.compile)
    task, build, make_objective = OBJECTIVES[args.objective](args)
    build |= {"arch": args.arch, **options.encoder_options(args)}
    with torch.device("meta"):
        build_network(task, build)

    # Data
    store = open_data(args, ranks, log)
    objective = make_objective(store)
    if objective.labels:
        build["num_classes"] = objective.classes.count
        if objective.classes.count < 2:
            raise ValueError(f"--data {' '.join(args.data)}: no labels there; preprocess with --labels")
    split = distributed.from_main(split_of(store, args) if ranks.is_main else None)
    train, validation = ([store.index(id) for id in split[side]] for side in ("train", "validation"))
    steps_per_epoch = max(1, len(train) // args.batch_size)
    steps = args.steps or args.epochs * steps_per_epoch

    # Network
    build["in_channels"] = len(store.channels)
    make = partial(build_network, task, build, args.checkpoint_activations)
    fitting = hardware.fit_micro_batch(make, args.patch_size, args.batch_size, ranks, half, objective.views)
    if objective.views > 1:
        fitting = 1  # its loss compares the patches of a micro-step: their number is no matter of memory
    chosen = {"accumulate": fitting if args.accumulate == "auto" else args.accumulate, "world": ranks.world}
    torch.manual_seed(args.seed)
    network = make().to(ranks.device)
    optimizer = build_optimizer(network.parameters(), args.lr, args.weight_decay, args.amsgrad)
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=half)
    plan = Plan(
        store, objective, task, train, validation, build, steps_per_epoch, steps, int(chosen["accumulate"]), autocast
    )
    decoder = f"{args.decoder} decoder" if args.decoder else f"{args.reconstruction_head} head"
    log(f"{args.arch}, {decoder}, {sum(p.numel() for p in network.parameters()):,} parameters, {how}")
    log(f"{args.objective}: {len(train)} volumes to train on, {len(validation)} to validate on")
    together = args.batch_size // (ranks.world * plan.accumulate)
    if objective.views > 1 and together < 2:
        log("WARNING: one patch per rank and micro-step: the contrastive loss is 0, there is nothing to tell it from")
    for line in hardware.complaints(ranks.device):
        log(line)
    if args.benchmark:
        measure(args, plan, ranks, network, distributed.wrap(network, ranks, compiler), optimizer, log)
        distributed.shutdown()
        return cli.EXIT_OK

    # Run
    if ranks.is_main:
        record = {"store": store.fingerprint, "validation": split["validation"], "build": build, "total_steps": steps}
        if objective.views > 1:
            record["patches_per_micro_step"] = together
        how_to_open = ("auto", False) if ranks.restarts else (args.resume, args.overwrite)
        chosen = open_run(args.out, "pretrain", options.as_plain(args), record, chosen, *how_to_open, log)
    if args.accumulate == "auto":
        plan.accumulate = distributed.from_main(chosen)["accumulate"]
    step = restore(args.out / "checkpoints", network, optimizer, ranks, log)
    log(options.describe_batch(args.batch_size, plan.accumulate, ranks, steps))
    share = args.batch_size // ranks.world
    with hardware.out_of_memory_explained(ranks.device, plan.accumulate, args.patch_size, share):
        loop(args, plan, ranks, network, distributed.wrap(network, ranks, compiler), optimizer, step, log)
    log(f"done: {args.out}/checkpoints/step-{steps}.pt")
    distributed.shutdown()
    return cli.EXIT_OK


def loop(args, plan: Plan, ranks, network: nn.Module, wrapped: distributed.Wrapped, optimizer, step: int, log) -> None:
    """From `step` to the last: read, augment, mask, predict, update, now and then report, validate and save."""
    device, objective = ranks.device, plan.objective
    batches, order = batches_from(step, args, plan, ranks, log)
    val_every = args.val_every or max(plan.steps_per_epoch, plan.steps // 100)
    describe = partial(describe_step, order, plan.store, objective.draw)
    sizes = (args.log_every, args.batch_size, plan.accumulate)
    progress = Progress(args.out, ranks, step, plan.steps, *sizes, describe, wrapped.all_reduce_ms)
    saving = SavePoints(StopRequest(), ranks, args.save_every, args.save_minutes, plan.steps)
    clock = progress.clock

    def validated() -> bool:
        """Validate where `step` asks for it; False where a request to stop cut that short."""
        if not plan.validation or (step % val_every and step != plan.steps):
            return True
        if (means := validate(network, plan, args, ranks, progress, saving)) is None:
            return False
        progress.write(step=step, val_loss=means[0], val_baseline=means[1])
        log(f"step {step}: validation loss {means[0]:.5f} (predicting {objective.trivial}: {means[1]:.5f})")
        clock.start()
        return True

    finished = not step or distributed.from_main(progress.has("val_loss")) or validated()
    network.train()
    while finished and step < plan.steps:
        lr = warmup_cosine(step, args.lr, round(args.warmup * plan.steps), plan.steps)
        set_lr(optimizer, lr)
        optimizer.zero_grad(set_to_none=True)
        for micro in range(plan.accumulate):
            batch = next(batches)
            clock.lap("data", on_host=True)
            progress.bad_cases(batch["bad"], tqdm.write)  # of every rank
            inputs, targets = objective.prepare(batch, device)
            clock.lap("augment")
            progress.add(step, gradient_step(plan, wrapped.model, wrapped.gradients, micro, inputs, targets))
            clock.lap("forward_backward")
        if args.on_nan == "skip":
            progress.skip(step, skip_if_not_finite(optimizer, network))
        optimizer.step()
        step += 1
        clock.lap("optimizer")
        progress.report(step, lr, network)
        finished = validated()
        if args.panels_every and (step % (args.panels_every * plan.steps_per_epoch) == 0 or step == plan.steps):
            draw_panels(args.out / "panels" / f"step-{step}.png", network, plan, args, ranks)
            clock.start()
        if saving.due(step) or not finished:
            progress.check_before_saving(step, network)
            if ranks.is_main:
                content = checkpoint_content(plan.task, step, network, optimizer, plan.store, plan.build, args)
                checkpoint.save(args.out / "checkpoints", content, args.keep)
            clock.start()
        finished = finished and not (saving.stopping and step < plan.steps)
    progress.close()
    if not finished:
        raise KeyboardInterrupt(f"saved at step {step}; the same command continues")


def batches_from(step: int, args, plan: Plan, ranks: distributed.Ranks, log) -> tuple[Iterator, Batches]:
    """This rank's batches from `step` on, and the order in which all cases are read."""
    read = {"seed": args.seed, "replace_by": plan.train if args.on_bad_case == "skip" else None}
    shares = (args.batch_size, args.seed, step, plan.steps, plan.accumulate, ranks.rank, ranks.world)
    if plan.objective.labels:
        read |= {"labels": True, "foreground": args.foreground}
    elif args.crop is not None:
        read |= {"crop": args.crop}
    if plan.objective.labels and isinstance(plan.store, Pool):
        order = MixedBatches(plan.store.groups(plan.train), *shares)
    else:
        order = Batches(plan.train, *shares)
    patches = Patches(plan.store, args.patch_size, plan.objective.window_size, **read)
    if (reach := patches.reach(plan.train)) < 0.5:
        log(
            f"--crop window, as published: patches come from {100 * reach:.1f} % of the places in their volumes, the "
            "middle ones; --crop patch takes them from anywhere, as validation does"
        )
    at_once = args.batch_size // (ranks.world * plan.accumulate) * patches.sample_bytes()
    if line := hardware.check_shared_memory(args.workers, at_once, local_world=ranks.local_world):
        log(line)
    return loader(patches, order, args.workers, pin_memory=ranks.device.type == "cuda"), order


def gradient_step(plan: Plan, model: Callable, gradients: Callable, micro: int, inputs, targets) -> dict:
    """Forward and backward pass of a micro-step; the terms of its loss."""
    with gradients(sync=micro == plan.accumulate - 1):
        with plan.autocast:
            outputs = model(inputs)
        terms = plan.objective.losses(outputs, targets)
        (sum(terms.values()) / plan.accumulate).backward()
    return terms


def measure(args, plan: Plan, ranks, network: nn.Module, wrapped: distributed.Wrapped, optimizer, log) -> None:
    """--benchmark: time whole steps with less and less left out; trains nothing that is kept, writes nothing."""
    plan.steps = 3 * (args.benchmark + max(2, args.benchmark // 10))
    batches, _ = batches_from(0, args, plan, ranks, log)
    prepare = partial(plan.objective.prepare, device=ranks.device)
    batch = next(batches)
    inputs = prepare(batch)
    model, gradients, _ = wrapped

    def step(read: Callable[[], tuple], gradients: Callable = gradients) -> None:
        optimizer.zero_grad(set_to_none=True)
        for micro in range(plan.accumulate):
            gradient_step(plan, model, gradients, micro, *read())
        optimizer.step()

    network.train()
    ways = {
        "network": partial(step, lambda: inputs),
        "augmentation": partial(step, lambda: prepare(batch)),
        "data": partial(step, lambda: prepare(next(batches))),
    }
    if ranks.world > 1:
        ways["alone"] = partial(step, lambda: inputs, lambda sync: gradients(sync=False))
    seconds = {}
    share = args.batch_size // ranks.world
    with hardware.out_of_memory_explained(ranks.device, plan.accumulate, args.patch_size, share):
        for name, way in ways.items():
            distributed.barrier()
            seconds[name] = benchmark.seconds_per_step(way, args.benchmark, ranks.device)
    with torch.device("meta"):
        shape = (plan.objective.views, *inputs[0].shape[1:])
        flop = benchmark.training_flop(build_network(plan.task, plan.build), shape)
    for line in benchmark.table(seconds, args.batch_size, ranks.world, flop, peak_gb(ranks.device), ranks.device):
        log(line)


@torch.no_grad()
def validate(
    network: nn.Module,
    plan: Plan,
    args: argparse.Namespace,
    ranks: distributed.Ranks,
    progress: Progress,
    saving: SavePoints,
) -> tuple[float, float] | None:
    """Mean loss over the validation volumes, one fixed patch of each, and that of a trivial prediction.

    Ranks share the volumes; each counts once. None where a rank was asked to stop meanwhile: it does not go on.
    """
    network.eval()
    sums = torch.zeros(4, device=ranks.device)  # loss, baseline, volumes, ranks that stopped
    patches = validation_patches(plan, args)
    size = plan.objective.validation_batch
    groups = [plan.validation[i : i + size] for i in range(0, len(plan.validation), size)]
    mine = [[(0, case) for case in group] for group in groups[ranks.rank :: ranks.world]]
    for batch in loader(patches, mine, workers=0, pin_memory=False):
        if saving.stop_requested:
            sums[3] = 1
            break
        progress.bad_cases(batch["bad"], tqdm.write)
        inputs, targets = plan.objective.prepare(batch, ranks.device, training=False)
        with plan.autocast:
            outputs = network(inputs)
        terms = plan.objective.losses(outputs, targets)
        losses = torch.stack([sum(terms.values()), plan.objective.baseline(targets)])
        sums[:3] += torch.cat([losses, losses.new_ones(1)]) * len(batch["case"])
    loss, baseline, count, stopped = distributed.sum_over_ranks(sums).tolist()
    network.train()
    return None if stopped else (loss / count, baseline / count)


@torch.no_grad()
def draw_panels(path: Path, network: nn.Module, plan: Plan, args: argparse.Namespace, ranks: distributed.Ranks) -> None:
    """Write what the network makes of fixed patches of the first validation volumes; rank 0 alone, without DDP."""
    if not ranks.is_main:
        return
    network.eval()
    cases = (plan.validation or plan.train)[:PANELS]
    batch = next(loader(validation_patches(plan, args), [[(0, case) for case in cases]], workers=0, pin_memory=False))
    inputs, targets = plan.objective.prepare(batch, ranks.device, training=False)
    with plan.autocast:
        outputs = network(inputs)
    network.train()
    rows = [plan.store.cases[case].id for case in cases]
    save_panels(path, plan.objective.panels(inputs, outputs, targets), rows, f"{args.out.name}, {path.stem}")


PANELS = 4  # patches on a page


def validation_patches(plan: Plan, args: argparse.Namespace) -> Patches:
    read = {"seed": args.seed, "replace_by": plan.validation + plan.train if args.on_bad_case == "skip" else None}
    return Patches(plan.store, args.patch_size, purpose="validation", labels=plan.objective.labels, **read)


def open_data(args: argparse.Namespace, ranks: distributed.Ranks, log: Callable[[str], None]) -> Store | Pool:
    """The stores of --data; the demo's is made first, by rank 0."""
    if args.data != ["demo"]:
        args.data = [str(Path(path).absolute()) for path in args.data]  # config.json finds it from any working folder
        return open_stores(args.data)
    folder = args.out / "demo"
    if ranks.is_main:
        log(f"--data demo: training on SYNTHETIC head phantoms, kept in {folder}; for real scans give --data STORE")
    make = partial(make_demo_data, folder, labels=args.objective == "supervised")
    return Store(distributed.from_main(make() if ranks.is_main else None))


def split_of(store: Store | Pool, args: argparse.Namespace) -> dict[str, list[str]]:
    """Training and validation volumes, written to each store the first time."""
    name = f"pretrain, {args.val_fraction} of volumes by {args.split_by}, seed {args.seed}"

    def draw(one: Store) -> dict[str, list[str]]:
        make = partial(pretrain_split, one, args.val_fraction, args.seed, args.split_by)
        return saved_split(one, name, make, by_subject=args.split_by == "subject")

    split = split_each(store, draw)
    if args.objective == "supervised":
        split = {side: labelled(store, ids) for side, ids in split.items()}
    return split


if __name__ == "__main__":
    cli.run(main)
