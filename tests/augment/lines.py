"""Ghosting and Gibbs ringing as functions of what is drawn."""

import torch

from amaes.augment import kspace


def ghosting(x, alpha, repetitions, axis, clip=True):
    return weighted(x, kspace.ghosting_weights(alpha.numpy(), repetitions.numpy(), x.shape[axis + 1]), axis, clip)


def gibbs_ringing(x, lines, axis, clip=True):
    return weighted(x, kspace.gibbs_weights(lines.numpy(), x.shape[axis + 1]), axis, clip)


def weighted(x, weights, axis, clip):
    return kspace.weight_lines(x, torch.from_numpy(kspace.even_and_odd(weights)), axis, clip)
