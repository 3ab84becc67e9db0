"""The files of one case on one grid: channels and label read, turned to RAS, mended or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from amaes.preprocess import nifti
from amaes.preprocess.nifti import Header, RejectedInput

NONFINITE_FRACTION = 0.001  # of the voxels, mended up to here
SAME_CORNER = 1e-3  # mm, corners closer than this are the same
INTEGER_TOLERANCE = 1e-3  # a label may differ from an integer by this
CORPUS_MIN_AXIS = 15  # voxels; the published corpus holds no thinner volumes


@dataclass(frozen=True)
class Channel:
    """One channel: (X, Y, Z) float32 in RAS on the grid of `header`, finite; how many voxels were not."""

    path: Path
    header: Header
    volume: np.ndarray
    n_nonfinite: int


@dataclass(frozen=True)
class Reading:
    """How files are read; see `amaes.preprocess.Config`."""

    min_axis: int
    on_geometry_mismatch: str
    options: Mapping  # of nifti.read


def read_channels(
    images: Sequence[Path | None], count: int, how: Reading, warnings: list[str], volumes: Sequence[int] | None = None
) -> list[Channel | None]:
    """One channel per file (None = missing), or those of one 4-D file of `count`; all on the first one's grid.

    Args:
        images: one file per channel, or one file.
        count: volumes of the one file.
        how: of reading.
        warnings: gets what was repaired or assumed.
        volumes: which of the one file, in this order; None = all.

    Raises:
        RejectedInput: any fault of a file, or a grid that differs.
    """
    channels: list[Channel | None] = []
    reference = None
    for path in images:
        if path is None:
            channels.append(None)
            continue
        header, data = nifti.read(path, channels=count if len(images) == 1 else 1, **how.options)
        if min(header.shape[:3]) < how.min_axis:
            found = " x ".join(map(str, header.shape[:3]))
            raise RejectedInput("too_small", path, f"expected at least {how.min_axis} voxels per axis, found {found}")
        warnings += header.warnings
        reference = reference or header
        aligned = _aligned(header, reference, "channel_geometry", how, warnings)
        parts = [data] if data.ndim == 3 else np.moveaxis(data, 3, 0)
        for part in parts if volumes is None else [parts[k] for k in volumes]:
            with np.errstate(over="ignore", invalid="ignore"):  # beyond float32 is infinite, which is counted below
                volume = np.array(part, dtype=np.float32, order="C")
            n_nonfinite = _mend(volume, path, warnings)
            if not aligned:
                volume = _onto(volume, header, reference, order=1, outside=float(volume.min()))
            channels.append(Channel(path, reference, volume, n_nonfinite))
    return channels


def check_corpus(channel: Channel) -> None:
    """What the published corpus takes of its four large sources: 15 voxels per axis or more, no negative value.

    Raises:
        RejectedInput: "corpus_filter", it would not be in there.
    """
    if min(channel.volume.shape) < CORPUS_MIN_AXIS:
        found = " x ".join(map(str, channel.volume.shape))
        text = f"expected at least {CORPUS_MIN_AXIS} voxels per axis, found {found}"
        raise RejectedInput("corpus_filter", channel.path, text)
    if (minimum := channel.volume.min()) < 0:
        raise RejectedInput("corpus_filter", channel.path, f"expected no negative value, found {minimum:g}")


def read_label(
    path: Path,
    reference: Header,
    classes: Sequence[int],
    label_map: Mapping[int, int],
    how: Reading,
    warnings: list[str],
) -> tuple[np.ndarray, list[int]]:
    """A label on the grid of the image, its values checked and mapped: (X, Y, Z) uint8 in RAS; and the file's values.

    Args:
        path: the label file.
        reference: header of the image.
        classes: values that the file may hold; empty = any that end in 0..255.
        label_map: old value to new.

    Raises:
        RejectedInput: any fault of the file, another grid, or other values.
    """
    header, data = nifti.read(path, **how.options)
    warnings += header.warnings
    aligned = _aligned(header, reference, "label_geometry", how, warnings)
    if data.dtype.kind == "f":
        whole = np.rint(data)
        if not np.isfinite(data).all() or np.abs(data - whole).max() > INTEGER_TOLERANCE:
            raise RejectedInput("label_values", path, "expected whole numbers, found values between them or not finite")
        data = whole
    values = [int(value) for value in np.unique(data)]
    allowed = {*classes, *label_map} if classes else {*range(256), *label_map}
    if unknown := [value for value in values if value not in allowed]:
        accepted = " ".join(map(str, sorted(allowed))) if classes else "0..255"
        found = " ".join(map(str, unknown[:10])) + (" ..." if len(unknown) > 10 else "")
        raise RejectedInput("label_values", path, f"expected label values {accepted}, found also {found}")
    label = np.zeros(data.shape, dtype=np.uint8)
    for value in values:
        if target := label_map.get(value, value):
            label[data == value] = target
    return label if aligned else _onto(label, header, reference, order=0, outside=0), values


def _mend(volume: np.ndarray, path: Path, warnings: list[str]) -> int:
    """Replace the few NaN or infinite voxels by the finite minimum, in place; return how many."""
    if np.isfinite(volume.min()) and np.isfinite(volume.max()):  # NaN and infinity pass through one of them
        return 0
    bad = ~np.isfinite(volume)
    count = int(np.count_nonzero(bad))
    if count > NONFINITE_FRACTION * volume.size:
        limit = f"at most {NONFINITE_FRACTION:.1%} of voxels NaN or infinite"
        raise RejectedInput("nonfinite_many", path, f"expected {limit}, found {count} of {volume.size}")
    volume[bad] = volume[~bad].min()
    warnings.append(f"nonfinite: {path.name}: {count} NaN or infinite voxels set to the minimum")
    return count


def _aligned(header: Header, reference: Header, code: str, how: Reading, warnings: list[str]) -> bool:
    """True where both files have one grid, False where `header`'s must be resampled.

    Corners may differ by half the smallest voxel side. A file without orientation has the grid of another only where
    both are stored in the same axes.
    """
    if header is reference:
        return True
    shapes = f"{_grid_text(header)}, {reference.path.name} has {_grid_text(reference)}"
    located = header.trusted and reference.trusted
    if header.ras_shape == reference.ras_shape:
        if located:
            distance = nifti.corner_distance(header.ras_grid, reference.ras_grid, header.ras_shape)
            limit = min(reference.spacing) / 2
            if SAME_CORNER < distance <= limit:
                warnings.append(
                    f"{code}: {header.path.name}: corners differ by {distance:.3g} mm from the first channel's"
                )
            if distance <= limit:
                return True
            shapes += f"; corners differ by {distance:.3g} mm, accepted up to {limit:.3g} mm"
        elif np.allclose(header.spacing, reference.spacing, rtol=nifti.SPACING_TOLERANCE):
            if (header.ornt == reference.ornt).all():
                return True
            shapes += "; one of them has no orientation (sform and qform code 0)"
    if how.on_geometry_mismatch == "reject" or not located:
        raise RejectedInput(code, header.path, f"expected one grid, found {shapes}")
    warnings.append(f"{code}: {header.path.name}: resampled onto the first channel's grid; {shapes}")
    return False


def _grid_text(header: Header) -> str:
    shape, spacing = " x ".join(map(str, header.ras_shape)), " x ".join(f"{value:.4g}" for value in header.ras_spacing)
    return f"{shape} voxels of {spacing} mm"


def _onto(volume: np.ndarray, header: Header, reference: Header, order: int, outside: float) -> np.ndarray:
    """The volume on the reference's grid by position in mm; order 1 linear, order 0 nearest."""
    from scipy.ndimage import affine_transform

    matrix = np.linalg.inv(header.ras_grid) @ reference.ras_grid
    return affine_transform(volume, matrix, output_shape=reference.ras_shape, order=order, cval=outside)
