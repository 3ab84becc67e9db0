"""From NIfTI files to arrays: turn to RAS, crop to the foreground, scale to [0, 1], resample to 1 mm.

    python -m amaes.preprocess --images DIR [--labels DIR] --out STORE
    python -m amaes.preprocess --source NAME=DIR [--source NAME=DIR ...] --out STORE

The order is that of the published pipeline (Munk et al. 2024, arXiv 2408.00640): crop, then intensities, then spacing.
`preprocess_case` does one case and writes nothing; `amaes.preprocess.write_store` does a folder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from amaes.cli import run
from amaes.preprocess import normalize, resample
from amaes.preprocess.config import FORMAT, Config
from amaes.preprocess.nifti import Header, RejectedInput
from amaes.preprocess.read_case import Channel, check_corpus, read_channels, read_label

MAX_SIDE, MAX_VOXELS = 1024, 512**3  # voxels after resampling
HINTS = {  # reason or warning: the option of this program that helps
    "singular_affine": "--assume-ras takes the stored axes as RAS",
    "label_values": "see --label-map",
    "channel_geometry": "see --on-geometry-mismatch",
    "label_geometry": "see --on-geometry-mismatch",
    "missing_channel": "--missing-channel zeros fills",
    "background_not_min": "see --background-to-min",
    "overflow": "--dtype float32 holds them",
}


def hinted(code: str, message: str) -> str:
    """The message of a reason or warning, with the option that helps."""
    return f"{message}; {HINTS[code]}" if code in HINTS else message


@dataclass(frozen=True)
class Case:
    """A preprocessed case.

    Attributes:
        image: (C, X, Y, Z) float32, RAS+.
        label: (X, Y, Z) uint8, or None.
        properties: plain data: the file's geometry, crop, shapes and statistics; what the way back needs.
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
) -> Case:
    """Read, check, turn, crop, scale and resample one case.

    Args:
        images: one file per channel (None = missing, allowed with missing_channel "zeros"), or one 4-D file where
            `channels` names several.
        config: how.
        label: label file, or None.
        case_id: goes into the properties.
        channels: names; by default image, or channel_0, channel_1, ...
        classes: accepted label values, those of the file; empty = 0..255.
        volumes: which volume of a 4-D file each channel is; None = in the order of the channels.
        volumes_in_file: how many a 4-D file has; None = one per channel.
        corpus_filter: refuse what the published corpus does not take from its large sources, as "corpus_filter".

    Raises:
        RejectedInput: the case cannot be used; `code` is the reason.
    """
    names = list(channels) or (["image"] if len(images) == 1 else [f"channel_{k}" for k in range(len(images))])
    paths = [None if path is None else Path(path) for path in images]
    how, warnings = config.reading(), []
    members = read_channels(_checked(paths, names, config), volumes_in_file or len(names), how, warnings, volumes)
    for member in members if corpus_filter else ():
        if member is not None:
            check_corpus(member)
    first = next(member.header for member in members if member is not None)
    box = _crop_box(members, config)
    crop = tuple(slice(start, stop) for start, stop in box)
    cropped = [stop - start for start, stop in box]
    shape = resample.target_shape(cropped, first.ras_spacing, config.spacing)
    if max(shape) > MAX_SIDE or math.prod(shape) > MAX_VOXELS:
        limit = f"at most {MAX_SIDE} voxels per axis and {MAX_VOXELS} in all after resampling"
        raise RejectedInput("implausible_spacing", first.path, f"expected {limit}, found {' x '.join(map(str, shape))}")
    target, facts = None, _label_facts(None, [], crop, first.path, warnings)
    if label is not None:  # before the images' arithmetic, which a bad label would waste
        whole, values = read_label(Path(label), first, classes, config.label_map, how, warnings)
        facts = _label_facts(whole, values, crop, Path(label), warnings)
        target = resample.resample_labels(whole[crop], shape, config.label_resampling)
    image = np.zeros((len(names), *shape), dtype=np.float32)
    intensity = []
    for k, member in enumerate(members):
        if member is not None:
            image[k], statistics = _scaled(member, crop, shape, config, warnings)
        intensity.append(None if member is None else statistics)
    properties = {
        "format": FORMAT,
        "id": case_id,
        "source_files": [None if path is None else str(path) for path in images],
        "label_file": None if label is None else str(Path(label).absolute()),  # found from any working folder
        "channels": names,
        **_geometry(first),
        "crop_box": box,
        "cropped_shape": cropped,
        "target_spacing": [float(value) for value in config.spacing],
        "resampled_shape": list(shape),
        "intensity": intensity,
        **facts,
        "warnings": warnings,
        "config_hash": config.hash(),
    }
    return Case(image, target, properties)


