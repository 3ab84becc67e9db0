"""Read the files of one case: channels and label in RAS on one grid, small faults repaired, others refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from amaes.preprocess import nifti
from amaes.preprocess.config import IGNORED, Config
from amaes.preprocess.nifti_header import SPACING_TOLERANCE, Header, RejectedInput, header_of_array

NONFINITE_FRACTION = 0.001  # up to this fraction of voxels may be NaN or infinite; they are repaired
SAME_CORNER = 1e-3  # mm; corners that are closer than this are the same
INTEGER_TOLERANCE = 1e-3  # a label value may differ from an integer by this
CORPUS_MIN_AXIS = 15  # voxels; the published corpus holds no thinner volumes


@dataclass(frozen=True)
class Channel:
    """One channel of a case.

    Attributes:
        path: its file.
        header: of the first channel's file, whose grid all channels have.
        volume: (X, Y, Z) float32 in RAS, finite.
        n_nonfinite: how many voxels were NaN or infinite.
    """

    path: Path
    header: Header
    volume: np.ndarray
    n_nonfinite: int


def read_file(
    path: Path, config: Config, channels: int = 1, reference: Header | None = None
) -> tuple[Header, np.ndarray]:
    """`nifti.read_nifti` as the configuration says; along the axes of the reference, where that has an orientation."""
    return nifti.read_nifti(
        path,
        channels=channels,
        verify=config.verify,
        strict=config.strict_orientation,
        assume_ras=config.assume_ras,
        axes=reference.ras_grid if reference is not None and reference.trusted else None,
    )


def read_channels(
    images: Sequence[Path | None],
    config: Config,
    warnings: list[str],
    *,
    volumes_in_file: int,
    volumes: Sequence[int] | None = None,
) -> list[Channel | None]:
    """The channels of a case, all on the grid of the first.

    Args:
        images: one file per channel (None = missing), or one file that holds all channels.
        config: which faults are refused, and which are repaired.
        warnings: gets what was repaired or assumed.
        volumes_in_file: how many volumes the file has, where there is one file.
        volumes: which of them to take, in this order; None = all.

    Returns:
        One channel per file or volume, None for a missing file.

    Raises:
        RejectedInput: any fault of a file, or a grid that differs.
    """
    channels: list[Channel | None] = []
    reference = None
    for path in images:
        if path is None:
            channels.append(None)
            continue
        header, data = read_file(path, config, volumes_in_file if len(images) == 1 else 1, reference)
        _check_sides(header, path, config)
        warnings += header.warnings
        reference = reference or header
        aligned = _on_one_grid(header, reference, "channel_geometry", config.on_geometry_mismatch, warnings)
        parts = [data] if data.ndim == 3 else np.moveaxis(data, 3, 0)
        for part in parts if volumes is None else [parts[k] for k in volumes]:
            volume, n_nonfinite = _finite(part, path, config, warnings)
            if not aligned:
                volume = _onto(volume, header, reference, order=1, outside=float(volume.min()))
            channels.append(Channel(path, reference, volume, n_nonfinite))
    return channels


def channels_of_array(array: np.ndarray, affine: np.ndarray, config: Config, warnings: list[str]) -> list[Channel]:
    """The channels of a case in memory, checked and repaired like those of files.

    Args:
        array: (C, X, Y, Z), real numbers.
        affine: (4, 4), voxel to RAS+ mm.
        config, warnings: of `read_channels`.

    Raises:
        RejectedInput: what a file would be refused for.
    """
    header = header_of_array(array.shape[1:], affine)
    _check_sides(header, header.path, config)
    channels = []
    for part in array:
        volume, n_nonfinite = _finite(nifti.to_ras(part, header.ornt), header.path, config, warnings)
        channels.append(Channel(header.path, header, volume, n_nonfinite))
    return channels


def _check_sides(header: Header, path: Path, config: Config) -> None:
    """Refuse a volume that is too thin."""
    if min(header.shape[:3]) < config.min_axis:
        sides = " x ".join(map(str, header.shape[:3]))
        text = f"expected at least {config.min_axis} voxels per axis, found {sides}"
        raise RejectedInput("too_small", path, text)


def _finite(part: np.ndarray, path: Path, config: Config, warnings: list[str]) -> tuple[np.ndarray, int]:
    """The values as float32 without NaN and infinity, and how many of those there were."""
    with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold becomes infinite and is counted below
        volume = np.array(part, dtype=np.float32, order="C")
    if config.nan_background == "zero":
        _nan_to_zero(volume, path, warnings)
    return volume, _repair(volume, path, warnings)


def check_corpus(channel: Channel) -> None:
    """Check what the published corpus takes of its four large sources: at least 15 voxels per axis, no negative value.

    Raises:
        RejectedInput: "corpus_filter"; the volume would not be in the corpus.
    """
    if min(channel.volume.shape) < CORPUS_MIN_AXIS:
        sides = " x ".join(map(str, channel.volume.shape))
        text = f"expected at least {CORPUS_MIN_AXIS} voxels per axis, found {sides}"
        raise RejectedInput("corpus_filter", channel.path, text)
    if (minimum := channel.volume.min()) < 0:
        raise RejectedInput("corpus_filter", channel.path, f"expected no negative value, found {minimum:g}")


def read_label(
    path: Path, reference: Header, config: Config, warnings: list[str], *, classes: Sequence[int] = ()
) -> tuple[np.ndarray, list[int]]:
    """A label on the grid of the image, its values checked and mapped.

    Args:
        path: the label file.
        reference: header of the image.
        config: with the label map; says which faults are refused, and which are repaired.
        warnings: gets what was repaired or assumed.
        classes: values that the file may hold, beside those of the label map; empty = 0..255.

    Returns:
        (X, Y, Z) uint8 in RAS, and the values in the file, before mapping.

    Raises:
        RejectedInput: any fault of the file, another grid, or other values.
    """
    header, data = read_file(path, config, reference=reference)
    warnings += header.warnings
    aligned = _on_one_grid(header, reference, "label_geometry", config.on_geometry_mismatch, warnings)
    if data.dtype.kind == "f":
        if config.nan_background == "zero":
            data = np.array(data)
            _nan_to_zero(data, path, warnings)
        if count := data.size - int(np.count_nonzero(np.isfinite(data))):
            text = f"expected whole numbers, found {count} of {data.size} voxels NaN or infinite"
            raise RejectedInput("nonfinite_many", path, text)
        whole = np.rint(data)
        if np.abs(data - whole).max() > INTEGER_TOLERANCE:
            raise RejectedInput("label_values", path, "expected whole numbers, found values between them")
        data = whole
    values = [int(value) for value in np.unique(data)]
    allowed = {*(classes or range(256)), *config.label_map}
    if unknown := [value for value in values if value not in allowed]:
        accepted = " ".join(map(str, sorted(allowed))) if classes else "0..255"
        others = " ".join(map(str, unknown[:10])) + (" ..." if len(unknown) > 10 else "")
        raise RejectedInput("label_values", path, f"expected label values {accepted}, found also {others}")
    if config.ignores and IGNORED in set(values) - set(config.label_map):
        text = f"found label {IGNORED}, which stands for what `label_map` leaves out; give it another value"
        raise RejectedInput("label_values", path, text)
    label = np.zeros(data.shape, dtype=np.uint8)
    for value in values:
        if target := config.label_map.get(value, value):
            label[data == value] = target
    return label if aligned else _onto(label, header, reference, order=0, outside=0), values


def _nan_to_zero(volume: np.ndarray, path: Path, warnings: list[str]) -> None:
    """Set NaN voxels to 0, in place."""
    nan = np.isnan(volume)
    if count := int(np.count_nonzero(nan)):
        volume[nan] = 0
        warnings.append(f"nan_background: {path.name}: {count} NaN voxels set to 0")


def _repair(volume: np.ndarray, path: Path, warnings: list[str]) -> int:
    """Set the few NaN or infinite voxels to the finite minimum, in place; returns how many there were."""
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


def _on_one_grid(header: Header, reference: Header, code: str, on_mismatch: str, warnings: list[str]) -> bool:
    """Whether two files have one grid; False: that of `header` must be resampled.

    Corners may differ by half the smallest voxel side. A file without orientation has the grid of another file only
    where both are stored along the same axes.

    Raises:
        RejectedInput: the grids differ, and `on_mismatch` is "reject" or a file has no orientation; with `code`.
    """
    if header is reference:
        return True
    grids = f"{_grid_text(header)}, {reference.path.name} has {_grid_text(reference)}"
    located = header.trusted and reference.trusted
    if header.ras_shape == reference.ras_shape:
        if located:
            distance = nifti.corner_distance(header.ras_grid, reference.ras_grid, header.ras_shape)
            limit = min(reference.spacing) / 2
            if SAME_CORNER < distance <= limit:
                text = f"corners differ by {distance:.3g} mm from the first channel's"
                warnings.append(f"{code}: {header.path.name}: {text}")
            if distance <= limit:
                return True
            grids += f"; corners differ by {distance:.3g} mm, accepted up to {limit:.3g} mm"
        elif np.allclose(header.spacing, reference.spacing, rtol=SPACING_TOLERANCE):
            if (header.ornt == reference.ornt).all():
                return True
            grids += "; one of them has no orientation (sform and qform code 0)"
    if on_mismatch == "reject" or not located:
        raise RejectedInput(code, header.path, f"expected one grid, found {grids}")
    warnings.append(f"{code}: {header.path.name}: resampled onto the grid of {reference.path.name}; {grids}")
    return False


def _grid_text(header: Header) -> str:
    shape, spacing = " x ".join(map(str, header.ras_shape)), " x ".join(f"{value:.4g}" for value in header.ras_spacing)
    return f"{shape} voxels of {spacing} mm"


def _onto(volume: np.ndarray, header: Header, reference: Header, order: int, outside: float) -> np.ndarray:
    """Resample the volume onto the reference's grid, by position in mm; order 1 is linear, order 0 nearest."""
    from scipy.ndimage import affine_transform

    matrix = np.linalg.inv(header.ras_grid) @ reference.ras_grid
    return affine_transform(volume, matrix, output_shape=reference.ras_shape, order=order, cval=outside)
