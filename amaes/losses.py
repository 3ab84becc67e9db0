"""Losses, all computed in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from amaes.choices import RECONSTRUCTION_MEANS

SMALLEST_SD = 0.1  # of the visible voxels, intensities of the store: air, with next to none, must not explode


def reconstruction_loss(
    prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None, over: str = "all"
) -> torch.Tensor:
    """Mean squared error of a masked autoencoder.

    Args:
        prediction, target: (B, C, X, Y, Z).
        mask: (B, 1, X, Y, Z), True = hidden; read unless `over` is "all".
        over: the mean is over "all" voxels (arXiv 2408.00640), over the "masked" ones (He et al. 2022), or
            "masked-parity": summed over masked voxels, divided by all of them, as the published code does.

    Returns:
        Scalar.
    """
    if over not in RECONSTRUCTION_MEANS:
        raise ValueError(f"`over` {over!r} is unknown; accepted: {', '.join(RECONSTRUCTION_MEANS)}")
    error = (prediction.float() - target.float()).square()
    if over == "all":
        return error.mean()
    if mask is None:
        raise ValueError(f"`over` {over!r}: needs `mask`")
    hidden = mask.to(error.dtype)
    total = (error * hidden).sum()
    return total / (error.numel() if over == "masked-parity" else hidden.sum() * error.shape[1])


def visible_mean_sd(x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation, at least SMALLEST_SD, over the visible voxels of every sample and channel.

    Args:
        x: (B, C, X, Y, Z).
        mask: (B, 1, X, Y, Z), True = hidden; at least one voxel is not.

    Returns:
        Both (B, C, 1, 1, 1).
    """
    space, visible = (2, 3, 4), (~mask).to(x.dtype)
    count = visible.sum(space, keepdim=True)  # (B, 1, 1, 1, 1)
    mean = (x * visible).sum(space, keepdim=True) / count
    variance = ((x - mean).square() * visible).sum(space, keepdim=True) / count
    return mean, variance.sqrt().clamp_min(SMALLEST_SD)


def contrastive_loss(first: torch.Tensor, second: torch.Tensor, temperature: float = 0.5) -> torch.Tensor:
    """Which of all other views shows the same volume (NT-Xent, arXiv 2002.05709, as in arXiv 2111.14791).

    Of each of the 2 B views the cross-entropy of its partner among the 2 B - 1 others, by cosine similarity divided by
    the temperature; the mean over all of them. With one volume there is nothing to choose from, and it is 0.

    Args:
        first, second: embeddings of two views of the same volumes, (B, E).
        temperature: > 0.

    Returns:
        Scalar.
    """
    with torch.autocast(first.device.type, enabled=False):
        z = F.normalize(torch.cat([first, second]).float(), dim=1)  # (2 B, E)
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        similarity = (z @ z.T / temperature).masked_fill(itself, float("-inf"))
    partner = torch.arange(len(z), device=z.device).roll(len(first))
    return F.cross_entropy(similarity, partner)


def dice_ce_loss(
    logits: torch.Tensor,
    label: torch.Tensor,
    allowed: torch.Tensor | None = None,
    ignored: int | None = None,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy plus soft Dice, weights 1 and 1 (arXiv 2408.00640, Sec. 4.2; background included, smoothing 1).

    Dice is per sample and class over space, `(2 TP + 1) / (2 TP + FP + FN + 1 + 1e-8)` on softmax probabilities; its
    mean is over samples and classes. The mean of the cross-entropy is over samples and voxels.

    Args:
        logits: (B, K, X, Y, Z).
        label: (B, X, Y, Z), integers in [0, K).
        allowed: classes that a sample may hold, (B, K), bool; the others take no part in its softmax and its Dice, and
            their logits get no gradient from it. None allows all.
        ignored: label of voxels that are left out of both; None: there are none.
        class_weights: of the voxels of each class in the mean of the cross-entropy, (K,), float32; None: equal.

    Returns:
        Scalar, at least -1.
    """
    logits = logits.float()
    if allowed is not None:
        logits = logits.masked_fill(~allowed[:, :, None, None, None], float("-inf"))
    log_p = F.log_softmax(logits, dim=1)
    label = label.long()
    p = log_p.exp()
    if ignored is None:
        one_hot = torch.zeros_like(p).scatter_(1, label[:, None], 1.0)  # (B, K, X, Y, Z)
        cross_entropy = F.nll_loss(log_p, label, class_weights)
    else:
        seen = (label != ignored)[:, None]  # (B, 1, X, Y, Z)
        known = label.where(seen[:, 0], 0)
        one_hot = torch.zeros_like(p).scatter_(1, known[:, None], seen.to(p.dtype))
        p = p * seen
        weights = seen[:, 0] if class_weights is None else class_weights[known] * seen[:, 0]
        total_ce = F.nll_loss(log_p, label, class_weights, ignore_index=ignored, reduction="sum")
        cross_entropy = total_ce / weights.sum().clamp(min=1e-8)
    space = (2, 3, 4)
    overlap = (p * one_hot).sum(space)  # TP, (B, K)
    total = p.sum(space) + one_hot.sum(space)  # 2 TP + FP + FN
    dice = (2 * overlap + 1) / (total + 1 + 1e-8)
    mean = dice.mean() if allowed is None else ((dice * allowed).sum(1) / allowed.sum(1)).mean()
    return cross_entropy - mean


def segmentation_loss(
    outputs: torch.Tensor | Sequence[torch.Tensor],
    label: torch.Tensor,
    allowed: torch.Tensor | None = None,
    ignored: int | None = None,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """`dice_ce_loss`, with deep supervision the mean over stages weighted 1, 1/2, 1/4, ... (finest first).

    Args:
        outputs: logits (B, K, X, Y, Z), or a list of them, finest first, each axis a whole fraction of the label's.
        label: (B, X, Y, Z), integers; brought to the size of coarser logits by taking every n-th voxel.
        allowed, ignored, class_weights: see `dice_ce_loss`.
    """
    if isinstance(outputs, torch.Tensor):
        return dice_ce_loss(outputs, label, allowed, ignored, class_weights)
    weights = [0.5**i for i in range(len(outputs))]
    losses = []
    for logits in outputs:
        step = [full // side for full, side in zip(label.shape[1:], logits.shape[2:], strict=True)]
        coarse = label[:, :: step[0], :: step[1], :: step[2]]
        losses.append(dice_ce_loss(logits, coarse, allowed, ignored, class_weights))
    return sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
