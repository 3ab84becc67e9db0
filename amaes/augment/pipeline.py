"""The augmentation of a batch: draw on the host, send one packet to the device, compute there.

Order: rotation, scaling and elastic deformation in one resampling; mirror; copy = target; additive noise, blur,
multiplicative noise, ghosting, Gibbs ringing, low resolution, bias field, gamma. Everything runs in float32 with
autocast off. Only samples that drew a transform are touched by it, and the host knows which, so nothing waits for the
device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import torch

from amaes.augment import spatial
from amaes.augment.draws import INTENSITY, SPATIAL, Draws, Options, check_reach, draw
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
from amaes.augment.kspace import ghosting, gibbs_ringing
from amaes.rng import uniform

PRESETS = {"all": (*SPATIAL, *INTENSITY), "spatial": SPATIAL, "none": ()}
FINETUNE_PRESETS = {"all": (*SPATIAL, *INTENSITY), "spatial": ("rotation", "scale"), "none": ()}
_ALIASES = {"basic": "spatial"}  # name on the command line of the published code
# Options that belong to no single transform, and the transforms that read them; nothing moving, any `window` is none.
_READERS = {"order": SPATIAL, "fill": SPATIAL, "clip": (*SPATIAL, *INTENSITY)}


@dataclass(frozen=True)
class Stage:
    """An intensity transform: which draws it reads and what it computes from them."""

    name: str  # gate in Draws
    parameters: tuple[str, ...]  # fields of Draws, in the order of the arguments
    apply: Callable[..., torch.Tensor]  # (volumes (N, X, Y, Z), *parameters, *tables) -> new volumes
    tables: tuple[str, ...] = ()
    axis: int | None = None  # only volumes that drew this axis

    @property
    def key(self) -> str:
        return self.name if self.axis is None else f"{self.name}{self.axis}"

    def gate(self, draws: Draws) -> np.ndarray:
        """(B, C) bool."""
        gate = getattr(draws, self.name)
        return gate if self.axis is None else gate & (getattr(draws, f"{self.name}_axis") == self.axis)


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

    presets = PRESETS
    defaults = Options()

    def __init__(self, patch_size: Sequence[int], preset: str, seed: int = 0, **options) -> None:
        self.patch_size = _check_patch(patch_size)
        self.preset = _ALIASES.get(preset, preset)
        if self.preset not in self.presets:
            raise ValueError(f"preset={preset!r}: expected one of {', '.join(map(repr, self.presets))}")
        if seed < 0:
            raise ValueError(f"seed={seed}: expected an integer >= 0")
        self.seed = seed
        self.options = _choose(self.defaults, self.preset, self.presets[self.preset], options)
        if self.options.gibbs == "absolute" and self.options.gibbs_ringing > 0 and min(self.patch_size) < 128:
            raise ValueError(
                f"gibbs='absolute': needs sides of at least 128, the patch has {self.patch_size}; use 'scaled'"
            )
        moves = any(getattr(self.options, name) > 0 for name in SPATIAL)
        self.window_size = spatial.window_size(self.patch_size, self.options.window if moves else "none")
        self._exact = all((w - p) % 2 == 0 for w, p in zip(self.window_size, self.patch_size, strict=True))
        self._stages = _stages(self.options, self.patch_size)
        bases = {side: spatial.smoothing_basis(self.options.elastic_sigma[0], side) for side in set(self.patch_size)}
        self._bases = [bases[side] for side in self.patch_size]
        self._tables: dict[torch.device, dict[str, torch.Tensor]] = {}

    def draw(self, epochs: Iterable[int], samples: Iterable[int], channels: int = 1) -> Draws:
        """Draw the parameters of a batch on the host; a row depends on (seed, epoch, sample) alone.

        Args:
            epochs: pass over the data of each sample, (B,), list or integer tensor on the CPU.
            samples: index of the case of each sample, (B,).
            channels: channels of the image.
        """
        return draw(self.options, self.patch_size, self.seed, epochs, samples, channels)

    def pack(self, draws: Draws, device: torch.device | str, masked: bool = False) -> dict[str, torch.Tensor]:
        """Everything `apply` needs: numbers sent in one transfer (pinned and asynchronous on CUDA), noise made there.

        The first call on a device also sends the constant tables.

        Args:
            masked: False (compact): the rows that drew a transform, and their indices. True: all rows and a gate, so
                that the shapes never change and `apply` can be compiled as one graph, at the price of computing
                every transform for every sample.

        Raises:
            ValueError: draws of an augmentation with other options, beyond what the tables of these reach.
        """
        device = torch.device(device)
        check_reach(draws, self.options, self.patch_size)
        arrays = self._pack_spatial(draws, masked)
        if self.options.mirror > 0:
            for axis in range(3):
                arrays |= _select(f"mirror{axis}", draws.mirror[:, axis], {}, masked)
        for stage in self._stages:
            values = {name: getattr(draws, name) for name in stage.parameters}
            values = {name: value.reshape(-1, *value.shape[2:]) for name, value in values.items()}  # (B, C) -> (B C)
            arrays |= _select(stage.key, stage.gate(draws).ravel(), values, masked)
        packed = _send(arrays, device)
        for name in (name for name in arrays if name.endswith("noise_key")):
            packed[name] = voxel_noise(packed[name], self.patch_size)  # (N, X, Y, Z) takes the place of its key
        if device not in self._tables:
            self._tables[device] = self._make_tables(device)
        return packed | self._tables[device]

    def _pack_spatial(self, draws: Draws, masked: bool) -> dict[str, np.ndarray]:
        degrees = np.where(draws.rotation[:, None], draws.rotation_degrees, 0.0)
        matrix = spatial.coordinate_matrices(degrees, np.where(draws.scale, draws.scale_factor, 1.0))
        moved = (degrees != 0).any(1) | draws.scale | (not self._exact)
        coefficients = self._coefficients(draws)
        bound = spatial.elastic_bound(coefficients, draws.elastic_sigma)
        leaves = spatial.leaves_window(matrix, bound, self.patch_size, self.window_size)
        affine, bent = {"matrix": matrix}, {"sigma": draws.elastic_sigma, "coefficients": coefficients}
        if masked:
            moves = self.window_size != self.patch_size or any(getattr(self.options, name) > 0 for name in SPATIAL)
            everything = _select("elastic", moved | draws.elastic, affine | bent, masked)
            return everything | {"elastic.border": leaves} if moves else {}
        arrays = {}
        for name, gate, values in (
            ("affine", moved & ~draws.elastic, affine),
            ("elastic", draws.elastic, affine | bent),
        ):
            arrays |= _select(name, gate, values, masked)
            if (gate & leaves).any():
                arrays[f"{name}.border"] = leaves[gate]  # its presence asks for the test against the border
        return arrays

    def _coefficients(self, draws: Draws) -> np.ndarray:
        """Of the elastic fields, voxels, 0 for samples without one: (B, 3, r0, r1, r2), float64."""
        ranks = [basis.shape[1] for basis in self._bases]
        count = 3 * int(np.prod(ranks))
        noise = np.zeros((len(draws), count))
        rows = np.flatnonzero(draws.elastic)
        if len(rows):
            noise[rows] = 2 * uniform(torch.from_numpy(draws.elastic_key[rows]), count).numpy() - 1
        return (noise * draws.elastic_alpha[:, None]).reshape(-1, 3, *ranks)

    def _make_tables(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Constants that depend on the sides alone, by name and side."""
        tables = {f"basis{side}": basis for side, basis in zip(self.patch_size, self._bases, strict=True)}
        if self.options.order == 3:
            tables |= {f"spline{side}": spatial.spline_inverse(side) for side in set(self.window_size)}
        if self.options.low_resolution > 0:
            for side in set(self.patch_size):
                shortest = max(round(side * self.options.low_resolution_zoom[0]), 1)
                tables[f"operators{side}"], tables[f"kept{side}"] = low_resolution_tables(side, shortest)
        return {name: torch.from_numpy(table).to(device) for name, table in tables.items()}

    def _move(self, window: torch.Tensor, label: torch.Tensor | None, packed: dict[str, torch.Tensor]):
        """The spatial stage: window (B, C, W...) and label (B, W...) or None -> patch and label, in new memory."""
        dtype = torch.float64 if window.dtype == torch.float64 else torch.float32
        patch = _copy(spatial.centre_crop(window, self.patch_size), dtype)
        moved = None if label is None else _copy(spatial.centre_crop(label, self.patch_size), label.dtype)
        for name in ("affine", "elastic"):
            if f"{name}.matrix" not in packed:
                continue
            offsets = self._offsets(name, packed, dtype)
            resampled = spatial.resample(
                _take(window, name, packed).to(dtype),
                offsets,
                self.options.fill,
                self.options.clip,
                [packed[f"spline{side}"] for side in self.window_size] if self.options.order == 3 else None,
                border=f"{name}.border" in packed,
            )
            patch = _put(patch, resampled, name, packed)
            if label is not None:
                moved = _put(moved, spatial.sample_label(_take(label, name, packed), offsets), name, packed)
        for axis in range(3):
            name = f"mirror{axis}"
            if _active(name, packed):
                patch = _put(patch, _take(patch, name, packed).flip(axis - 3), name, packed)
                moved = None if label is None else _put(moved, _take(moved, name, packed).flip(axis - 3), name, packed)
        return patch, moved

    def _offsets(self, name: str, packed: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        matrix = packed[f"{name}.matrix"]
        if f"{name}.coefficients" not in packed:
            return spatial.sampling_offsets(matrix, self.patch_size, dtype)
        largest = int(4 * self.options.elastic_sigma[1] + 0.5)
        bases = [packed[f"basis{side}"] for side in self.patch_size]
        sigma = packed[f"{name}.sigma"]
        factors = [spatial.smoothing_matrix(sigma, len(basis), largest) @ basis for basis in bases]
        return spatial.elastic_offsets(matrix, packed[f"{name}.coefficients"], factors, dtype)

    def _degrade(self, patch: torch.Tensor, packed: dict[str, torch.Tensor]) -> torch.Tensor:
        """The intensity stages: (B, C, X, Y, Z) -> the same shape in new memory."""
        volumes = patch.flatten(0, 1).clone()  # (B C, X, Y, Z)
        for stage in self._stages:
            if _active(stage.key, packed):
                parameters = [packed[f"{stage.key}.{name}"] for name in stage.parameters]
                tables = [[packed[f"{table}{side}"] for side in self.patch_size] for table in stage.tables]
                result = stage.apply(_take(volumes, stage.key, packed), *parameters, *tables)
                volumes = _put(volumes, result, stage.key, packed)
        return volumes.contiguous().view_as(patch)  # a transform along one axis may leave other strides

    def _check(self, window: torch.Tensor, draws: Draws) -> None:
        expected = (len(draws), draws.blur.shape[1], *self.window_size)
        if tuple(window.shape) != expected:
            raise ValueError(
                f"window {tuple(window.shape)}: expected {expected}, (samples and channels of the draws, "
                f"*window_size) for patch_size {self.patch_size}"
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
        window_size: (X, Y, Z), the crop to load; larger than the patch if the preset moves voxels.
    """

    def __init__(
        self, patch_size: Sequence[int] = (128, 128, 128), preset: str = "all", seed: int = 0, **options
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
            ValueError: shape of the window; NaN or infinite intensities, tested for windows on the CPU only.
        """
        self._check(window, draws)
        return self.apply(window, self.pack(draws, window.device))

    def apply(self, window: torch.Tensor, packed: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The part that computes: a pure function of tensors, for packets of `pack`."""
        with torch.autocast(window.device.type, enabled=False):
            target, _ = self._move(window, None, packed)
            return self._degrade(target, packed), target


class FinetuneAugment(_Augment):
    """Augmentation for segmentation: image and label move together, intensities change in the image only.

    Args:
        patch_size: (X, Y, Z), voxels.
        preset: "spatial" (rotation and scaling, for pretrained weights), "all" (elastic deformation and intensities
            as well, from scratch) or "none".
        seed: of every draw.
        options: fields of `Options`; here `window` is "none" (no margin) and `clip` is off unless given.
    """

    presets = FINETUNE_PRESETS
    defaults = Options(window="none", clip=False)

    def __init__(
        self, patch_size: Sequence[int] = (128, 128, 128), preset: str = "spatial", seed: int = 0, **options
    ) -> None:
        super().__init__(patch_size, preset, seed, **options)

    @torch.no_grad()
    def __call__(
        self, window: torch.Tensor, label_window: torch.Tensor, draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment a batch.

        Args:
            window: (B, C, *window_size), float16 or float32; not changed.
            label_window: (B, *window_size), integer; nearest voxel, 0 outside, never interpolated.
            draws: of `draw`, a row per sample.

        Returns:
            image (B, C, *patch_size), float32, and label (B, *patch_size) in its own dtype.

        Raises:
            ValueError: shapes; a label that is not integer; NaN or infinite intensities on the CPU.
        """
        self._check(window, draws)
        if label_window.shape != window.shape[:1] + window.shape[2:]:
            raise ValueError(f"label {tuple(label_window.shape)}: expected {(len(draws), *self.window_size)}")
        if label_window.is_floating_point() or label_window.is_complex():
            raise ValueError(f"label {label_window.dtype}: expected an integer dtype")
        return self.apply(window, label_window, self.pack(draws, window.device))

    def apply(
        self, window: torch.Tensor, label_window: torch.Tensor, packed: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The part that computes: a pure function of tensors, for packets of `pack`."""
        with torch.autocast(window.device.type, enabled=False):
            image, label = self._move(window, label_window, packed)
            return self._degrade(image, packed), label


def _stages(options: Options, patch_size: Sequence[int]) -> tuple[Stage, ...]:
    """The intensity transforms that can occur, in order; one stage per axis for those along a single axis."""
    clip = options.clip
    radius = int(4 * options.blur_sigma[1] + 0.5)
    ghosts = ("ghosting_alpha", "ghosting_repetitions")
    stages = (
        Stage("additive_noise", ("additive_noise_sigma", "additive_noise_key"), partial(additive_noise, clip=clip)),
        Stage("blur", ("blur_sigma",), partial(blur, radius=radius, clip=clip)),
        Stage(
            "multiplicative_noise",
            ("multiplicative_noise_sigma", "multiplicative_noise_key"),
            partial(multiplicative_noise, clip=clip),
        ),
        *(Stage("ghosting", ghosts, partial(ghosting, axis=axis, clip=clip), axis=axis) for axis in range(3)),
        *(
            Stage("gibbs_ringing", ("gibbs_ringing_lines",), partial(gibbs_ringing, axis=axis, clip=clip), axis=axis)
            for axis in range(3)
        ),
        Stage("low_resolution", ("low_resolution_lengths",), low_resolution, tables=("operators", "kept")),
        Stage("bias_field", ("bias_field_centre",), partial(bias_field, mode=options.bias, clip=clip)),
        Stage("gamma", ("gamma_value", "gamma_inversion"), partial(gamma, clip=clip)),
    )
    return tuple(stage for stage in stages if getattr(options, stage.name) > 0)


def _choose(defaults: Options, preset: str, transforms: Sequence[str], options: dict) -> Options:
    """Options of a preset: transforms outside it get probability 0, and options that nothing would read are refused."""
    known = {field.name: getattr(defaults, field.name) for field in fields(defaults)}
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{name}={value!r}: no such option; accepted: {', '.join(known)}")
        owner = _owner(name)
        read = owner is None or owner in transforms or (owner == "mirror" and transforms)
        if not read and value != known[name]:
            raise ValueError(
                f"{name}={value!r}: the preset {preset!r} has no {owner}; accepted: {', '.join(transforms) or 'none'}"
            )
    off = {name: 0.0 for name in (*SPATIAL, *INTENSITY) if name not in transforms}
    chosen = replace(defaults, **(options | off))
    occur = {name for name in (*SPATIAL, "mirror", *INTENSITY) if getattr(chosen, name) > 0}
    for name, value in options.items():
        readers = {*_READERS.get(name, [_owner(name)])} - {None}
        if name not in readers and value != known[name] and readers and not readers & occur:
            raise ValueError(
                f"{name}={value!r}: nothing reads it, as the probability of {' and '.join(sorted(readers))} is 0; "
                f"accepted then: {known[name]!r}"
            )
    return chosen


def _owner(option: str) -> str | None:
    """The transform that an option belongs to."""
    special = {"gibbs": "gibbs_ringing", "bias": "bias_field"} | dict.fromkeys(("window", *_READERS))
    if option in special:
        return special[option]
    return next(name for name in (*SPATIAL, *INTENSITY, "mirror") if option == name or option.startswith(f"{name}_"))


def _check_patch(patch_size: Sequence[int]) -> tuple[int, int, int]:
    sides = tuple(patch_size)
    if len(sides) != 3 or not all(int(side) == side and side >= 1 for side in sides):
        raise ValueError(f"patch_size={patch_size!r}: expected three whole numbers >= 1, in voxels")
    return tuple(int(side) for side in sides)


def _select(name: str, gate: np.ndarray, values: dict[str, np.ndarray], masked: bool) -> dict[str, np.ndarray]:
    """The part of a packet that one transform reads."""
    if masked:
        return {f"{name}.gate": gate} | {f"{name}.{key}": value for key, value in values.items()}
    rows = np.flatnonzero(gate)
    if len(rows) == 0:
        return {}
    return {f"{name}.rows": rows} | {f"{name}.{key}": value[rows] for key, value in values.items()}


def _send(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """Arrays of numbers as tensors on the device (float64, int64 or bool), through one buffer and one transfer."""
    if not arrays:
        return {}
    words = [np.asarray(a, dtype=np.float64 if a.dtype.kind == "f" else np.int64).ravel() for a in arrays.values()]
    buffer = torch.from_numpy(np.concatenate([np.ascontiguousarray(word).view(np.int64) for word in words]))
    if device.type == "cuda":
        buffer = buffer.pin_memory().to(device, non_blocking=True)
    tensors, start = {}, 0
    for name, array in arrays.items():
        part = buffer[start : start + array.size]
        start += array.size
        part = part.view(torch.float64) if array.dtype.kind == "f" else part != 0 if array.dtype.kind == "b" else part
        tensors[name] = part.view(array.shape)
    return tensors


def _active(name: str, packed: dict[str, torch.Tensor]) -> bool:
    return f"{name}.rows" in packed or f"{name}.gate" in packed


def _take(x: torch.Tensor, name: str, packed: dict[str, torch.Tensor]) -> torch.Tensor:
    """The samples that a transform works on."""
    rows = packed.get(f"{name}.rows")
    return x if rows is None or len(rows) == len(x) else x.index_select(0, rows)


def _put(x: torch.Tensor, result: torch.Tensor, name: str, packed: dict[str, torch.Tensor]) -> torch.Tensor:
    """The samples with their results in place; x is overwritten in compact mode."""
    rows = packed.get(f"{name}.rows")
    if rows is not None:
        return result if len(rows) == len(x) else x.index_copy_(0, rows, result)
    return torch.where(packed[f"{name}.gate"].view(-1, *(1,) * (x.ndim - 1)), result, x)


def _copy(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous copy in new memory."""
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)
