"""Which encoder knows most before it is fine-tuned: Dice of a linear classifier on its features.

    python -m amaes.evaluation.probe --data STORE --arch unet_b --weights scratch RUN1 RUN2

Prints a line per encoder: the mean over folds, each fold, the weights. Encoders that differ by less than pretraining
with another seed changes are not told apart.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from amaes import cli
from amaes.choices import DEVICES, SCRATCH
from amaes.files import write_json
from amaes.models.build import ARCHITECTURES

if TYPE_CHECKING:
    from torch import nn

    from amaes.data.store import Store


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = cli.Parser(description="Compare encoders before fine-tuning: a linear classifier on their features.")
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="STORE", help="written by amaes.preprocess --labels")
    explanation = f"encoders to compare, files or runs; {SCRATCH}: drawn at random"
    add("--weights", nargs="+", required=True, metavar="CKPT|RUN", help=explanation)
    add("--arch", choices=list(ARCHITECTURES), default="unet_xl", help="of the encoders")
    add("--folds", type=cli.folds, default=6, metavar="N", help="choices of the labelled cases")
    add("--train-cases", type=cli.positive_int, default=5, metavar="N", help="labelled cases of a fold")
    add("--test-cases", type=cli.positive_int, default=24, metavar="N", help="at most so many of the others are tested")
    add("--voxels", type=cli.positive_int, default=5000, metavar="N", help="of each labelled case the classifier sees")
    add("--seed", type=cli.seed, default=0, help="of these voxels, and of the encoder drawn at random")
    add("--device", choices=DEVICES, default="auto", help="auto: CUDA where there is a GPU")
    add("--json", type=cli.output_file, metavar="FILE", help="also write the numbers there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print a line per encoder."""
    args = parse_options(argv)
    from amaes.data.splits import fold_splits
    from amaes.data.store import Store
    from amaes.distributed import pick_device
    from amaes.evaluation.linear_probe import linear_probe  # here, as --help needs no torch
    from amaes.evaluation.scores import mean_and_sd, nan_to_null
    from amaes.training.weights import find_weights

    store, device = Store(args.data), pick_device(args.device)
    splits = fold_splits(store, args.folds, args.train_cases)
    found = [find_weights(weights, store, cli.say) for weights in args.weights]
    encoders = [load(args.arch, store, weights, args.seed) for weights in found]
    rows = []
    for name, encoder in zip(args.weights, encoders, strict=True):
        cases = [(split["train"], split["test"][: args.test_cases]) for split in splits]
        folds = [100 * linear_probe(encoder.to(device), store, *of_fold, args.voxels, args.seed) for of_fold in cases]
        mean = mean_and_sd(folds)["mean"]  # without folds whose test cases have nothing to find
        rows.append({"weights": name, "folds": folds, "mean": mean})
        cli.say(f"{mean:5.1f}  ({' '.join(f'{fold:.1f}' for fold in folds)})  {name}")
        if args.json:
            write_json(args.json, {"unit": "Dice, percent", "encoders": nan_to_null(rows)})
    return 0


def load(arch: str, store: Store, weights: str, seed: int) -> nn.Module:
    """The encoder that a file holds, or, for SCRATCH, one drawn at random, in evaluation mode."""
    import torch

    from amaes.checkpoint import load_encoder
    from amaes.models import build_segmenter

    torch.manual_seed(seed)
    network = build_segmenter(arch, len(store.channels), store.num_classes)
    if weights != SCRATCH:
        load_encoder(network, weights)
    return network.encoder.eval()


if __name__ == "__main__":
    cli.run(main)
