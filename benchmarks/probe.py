"""What an encoder knows before any fine-tuning: Dice of a linear classifier on its features.

    python benchmarks/probe.py --data STORE --weights scratch RUN1 RUN2 --arch unet_tiny [--json FILE]

The encoder's weights stay. The features of all stages of whole cases, brought to full resolution, are the inputs of a
logistic regression, which is fitted to a few voxels of the labelled cases of a fold and tested on all voxels of other
cases. Nothing is drawn but these voxels, the same for every encoder, so that it tells encoders apart between which
fine-tuning cannot decide, since it depends on the seed. It says what can be read from the features, not what
fine-tuning will make of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from amaes import cli
from amaes.checkpoint import load_encoder
from amaes.choices import SCRATCH
from amaes.data.splits import fold_splits
from amaes.data.store import Store
from amaes.distributed import pick_device
from amaes.files import write_json
from amaes.metrics import dice
from amaes.models import ARCHITECTURES, build_segmenter
from amaes.training.run_folder import commit, versions

PENALTY = 1e-3  # on the squared weights, features standardized
ITERATIONS = 40  # of L-BFGS


def main() -> int:
    args = parse_options()
    store, device = Store(args.data), pick_device(args.device)
    splits = fold_splits(store, args.folds, args.train_cases)
    rows = []
    for weights in args.weights:
        torch.manual_seed(args.seed)
        network = build_segmenter(args.arch, len(store.channels), store.num_classes)
        if weights != SCRATCH:
            load_encoder(network, weights)
        encoder = network.encoder.to(device).eval()
        folds = [probe(encoder, store, split["train"], split["test"][: args.test_cases], args) for split in splits]
        rows.append({"weights": weights, "folds": folds, "mean": mean(folds)})
        print(f"{100 * mean(folds):5.1f}  ({' '.join(f'{100 * fold:.1f}' for fold in folds)})  {weights}", flush=True)
    if args.json:
        write_json(args.json, {"versions": versions(), "commit": commit(), "rows": rows})
    return 0


def parse_options() -> argparse.Namespace:
    parser = cli.Parser(description="Dice of a linear classifier on the features of frozen encoders.")
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="STORE", help="with labels")
    add("--weights", nargs="+", required=True, metavar="CKPT|RUN", help=f"encoders to compare; {SCRATCH}: at random")
    add("--arch", choices=list(ARCHITECTURES), required=True, help="of the encoders")
    add("--folds", type=cli.positive_int, default=2, metavar="N", help="choices of the labelled cases")
    add("--train-cases", type=cli.positive_int, default=5, metavar="N", help="labelled cases of a fold")
    add("--test-cases", type=cli.positive_int, default=24, metavar="N", help="how many of the others are tested")
    add("--voxels", type=cli.positive_int, default=5000, metavar="N", help="of each labelled case, drawn uniformly")
    add("--seed", type=cli.seed, default=0, help="of the voxels and of an encoder at random")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is a GPU")
    add("--json", type=Path, metavar="FILE", help="also write the numbers there")
    return parser.parse_args()


@torch.no_grad()
def features(encoder: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    """(C, X, Y, Z) to the features of each stage, (C_i, X_i, Y_i, Z_i); the image is padded with zeros at its ends."""
    padding = [end for side in reversed(image.shape[1:]) for end in (0, -side % encoder.strides[-1])]
    return [stage[0].float() for stage in encoder(F.pad(image, padding)[None])]


def full_size(maps: torch.Tensor, stride: int, shape: tuple[int, ...]) -> torch.Tensor:
    """(C, X_i, Y_i, Z_i) of a stage to (C, X * Y * Z), interpolated linearly."""
    larger = F.interpolate(maps[None], scale_factor=float(stride), mode="trilinear")[0] if stride > 1 else maps
    x, y, z = shape
    return larger[:, :x, :y, :z].flatten(1)


def probe(encoder: nn.Module, store: Store, train: list[str], test: list[str], args: argparse.Namespace) -> float:
    """Dice, the mean over test cases and classes, of a classifier that was fitted to voxels of the cases `train`."""
    device = next(encoder.parameters()).device
    generator = torch.Generator().manual_seed(args.seed)
    inputs, targets = [], []
    for case in train:
        image, label = volume(store, case, device)
        voxels = torch.randperm(label.numel(), generator=generator)[: args.voxels].to(device)
        stages = zip(features(encoder, image), encoder.strides, strict=True)
        sampled = [full_size(maps, stride, label.shape)[:, voxels] for maps, stride in stages]
        inputs.append(torch.cat(sampled).T)  # (voxels, channels of all stages)
        targets.append(label.flatten()[voxels])
    weights, bias = fit(torch.cat(inputs), torch.cat(targets), store.num_classes)
    scores = []
    for case in test:
        image, label = volume(store, case, device)
        maps = features(encoder, image)
        parts = weights.split([stage.shape[0] for stage in maps], 1)  # (classes, channels) of each stage
        logits = bias[:, None]
        for part, stage, stride in zip(parts, maps, encoder.strides, strict=True):
            answer = torch.einsum("kc,cxyz->kxyz", part, stage)  # before it is interpolated: fewer channels
            logits = logits + full_size(answer, stride, label.shape)
        predicted = logits.argmax(0).view(label.shape).cpu().numpy()
        scores += [dice(predicted == k, label.cpu().numpy() == k) for k in range(1, store.num_classes)]
    return float(np.nanmean(scores))  # NaN: neither has the class


def volume(store: Store, case: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Image (C, X, Y, Z) float32 and label (X, Y, Z) of a case."""
    image, label = (torch.from_numpy(array.copy()).to(device) for array in (store.image(case), store.label(case)))
    return image.float(), label.long()


def fit(inputs: torch.Tensor, targets: torch.Tensor, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logistic regression of `targets` (N) on `inputs` (N, C): weights (classes, C) and bias (classes)."""
    center, spread = inputs.mean(0), inputs.std(0) + 1e-6
    inputs = (inputs - center) / spread
    solution = torch.zeros(classes, inputs.shape[1] + 1, device=inputs.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([solution], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        weights, bias = solution[:, :-1], solution[:, -1]
        loss = F.cross_entropy(inputs @ weights.T + bias, targets) + PENALTY * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weights = solution.detach()[:, :-1] / spread
    return weights, solution.detach()[:, -1] - weights @ center


if __name__ == "__main__":
    cli.run(main)
