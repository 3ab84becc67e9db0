"""SwinUNETR (arXiv 2201.01266): Swin transformer encoder (arXiv 2103.14030) in 3D, and its convolutional decoder.

Equal to MONAI's class of that name, whose weights load (`amaes.published`). Tokens are (B, X, Y, Z, C), channels last.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import nn

from amaes.models.decoder import Decoder
from amaes.models.ops import conv_before_norm, norm_act, norm_only
from amaes.models.ops.norm_act import SLOPE
from amaes.models.stages import run_stage

WINDOW = (7, 7, 7)  # tokens
DEPTHS = (2, 2, 2, 2)
HEADS = (3, 6, 12, 24)

# Order in which patch merging stacks the eight sub-grids of stride 2, as offsets (x, y, z). MONAI changed it twice; the
# first version, with which all published weights were made, repeats two sub-grids and loses two. The shapes of the
# weights are the same for all three.
MERGING = {
    "legacy": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)),  # before 1.5
    "fixed": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)),  # since 1.5
    "v2": tuple(product((0, 1), repeat=3)),
}
MASKED_LOGIT = -100.0  # added to the attention logit of two tokens that only the cyclic shift brought together


def position_index(window: Sequence[int]) -> torch.Tensor:
    """For every pair of a window's tokens the row of the bias table that belongs to their offset: (n, n), int64."""
    grid = torch.stack(torch.meshgrid(*(torch.arange(side) for side in window), indexing="ij")).flatten(1)  # (3, n)
    offset = grid[:, :, None] - grid[:, None, :] + torch.tensor(window)[:, None, None] - 1  # (3, n, n), from 0
    return (offset[0] * (2 * window[1] - 1) + offset[1]) * (2 * window[2] - 1) + offset[2]


class WindowAttention(nn.Module):
    """Attention among the tokens of a window, with a learned bias per relative position and head.

    Args:
        channels: of the tokens.
        heads: divides `channels`.
        window: the largest window.
    """

    def __init__(self, channels: int, heads: int, window: Sequence[int] = WINDOW) -> None:
        super().__init__()
        self.heads = heads
        self.bias = nn.Parameter(torch.empty((2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1), heads))
        nn.init.trunc_normal_(self.bias, std=0.02)
        self.register_buffer("index", position_index(window), persistent=False)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens of windows, (W, n, C), to the same shape.

        Args:
            x: n tokens each, at most those of the largest window.
            mask: (n, n), added to the attention logits of every window; None adds nothing.
        """
        count, n, channels = x.shape
        q, k, v = self.qkv(x).view(count, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (W, heads, n, C / heads)
        # A smaller window reads the corner of the index of the largest, which is not its own geometry: as published.
        # (Embedding, and not indexing, whose gradient threads sum in any order.)
        bias = F.embedding(self.index[:n, :n], self.bias).permute(2, 0, 1)  # (heads, n, n)
        bias = bias if mask is None else bias + mask
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)[None])
        return self.proj(y.transpose(1, 2).reshape(count, n, channels))


class SwinBlock(nn.Module):
    """Window attention and MLP, each after a layer norm and added to its input.

    Args:
        channels, heads, window: see `WindowAttention`.
        shifted: move the windows by half their side (cyclically).
    """

    def __init__(self, channels: int, heads: int, shifted: bool, window: Sequence[int] = WINDOW) -> None:
        super().__init__()
        self.window, self.shifted = tuple(window), shifted
        self.norm1 = nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, heads, window)
        self.norm2 = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, 4 * channels)
        self.project = nn.Linear(4 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, X, Y, Z, C) to the same shape, of any sides."""
        x = x + self._attend(self.norm1(x))
        return x + self.project(F.gelu(self.expand(self.norm2(x))))

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        sides = x.shape[1:4]
        window = tuple(min(n, w) for n, w in zip(sides, self.window, strict=True))
        shift = tuple(w // 2 if self.shifted and n > w else 0 for n, w in zip(sides, self.window, strict=True))
        # The zeros that fill up the last windows take part in the attention: as published.
        fill = [-n % w for n, w in zip(sides, window, strict=True)]
        x = F.pad(x, (0, 0, 0, fill[2], 0, fill[1], 0, fill[0]))
        if any(shift):
            x = torch.roll(x, [-s for s in shift], dims=(1, 2, 3))
        x = self._by_region(x, window, shift, axis=0, last=())
        if any(shift):
            x = torch.roll(x, shift, dims=(1, 2, 3))
        return x[:, : sides[0], : sides[1], : sides[2]]

    def _by_region(
        self, x: torch.Tensor, window: Sequence[int], shift: Sequence[int], axis: int, last: tuple[bool, ...]
    ) -> torch.Tensor:
        """Attention, apart for the windows in which the shift brought together tokens from both ends of an axis.

        Along a shifted axis only the last window holds tokens from both ends. So there are at most eight kinds of
        windows, and each kind has one mask.

        Args:
            x: (B, X, Y, Z, C), sides multiples of the window's.
            window, shift: tokens, per axis.
            axis: the axis along which x is split next; 3 when it was split along all.
            last: for each axis before `axis`, whether x holds the last window along it.
        """
        if axis == 3:
            return self._windows(x, window, _shift_mask(window, shift, last, x) if any(last) else None)
        if not shift[axis]:
            return self._by_region(x, window, shift, axis + 1, (*last, False))
        dim = axis + 1
        parts = x.split([x.shape[dim] - window[axis], window[axis]], dim)
        return torch.cat(
            [self._by_region(part, window, shift, axis + 1, (*last, i == 1)) for i, part in enumerate(parts)], dim
        )

    def _windows(self, x: torch.Tensor, window: Sequence[int], mask: torch.Tensor | None) -> torch.Tensor:
        shape = x.shape
        for axis, side in enumerate(window):  # (B, X / w, w, Y / w, w, Z / w, w, C)
            x = x.unflatten(2 * axis + 1, (-1, side))
        split = x.shape
        x = x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, window[0] * window[1] * window[2], shape[-1])  # (W, n, C)
        x = self.attention(x, mask)
        x = x.view(split[0], split[1], split[3], split[5], *window, shape[-1])
        return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(shape)


