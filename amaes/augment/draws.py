"""What the augmentation draws: one row of numbers per sample, a function of (seed, epoch, sample) alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from amaes import rng
from amaes.augment.options import SPATIAL, TRANSFORMS, Options


@dataclass(frozen=True)
class Draws:
    """What was drawn for a batch, on the host: one row per sample.

    The field with the bare name of a transform is its gate, bool: whether it is applied. Its parameters are drawn
    whether the gate is on or off. Shapes: (B,) or (B, 3 axes) for rotation, scale, elastic and mirror; (B, C) or
    (B, C, 3 axes) for the other transforms.
    """

    elastic: np.ndarray
    elastic_sigma: np.ndarray  # voxels
    elastic_alpha: np.ndarray  # voxels
    elastic_key: np.ndarray  # of the random coefficients of the field, see amaes.rng
    rotation: np.ndarray
    rotation_degrees: np.ndarray  # (B, 3), 0 for an axis that was not chosen
    scale: np.ndarray
    scale_factor: np.ndarray
    mirror: np.ndarray  # (B, 3)
    additive_noise: np.ndarray
    additive_noise_sigma: np.ndarray
    additive_noise_key: np.ndarray  # of the noise
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

    def __getitem__(self, rows: slice | Sequence[int]) -> Draws:
        """The draws of some samples: a slice or a list of indices."""
        return Draws(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def only(self, *names: str) -> Draws:
        """The same parameters with the gates of these transforms on for every sample and all other gates off."""
        gates = {name: np.full_like(getattr(self, name), name in names) for name in TRANSFORMS}
        return replace(self, **gates)

    def summary(self, sample: int) -> str:
        """The transforms that are on for one sample (channel 0), with their parameters."""
        parts = []
        for name in TRANSFORMS:
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


def check_ranges(draws: Draws, options: Options, patch_size: Sequence[int]) -> None:
    """Refuse draws that these options cannot have made, where tables made for the options would not hold them.

    Raises:
        ValueError: names the field, its value and the range.
    """
    sides = np.asarray(patch_size)
    shortest = np.maximum(np.rint(sides * options.low_resolution_zoom[0]), 1).astype(np.int64)
    ranges = {
        ("elastic", "elastic_sigma"): options.elastic_sigma,
        ("blur", "blur_sigma"): (0.0, options.blur_sigma[1]),
        ("low_resolution", "low_resolution_lengths"): (shortest, sides),
    }
    for (name, field), (low, high) in ranges.items():
        values = getattr(draws, field)[getattr(draws, name)]
        outside = (values < low) | (values > high)
        if getattr(options, name) > 0 and outside.any():
            value = values[outside][0]
            raise ValueError(f"draws: {field} {value:g}, expected {low} to {high}, what these options can draw")


class _Uniforms:
    """Columns of a table of uniform numbers, used up from left to right."""

    def __init__(self, table: np.ndarray) -> None:
        self.table, self.used = table, 0

    def take(self, count: int | None = None) -> np.ndarray:
        """The next column, (...), or the next `count` columns, (..., count)."""
        start, self.used = self.used, self.used + (count or 1)
        return self.table[..., start] if count is None else self.table[..., start : self.used]

    def between(self, bounds: tuple[float, float], count: int | None = None) -> np.ndarray:
        """Uniform over [low, high)."""
        low, high = bounds
        return low + (high - low) * self.take(count)

    def integer(self, low: np.ndarray | int, high: np.ndarray | int, count: int | None = None) -> np.ndarray:
        """Uniform over low, ..., high."""
        return _integer(self.take(count), low, high)


def _integer(uniform: np.ndarray, low: np.ndarray | int, high: np.ndarray | int) -> np.ndarray:
    """Numbers in [0, 1) as whole numbers, uniform over low, ..., high."""
    span = np.asarray(high) - low + 1
    return low + np.minimum(np.floor(uniform * span).astype(np.int64), span - 1)


# Columns that `draw` uses, whatever the options, so that no option moves the numbers of another.
_SAMPLE_COLUMNS, _CHANNEL_COLUMNS = 21, 23


def draw(
    options: Options, patch_size: Sequence[int], seed: int, epochs: Iterable[int], samples: Iterable[int], channels: int
) -> Draws:
    """Draw the parameters of a batch; each row is a function of (seed, epoch, sample) alone.

    Args:
        options: probabilities and ranges.
        patch_size: (X, Y, Z), voxels.
        seed: of the run.
        epochs: pass over the data of each sample, (B,).
        samples: index of the case of each sample, (B,).
        channels: channels of the image.

    Raises:
        ValueError: no sample, or not as many epochs as samples.
    """
    epochs, samples = [int(epoch) for epoch in epochs], [int(sample) for sample in samples]
    if len(epochs) != len(samples) or not epochs:
        raise ValueError(
            f"{len(epochs)} epochs and {len(samples)} samples: expected one of each per sample of the batch"
        )
    streams = [rng.stream(seed, epoch, sample, "augment") for epoch, sample in zip(epochs, samples, strict=True)]
    sample = _Uniforms(np.stack([stream.random(_SAMPLE_COLUMNS) for stream in streams]))  # (B, columns)
    channel = _Uniforms(np.stack([stream.random((channels, _CHANNEL_COLUMNS)) for stream in streams]))  # (B, C, ...)

    def keys(purpose: str) -> np.ndarray:
        return rng.keys(seed, epochs, samples, f"augment/{purpose}").numpy()

    def channel_keys(purpose: str) -> np.ndarray:
        return np.stack([keys(f"{purpose}/{index}") for index in range(channels)], axis=1)

    spatial = _draw_spatial(sample, options)
    intensity = _draw_intensity(sample, channel, options, np.asarray(patch_size))
    assert (sample.used, channel.used) == (_SAMPLE_COLUMNS, _CHANNEL_COLUMNS)
    return Draws(
        **spatial,
        **intensity,
        elastic_key=keys("elastic"),
        additive_noise_key=channel_keys("additive_noise"),
        multiplicative_noise_key=channel_keys("multiplicative_noise"),
    )


def _draw_spatial(sample: _Uniforms, options: Options) -> dict[str, np.ndarray]:
    """Fields of Draws by name. The order of the lines is the order of the columns: a change here changes all draws."""
    drawn = {"elastic": sample.take() < options.elastic}
    drawn["elastic_sigma"] = sample.between(options.elastic_sigma)
    drawn["elastic_alpha"] = sample.between(options.elastic_alpha)
    drawn["rotation"] = sample.take() < options.rotation
    axes = sample.take(3) < options.rotation_axis
    drawn["rotation_degrees"] = np.where(axes, sample.between(options.rotation_degrees, 3), 0.0)
    drawn["scale"] = sample.take() < options.scale
    drawn["scale_factor"] = sample.between(options.scale_factor)
    gate = sample.take() < options.mirror
    drawn["mirror"] = gate[:, None] & (sample.take(3) < options.mirror_axis)
    return drawn


def _draw_intensity(
    sample: _Uniforms, channel: _Uniforms, options: Options, sides: np.ndarray
) -> dict[str, np.ndarray]:
    """Fields of Draws by name. The order of the lines is the order of the columns: a change here changes all draws."""

    def all_channels(column: np.ndarray) -> np.ndarray:
        return np.repeat(column[:, None], channel.table.shape[1], axis=1)

    drawn = {"additive_noise": channel.take() < options.additive_noise}
    drawn["additive_noise_sigma"] = channel.between(options.additive_noise_sigma)
    drawn["blur"] = all_channels(sample.take() < options.blur) & (channel.take() < options.blur_channel)
    drawn["blur_sigma"] = all_channels(sample.between(options.blur_sigma))
    drawn["multiplicative_noise"] = channel.take() < options.multiplicative_noise
    drawn["multiplicative_noise_sigma"] = channel.between(options.multiplicative_noise_sigma)
    drawn["ghosting"] = channel.take() < options.ghosting
    drawn["ghosting_alpha"] = channel.between(options.ghosting_alpha)
    drawn["ghosting_repetitions"] = channel.integer(*map(int, options.ghosting_repetitions))
    drawn["ghosting_axis"] = channel.integer(0, 2)
    drawn["gibbs_ringing"] = channel.take() < options.gibbs_ringing
    lines, axis = channel.take(), channel.integer(0, 2)
    drawn["gibbs_ringing_lines"], drawn["gibbs_ringing_axis"] = _kept_lines(lines, sides[axis], options.gibbs), axis
    gate = all_channels(sample.take() < options.low_resolution)
    drawn["low_resolution"] = gate & (channel.take() < options.low_resolution_channel)
    zoom = channel.between(options.low_resolution_zoom)[..., None]
    shorter = np.maximum(np.rint(sides * zoom).astype(np.int64), 1)  # rint: halves to even
    drawn["low_resolution_lengths"] = np.where(channel.take(3) < options.low_resolution_axis, shorter, sides)
    drawn["bias_field"] = channel.take() < options.bias_field
    drawn["bias_field_centre"] = channel.integer(0, sides - 1, 3)
    drawn["gamma"] = all_channels(sample.take() < options.gamma)
    drawn["gamma_inversion"] = all_channels(sample.take() < options.gamma_inversion)
    is_low, uniform = channel.take() < 0.5, channel.take()
    low, high = (a + (b - a) * uniform for a, b in (options.gamma_low, options.gamma_high))
    drawn["gamma_value"] = np.where(is_low, low, high)
    return drawn


def _kept_lines(uniform: np.ndarray, side: np.ndarray, gibbs: str) -> np.ndarray:
    """How many lines of k-space Gibbs ringing keeps; see `Options.gibbs`."""
    if gibbs == "absolute":
        return _integer(uniform, 96, 128)
    return _integer(uniform, np.rint(0.75 * side).astype(np.int64), side)
