"""NIfTI files: read them and name every fault, turn to RAS and back, compare grids in mm, write on a scan's own grid.

`to_ras` is where the orientation is fixed. What a header says, and what is wrong with it, is in `nifti_header`.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np

from amaes.files import written_whole
from amaes.preprocess.nifti_header import MAX_BEYOND, Header, RejectedInput, parse_header
from amaes.preprocess.orientation import stored_axes
from amaes.preprocess.other_formats import START, kind_of, missing

GZIP_RATIO = 1040  # deflate cannot expand by more than 1032
PADDING = 512  # zero bytes that may follow the data; more, or others, are data that the header does not tell of


def read_nifti(
    path: str | Path,
    *,
    channels: int = 1,
    verify: bool = False,
    strict: bool = False,
    assume_ras: bool = False,
    axes: np.ndarray | None = None,
) -> tuple[Header, np.ndarray]:
    """Read a NIfTI file turned to RAS.

    Args:
        path: `.nii` or `.nii.gz`.
        channels: length the fourth axis must have; 1 = a 3-D file.
        verify: read a gzip stream to its end and check its CRC; refuse a header that contradicts itself on the data.
        strict: refuse a file whose sform and qform codes are both 0.
        assume_ras: take stored axes as RAS where the affine is singular.
        axes: (4, 4), grid in RAS of the image that the file belongs to: its axes are taken instead of the nearest.

    Returns:
        The header and the values after slope and intercept, a view or array (X, Y, Z) in RAS, or (X, Y, Z, C);
        the stored type where there is no scaling, else float64.

    Raises:
        RejectedInput: any fault of the file.
    """
    path = Path(path)
    with _opened(path) as stream:
        header = parse_header(
            path, stream, channels=channels, verify=verify, strict=strict, assume_ras=assume_ras, axes=axes
        )
        data = _read_data(header, stream, path)
        _check_end(path, stream, data.nbytes, verify)
    data = data.reshape(header.shape, order="F")
    if header.slope is not None and (header.slope != 1 or header.intercept != 0):
        data = data.astype(np.float64) * header.slope + header.intercept
    return header, to_ras(data, header.ornt)


def to_ras(array: np.ndarray, ornt: np.ndarray) -> np.ndarray:
    """Stored axes to RAS: permutes and reverses axes, interpolates nothing.

    Args:
        array: (I, J, K, ...), as stored.
        ornt: (3, 2), of `Header`.

    Returns:
        (X, Y, Z, ...), a view.
    """
    flipped = array[tuple(slice(None, None, -1 if sign < 0 else 1) for _, sign in ornt)]
    return flipped.transpose(*stored_axes(ornt), *range(3, array.ndim))


def to_stored_axes(array: np.ndarray, ornt: np.ndarray) -> np.ndarray:
    """RAS to stored axes, (X, Y, Z, ...) to (I, J, K, ...): the exact inverse of `to_ras`, a view."""
    stored = array.transpose(*(int(axis) for axis, _ in ornt), *range(3, array.ndim))
    return stored[tuple(slice(None, None, -1 if sign < 0 else 1) for _, sign in ornt)]


@np.errstate(invalid="ignore", over="ignore")  # damaged headers: infinite, or NaN, which is no distance within a limit
def corner_distance(first: np.ndarray, second: np.ndarray, shape: Sequence[int]) -> float:
    """Largest distance in mm between the corners of two volumes of one shape.

    Args:
        first, second: (4, 4) voxel to mm.
        shape: (X, Y, Z); the corners are voxel edges, at -0.5 and n - 0.5.
    """
    sides = [(-0.5, n - 0.5) for n in shape]
    corners = np.array([[x, y, z, 1.0] for x in sides[0] for y in sides[1] for z in sides[2]])  # (8, 4)
    return float(np.linalg.norm((corners @ (first - second).T)[:, :3], axis=1).max())


def write_like(path: str | Path, labels: np.ndarray, properties: dict) -> None:
    """Write a label map with the geometry of the file its properties describe, whole or not at all.

    Args:
        path: `.nii` or `.nii.gz`; the suffix decides on compression.
        labels: (X, Y, Z) on the file's own grid and axes, integers >= 0; uint8 up to 255, else uint16.
        properties: of `preprocess_case`; its "header" holds the fields to repeat.

    Raises:
        ValueError: shape or values do not fit, or the suffix is another.
    """
    path, shape = Path(path), tuple(properties["header"]["shape"])
    if tuple(labels.shape) != shape[:3]:
        raise ValueError(f"{path.name}: labels have shape {tuple(labels.shape)}, the source file {shape[:3]}")
    top = int(labels.max(initial=0))
    if int(labels.min(initial=0)) < 0 or top > 65535:
        raise ValueError(f"{path.name}: label values must lie in 0..65535, found {labels.min()}..{top}")
    _write_volume(path, np.asarray(labels).astype("u1" if top <= 255 else "<u2"), shape, properties)


def write_probabilities(path: str | Path, probabilities: np.ndarray, properties: dict) -> None:
    """Write the probability of every class, (X, Y, Z, K) float32, as `write_like` writes labels."""
    shape = tuple(properties["header"]["shape"][:3])
    if probabilities.ndim != 4 or probabilities.shape[:3] != shape:
        name = Path(path).name
        raise ValueError(f"{name}: probabilities have shape {probabilities.shape}, the source file {shape}")
    _write_volume(Path(path), probabilities.astype("<f4"), probabilities.shape, properties)


def _write_volume(path: Path, stored: np.ndarray, shape: tuple[int, ...], properties: dict) -> None:
    """Write values as they are with the geometry of the file that the properties describe."""
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: expected a name ending in .nii or .nii.gz")
    fields = properties["header"]
    header = nib.Nifti2Header(endianness="<") if fields["version"] == 2 else nib.Nifti1Header(endianness="<")
    header.set_data_dtype(stored.dtype)
    header["dim"] = [len(shape), *shape, *[1] * (7 - len(shape))]
    header["pixdim"] = [_number(value) for value in fields["pixdim"]]
    for name, value in zip(("quatern_b", "quatern_c", "quatern_d"), fields["quatern"], strict=True):
        header[name] = _number(value)
    for axis, value in zip("xyz", fields["qoffset"], strict=True):
        header[f"qoffset_{axis}"] = _number(value)
    for axis, row in zip("xyz", fields["srow"], strict=True):
        header[f"srow_{axis}"] = [_number(value) for value in row]
    header["sform_code"], header["qform_code"] = properties["sform_code"], properties["qform_code"]
    header["xyzt_units"], header["scl_slope"], header["scl_inter"] = fields["xyzt_units"], 1, 0
    header["vox_offset"], header["magic"] = len(header.binaryblock) + 4, header.single_magic
    content = header.binaryblock + bytes(4) + stored.tobytes(order="F")  # 4 zero bytes: no extensions
    if path.name.lower().endswith(".gz"):
        content = gzip.compress(content, compresslevel=6, mtime=0)
    with written_whole(path) as file:
        file.write(content)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The uncompressed stream of a file; faults of the file or of its compression become RejectedInput."""
    if not path.is_file():
        raise RejectedInput("missing_file", path, missing(path))
    if path.stat().st_size == 0:
        raise RejectedInput("empty_file", path, "expected a NIfTI file, found 0 bytes")
    with path.open("rb") as raw:
        compressed, named_gz = raw.read(2) == b"\x1f\x8b", path.name.lower().endswith(".gz")
        raw.seek(0)
        try:
            stream = gzip.GzipFile(fileobj=raw, mode="rb") if compressed else raw
            if named_gz != compressed:
                _refuse_wrong_name(path, stream, compressed)
            yield stream
        except gzip.BadGzipFile as error:
            raise RejectedInput("corrupt_gzip", path, f"damaged gzip data ({error})") from error
        except (EOFError, zlib.error) as error:
            raise RejectedInput("truncated", path, f"gzip data end early or are damaged ({error})") from error


