"""What an augmentation draws: its options, and one row of numbers per sample."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from amaes import rng

SPATIAL = ("rotation", "scale", "elastic")
INTENSITY = (
    "additive_noise",
    "blur",
    "multiplicative_noise",
    "ghosting",
    "gibbs_ringing",
    "low_resolution",
    "bias_field",
    "gamma",
)
CHOICES = {
    "order": (1, 3),
    "window": ("parity", "official", "none"),
    "gibbs": ("scaled", "absolute"),
    "bias": ("official", "exp"),
}


@dataclass(frozen=True)
class Options:
    """Options of the augmentation; what belongs to a transform starts with its name (`gibbs`, `bias`: a part of it).

    The bare name is the probability of the transform per sample (noise, ghosting, Gibbs ringing, bias field: per sample
    and channel), a pair is the range of a uniform draw. Defaults: Llambias et al. 2024, Table 5, and the published
    code where the table is silent.
    """

    order: int = 1  # interpolation of images: 1 trilinear, 3 cubic B-spline (published code)
    window: str = "parity"  # see spatial.window_size
    fill: str | float = "min"  # value outside the window: "min" of the window, or a number; labels: 0
    clip: bool = True  # after every stage, to the range of its input
    rotation: float = 0.2
    rotation_axis: float = 0.66  # probability of each axis, given a rotation
    rotation_degrees: tuple[float, float] = (-30.0, 30.0)
    scale: float = 0.2
    scale_factor: tuple[float, float] = (0.9, 1.1)  # of the sampling coordinates: < 1 magnifies
    elastic: float = 0.33
    elastic_alpha: tuple[float, float] = (200.0, 600.0)  # voxels
    elastic_sigma: tuple[float, float] = (20.0, 30.0)  # voxels
    mirror: float = 0.0
    mirror_axis: float = 0.33
    additive_noise: float = 0.2
    additive_noise_sigma: tuple[float, float] = (1e-4, 1e-3)
    blur: float = 0.2
    blur_channel: float = 0.5  # probability of each channel, given a blur
    blur_sigma: tuple[float, float] = (0.0, 1.0)  # voxels
    multiplicative_noise: float = 0.2
    multiplicative_noise_sigma: tuple[float, float] = (1e-4, 1e-3)
    ghosting: float = 0.2
    ghosting_alpha: tuple[float, float] = (0.85, 0.95)
    ghosting_repetitions: tuple[int, int] = (2, 10)  # both included; the paper prints (2, 11)
    gibbs_ringing: float = 0.2
    gibbs: str = "scaled"  # lines kept: "scaled" 0.75 n ... n, "absolute" 96 ... 128 (published code)
    low_resolution: float = 0.2
    low_resolution_channel: float = 0.5
    low_resolution_axis: float = 0.33
    low_resolution_zoom: tuple[float, float] = (0.5, 1.0)
    bias_field: float = 0.33
    bias: str = "official"  # "exp": always positive
    gamma: float = 0.2
    gamma_inversion: float = 0.05  # given gamma; the paper's 0.01 is the unconditional rate
    gamma_low: tuple[float, float] = (0.5, 1.0)  # half of the draws
    gamma_high: tuple[float, float] = (1.0, 2.0)  # the other half

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(field.name, getattr(self, field.name), field.default)


_LIMITS = {  # what a range may span; the others only have to be finite and ordered
    "scale_factor": (0.01, 100.0),
    "elastic_sigma": (0.1, 1e3),
    "elastic_alpha": (0.0, 1e6),
    "additive_noise_sigma": (0.0, 1e3),
    "blur_sigma": (0.0, 16.0),
    "multiplicative_noise_sigma": (0.0, 1e3),
    "ghosting_alpha": (0.0, 1.0),
    "ghosting_repetitions": (1, 10**6),
    "low_resolution_zoom": (0.05, 1.0),
    "gamma_low": (0.01, 100.0),
    "gamma_high": (0.01, 100.0),
}


def _check(name: str, value, default) -> None:
    if name in CHOICES:
        accepted, valid = ", ".join(map(repr, CHOICES[name])), value in CHOICES[name]
    elif isinstance(default, bool):
        accepted, valid = "True, False", isinstance(value, bool)
    elif name == "fill":
        accepted, valid = "'min' or a finite number", value == "min" or _is_number(value)
    elif isinstance(default, tuple):
        low, high = _LIMITS.get(name, (-1e6, 1e6))
        whole = " whole" if isinstance(default[0], int) else ""
        accepted = f"a pair of{whole} numbers, low <= high, in [{low:g}, {high:g}]"
        valid = isinstance(value, Sequence) and len(value) == 2 and all(map(_is_number, value))
        valid = valid and low <= value[0] <= value[1] <= high and (not whole or all(v == int(v) for v in value))
    else:
        accepted, valid = "a probability in [0, 1]", _is_number(value) and 0 <= value <= 1
    if not valid:
        raise ValueError(f"{name}={value!r}: expected {accepted}")


def _is_number(value) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and np.isfinite(value)


@dataclass(frozen=True)
class Draws:
    """One row per sample, on the host. A bare name is the gate; parameters are drawn whether the gate is on or not.

    Shapes: (B,) or (B, 3 axes) for spatial transforms, (B, C) or (B, C, 3 axes) for the others.
    """

    elastic: np.ndarray
    elastic_sigma: np.ndarray  # voxels
    elastic_alpha: np.ndarray  # voxels
    elastic_key: np.ndarray  # of the coefficients of the field
    rotation: np.ndarray
    rotation_degrees: np.ndarray  # (B, 3), 0 for an axis that was not chosen
    scale: np.ndarray
    scale_factor: np.ndarray
    mirror: np.ndarray  # (B, 3)
    additive_noise: np.ndarray
    additive_noise_sigma: np.ndarray
    additive_noise_key: np.ndarray
    blur: np.ndarray
    blur_sigma: np.ndarray  # voxels
    multiplicative_noise: np.ndarray
    multiplicative_noise_sigma: np.ndarray
    multiplicative_noise_key: np.ndarray
    ghosting: np.ndarray
    ghosting_alpha: np.ndarray
    ghosting_repetitions: np.ndarray
    ghosting_axis: np.ndarray
    gibbs_ringing: np.ndarray
    gibbs_ringing_lines: np.ndarray
    gibbs_ringing_axis: np.ndarray
    low_resolution: np.ndarray
    low_resolution_lengths: np.ndarray  # (B, C, 3), voxels; the side of the patch for an axis that was not chosen
    bias_field: np.ndarray
    bias_field_centre: np.ndarray  # (B, C, 3), voxels
    gamma: np.ndarray
    gamma_value: np.ndarray
    gamma_inversion: np.ndarray

    def __len__(self) -> int:
        return len(self.elastic)

    def __getitem__(self, rows) -> Draws:
        """The draws of some samples: a slice or a list of indices."""
        return Draws(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def only(self, *names: str) -> Draws:
        """The same parameters with the gates of these transforms on for every sample and all other gates off."""
        gates = {name: np.full_like(getattr(self, name), name in names) for name in (*SPATIAL, "mirror", *INTENSITY)}
        return replace(self, **gates)

    def as_dict(self) -> dict[str, list]:
        """Plain lists, ready for JSON."""
        return {field.name: getattr(self, field.name).tolist() for field in fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, list]) -> Draws:
        """The draws that `as_dict` wrote."""
        return cls(**{field.name: np.asarray(values[field.name]) for field in fields(cls)})

    def summary(self, sample: int) -> str:
        """The transforms that are on for one sample (channel 0), with their parameters."""
        parts = []
        for name in (*SPATIAL, "mirror", *INTENSITY):
            if not np.any(_first_channel(getattr(self, name)[sample], name)):
                continue
            values = [
                f"{field.name[len(name) + 1 :]} {_show(_first_channel(getattr(self, field.name)[sample], name))}"
                for field in fields(self)
                if field.name.startswith(f"{name}_") and not field.name.endswith("_key")
            ]
            parts.append(f"{name} ({', '.join(values)})" if values else f"{name} {_show(self.mirror[sample])}")
        return "; ".join(parts) or "nothing"


def _first_channel(value: np.ndarray, name: str) -> np.ndarray:
    return value if name in SPATIAL or name == "mirror" else value[0]


def _show(value: np.ndarray) -> str:
    return " ".join(f"{v:.4g}" for v in np.atleast_1d(value))


def check_reach(draws: Draws, options: Options, patch_size: Sequence[int]) -> None:
    """Refuse draws of other options where the kernels and tables made for these would be cut off or missing.

    Raises:
        ValueError: names the field, its value and the range.
    """
    sides = np.asarray(patch_size)
    shortest = np.maximum(np.rint(sides * options.low_resolution_zoom[0]), 1).astype(np.int64)
    reach = {
        ("elastic", "elastic_sigma"): options.elastic_sigma,
        ("blur", "blur_sigma"): (0.0, options.blur_sigma[1]),
        ("low_resolution", "low_resolution_lengths"): (shortest, sides),
    }
    for (name, field), (low, high) in reach.items():
        values = getattr(draws, field)[getattr(draws, name)]
        outside = (values < low) | (values > high)
        if getattr(options, name) > 0 and outside.any():
            found = values[outside][0]
            raise ValueError(f"draws: {field} {found:g}, expected {low} to {high}, what these options can draw")


class _Uniforms:
    """Columns of a table of uniform numbers, used up from left to right."""

    def __init__(self, table: np.ndarray) -> None:
        self.table, self.used = table, 0

    def take(self, count: int | None = None) -> np.ndarray:
        """The next column, or the next `count` columns with an axis of their own at the end."""
        start, self.used = self.used, self.used + (count or 1)
        return self.table[..., start] if count is None else self.table[..., start : self.used]

    def between(self, bounds: tuple[float, float], count: int | None = None) -> np.ndarray:
        low, high = bounds
        return low + (high - low) * self.take(count)

    def integer(self, low: np.ndarray | int, high: np.ndarray | int, count: int | None = None) -> np.ndarray:
        """Uniform over low, ..., high."""
        span = np.asarray(high) - low + 1
        return low + np.minimum(np.floor(self.take(count) * span).astype(np.int64), span - 1)


_SAMPLE_COLUMNS, _CHANNEL_COLUMNS = 21, 23  # counted by `draw`; fixed, so that no option moves another's numbers


def draw(
    options: Options, patch_size: Sequence[int], seed: int, epochs: Iterable[int], samples: Iterable[int], channels: int
) -> Draws:
    """Draw the parameters of a batch; each row is a function of (seed, epoch, sample) alone.

    Args:
        epochs: pass over the data of each sample, (B,).
        samples: index of the case of each sample, (B,).
        channels: channels of the image.
    """
    epochs, samples = [int(epoch) for epoch in epochs], [int(sample) for sample in samples]
    if len(epochs) != len(samples) or not epochs:
        raise ValueError(
            f"{len(epochs)} epochs and {len(samples)} samples: expected one of each per sample of the batch"
        )
    streams = [rng.stream(seed, epoch, sample, "augment") for epoch, sample in zip(epochs, samples, strict=True)]
    b = _Uniforms(np.stack([stream.random(_SAMPLE_COLUMNS) for stream in streams]))  # (B, columns)
    c = _Uniforms(np.stack([stream.random((channels, _CHANNEL_COLUMNS)) for stream in streams]))  # (B, C, columns)

    def keys(purpose: str) -> np.ndarray:
        return rng.keys(seed, epochs, samples, f"augment/{purpose}").numpy()

    def channel_keys(purpose: str) -> np.ndarray:
        return np.stack([keys(f"{purpose}/{channel}") for channel in range(channels)], axis=1)

    values = _draw_spatial(b, options) | {"elastic_key": keys("elastic")}
    values |= _draw_intensity(b, c, options, np.asarray(patch_size))
    values |= {f"{name}_key": channel_keys(name) for name in ("additive_noise", "multiplicative_noise")}
    assert (b.used, c.used) == (_SAMPLE_COLUMNS, _CHANNEL_COLUMNS)
    return Draws(**values)


def _draw_spatial(b: _Uniforms, o: Options) -> dict[str, np.ndarray]:
    v = {"elastic": b.take() < o.elastic}
    v["elastic_sigma"] = b.between(o.elastic_sigma)
    v["elastic_alpha"] = b.between(o.elastic_alpha)
    v["rotation"] = b.take() < o.rotation
    chosen = b.take(3) < o.rotation_axis
    v["rotation_degrees"] = np.where(chosen, b.between(o.rotation_degrees, 3), 0.0)
    v["scale"] = b.take() < o.scale
    v["scale_factor"] = b.between(o.scale_factor)
    gate = b.take() < o.mirror
    v["mirror"] = gate[:, None] & (b.take(3) < o.mirror_axis)
    return v


def _draw_intensity(b: _Uniforms, c: _Uniforms, o: Options, sides: np.ndarray) -> dict[str, np.ndarray]:
    def per_channel(column: np.ndarray) -> np.ndarray:
        return np.repeat(column[:, None], c.table.shape[1], axis=1)

    v = {"additive_noise": c.take() < o.additive_noise}
    v["additive_noise_sigma"] = c.between(o.additive_noise_sigma)
    v["blur"] = per_channel(b.take() < o.blur) & (c.take() < o.blur_channel)
    v["blur_sigma"] = per_channel(b.between(o.blur_sigma))
    v["multiplicative_noise"] = c.take() < o.multiplicative_noise
    v["multiplicative_noise_sigma"] = c.between(o.multiplicative_noise_sigma)
    v["ghosting"] = c.take() < o.ghosting
    v["ghosting_alpha"] = c.between(o.ghosting_alpha)
    v["ghosting_repetitions"] = c.integer(*map(int, o.ghosting_repetitions))
    v["ghosting_axis"] = c.integer(0, 2)
    v["gibbs_ringing"] = c.take() < o.gibbs_ringing
    line, axis = c.take(), c.integer(0, 2)
    v["gibbs_ringing_lines"], v["gibbs_ringing_axis"] = _kept_lines(line, sides[axis], o.gibbs), axis
    v["low_resolution"] = per_channel(b.take() < o.low_resolution) & (c.take() < o.low_resolution_channel)
    zoom = c.between(o.low_resolution_zoom)[..., None]
    shorter = np.maximum(np.rint(sides * zoom).astype(np.int64), 1)  # rint: halves to even
    v["low_resolution_lengths"] = np.where(c.take(3) < o.low_resolution_axis, shorter, sides)
    v["bias_field"] = c.take() < o.bias_field
    v["bias_field_centre"] = c.integer(0, sides - 1, 3)
    v["gamma"] = per_channel(b.take() < o.gamma)
    v["gamma_inversion"] = per_channel(b.take() < o.gamma_inversion)
    low, u = c.take() < 0.5, c.take()
    spans = [bounds[0] + (bounds[1] - bounds[0]) * u for bounds in (o.gamma_low, o.gamma_high)]
    v["gamma_value"] = np.where(low, *spans)
    return v


def _kept_lines(u: np.ndarray, side: np.ndarray, lines: str) -> np.ndarray:
    low, high = (np.rint(0.75 * side).astype(np.int64), side) if lines == "scaled" else (np.int64(96), np.int64(128))
    return low + np.minimum(np.floor(u * (high - low + 1)).astype(np.int64), high - low)
