"""1x1x1 convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from amaes.models.ops import dispatch


def pointwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """1x1x1 convolution as a matrix product over channels: (B, C, X, Y, Z) to (B, O, X, Y, Z) in channels-last memory.

    Args:
        x: input.
        weight: (O, C, 1, 1, 1).
        bias: (O,), or None.
    """
    return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)


def head(x: torch.Tensor, layer: nn.Conv3d | nn.ConvTranspose3d) -> torch.Tensor:
    """`layer(x)` of a 1x1x1 convolution to few channels; beside Triton kernels as a matrix product, not by cuDNN.

    Args:
        x: (B, C, X, Y, Z).
        layer: stride 1.
    """
    if not dispatch.use_triton(x):
        return layer(x)
    weight = layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose3d) else layer.weight
    return pointwise(x, weight, layer.bias)