def _refuse_wrong_name(path: Path, stream: BinaryIO, compressed: bool) -> None:
    """Say what a .nii.gz that is not compressed is, or a compressed file of another name."""
    start = stream.read(START)
    if kind := kind_of(start):
        raise RejectedInput("not_nifti", path, f"expected a NIfTI file, found {kind}")
    is_nifti = start[:4] in [size.to_bytes(4, order) for size in (348, 540) for order in ("little", "big")]
    if compressed:
        advice = "rename it to .nii.gz" if is_nifti else "but no NIfTI file within"
        raise RejectedInput("bad_header", path, f"expected plain data, found gzip; {advice}")
    found = "a NIfTI file that is not compressed; rename it to .nii" if is_nifti else f"{start[:4]!r}"
    raise RejectedInput("not_gzip", path, f"expected gzip data, found {found}")


def _read_data(header: Header, stream: BinaryIO, path: Path) -> np.ndarray:
    """The stored values in file order, flat; memory is reserved only where the file can hold that much."""
    count = math.prod(header.shape)
    expected, size = count * header.dtype.itemsize, path.stat().st_size
    possible = size * GZIP_RATIO if path.name.lower().endswith(".gz") else size - header.offset
    if possible < expected:
        raise RejectedInput("truncated", path, f"expected {expected} bytes of data, found a file of {size} bytes")
    data = np.empty(count, dtype=header.dtype)
    target, filled = memoryview(data.view(np.uint8)), 0
    while filled < expected:
        n_read = stream.readinto(target[filled:])
        if not n_read:
            raise RejectedInput("truncated", path, f"expected {expected} bytes of data, found {filled}")
        filled += n_read
    return data


def _check_end(path: Path, stream: BinaryIO, size: int, verify: bool) -> None:
    """Refuse a file that holds more than its header says, apart from a few zero bytes.

    Args:
        path: of the file, for messages.
        stream: behind the data.
        size: of the data that the header says, bytes.
        verify: a wrong checksum of gzip, which stands at its end, is an error.
    """
    more, zero = 0, True
    try:
        while more <= MAX_BEYOND and (block := stream.read1(1 << 16)):
            more, zero = more + len(block), zero and not block.strip(b"\0")
    except (gzip.BadGzipFile, EOFError, zlib.error):
        if verify:
            raise
    if more > PADDING or not zero:
        found = f"more than {size + MAX_BEYOND}" if more > MAX_BEYOND else size + more
        raise RejectedInput("bad_header", path, f"header says {size} bytes of data, file has {found}")


def _number(value: float | None) -> float:
    """The inverse of `_plain` for one number; infinity becomes NaN."""
    return math.nan if value is None else value
