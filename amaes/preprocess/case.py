"""One case, from NIfTI files to arrays: turn to RAS, crop to the foreground, scale to [0, 1], resample to 1 mm.

The order is that of the published pipeline (Munk et al. 2024, arXiv 2408.00640): crop, then intensities, then spacing.
`preprocess_case` does one case and writes nothing; `amaes.preprocess.write_store` does a folder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from amaes.preprocess import normalize, resample
from amaes.preprocess.config import CASE_FORMAT, IGNORED, Config
from amaes.preprocess.nifti_header import Header, RejectedInput
from amaes.preprocess.read_case import Channel, channels_of_array, check_corpus, read_channels, read_label

MAX_SIDE, MAX_VOXELS = 1024, 512**3  # voxels after resampling
NO_LABEL = {"raw_label_values": [], "label_values": [], "label_counts": {}, "label_voxels_outside_crop": 0}


@dataclass(frozen=True)
class PreprocessedCase:
    """The arrays of a case.

    Attributes:
        image: (C, X, Y, Z) float32, RAS+.
        label: (X, Y, Z) uint8, or None.
        properties: plain data: geometry of the file, crop, shapes and statistics; `to_stored_axes` and `write_like`
            need it to go back to the file's grid.
    """

    image: np.ndarray
    label: np.ndarray | None
    properties: dict


def preprocess_case(
    images: Sequence[str | Path | None],
    config: Config,
    label: str | Path | None = None,
    *,
    case_id: str = "",
    channels: Sequence[str] = (),
    classes: Sequence[int] = (),
    volumes: Sequence[int] | None = None,
    volumes_in_file: int | None = None,
    corpus_filter: bool = False,
) -> PreprocessedCase:
    """Read, check, turn, crop, scale and resample one case.

    Args:
        images: one file per channel (None = missing, allowed with `missing_channel` "zeros"), or one 4-D file where
            `channels` names several.
        config: the settings.
        label: label file, or None.
        case_id: goes into the properties.
        channels: names; by default image, or channel_0, channel_1, ...
        classes: accepted label values of the file; empty = 0..255.
        volumes: which volume of a 4-D file each channel is; None = in the order of the channels.
        volumes_in_file: number of volumes of a 4-D file; None = one per channel.
        corpus_filter: refuse, with the code "corpus_filter", what the published corpus does not take.

    Raises:
        RejectedInput: the case cannot be used; `code` is the reason.
        ValueError: the number of files does not fit that of the channels.
    """
    names = list(channels) or (["image"] if len(images) == 1 else [f"channel_{k}" for k in range(len(images))])
    paths = [None if path is None else Path(path) for path in images]
    _check_channels(paths, names, config)
    warnings: list[str] = []
    members = read_channels(paths, config, warnings, volumes_in_file=volumes_in_file or len(names), volumes=volumes)
    for member in members if corpus_filter else ():
        if member is not None:
            check_corpus(member)
    named = {
        "id": case_id,
        "source_files": [None if path is None else str(path) for path in images],
        "label_file": None if label is None else str(Path(label).absolute()),  # valid in any working folder
        "channels": names,
    }
    return _prepared(members, config, warnings, named, None if label is None else Path(label), classes)


def preprocess_array(
    array: np.ndarray, affine: np.ndarray, config: Config, channels: Sequence[str] = ()
) -> PreprocessedCase:
    """`preprocess_case` of an array in memory instead of files.

    Args:
        array: (C, X, Y, Z), real numbers.
        affine: (4, 4), voxel to RAS+ mm; its axes may point anywhere.
        config: the settings.
        channels: names; by default image, or channel_0, channel_1, ...

    Raises:
        RejectedInput: the case cannot be used; `code` is the reason.
        ValueError: another number of channels, or no four axes.
    """
    array = np.asarray(array)
    names = list(channels) or (["image"] if len(array) == 1 else [f"channel_{k}" for k in range(len(array))])
    if array.ndim != 4 or len(array) != len(names) or array.dtype.kind not in "iufb":
        text = f"expected real numbers ({len(names)}, X, Y, Z), channels {', '.join(names)}"
        raise ValueError(f"`array` is {array.dtype} {array.shape}; {text}")
    warnings: list[str] = []
    members = channels_of_array(array, affine, config, warnings)
    named = {"id": "", "source_files": [], "label_file": None, "channels": names}
    return _prepared(members, config, warnings, named)


def _prepared(
    members: Sequence[Channel | None],
    config: Config,
    warnings: list[str],
    named: dict,
    label: Path | None = None,
    classes: Sequence[int] = (),
) -> PreprocessedCase:
    """The arrays of a case whose channels are read; `named` goes into its properties."""
    grid = _target_grid([member for member in members if member is not None], config)
    target, label_properties = None, dict(NO_LABEL)
    if label is not None:  # before the images are computed, which a bad label would make useless
        target, label_properties = _label_array(label, grid, config, warnings, classes=classes)
    image, intensity = _image_array(members, grid, config, warnings)
    properties = {
        "format": CASE_FORMAT,
        **named,
        **_geometry(grid.header),
        "crop_box": grid.box,
        "cropped_shape": [stop - start for start, stop in grid.box],
        "target_spacing": [float(value) for value in config.spacing],
        "resampled_shape": list(grid.shape),
        "intensity": intensity,
        **label_properties,
        "warnings": warnings,
        "config_hash": config.hash(),
    }
    return PreprocessedCase(image, target, properties)


@dataclass(frozen=True)
class _Grid:
    """Where the arrays lie.

    Attributes:
        header: of the first channel's file, whose grid all channels have.
        box: [[start, stop], ...] of the crop, on that grid.
        shape: of the arrays, after resampling.
    """

    header: Header
    box: list[list[int]]
    shape: tuple[int, int, int]

    @property
    def crop(self) -> tuple[slice, ...]:
        """The box as an index."""
        return tuple(slice(start, stop) for start, stop in self.box)


def _check_channels(paths: list[Path | None], names: Sequence[str], config: Config) -> None:
    present = [path for path in paths if path is not None]
    if not present or len(paths) not in (1, len(names)):
        raise ValueError(f"{len(names)} channels ({' '.join(names)}) need as many files or one, found {len(present)}")
    if len(present) < len(paths) and config.missing_channel == "error":
        missing = " ".join(name for name, path in zip(names, paths, strict=True) if path is None)
        raise RejectedInput("missing_channel", present[0], f"expected channels {' '.join(names)}, missing {missing}")


def _crop_box(members: Sequence[Channel], config: Config) -> list[list[int]]:
    """[[start, stop], ...]: around the foreground of all channels, or of the first."""
    boxes = []
    for member in members:
        try:
            boxes.append(normalize.foreground_box(member.volume))
        except normalize.Unusable as error:
            raise RejectedInput(error.code, member.path, str(error)) from error
    used = boxes[:1] if config.crop_from == "first" else boxes
    shape = members[0].volume.shape
    extra = int(config.crop_extra_plane)
    return [
        [min(box[axis][0] for box in used), min(max(box[axis][1] for box in used) + extra, shape[axis])]
        for axis in range(3)
    ]


def _target_grid(members: Sequence[Channel], config: Config) -> _Grid:
    """The grid of the arrays; refused where it is implausibly large."""
    header, box = members[0].header, _crop_box(members, config)
    cropped = [stop - start for start, stop in box]
    shape = resample.target_shape(cropped, header.ras_spacing, config.spacing)
    if max(shape) > MAX_SIDE or math.prod(shape) > MAX_VOXELS:
        limit = f"at most {MAX_SIDE} voxels per axis and {MAX_VOXELS} in all after resampling"
        text = f"expected {limit}, found {' x '.join(map(str, shape))}"
        raise RejectedInput("implausible_spacing", header.path, text)
    return _Grid(header, box, shape)


def _image_array(
    members: Sequence[Channel | None], grid: _Grid, config: Config, warnings: list[str]
) -> tuple[np.ndarray, list[dict | None]]:
    """(C, X, Y, Z) float32 and the statistics of each channel; zeros and None for a missing one."""
    image = np.zeros((len(members), *grid.shape), dtype=np.float32)
    intensity: list[dict | None] = [None] * len(members)
    for k, member in enumerate(members):
        if member is not None:
            image[k], intensity[k] = _scaled(member, grid, config, warnings)
    return image, intensity


def _scaled(member: Channel, grid: _Grid, config: Config, warnings: list[str]) -> tuple[np.ndarray, dict]:
    """One channel cropped, scaled and resampled, (X, Y, Z) float32, and its statistics."""
    volume = member.volume[grid.crop]
    if volume.min() < 0:
        background = normalize.most_frequent(volume)
        if background != volume.min():
            values = f"most frequent value {background:g}, minimum {volume.min():g}"
            warnings.append(f"background_not_min: {member.path.name}: {values}")
            if config.background_to_min:
                volume = np.where(volume == background, volume.min(), volume)
    try:
        scaled, statistics = normalize.normalize(volume, config.normalization)
    except normalize.Unusable as error:
        raise RejectedInput(error.code, member.path, str(error)) from error
    result = resample.resample_image(scaled, grid.shape)
    low, high = (0.0, 1.0) if config.normalization == "unit" else (-np.finfo("f4").max, np.finfo("f4").max)
    assert low <= result.min() <= result.max() <= high  # also false for NaN
    limit = float(np.finfo(config.dtype).max)
    if (extreme := max(-float(result.min()), float(result.max()))) > limit:
        text = f"expected values up to {limit:g} ({config.dtype}), found {extreme:g}"
        raise RejectedInput("overflow", member.path, text)
    return result, {**statistics, "n_nonfinite": member.n_nonfinite}


def _label_array(
    path: Path, grid: _Grid, config: Config, warnings: list[str], *, classes: Sequence[int]
) -> tuple[np.ndarray, dict]:
    """(X, Y, Z) uint8, and what the label holds: its values before mapping, and after it before it is cropped."""
    label, raw_values = read_label(path, grid.header, config, warnings, classes=classes)
    counts = np.bincount(label.ravel())
    values = [int(value) for value in np.flatnonzero(counts)]
    classes_of = slice(1, IGNORED if config.ignores else None)
    n_outside = int(counts[classes_of].sum() - np.bincount(label[grid.crop].ravel())[classes_of].sum())
    if n_outside:
        text = f"{n_outside} label voxels lie outside the image's foreground box"
        warnings.append(f"label_outside_crop: {path.name}: {text}")
    properties = {
        "raw_label_values": raw_values,
        "label_values": values,
        "label_counts": {str(value): int(counts[value]) for value in values if value},
        "label_voxels_outside_crop": n_outside,
    }
    return resample.resample_labels(label[grid.crop], grid.shape, config.label_resampling), properties


def _geometry(header: Header) -> dict:
    """What is needed to go back to the file's grid, as plain data."""
    affine = [[float(value) if math.isfinite(value) else None for value in row] for row in header.affine]
    return {
        "original_shape": list(header.shape[:3]),
        "original_affine": affine,
        "sform_code": header.sform_code,
        "qform_code": header.qform_code,
        "orientation_trusted": header.trusted,
        "original_orientation": header.orientation,
        "ras_ornt": header.ornt.tolist(),
        "ras_shape": list(header.ras_shape),
        "ras_spacing": list(header.ras_spacing),
        "header": header.fields,
    }
