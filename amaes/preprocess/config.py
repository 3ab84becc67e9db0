"""The settings of preprocessing: all that the arrays of a store depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

CASE_FORMAT = "amaes-preproc-1"  # of the properties of a case; a new one where the same settings give other arrays
STORE_FORMAT = "amaes-store-1"  # of a store's dataset.json
PLACEHOLDER = re.compile(r"label_\d+")  # the name of a label value that has none
CHOICES = {
    "normalization": ("unit", "zscore", "none"),
    "crop_from": ("union", "first"),
    "label_resampling": ("nearest", "onehot_linear"),
    "missing_channel": ("error", "zeros"),
    "on_geometry_mismatch": ("reject", "resample"),
    "nan_background": ("reject", "zero"),
    "dtype": ("float32", "float16"),
}
IGNORED = 255  # stored label of voxels that take part in no loss and no score
SPACING = (0.01, 100.0)  # mm, of the arrays
MIN_AXIS = (1, 4096)  # voxels
ADDED = {"nan_background": "reject"}  # settings that came later, and the value at which the arrays are as before


@dataclass(frozen=True)
class Config:
    """Everything the arrays depend on, and `verify`.

    Attributes:
        spacing: voxel size of the arrays, mm.
        normalization: "unit" = [0, 1], which the networks here expect; "zscore"; "none".
        crop_from: crop to the box around the foreground of all channels ("union") or of the first channel ("first").
        crop_extra_plane: one plane more at the upper end of each axis, as in the published pipeline.
        label_resampling: "nearest" or "onehot_linear".
        missing_channel: "error" rejects a case that lacks a channel; "zeros" fills the channel with zeros.
        on_geometry_mismatch: "reject", or "resample" channels and label onto the grid of the first channel.
        nan_background: "reject" a file with many NaN voxels, or take every NaN as "zero".
        background_to_min: in an image with negative values, set the most frequent value to the minimum.
        strict_orientation: refuse files whose sform and qform codes are both 0.
        assume_ras: take the stored axes as RAS where the affine is singular.
        min_axis: fewest voxels of a stored axis.
        verify: check the CRC of gzip files, and the size of a voxel, which a header says twice; not part of the hash,
            as it changes no array.
        dtype: of the stored images.
        label_map: old label value to new; IGNORED = left out of losses and scores. The index of a store also lists, as
            {1: 1}, values of its label files that other values were mapped onto; such entries are not part of the hash.
    """

    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    normalization: str = "unit"
    crop_from: str = "union"
    crop_extra_plane: bool = False
    label_resampling: str = "nearest"
    missing_channel: str = "error"
    on_geometry_mismatch: str = "reject"
    nan_background: str = "reject"
    background_to_min: bool = False
    strict_orientation: bool = False
    assume_ras: bool = False
    min_axis: int = 3
    verify: bool = False
    dtype: str = "float32"
    label_map: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, accepted in CHOICES.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"`{name}` {getattr(self, name)!r:.80} is unknown; choose from {', '.join(accepted)}")
        for item in dataclasses.fields(self):
            if item.type == "bool" and not isinstance(getattr(self, item.name), bool):
                raise ValueError(f"`{item.name}` must be true or false, found {getattr(self, item.name)!r:.80}")
        low, high = SPACING
        if len(self.spacing) != 3 or not all(_is_number(value) and low <= value <= high for value in self.spacing):
            raise ValueError(f"`spacing` must be three lengths of {low:g} to {high:g} mm, found {self.spacing!r:.80}")
        low, high = MIN_AXIS
        if type(self.min_axis) is not int or not low <= self.min_axis <= high:
            raise ValueError(f"`min_axis` must be a whole number from {low} to {high}, found {self.min_axis!r:.80}")
        pairs = [*self.label_map, *self.label_map.values()]
        if not all(type(value) is int for value in pairs) or not all(0 <= v <= 255 for v in self.label_map.values()):
            raise ValueError(f"`label_map` must lead to values in 0..255, found {self.label_map!r:.80}")

    @property
    def ignores(self) -> bool:
        """Voxels of some label values are left out."""
        return IGNORED in self.label_map.values()

    def as_dict(self) -> dict:
        """Plain data that JSON does not change."""
        plain = dataclasses.asdict(self)
        labels = {str(old): new for old, new in sorted(self.label_map.items())}
        return {**plain, "spacing": [float(value) for value in self.spacing], "label_map": labels}

    @classmethod
    def from_dict(cls, content: Mapping) -> Config:
        """The inverse of `as_dict`; a ValueError names a field that is unknown, or has an impossible value."""
        if not isinstance(content, Mapping):
            raise ValueError(f"preprocessing configuration: expected an object, found {content!r:.80}")
        if unknown := sorted(set(content) - {item.name for item in dataclasses.fields(cls)}):
            raise ValueError(f"preprocessing configuration: unknown field {', '.join(unknown):.80}")
        content = dict(content)
        if "spacing" in content:
            content["spacing"] = tuple(content["spacing"] if isinstance(content["spacing"], Sequence) else ())
        labels = content.get("label_map", {})
        if not isinstance(labels, Mapping) or not all(re.fullmatch(r"-?\d{1,19}", str(old)) for old in labels):
            raise ValueError(f"preprocessing configuration: `label_map` must map label values, found {labels!r:.80}")
        content["label_map"] = {int(old): new for old, new in labels.items()}
        return cls(**content)

    def settings(self) -> dict:
        """What the arrays depend on, as plain data."""
        changes = {str(old): new for old, new in sorted(self.label_map.items()) if old != new}
        return {name: value for name, value in (self.as_dict() | {"label_map": changes}).items() if name != "verify"}

    def with_values(self, raw: Iterable[int]) -> Config:
        """The same, with those values of the label files listed that others are mapped onto."""
        targets = {value: value for value in sorted(raw) if value in self.label_map.values()}
        return dataclasses.replace(self, label_map={**targets, **self.label_map})

    def hash(self) -> str:
        """16 hexadecimal digits that differ where arrays may differ."""
        settings = {name: value for name, value in self.settings().items() if ADDED.get(name, "") != value}
        text = json.dumps([CASE_FORMAT, settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