def _shift_mask(window: Sequence[int], shift: Sequence[int], last: Sequence[bool], x: torch.Tensor) -> torch.Tensor:
    """MASKED_LOGIT between tokens of a window from different ends of an axis, else 0: (n, n)."""
    ends = [
        (torch.arange(w, device=x.device) >= w - s) & is_last for w, s, is_last in zip(window, shift, last, strict=True)
    ]
    end = torch.stack(torch.meshgrid(*ends, indexing="ij")).flatten(1)  # (3, n)
    return (end[:, :, None] != end[:, None, :]).any(0).to(x.dtype) * MASKED_LOGIT


class PatchMerging(nn.Module):
    """The eight sub-grids of stride 2 as channels, a layer norm, and a linear map to twice the channels.

    Args:
        channels: of the tokens.
        merging: a key of MERGING.
    """

    def __init__(self, channels: int, merging: str = "fixed") -> None:
        super().__init__()
        self.offsets = MERGING[merging]
        self.norm = nn.LayerNorm(8 * channels)
        self.reduction = nn.Linear(8 * channels, 2 * channels, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, X, Y, Z, C) to (B, X/2, Y/2, Z/2, 2C), sides rounded up."""
        odd = [n % 2 for n in x.shape[1:4]]
        x = F.pad(x, (0, 0, 0, odd[2], 0, odd[1], 0, odd[0]))
        x = torch.cat([x[:, i::2, j::2, k::2] for i, j, k in self.offsets], dim=-1)
        return self.reduction(self.norm(x))


class SwinStage(nn.Module):
    """Swin blocks, every second one with shifted windows, then patch merging."""

    def __init__(self, channels: int, heads: int, depth: int, merging: str, window: Sequence[int] = WINDOW) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(SwinBlock(channels, heads, bool(i % 2), window) for i in range(depth)))
        self.merge = PatchMerging(channels, merging)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, X, Y, Z, C) to (B, X/2, Y/2, Z/2, 2C), sides rounded up."""
        return self.merge(self.blocks(x))