def _checked(paths: list[Path | None], names: Sequence[str], config: Config) -> list[Path | None]:
    present = [path for path in paths if path is not None]
    if not present or len(paths) not in (1, len(names)):
        raise ValueError(f"{len(names)} channels ({' '.join(names)}) need as many files or one, found {len(present)}")
    if len(present) < len(paths) and config.missing_channel == "error":
        missing = " ".join(name for name, path in zip(names, paths, strict=True) if path is None)
        raise RejectedInput("missing_channel", present[0], f"expected channels {' '.join(names)}, missing {missing}")
    return paths


def _crop_box(members: Sequence[Channel | None], config: Config) -> list[list[int]]:
    """[[start, stop], ...]: around the foreground of all channels, or of the first."""
    boxes = []
    for member in members:
        if member is None:
            continue
        try:
            boxes.append(normalize.foreground_box(member.volume))
        except normalize.Unusable as error:
            raise RejectedInput(error.code, member.path, str(error)) from error
    used = boxes[:1] if config.crop_from == "first" else boxes
    shape = next(member.volume.shape for member in members if member is not None)
    extra = int(config.crop_extra_plane)
    return [
        [min(box[axis][0] for box in used), min(max(box[axis][1] for box in used) + extra, shape[axis])]
        for axis in range(3)
    ]


def _scaled(
    member: Channel, crop: tuple[slice, ...], shape: Sequence[int], config: Config, warnings: list[str]
) -> tuple[np.ndarray, dict]:
    """Crop, scale and resample one channel; its statistics."""
    volume = member.volume[crop]
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
    result = resample.resample_image(scaled, shape)
    low, high = (0.0, 1.0) if config.normalization == "unit" else (-np.finfo("f4").max, np.finfo("f4").max)
    assert low <= result.min() <= result.max() <= high  # false for NaN as well
    limit = float(np.finfo(config.dtype).max)
    if (extreme := max(-float(result.min()), float(result.max()))) > limit:
        raise RejectedInput(
            "overflow", member.path, f"expected values up to {limit:g} ({config.dtype}), found {extreme:g}"
        )
    return result, {**statistics, "n_nonfinite": member.n_nonfinite}


def _label_facts(
    label: np.ndarray | None, raw: list[int], crop: tuple[slice, ...], path: Path, warnings: list[str]
) -> dict:
    """What is in a label, and in its file before mapping; all empty without one."""
    if label is None:
        return {"raw_label_values": [], "label_values": [], "label_counts": {}, "label_voxels_outside_crop": 0}
    counts = np.bincount(label.ravel())
    outside = int(counts[1:].sum()) - int(np.count_nonzero(label[crop]))
    if outside:
        warnings.append(
            f"label_outside_crop: {path.name}: {outside} label voxels lie outside the image's foreground box"
        )
    values = [int(value) for value in np.flatnonzero(counts)]
    return {
        "raw_label_values": raw,
        "label_values": values,
        "label_counts": {str(value): int(counts[value]) for value in values if value},
        "label_voxels_outside_crop": outside,
    }


def _geometry(header: Header) -> dict:
    """What the way back to the file's grid needs."""
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


if __name__ == "__main__":
    from amaes.preprocess.__main__ import (
        main as imported,  # not this copy: classes of worker processes must be the same
    )

    run(imported)
