"""An encoder and a decoder as one network."""

from __future__ import annotations

import torch
from torch import nn


class Network(nn.Module):
    """An encoder and a decoder, or other heads, that reads its features.

    Raises:
        ValueError: the decoder was built for other channels; (forward) wrong number of channels, a side that is not a
            multiple of the encoder's stride, or an image that shrinks to a single voxel, which has no statistics.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, in_channels: int) -> None:
        super().__init__()
        if tuple(decoder.channels) != tuple(encoder.channels):
            raise ValueError(f"a decoder of channels {decoder.channels} for an encoder of channels {encoder.channels}")
        self.encoder = encoder
        self.decoder = decoder
        self.in_channels = in_channels
        self.stride = encoder.strides[-1]

    def checkpoint_activations(self, on: bool = True) -> None:
        """Keep only the input of each stage for the backward pass, which runs it again: less memory, same numbers."""
        self.encoder.checkpoint_activations = self.decoder.checkpoint_activations = on

    def checkpointed_stages(self) -> list[nn.Module]:
        """The modules that the backward pass runs again; none where `checkpoint_activations` is off."""
        names = ("stages", "downs", "ups", "laterals")
        parts = (self.encoder, self.decoder) if self.encoder.checkpoint_activations else ()
        return [module for part in parts for name in names for module in getattr(part, name, ())]

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor, ...]:
        if x.shape[1] != self.in_channels:
            raise ValueError(f"the network takes {self.in_channels} channels, got {x.shape[1]}")
        sides = tuple(x.shape[2:])
        if any(side % self.stride for side in sides):
            raise ValueError(f"sides {sides} must be multiples of {self.stride}")
        if all(side == self.stride for side in sides):
            raise ValueError(f"sides {sides}: at least one must be {2 * self.stride} or more")
        return self.decoder(self.encoder(x))
