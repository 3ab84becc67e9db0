"""The self-supervision of SwinUNETR (arXiv 2111.14791), with which arXiv 2408.00640 compares itself.

Two views of a patch are turned and damaged; the network tells how far each was turned, which views belong together,
and what the undamaged view looks like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from amaes import rng
from amaes.losses import contrastive_loss
from amaes.models.swin_heads import ROTATIONS

if TYPE_CHECKING:
    from amaes.data.several_stores import SeveralStores
    from amaes.data.store import Store

VIEWS = 2
_EDGES = (0.05, 0.25)  # of a box, as fractions of the patch
BOXES_PER_DRAW = 64  # boxes drawn together; a patch of the published 30 % takes about 50


@dataclass(frozen=True)
class Views:
    """What is drawn for a batch, a row per sample, on the host.

    Boxes are (B, views, N, 3 axes, 2): first voxel and the one after the last; rows of fewer boxes end in empty ones.
    """

    turns: np.ndarray  # (B, views), multiples of 90 degrees
    noise_boxes: np.ndarray  # of the first round
    partner: np.ndarray  # (B, views), in [0, 1): place in the batch of the sample whose voxels fill the second round
    partner_boxes: np.ndarray  # of the second round
    noise_key: np.ndarray  # (B, views), of the noise


@dataclass(frozen=True)
class ViewTargets:
    """What the network should have said: of the first views of all samples, then of the second ones."""

    turns: torch.Tensor  # (2 B,), int64
    clean: torch.Tensor  # (2 B, C, X, Y, Z), turned and undamaged


class SwinSelfSupervision:
    """Rotation, contrastive and reconstruction loss on two damaged views of each patch (arXiv 2111.14791, Sec. 3.2).

    A view is turned by a multiple of 90 degrees in the plane of the last two axes, and damaged twice: boxes of random
    noise, then boxes of another view of the batch. Each time boxes are drawn until together they are u of the patch, u
    uniform up to `corruption`; overlaps count again.

    Which view fills the second round, and what the contrastive loss tells apart, depends on the patches of a
    micro-batch on this rank; all else on (seed, epoch, case). Three things differ from the published program: noise is
    scaled to [0, 1] by the extremes of a whole sample's noise and not of each box; boxes are at least one voxel thick;
    and the two views go through the network as one batch, which no layer of it notices. It trained on 96^3 voxels;
    arXiv 2408.00640 on 128^3, and there "mask ratio 0.3" is `corruption`, while its "mask size 2" has no place here.

    Args:
        patch_size: (X, Y, Z), voxels; Y and Z equal.
        seed: of every draw.
        corruption: the most of a view that a round damages, in [0, 1).
        weights: of the rotation, contrastive and reconstruction losses.
        temperature: of the contrastive loss.
        reconstruction_head: of the network, see `amaes.models.build_swin_ssl`.

    Raises:
        ValueError: a patch that cannot be turned, or `corruption` outside [0, 1).
    """

    task = "swin"
    labels = False
    validation_batch = 4  # the contrastive loss needs several volumes
    views = VIEWS
    trivial = "chance and each view's mean"

    def __init__(
        self,
        patch_size: Sequence[int],
        seed: int = 0,
        corruption: float = 0.3,
        weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        temperature: float = 0.5,
        reconstruction_head: str = "vae",
    ) -> None:
        if patch_size[1] != patch_size[2]:
            raise ValueError(
                f"`patch_size` {' '.join(map(str, patch_size))}: views are turned in the plane of the last two axes, "
                "which must be equally long"
            )
        if not 0 <= corruption < 1:
            raise ValueError(f"`corruption` {corruption} is outside [0, 1)")
        self.window_size = tuple(patch_size)
        self.reading: dict = {}
        self.build = {"reconstruction": reconstruction_head}
        self.seed, self.corruption, self.weights, self.temperature = seed, corruption, weights, temperature

    def see(self, store: Store | SeveralStores) -> None:
        """Nothing of the data changes this objective."""

    def draw(self, epochs: Sequence[int], samples: Sequence[int], channels: int = 1, purpose: str = "view") -> Views:
        """Turns, boxes and partners of a batch; a row depends on (seed, epoch, sample) alone.

        Args:
            epochs: pass over the data of each sample, (B,).
            samples: index of the case of each sample, (B,).
            channels: of the image; all share the boxes.
            purpose: name of the random stream.
        """
        turns, noise, partner, replace, keys = [], [], [], [], []
        for view in range(VIEWS):
            name = f"{purpose} {view}"
            for epoch, sample in zip(epochs, samples, strict=True):
                stream = rng.stream(self.seed, int(epoch), int(sample), name)
                turns.append(stream.integers(ROTATIONS))
                noise.append(self._boxes(stream))
                partner.append(stream.random())
                replace.append(self._boxes(stream))
            keys.append(rng.keys(self.seed, epochs, samples, f"{name} noise").numpy())
        count = len(epochs)

        def by_sample(rows: list) -> np.ndarray:
            array = np.stack(rows)
            return array.reshape(VIEWS, count, *array.shape[1:]).swapaxes(0, 1)

        return Views(
            by_sample(turns),
            by_sample(_filled_up(noise)),
            by_sample(partner),
            by_sample(_filled_up(replace)),
            np.stack(keys, axis=1),
        )

    @torch.no_grad()
    def prepare(self, batch: dict, device: torch.device, training: bool = True) -> tuple[torch.Tensor, ViewTargets]:
        """The damaged views, (2 B, C, X, Y, Z), first ones first; how they were turned, and what they were."""
        image = batch["image"].to(device, non_blocking=True).float()
        count = len(image)
        draws = self.draw(batch["epoch"], batch["case"], purpose="view" if training else "validation view")
        boxes = np.stack(_filled_up([draws.noise_boxes, draws.partner_boxes]))  # (rounds, B, views, N, 3, 2)
        boxes = _send(boxes, device)
        damaged, clean = [], []
        for view in range(VIEWS):
            turned = torch.stack(
                [torch.rot90(x, int(k), (2, 3)) for x, k in zip(image, draws.turns[:, view], strict=True)]
            )
            noise = _noise(_send(draws.noise_key[:, view], device), turned)
            covers = _cover(boxes[:, :, view].flatten(0, 1), self.window_size).unflatten(0, (2, count))
            damaged.append(_damage(turned, noise, covers, draws.partner[:, view]))
            clean.append(turned)
        turns = _send(draws.turns.T.ravel(), device)
        return torch.cat(damaged), ViewTargets(turns, torch.cat(clean))

    def losses(self, outputs: tuple[torch.Tensor, ...], targets: ViewTargets) -> dict[str, torch.Tensor]:
        """Cross-entropy of the rotation, contrastive loss, and mean absolute error over all voxels, weighted.

        Args:
            outputs: logits (2 B, 4), embeddings (2 B, E) and reconstructions (2 B, C, X, Y, Z).
            targets: of `prepare`.
        """
        logits, embedding, reconstruction = outputs
        terms = {
            "rotation": F.cross_entropy(logits.float(), targets.turns),
            "contrastive": contrastive_loss(*embedding.chunk(VIEWS), self.temperature),
            "reconstruction": F.l1_loss(reconstruction.float(), targets.clean.float()),
        }
        return {name: weight * term for weight, (name, term) in zip(self.weights, terms.items(), strict=True)}

    def baseline(self, targets: ViewTargets) -> torch.Tensor:
        """All rotations equally likely, all views equally alike, and each voxel the mean of its view."""
        clean = targets.clean
        logits, embedding = clean.new_zeros(len(clean), ROTATIONS), clean.new_ones(len(clean), 1)
        mean = clean.mean(dim=(2, 3, 4), keepdim=True).expand_as(clean)
        return torch.stack(list(self.losses((logits, embedding, mean), targets).values())).sum()

    def panels(
        self, inputs: torch.Tensor, outputs: tuple[torch.Tensor, ...], targets: ViewTargets
    ) -> dict[str, torch.Tensor]:
        """The first channel of the first views as the network sees it, as it rebuilds it, and as it is."""
        seen, rebuilt, target = (x.chunk(VIEWS)[0][:, :1] for x in (inputs, outputs[-1], targets.clean))
        return {"seen": seen, "rebuilt": rebuilt, "target": target}

    def _boxes(self, stream: np.random.Generator) -> np.ndarray:
        """Boxes that together are a random share of the patch: (N, 3, 2), int16."""
        sides = np.array(self.window_size)
        thin = np.maximum(1, (_EDGES[0] * sides).astype(int))
        thick = np.maximum(thin + 1, (_EDGES[1] * sides).astype(int))  # not reached
        wanted, found, boxes = stream.uniform(0, self.corruption) * sides.prod(), 0, [np.zeros((0, 3, 2), np.int16)]
        while found < wanted:
            first = stream.integers(0, np.maximum(1, sides - thin), (BOXES_PER_DRAW, 3))
            after = np.minimum(first + stream.integers(thin, thick, (BOXES_PER_DRAW, 3)), sides)
            sums = found + (after - first).prod(axis=1).cumsum()
            needed = int(np.searchsorted(sums, wanted)) + 1  # the first at which enough is damaged
            boxes.append(np.stack([first, after], axis=2)[:needed].astype(np.int16))
            found = sums[-1]
        return np.concatenate(boxes)


def _noise(keys: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Normal noise, scaled to [0, 1] in each sample: the shape of `like`."""
    noise = rng.normal(keys, like[0].numel())
    low, high = noise.aminmax(dim=1, keepdim=True)
    return ((noise - low) / (high - low)).view_as(like)


