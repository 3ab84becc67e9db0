"""Activation checkpointing by stage, the same for every encoder and decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Output = TypeVar("Output")  # a map, or several


def run_stage(owner: nn.Module, stage: Callable[[torch.Tensor], Output], x: torch.Tensor) -> Output:
    """`stage(x)`; where `owner.checkpoint_activations` is on, only x is kept, and the backward pass runs it again."""
    if owner.checkpoint_activations and torch.is_grad_enabled():
        return checkpoint(stage, x, use_reentrant=False, preserve_rng_state=False)  # no stage draws random numbers
    return stage(x)
