"""What an encoder knows before it is fine-tuned: a linear classifier on its features (Alain and Bengio, 1610.01644)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from amaes.data.store import Store, check_label
from amaes.metrics import dice

PENALTY = 1e-3  # times the sum of the squared weights, features standardized
ITERATIONS = 40  # of L-BFGS
CONSTANT = 1e-5  # spread of a feature beside its mean that is rounding alone
AT_ONCE = 8  # channels that are brought to full resolution together, for the memory


def linear_probe(
    encoder: nn.Module, store: Store, train: Sequence[str], test: Sequence[str], voxels: int = 5000, seed: int = 0
) -> float:
    """Dice of a multinomial logistic regression on the features of all stages, brought to full resolution.

    The encoder stays as it is. Nothing is drawn but the voxels that the classifier is fitted to, the same for every
    encoder. It says what can be read from the features, not what fine-tuning will make of them.

    Args:
        encoder: patches (B, C, X, Y, Z) to a list of features, finest first, with `strides`, in evaluation mode.
        store: with labels.
        train, test: ids of labelled cases; whole volumes are passed through the encoder.
        voxels: of each case of `train`, up to half of them foreground.
        seed: of the drawing of voxels.

    Returns:
        In [0, 1]: the mean over test cases and classes, or regions where the store has them; NaN where no
        test case has anything to find.

    Raises:
        ValueError: a label holds a value that the store does not declare; names the case.
    """
    device = next(encoder.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    inputs, targets, shares = [], [], []
    for case in train:
        image, label = _volume(store, case, device)
        drawn, share = draw_voxels(label.flatten().cpu(), voxels, store.ignored, generator)
        sampled = [
            _full_size(part, stride, label.shape)[:, drawn.to(device)]
            for maps, stride in zip(_features(encoder, image), encoder.strides, strict=True)
            for part in maps.split(AT_ONCE)
        ]
        inputs.append(torch.cat(sampled).T)  # (voxels, channels of all stages)
        targets.append(label.flatten()[drawn.to(device)])
        shares.append(share.to(device))
    weights, bias = fit(torch.cat(inputs), torch.cat(targets), torch.cat(shares), store.num_classes)
    scores = []
    for case in test:
        image, label = _volume(store, case, device)
        predicted = _classify(encoder, image, weights, bias).cpu().numpy()
        reference = label.cpu().numpy()
        seen = reference != store.ignored  # all, where nothing is ignored
        for values in store.scored(store.num_classes).values():
            scores.append(dice(np.isin(predicted, values) & seen, np.isin(reference, values)))
    return float(np.mean([score for score in scores if not np.isnan(score)] or np.nan))  # NaN: neither has the class


def draw_voxels(
    label: torch.Tensor, count: int, ignored: int | None, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Voxels of a case, up to half of them foreground, so that a small lesion is seen.

    Args:
        label: (N,).
        count: how many.
        ignored: value of voxels that are left out.
        generator: source of the draw.

    Returns:
        Indices, and for each how many voxels of the case it stands for, both (at most `count`,).
    """
    foreground, background = label > 0, label == 0
    if ignored is not None:
        foreground, background = (part & (label != ignored) for part in (foreground, background))
    drawn, shares = [], []
    for part, most in ((foreground, count // 2), (background, count)):
        found = part.nonzero()[:, 0]
        taken = found[torch.randperm(len(found), generator=generator)[: most - sum(map(len, drawn))]]
        drawn.append(taken)
        shares.append(torch.full((len(taken),), len(found) / max(len(taken), 1)))
    return torch.cat(drawn), torch.cat(shares)


def fit(
    inputs: torch.Tensor, targets: torch.Tensor, shares: torch.Tensor, classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logistic regression of `targets` (N,) on `inputs` (N, C), each counted `shares` times.

    Returns:
        Weights (classes, C) and bias (classes,), for inputs that are not standardized.
    """
    center, spread = inputs.mean(0), inputs.std(0, correction=0)
    spread = spread.masked_fill(spread <= CONSTANT * center.abs(), torch.inf)  # their weight is 0
    inputs, shares = (inputs - center) / spread, shares / shares.sum()
    solution = inputs.new_zeros((classes, inputs.shape[1] + 1)).requires_grad_()
    optimizer = torch.optim.LBFGS([solution], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        weights, bias = solution[:, :-1], solution[:, -1]
        errors = F.cross_entropy(inputs @ weights.T + bias, targets, reduction="none")
        loss = errors @ shares + PENALTY * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weights = solution.detach()[:, :-1] / spread
    return weights, solution.detach()[:, -1] - weights @ center


def _volume(store: Store, case: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Image (C, X, Y, Z) float32 and label (X, Y, Z) of a case."""
    arrays = [np.array(array) for array in (store.image(case), store.label(case))]
    try:
        check_label(arrays[1], store.declared(case))
    except ValueError as error:
        raise ValueError(f"{store.path}: {case}: {error}") from None
    image, label = (torch.from_numpy(array).to(device) for array in arrays)
    return image.float(), label.long()


@torch.no_grad()
def _features(encoder: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    """(C, X, Y, Z) to the features of each stage, (C_i, X_i, Y_i, Z_i); zeros are added at the far ends."""
    padding = [end for side in reversed(image.shape[1:]) for end in (0, -side % encoder.strides[-1])]
    return [maps[0].float() for maps in encoder(F.pad(image, padding)[None])]


def _full_size(maps: torch.Tensor, stride: int, shape: Sequence[int]) -> torch.Tensor:
    """(C, X_i, Y_i, Z_i) of a stage, interpolated linearly, to (C, X * Y * Z)."""
    if stride > 1:
        maps = F.interpolate(maps[None], scale_factor=float(stride), mode="trilinear")[0]
    x, y, z = shape
    return maps[:, :x, :y, :z].flatten(1)


def _classify(encoder: nn.Module, image: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The class of every voxel of an image (C, X, Y, Z): (X, Y, Z)."""
    maps, shape = _features(encoder, image), image.shape[1:]
    parts = weights.split([stage.shape[0] for stage in maps], 1)  # (classes, channels) of each stage
    logits = bias[:, None]
    for part, stage, stride in zip(parts, maps, encoder.strides, strict=True):
        answer = torch.einsum("kc,cxyz->kxyz", part, stage)  # before it is interpolated: fewer channels
        logits = logits + _full_size(answer, stride, shape)
    return logits.argmax(0).view(shape)