def _damage(views: torch.Tensor, noise: torch.Tensor, covers: torch.Tensor, partners: np.ndarray) -> torch.Tensor:
    """One sample after the other: noise where covers[0], then the partner as it is by now where covers[1]."""
    x = views.clone()
    for i, place in enumerate((partners * len(x)).astype(int)):
        x[i] = torch.where(covers[0, i], noise[i], x[i])
        if place != i:
            x[i] = torch.where(covers[1, i], x[place], x[i])
    return x


def _filled_up(boxes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """All with the same number of boxes, (..., N, 3, 2), by empty ones at the end."""
    longest = max(b.shape[-3] for b in boxes)
    return [np.pad(b, [(0, 0)] * (b.ndim - 3) + [(0, longest - b.shape[-3]), (0, 0), (0, 0)]) for b in boxes]


def _cover(boxes: torch.Tensor, sides: Sequence[int]) -> torch.Tensor:
    """Voxels that lie in any box: (R, N, 3, 2) -> (R, X, Y, Z), bool.

    A box is a product of three intervals; the number of boxes over a voxel is a matrix product of their indicators.
    """
    inside = []
    for axis, side in enumerate(sides):
        at = torch.arange(side, device=boxes.device)
        inside.append(((at >= boxes[:, :, axis, :1]) & (at < boxes[:, :, axis, 1:])).float())  # (R, N, side)
    with torch.autocast(boxes.device.type, enabled=False):
        planes = (inside[0][..., :, None] * inside[1][..., None, :]).flatten(2)  # (R, N, X Y)
        counts = planes.transpose(1, 2) @ inside[2]  # (R, X Y, Z)
    return (counts > 0.5).view(len(boxes), *sides)


def _send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """To the device, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor
