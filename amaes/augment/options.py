"""Options of the augmentation: probabilities and ranges of every transform, and the presets that choose transforms.

`Options` holds the values, `preset_options` puts together those of a preset. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real

from amaes.choices import WINDOWS

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
TRANSFORMS = (*SPATIAL, "mirror", *INTENSITY)  # mirror is in no preset: a probability switches it on
PRETRAIN_PRESETS = {"all": (*SPATIAL, *INTENSITY), "spatial": SPATIAL, "none": ()}
FINETUNE_PRESETS = {"all": (*SPATIAL, *INTENSITY), "spatial": ("rotation", "scale"), "none": ()}
CHOICES = {"order": (1, 3), "window": WINDOWS, "gibbs": ("scaled", "absolute"), "bias": ("official", "exp")}


@dataclass(frozen=True)
class Options:
    """Options of the augmentation. The name of an option starts with its transform; `gibbs` and `bias` are short forms.

    The option with the bare name of a transform is its probability, per sample (noise, ghosting, Gibbs ringing and bias
    field: per sample and channel). A pair is the range of a uniform draw. Defaults: Llambias et al. 2024, Table 5, and
    the published code where the table says nothing.

    Raises:
        ValueError: names the option, its value and what is accepted.
    """

    order: int = 1  # interpolation of images: 1 trilinear, 3 cubic B-spline (published code)
    window: str = "parity"  # margin that is read around the patch, see spatial.window_size
    fill: str | float = "min"  # value outside the window: "min" of the window, or a number; labels: 0
    clip: bool = True  # after every transform, to the range of its input
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
    bias: str = "official"  # as in the published code; "exp": always positive
    gamma: float = 0.2
    gamma_inversion: float = 0.05  # given gamma; the paper's 0.01 is the unconditional rate
    gamma_low: tuple[float, float] = (0.5, 1.0)  # half of the draws
    gamma_high: tuple[float, float] = (1.0, 2.0)  # the other half

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(field.name, getattr(self, field.name), field.default)


_LIMITS = {  # of a range; any other range only has to be finite and ordered
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
FILL = 1e6  # the largest value outside the window
# The transforms that read an option whose name does not start with theirs.
_READERS = {
    "order": SPATIAL,
    "fill": SPATIAL,
    "clip": (*SPATIAL, *INTENSITY),
    "gibbs": ("gibbs_ringing",),
    "bias": ("bias_field",),
}


def preset_options(defaults: Options, preset: str, transforms: Sequence[str], changes: Mapping[str, object]) -> Options:
    """The options of a preset with some values changed.

    Args:
        defaults: options of the caller, before any change.
        preset: its name, for the errors.
        transforms: those of the preset; all others get probability 0.
        changes: values by name of the option.

    Raises:
        ValueError: no such option, a value that is not accepted, or a changed value that no transform would read.
    """
    known = {field.name: getattr(defaults, field.name) for field in fields(defaults)}
    for name, value in changes.items():
        if name not in known:
            raise ValueError(f"{name}={value!r}: no such option; accepted: {', '.join(known)}")
        transform = _transform_of(name)
        in_preset = transform is None or transform in transforms or (transform == "mirror" and transforms)
        if not in_preset and value != known[name]:
            accepted = ", ".join(transforms) or "none"
            raise ValueError(f"{name}={value!r}: the preset {preset!r} has no {transform}; accepted: {accepted}")
    off = {name: 0.0 for name in (*SPATIAL, *INTENSITY) if name not in transforms}
    options = replace(defaults, **{**changes, **off})
    for name, value in changes.items():
        readers = _readers(name)
        unread = readers and name not in readers and all(getattr(options, reader) == 0 for reader in readers)
        if unread and value != known[name]:
            raise ValueError(
                f"{name}={value!r}: nothing reads it, as the probability of {' and '.join(sorted(readers))} is 0; "
                f"accepted then: {known[name]!r}"
            )
    return options


def _readers(option: str) -> Sequence[str]:
    """The transforms that read an option; none for `window`, which is also accepted where nothing moves."""
    transform = _transform_of(option)
    return _READERS.get(option, () if transform is None else (transform,))


def _transform_of(option: str) -> str | None:
    """The one transform that an option belongs to."""
    if option == "window":
        return None
    if option in _READERS:
        return _READERS[option][0] if len(_READERS[option]) == 1 else None
    return next(name for name in TRANSFORMS if option == name or option.startswith(f"{name}_"))


def _check(name: str, value: object, default: object) -> None:
    """Refuse a value that the option does not accept; the kind of its default says what it is."""
    if name in CHOICES:
        accepted, valid = ", ".join(map(repr, CHOICES[name])), value in CHOICES[name]
    elif isinstance(default, bool):
        accepted, valid = "True, False", isinstance(value, bool)
    elif name == "fill":
        accepted, valid = (
            f"'min' or a number in [{-FILL:g}, {FILL:g}]",
            value == "min" or (_is_number(value) and abs(value) <= FILL),
        )
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


def _is_number(value: object) -> bool:
    """A finite real number, of Python or NumPy."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
