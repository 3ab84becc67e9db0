"""The augmentation of a batch: draw on the host, send the numbers to the device at once, compute there.

Order: rotation, scaling and elastic deformation in one resampling; mirror; copy = target; additive noise, blur,
multiplicative noise, ghosting, Gibbs ringing, low resolution, bias field, gamma. Everything runs in float32 with
autocast off. A transform touches only the samples that drew it, and the host knows which, so nothing waits for the
device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from amaes.augment import spatial
from amaes.augment.draws import Draws, check_ranges, draw
from amaes.augment.intensity import (
    additive_noise,
    bias_field,
    blur,
    gamma,
    low_resolution,
    low_resolution_tables,
    multiplicative_noise,
    voxel_noise,
)
from amaes.augment.kspace import even_and_odd, ghosting_weights, gibbs_weights, weight_lines
from amaes.augment.options import FINETUNE_PRESETS, PRETRAIN_PRESETS, SPATIAL, Options, preset_options
from amaes.rng import uniform

_ALIASES = {"basic": "spatial"}  # name on the command line of the published code


@dataclass(frozen=True)
class Transform:
    """An intensity transform: the function that computes it and where its arguments come from."""

    name: str  # gate in Draws
    apply: Callable[..., torch.Tensor]  # (volumes (N, X, Y, Z), **arguments) -> new volumes
    drawn: tuple[str, ...]  # arguments that were drawn, fields of Draws without the name of the transform
    fixed: Mapping[str, object] = field(default_factory=dict)  # arguments that are the same for all draws
    tables: tuple[str, ...] = ()  # arguments that are tables, one per axis
    axis: int | None = None  # only volumes that drew this axis
    weights: Callable[..., np.ndarray] | None = None  # of lines of k-space: the argument instead of what was drawn

    @property
    def key(self) -> str:
        """Of its selection."""
        return self.name if self.axis is None else f"{self.name}{self.axis}"

    def gate(self, draws: Draws) -> np.ndarray:
        """(B, C) bool."""
        gate = getattr(draws, self.name)
        return gate if self.axis is None else gate & (getattr(draws, f"{self.name}_axis") == self.axis)


@dataclass
class Selection:
    """The samples, or volumes of single channels, that one transform works on, and what they drew."""

    rows: torch.Tensor | np.ndarray  # (N,), indices into the batch
    drawn: dict[str, torch.Tensor] | dict[str, np.ndarray]  # (N, ...)
    leaves_window: bool = False  # whether a voxel may look outside the window

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """The selected rows of x; x itself where all are."""
        return x if len(self.rows) == len(x) else x.index_select(0, self.rows)

    def put(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """x with `result` in the selected rows; may write into x."""
        return result if len(self.rows) == len(x) else x.index_copy_(0, self.rows, result)


def check_finite(window: torch.Tensor, name: str = "window") -> None:
    """Refuse NaN and infinite intensities. Waits for the device: call it where the data are still on the CPU.

    Raises:
        ValueError: naming the samples of the batch.
    """
    if torch.isfinite(window.sum(dtype=torch.float32)):
        return
    bad = [row for row, sample in enumerate(window) if not torch.isfinite(sample).all()]
    if bad:
        raise ValueError(f"{name}: NaN or infinite intensities in samples {bad} of the batch; expected finite numbers")


class _Augment:
    """What pretraining and fine-tuning share."""

    presets = PRETRAIN_PRESETS
    defaults = Options()

    def __init__(self, patch_size: Sequence[int], preset: str, seed: int = 0, **options: object) -> None:
        self.patch_size = _check_patch(patch_size)
        self.preset = _ALIASES.get(preset, preset)
        if self.preset not in self.presets:
            raise ValueError(f"`preset` {preset!r} is unknown; accepted: {', '.join(self.presets)}")
        if seed < 0:
            raise ValueError(f"`seed` {seed}: expected an integer >= 0")
        self.seed = seed
        self.options = preset_options(self.defaults, self.preset, self.presets[self.preset], options)
        if self.options.gibbs == "absolute" and self.options.gibbs_ringing > 0 and min(self.patch_size) < 128:
            raise ValueError(
                f"gibbs='absolute': needs sides of at least 128, the patch has {self.patch_size}; use 'scaled'"
            )
        moves = any(getattr(self.options, name) > 0 for name in SPATIAL)
        self.window_size = spatial.window_size(self.patch_size, self.options.window if moves else "none")
        # Whether the centre of the window falls on voxels of the patch, so that an unmoved patch is a plain crop.
        self._aligned = all((w - p) % 2 == 0 for w, p in zip(self.window_size, self.patch_size, strict=True))
        self._transforms = _intensity_transforms(self.options)
        self._tables: dict[torch.device, dict[str, list[torch.Tensor]]] = {}

    @cached_property
    def _bases(self) -> list[np.ndarray]:
        """Of the elastic fields, one per axis; made when first needed: a patch beyond reason is refused before."""
        bases = {side: spatial.smoothing_basis(self.options.elastic_sigma[0], side) for side in set(self.patch_size)}
        return [bases[side] for side in self.patch_size]

    def draw(self, epochs: Iterable[int], samples: Iterable[int], channels: int = 1) -> Draws:
        """Draw the parameters of a batch on the host; a row depends on (seed, epoch, sample) alone.

        Args:
            epochs: pass over the data of each sample, (B,), list or integer tensor on the CPU.
            samples: index of the case of each sample, (B,).
            channels: channels of the image.
        """
        return draw(self.options, self.patch_size, self.seed, epochs, samples, channels)

    def _select(self, draws: Draws, device: torch.device) -> dict[str, Selection]:
        """What each transform that occurs works on, by its key, on the device.

        All numbers go there in one transfer (pinned and asynchronous on CUDA); voxel noise is made there.

        Raises:
            ValueError: draws of an augmentation with other options, beyond what the tables of these hold.
        """
        check_ranges(draws, self.options, self.patch_size)
        selections = self._select_moved(draws)
        for axis in range(3):
            selections[f"mirror{axis}"] = _rows_of(draws.mirror[:, axis] & (self.options.mirror > 0), {})
        for transform in self._transforms:
            if (gate := transform.gate(draws)).any():
                values = {name: getattr(draws, f"{transform.name}_{name}") for name in transform.drawn}
                values = {name: value.reshape(-1, *value.shape[2:]) for name, value in values.items()}  # (B C, ...)
                selections[transform.key] = selection = _rows_of(gate.ravel(), values)
                if transform.weights is not None:
                    lines = transform.weights(**selection.drawn, side=self.patch_size[transform.axis])
                    selection.drawn = {"weights": even_and_odd(lines)}
        selections = _send({key: selection for key, selection in selections.items() if len(selection.rows)}, device)
        noisy = [selection for selection in selections.values() if "key" in selection.drawn]
        if noisy:  # all of it at once, (N, X, Y, Z)
            noise = voxel_noise(torch.cat([selection.drawn.pop("key") for selection in noisy]), self.patch_size)
            for selection, part in zip(noisy, noise.split([len(s.rows) for s in noisy]), strict=True):
                selection.drawn["noise"] = part
        return selections

    def _select_moved(self, draws: Draws) -> dict[str, Selection]:
        """The samples that are resampled: without elastic deformation and with it."""
        degrees = np.where(draws.rotation[:, None], draws.rotation_degrees, 0.0)
        matrix = spatial.coordinate_matrices(degrees, np.where(draws.scale, draws.scale_factor, 1.0))
        affine = ((degrees != 0).any(1) | draws.scale | (not self._aligned)) & ~draws.elastic
        coefficients = self._coefficients(draws)
        bound = spatial.elastic_bound(coefficients, draws.elastic_sigma)
        leaves = spatial.leaves_window(matrix, bound, self.patch_size, self.window_size)
        bent = {"matrix": matrix, "sigma": draws.elastic_sigma, "coefficients": coefficients}
        return {
            "affine": _rows_of(affine, {"matrix": matrix}, leaves),
            "elastic": _rows_of(draws.elastic, bent, leaves),
        }

    def _coefficients(self, draws: Draws) -> np.ndarray:
        """Of the elastic fields, voxels, 0 for samples without one: (B, 3, r0, r1, r2), float64."""
        ranks = [basis.shape[1] for basis in self._bases]
        count = 3 * int(np.prod(ranks))
        noise = np.zeros((len(draws), count))
        rows = np.flatnonzero(draws.elastic)
        if len(rows):
            noise[rows] = 2 * uniform(torch.from_numpy(draws.elastic_key[rows]), count).numpy() - 1
        return (noise * draws.elastic_alpha[:, None]).reshape(-1, 3, *ranks)

    def _tables_on(self, device: torch.device) -> dict[str, list[torch.Tensor]]:
        """Constants that depend on the sides alone: by name, one per axis. Made and sent at the first call."""
        if device in self._tables:
            return self._tables[device]

        def per_axis(by_side: Mapping[int, np.ndarray], sides: Sequence[int]) -> list[torch.Tensor]:
            sent = {side: torch.from_numpy(table).to(device) for side, table in by_side.items()}
            return [sent[side] for side in sides]

        tables = {"bases": per_axis(dict(zip(self.patch_size, self._bases, strict=True)), self.patch_size)}
        if self.options.order == 3:
            filters = {side: spatial.spline_filter(side) for side in set(self.window_size)}
            tables["filters"] = per_axis(filters, self.window_size)
        if self.options.low_resolution > 0:
            zoom = self.options.low_resolution_zoom[0]
            made = {side: low_resolution_tables(side, max(round(side * zoom), 1)) for side in set(self.patch_size)}
            tables["operators"] = per_axis({side: pair[0] for side, pair in made.items()}, self.patch_size)
            tables["lost"] = per_axis({side: pair[1] for side, pair in made.items()}, self.patch_size)
        self._tables[device] = tables
        return tables

    def _move(
        self, window: torch.Tensor, label: torch.Tensor | None, selections: Mapping[str, Selection]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The spatial part: window (B, C, W...) and label (B, W...) or None -> patch and label, in new memory."""
        dtype = torch.float64 if window.dtype == torch.float64 else torch.float32
        tables = self._tables_on(window.device)
        patch = _copy(spatial.centre_crop(window, self.patch_size), dtype)
        moved = None if label is None else _copy(spatial.centre_crop(label, self.patch_size), label.dtype)
        for key in ("affine", "elastic"):
            if key not in selections:
                continue
            selection = selections[key]
            offsets = self._offsets(selection, tables["bases"], dtype)
            resampled = spatial.resample(
                selection.take(window).to(dtype),
                offsets,
                self.options.fill,
                self.options.clip,
                filters=tables.get("filters"),
                border=selection.leaves_window,
            )
            patch = selection.put(patch, resampled)
            if label is not None:
                moved = selection.put(moved, spatial.sample_label(selection.take(label), offsets))
        for axis in range(3):
            if selection := selections.get(f"mirror{axis}"):
                patch = selection.put(patch, selection.take(patch).flip(axis - 3))
                moved = None if label is None else selection.put(moved, selection.take(moved).flip(axis - 3))
        return patch, moved

    def _offsets(self, selection: Selection, bases: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Where each voxel of the patch looks in the window: (N, 3, X, Y, Z), voxels from its centre."""
        matrix = selection.drawn["matrix"]
        if "coefficients" not in selection.drawn:
            return spatial.sampling_offsets(matrix, self.patch_size, dtype)
        largest, sigma = int(4 * self.options.elastic_sigma[1] + 0.5), selection.drawn["sigma"]
        by_side = dict(zip(self.patch_size, bases, strict=True))
        factors = {side: spatial.smoothing_matrix(sigma, side, largest) @ basis for side, basis in by_side.items()}
        factors = [factors[side] for side in self.patch_size]
        return spatial.elastic_offsets(matrix, selection.drawn["coefficients"], factors, dtype)

    def _degrade(self, patch: torch.Tensor, selections: Mapping[str, Selection]) -> torch.Tensor:
        """The intensity transforms: (B, C, X, Y, Z) -> the same shape in new memory."""
        tables = self._tables_on(patch.device)
        volumes = patch.flatten(0, 1).clone()  # (B C, X, Y, Z)
        for transform in self._transforms:
            if selection := selections.get(transform.key):
                constants = {name: tables[name] for name in transform.tables}
                result = transform.apply(selection.take(volumes), **selection.drawn, **constants, **transform.fixed)
                volumes = selection.put(volumes, result)
        return volumes.contiguous().view_as(patch)  # a transform along one axis may leave other strides

    def _check(self, window: torch.Tensor, draws: Draws) -> None:
        expected = (len(draws), draws.blur.shape[1], *self.window_size)
        if tuple(window.shape) != expected:
            raise ValueError(
                f"window {tuple(window.shape)}: expected {expected}, (samples and channels of the draws, "
                f"*window_size) for patches of {self.patch_size}"
            )
        if not window.is_floating_point():
            raise ValueError(f"window {window.dtype}: expected floating-point intensities")
        if window.device.type == "cpu":  # on a device the test would wait for it: call check_finite before sending
            check_finite(window)


class PretrainAugment(_Augment):
    """Augmentation for reconstruction: source (all transforms) and target (spatial ones only).

    Args:
        patch_size: (X, Y, Z), voxels.
        preset: "all", "spatial" (rotation, scaling, elastic deformation) or "none".
        seed: of every draw.
        options: fields of `Options`.

    Attributes:
        window_size: (X, Y, Z), voxels, the crop to load; larger than the patch if the preset moves voxels.

    Raises:
        ValueError: a patch size, preset, seed or option that is not accepted.
    """

    def __init__(
        self, patch_size: Sequence[int] = (128, 128, 128), preset: str = "all", seed: int = 0, **options: object
    ) -> None:
        super().__init__(patch_size, preset, seed, **options)

    @torch.no_grad()
    def __call__(self, window: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment a batch.

        Args:
            window: (B, C, *window_size), float16 or float32, intensities in [0, 1]; not changed.
            draws: of `draw`, a row per sample.

        Returns:
            source and target, each (B, C, *patch_size), float32, on the device of the window.

        Raises:
            ValueError: the shape or dtype of the window; NaN or infinite intensities (tested on the CPU only).
        """
        self._check(window, draws)
        selections = self._select(draws, window.device)
        with torch.autocast(window.device.type, enabled=False):
            target, _ = self._move(window, None, selections)
            return self._degrade(target, selections), target


class FinetuneAugment(_Augment):
    """Augmentation for segmentation: image and label move together, intensities change in the image only.

    Args:
        patch_size: (X, Y, Z), voxels.
        preset: "spatial" (rotation and scaling, for pretrained weights), "all" (elastic deformation and intensities
            as well, from scratch) or "none".
        seed: of every draw.
        options: fields of `Options`; here `window` is "none" (no margin) and `clip` is off unless given.

    Attributes:
        window_size: (X, Y, Z), voxels, the crop to load.

    Raises:
        ValueError: a patch size, preset, seed or option that is not accepted.
    """

    presets = FINETUNE_PRESETS
    defaults = Options(window="none", clip=False)

    def __init__(
        self, patch_size: Sequence[int] = (128, 128, 128), preset: str = "spatial", seed: int = 0, **options: object
    ) -> None:
        super().__init__(patch_size, preset, seed, **options)

    @torch.no_grad()
    def __call__(
        self, window: torch.Tensor, label_window: torch.Tensor, draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment a batch.

        Args:
            window: (B, C, *window_size), float16 or float32; not changed.
            label_window: (B, *window_size), integer; each voxel takes the nearest one, 0 outside.
            draws: of `draw`, a row per sample.

        Returns:
            image (B, C, *patch_size), float32, and label (B, *patch_size), its dtype unchanged.

        Raises:
            ValueError: a shape or dtype; NaN or infinite intensities (tested on the CPU only).
        """
        self._check(window, draws)
        if label_window.shape != window.shape[:1] + window.shape[2:]:
            raise ValueError(f"label {tuple(label_window.shape)}: expected {(len(draws), *self.window_size)}")
        if label_window.is_floating_point() or label_window.is_complex():
            raise ValueError(f"label {label_window.dtype}: expected an integer dtype")
        selections = self._select(draws, window.device)
        with torch.autocast(window.device.type, enabled=False):
            image, label = self._move(window, label_window, selections)
            return self._degrade(image, selections), label


def _intensity_transforms(options: Options) -> tuple[Transform, ...]:
    """The intensity transforms that can occur, in order; one per axis for those along a single axis."""
    clip = {"clip": options.clip}
    radius = int(4 * options.blur_sigma[1] + 0.5)
    transforms = (
        Transform("additive_noise", additive_noise, ("sigma", "key"), clip),
        Transform("blur", blur, ("sigma",), {"radius": radius, **clip}),
        Transform("multiplicative_noise", multiplicative_noise, ("sigma", "key"), clip),
        *(
            Transform(
                "ghosting",
                weight_lines,
                ("alpha", "repetitions"),
                {"axis": axis, **clip},
                axis=axis,
                weights=ghosting_weights,
            )
            for axis in range(3)
        ),
        *(
            Transform(
                "gibbs_ringing", weight_lines, ("lines",), {"axis": axis, **clip}, axis=axis, weights=gibbs_weights
            )
            for axis in range(3)
        ),
        Transform("low_resolution", low_resolution, ("lengths",), tables=("operators", "lost")),
        Transform("bias_field", bias_field, ("centre",), {"mode": options.bias, **clip}),
        Transform("gamma", gamma, ("value", "inversion"), clip),
    )
    return tuple(transform for transform in transforms if getattr(options, transform.name) > 0)


def _check_patch(patch_size: Sequence[int]) -> tuple[int, int, int]:
    sides = tuple(patch_size)
    if len(sides) != 3 or not all(int(side) == side and side >= 1 for side in sides):
        raise ValueError(f"`patch_size` {' '.join(map(str, sides))}: expected three whole numbers >= 1, in voxels")
    return tuple(int(side) for side in sides)


def _rows_of(gate: np.ndarray, values: Mapping[str, np.ndarray], leaves: np.ndarray | None = None) -> Selection:
    """The rows whose gate is on, (B,) bool, with their values, (B, ...); `leaves`: which look outside the window."""
    rows = np.flatnonzero(gate)
    drawn = {name: value[rows] for name, value in values.items()}
    return Selection(rows, drawn, leaves is not None and bool(leaves[rows].any()))


def _send(selections: Mapping[str, Selection], device: torch.device) -> dict[str, Selection]:
    """Selections with tensors on the device (float64, int64 or bool), through one buffer and one transfer."""
    if not selections:
        return {}
    arrays = [array for selection in selections.values() for array in (selection.rows, *selection.drawn.values())]
    words = [array.ravel().astype(np.float64 if array.dtype.kind == "f" else np.int64) for array in arrays]
    buffer = torch.from_numpy(np.concatenate([word.view(np.int64) for word in words]))
    if device.type == "cuda":
        buffer = buffer.pin_memory().to(device, non_blocking=True)
    parts = buffer.split([array.size for array in arrays])
    tensors = iter([_as_sent(part, array) for part, array in zip(parts, arrays, strict=True)])
    return {
        key: Selection(next(tensors), {name: next(tensors) for name in selection.drawn}, selection.leaves_window)
        for key, selection in selections.items()
    }


def _as_sent(part: torch.Tensor, array: np.ndarray) -> torch.Tensor:
    """A part of the buffer of int64 as numbers of the kind and shape of the array that was written there."""
    kind = array.dtype.kind
    part = part.view(torch.float64) if kind == "f" else part != 0 if kind == "b" else part
    return part.view(array.shape)


def _copy(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous copy in new memory."""
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)