class SwinUNETR(nn.Module):
    """Swin encoder of SwinUNETR: patches of 2x2x2 voxels, four stages.

    Its finest feature is the image itself, so that the features reach from stride 1 to 32.

    Args:
        in_channels: channels of the image.
        width: channels of the first stage; they double at each stage.
        merging: order of the sub-grids in patch merging, a key of MERGING: "fixed", or "legacy" for weights made with
            MONAI before 1.5.

    Attributes:
        channels, strides: of each feature, finest first.
        decoders: name -> this family's own form of that decoder: "unet" is SwinUNETR's.
        variant: options of the encoder that do not show in the shapes of its weights.
        min_bottleneck_voxels: fewest voxels of the coarsest feature in training; its norms are over channels.

    Raises:
        ValueError: unknown `merging`.
    """

    min_bottleneck_voxels = 2

    def __init__(self, in_channels: int = 1, width: int = 48, merging: str = "fixed") -> None:
        super().__init__()
        if merging not in MERGING:
            raise ValueError(f"`merging` {merging!r} is unknown; accepted: {', '.join(MERGING)}")
        self.checkpoint_activations = False
        widths = [width * 2**i for i in range(len(DEPTHS) + 1)]
        self.channels = (in_channels, *widths)
        self.strides = tuple(2**i for i in range(len(self.channels)))
        self.decoders = {"unet": SwinUNETRDecoder}
        self.variant = {"merging": merging}
        self.patch_embed = nn.Conv3d(in_channels, width, kernel_size=2, stride=2)
        self.stages = nn.ModuleList(
            SwinStage(channels, heads, depth, merging)
            for channels, heads, depth in zip(widths[:-1], HEADS, DEPTHS, strict=True)
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """(B, C, X, Y, Z) to features, finest first: (B, channels[i], X/2^i, Y/2^i, Z/2^i), the image at i = 0.

        All but the image are layer-normalised, without parameters; the next stage reads them as they were before.
        """
        features = [x]
        tokens = self.patch_embed(x).movedim(1, -1)  # (B, X/2, Y/2, Z/2, C)
        for stage in (nn.Identity(), *self.stages):
            tokens = run_stage(self, stage, tokens)
            features.append(F.layer_norm(tokens, tokens.shape[-1:]).movedim(-1, 1))
        return features


class SwinResidualBlock(nn.Module):
    """Two 3x3x3 convolutions without bias, instance norms without parameters, leaky ReLU; the input added.

    A change of channels brings the input through a 1x1x1 convolution and an instance norm.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.conv2 = nn.Conv3d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        same = in_channels == out_channels
        self.shortcut = None if same else nn.Conv3d(in_channels, out_channels, kernel_size=1, bias=False)
        self.norm = nn.InstanceNorm3d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, X, Y, Z) to (B, O, X, Y, Z)."""
        y = norm_act(conv_before_norm(x, self.conv1), self.norm)
        y = norm_only(conv_before_norm(y, self.conv2), self.norm)
        if self.shortcut is not None:
            x = norm_only(conv_before_norm(x, self.shortcut), self.norm)
        return F.leaky_relu(y + x, SLOPE, inplace=True)


class SwinUNETRDecoder(Decoder):
    """Decoder of SwinUNETR: a residual block on every skip connection but one, transposed convolution, residual block.

    Args:
        channels, strides, deep_supervision: see `Decoder`; the finest feature is the image, which is decoded at the
            width of the next.
        num_classes: output channels.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], num_classes: int, deep_supervision: bool = False
    ) -> None:
        super().__init__(channels, strides, deep_supervision=deep_supervision, ratio=2)
        widths = (channels[1], *channels[1:])
        deepest = len(channels) - 1
        for i, (count, width) in enumerate(zip(channels, widths, strict=True)):
            self.laterals.append(nn.Identity() if i == deepest - 1 else SwinResidualBlock(count, width))
        for i in range(deepest):
            self.ups.append(nn.ConvTranspose3d(widths[i + 1], widths[i], kernel_size=2, stride=2, bias=False))
            self.stages.append(SwinResidualBlock(2 * widths[i], widths[i]))
        heads = widths if deep_supervision else widths[:1]
        self.heads.extend(nn.Conv3d(width, num_classes, kernel_size=1) for width in heads)
