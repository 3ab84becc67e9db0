"""NIfTI files: read them and name every fault, turn to RAS and back, compare grids in mm, write on a scan's own grid.

`to_ras` is where the orientation is fixed. The header is parsed from its raw bytes without repairs, so that a zero or
negative voxel size is seen before a library repairs it. What the header alone can tell is refused before data are read.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.orientations import aff2axcodes, inv_ornt_aff, io_orientation

from amaes.files import written_whole

DATA_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
ORIENTATION_CODES = range(6)  # other codes are read as 0, which means unknown
MAX_AXIS, MAX_VOXELS = 4096, 1 << 30  # a header that claims more is taken for damaged; 2^30 voxels of float32 = 4 GiB
MAX_BEYOND = 1 << 24  # bytes before or after the data: enough for extensions, too few for a gzip bomb
GZIP_RATIO = 1040  # deflate cannot expand by more than 1032
MIN_SPACING, MAX_SPACING = 0.05, 20.0  # mm
SPACING_TOLERANCE = 0.01  # fraction by which pixdim may differ from the affine's column norms


class RejectedInput(ValueError):
    """An input that cannot be used, with a stable reason code.

    Attributes:
        code: the reason ("truncated", "bad_spacing", ...).
        path: the file.
    """

    def __init__(self, code: str, path: str | Path, message: str) -> None:
        super().__init__(f"{Path(path).name}: {message}")
        self.code, self.path = code, Path(path)


@dataclass(frozen=True)
class Header:
    """What a file's header says, checked.

    Attributes:
        path: the file.
        shape: stored shape without trailing axes of length 1: (X, Y, Z), or (X, Y, Z, C) where C was declared.
        sform_code, qform_code: as stored.
        affine: (4, 4), voxel to mm, as stored (sform, else qform, else the guess other tools make).
        grid: (4, 4), voxel to RAS+ mm as used here: `affine`, or diag(spacing) where the orientation is not known.
        trusted: the orientation is known (sform or qform code is not 0).
        ornt: (3, 2), stored axis i becomes RAS axis ornt[i, 0], reversed where ornt[i, 1] is -1.
        spacing: mm along the stored axes.
        warnings: "code: text" of what was repaired or assumed.
        fields: plain numbers from which `write_like` rebuilds the header.
        dtype, offset, slope, intercept: of the stored data; slope None: values are stored as they are.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    slope: float | None
    intercept: float
    sform_code: int
    qform_code: int
    affine: np.ndarray
    grid: np.ndarray
    trusted: bool
    ornt: np.ndarray
    spacing: tuple[float, float, float]
    warnings: list[str] = field(default_factory=list)
    fields: dict = field(default_factory=dict)

    @property
    def orientation(self) -> str:
        """Where the stored axes point, such as "LPS"."""
        return "".join(aff2axcodes(self.grid))

    @property
    def ras_shape(self) -> tuple[int, int, int]:
        """(X, Y, Z) after turning to RAS."""
        return tuple(self.shape[axis] for axis in _stored_axes(self.ornt))

    @property
    def ras_spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along the RAS axes."""
        return tuple(self.spacing[axis] for axis in _stored_axes(self.ornt))

    @property
    def ras_grid(self) -> np.ndarray:
        """(4, 4), voxel of the array turned to RAS to mm."""
        return self.grid @ inv_ornt_aff(self.ornt, self.shape[:3])


def read_nifti(
    path: str | Path, *, channels: int = 1, verify: bool = False, strict: bool = False, assume_ras: bool = False
) -> tuple[Header, np.ndarray]:
    """Read a NIfTI file turned to RAS.

    Args:
        path: `.nii` or `.nii.gz`.
        channels: length the fourth axis must have; 1 = a 3-D file.
        verify: read a gzip stream to its end and check its CRC.
        strict: refuse a file whose sform and qform codes are both 0.
        assume_ras: take stored axes as RAS where the affine is singular.

    Returns:
        The header and the values after slope and intercept, a view or array (X, Y, Z) in RAS, or (X, Y, Z, C);
        the stored type where there is no scaling, else float64.

    Raises:
        RejectedInput: any fault of the file.
    """
    path = Path(path)
    with _opened(path) as stream:
        header = _parse_header(path, stream, channels, strict, assume_ras)
        data = _read_data(header, stream, path)
        if verify and len(stream.read(MAX_BEYOND + 1)) > MAX_BEYOND:  # to the end, where gzip has its checksum
            raise RejectedInput(
                "bad_header", path, f"expected its end after the data, found more than {MAX_BEYOND} bytes"
            )
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
    return flipped.transpose(*_stored_axes(ornt), *range(3, array.ndim))


def to_stored_axes(array: np.ndarray, ornt: np.ndarray) -> np.ndarray:
    """RAS to stored axes, (X, Y, Z, ...) to (I, J, K, ...): the exact inverse of `to_ras`, a view."""
    stored = array.transpose(*(int(axis) for axis, _ in ornt), *range(3, array.ndim))
    return stored[tuple(slice(None, None, -1 if sign < 0 else 1) for _, sign in ornt)]


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
    path, fields = Path(path), properties["header"]
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path}: expected a name ending in .nii or .nii.gz")
    shape = tuple(fields["shape"])
    if tuple(labels.shape) != shape[:3]:
        raise ValueError(f"{path.name}: labels have shape {tuple(labels.shape)}, the source file {shape[:3]}")
    top = int(labels.max(initial=0))
    if int(labels.min(initial=0)) < 0 or top > 65535:
        raise ValueError(f"{path.name}: label values must lie in 0..65535, found {labels.min()}..{top}")
    stored = np.asarray(labels).astype("u1" if top <= 255 else "<u2")
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
        raise RejectedInput("missing_file", path, f"no such file ({path})")
    if path.stat().st_size == 0:
        raise RejectedInput("empty_file", path, "expected a NIfTI file, found 0 bytes")
    with path.open("rb") as raw:
        compressed, named_gz = raw.read(2) == b"\x1f\x8b", path.name.lower().endswith(".gz")
        raw.seek(0)
        if named_gz and not compressed:
            raise RejectedInput("not_gzip", path, "expected gzip data, found none; uncompressed file with .gz name?")
        if compressed and not named_gz:
            raise RejectedInput("bad_header", path, "expected plain data, found gzip; rename it to .nii.gz")
        try:
            yield gzip.GzipFile(fileobj=raw, mode="rb") if compressed else raw
        except gzip.BadGzipFile as error:
            raise RejectedInput("corrupt_gzip", path, f"damaged gzip data ({error})") from error
        except (EOFError, zlib.error) as error:
            raise RejectedInput("truncated", path, f"gzip data end early or are damaged ({error})") from error


@np.errstate(invalid="ignore")  # damaged headers hold signalling NaNs
def _parse_header(path: Path, stream: BinaryIO, channels: int, strict: bool, assume_ras: bool) -> Header:
    raw, version = _raw_header(path, stream)
    shape, trailing = _shape(path, raw, channels)
    code = int(raw["datatype"])
    if code not in DATA_TYPES:
        kind = (
            nib.nifti1.data_type_codes.label.get(code, "unknown") if code in nib.nifti1.data_type_codes else "unknown"
        )
        raise RejectedInput("bad_header", path, f"expected real numbers, found data type {code} ({kind})")
    dtype = np.dtype(DATA_TYPES[code]).newbyteorder(raw.endianness)
    offset = float(raw["vox_offset"])
    if not (raw.single_vox_offset <= offset <= MAX_BEYOND):
        limits = f"{raw.single_vox_offset} to {MAX_BEYOND}"
        raise RejectedInput("bad_header", path, f"expected data at byte {limits}, found {offset:g}")
    slope, intercept = float(raw["scl_slope"]), float(raw["scl_inter"])
    slope = slope if math.isfinite(slope) and slope != 0 else None
    if slope is not None and not math.isfinite(intercept):
        raise RejectedInput(
            "bad_header", path, f"expected a finite intercept beside slope {slope:g}, found {intercept}"
        )
    geometry = _geometry(path, raw, strict, assume_ras)
    return Header(
        path=path,
        shape=shape,
        dtype=dtype,
        offset=int(offset),
        slope=slope,
        intercept=intercept,
        sform_code=int(raw["sform_code"]),
        qform_code=int(raw["qform_code"]),
        **geometry,
        fields=_fields(raw, version, (*shape[:3], *[1] * trailing)),
    )


def _raw_header(path: Path, stream: BinaryIO) -> tuple[nib.Nifti1Header, int]:
    """The header as stored, without repairs, and the NIfTI version."""
    start = stream.read(4)
    endianness, size = "<", int.from_bytes(start, "little")
    if size not in (348, 540):
        endianness, size = ">", int.from_bytes(start, "big")
    if len(start) < 4 or size not in (348, 540):
        raise RejectedInput("bad_header", path, f"expected a NIfTI header of 348 or 540 bytes, found {start!r}")
    block = start + stream.read(size - 4)
    if len(block) < size:
        raise RejectedInput("truncated", path, f"expected a header of {size} bytes, found {len(block)}")
    kind, version = (nib.Nifti1Header, 1) if size == 348 else (nib.Nifti2Header, 2)
    raw = kind(block, endianness=endianness, check=False)
    magic = bytes(raw.structarr["magic"].item())
    if magic != raw.single_magic:
        raise RejectedInput("bad_header", path, f"expected a single-file NIfTI ({raw.single_magic!r}), found {magic!r}")
    for name in ("sform_code", "qform_code"):
        if raw[name] not in ORIENTATION_CODES:
            raw[name] = 0
    return raw, version


def _shape(path: Path, raw: nib.Nifti1Header, channels: int) -> tuple[tuple[int, ...], int]:
    """Shape without trailing axes of length 1, and how many of those the file has beyond three axes."""
    dims = [int(n) for n in raw["dim"]]
    if not 1 <= dims[0] <= 7 or any(n < 1 for n in dims[1 : dims[0] + 1]):
        raise RejectedInput("bad_header", path, f"expected 1 to 7 positive dimensions, found dim = {dims}")
    shape = dims[1 : dims[0] + 1]
    trailing = 0
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
        trailing += 1
    sides = " x ".join(map(str, shape))
    if len(shape) != (3 if channels == 1 else 4):
        expected = "3-D" if channels == 1 else f"{channels} channels"
        raise RejectedInput("bad_ndim", path, f"expected {expected}, found {sides}")
    if channels > 1 and shape[3] != channels:
        raise RejectedInput("bad_ndim", path, f"expected {channels} channels in the fourth axis, found {sides}")
    if max(shape) > MAX_AXIS or math.prod(shape) > MAX_VOXELS:
        limit = f"at most {MAX_AXIS} per axis and {MAX_VOXELS} in all"
        raise RejectedInput("bad_header", path, f"expected {limit} voxels, found {sides}")
    return tuple(shape), trailing


def _geometry(path: Path, raw: nib.Nifti1Header, strict: bool, assume_ras: bool) -> dict:
    """The fields of `Header` that say where the voxels are; refuses what cannot be known."""
    warnings = []
    pixdim = np.array(raw["pixdim"][1:4], dtype=np.float64)
    sound = bool(np.isfinite(pixdim).all() and (pixdim > 0).all())
    repaired = np.where(np.isfinite(pixdim) & (pixdim != 0), np.abs(pixdim), 1.0)
    stored_text = _mm_text(pixdim)
    affine, trusted = _affine(raw, repaired), bool(raw["sform_code"] > 0 or raw["qform_code"] > 0)
    regular = trusted and _is_regular(affine)
    if not sound and not (regular and raw["sform_code"] > 0):
        raise RejectedInput("bad_spacing", path, f"expected positive voxel sizes, found {stored_text}")
    if not sound:
        warnings.append(f"bad_spacing_repaired: {path.name}: voxel sizes {stored_text} in pixdim, the affine is used")
    if not trusted:
        if strict:
            raise RejectedInput("no_orientation", path, "expected an sform or qform code above 0, found 0 and 0")
        warnings.append(f"no_orientation: {path.name}: sform and qform codes are 0, stored axes are taken as RAS")
    elif not regular:
        if not assume_ras:
            rows = np.array2string(affine[:3, :3], precision=4).replace("\n", "")
            raise RejectedInput("singular_affine", path, f"expected an affine of rank 3, found {rows}")
        warnings.append(f"singular_affine: {path.name}: stored axes are taken as RAS, voxel sizes from pixdim")
        trusted = False
    grid = affine if trusted else np.diag([*repaired, 1.0])
    norms = np.linalg.norm(grid[:3, :3], axis=0)
    if trusted and sound and (np.abs(norms / pixdim - 1) > SPACING_TOLERANCE).any():
        text = f"pixdim {stored_text} mm, affine {_mm_text(norms)} mm; the affine is used"
        warnings.append(f"spacing_mismatch: {path.name}: {text}")
    if norms.min() < MIN_SPACING or norms.max() > MAX_SPACING:
        limits = f"{MIN_SPACING:g} to {MAX_SPACING:g} mm"
        raise RejectedInput("implausible_spacing", path, f"expected voxels of {limits}, found {_mm_text(norms)}")
    return {
        "affine": affine,
        "grid": grid,
        "trusted": trusted,
        "ornt": io_orientation(grid).astype(int),
        "spacing": tuple(float(value) for value in norms),
        "warnings": warnings,
    }


def _mm_text(lengths: np.ndarray) -> str:
    return " x ".join(f"{value:g}" for value in lengths)


def _affine(raw: nib.Nifti1Header, spacing: np.ndarray) -> np.ndarray:
    """sform, else qform, else what other tools assume (first axis reversed, origin at the centre); may be singular."""
    if raw["sform_code"] > 0:
        return raw.get_sform()
    repaired = raw.copy()
    repaired["pixdim"][1:4] = spacing
    if raw["qform_code"] <= 0:
        return repaired.get_base_affine()
    try:
        return repaired.get_qform()
    except (ValueError, nib.spatialimages.HeaderDataError):  # quaternion longer than 1
        return np.full((4, 4), np.nan)


def _is_regular(affine: np.ndarray) -> bool:
    """Finite and of rank 3, with a margin for rounding."""
    if not np.isfinite(affine).all():
        return False
    norms = np.linalg.norm(affine[:3, :3], axis=0)
    return bool(norms.min() > 0 and np.linalg.svd(affine[:3, :3] / norms, compute_uv=False).min() > 1e-3)


def _fields(raw: nib.Nifti1Header, version: int, shape: tuple[int, ...]) -> dict:
    """Header fields for `write_like`; voxel sizes repaired as other readers do, None for NaN and infinity."""
    pixdim = [float(value) for value in raw["pixdim"]]
    repaired = [abs(value) if math.isfinite(value) and value != 0 else 1.0 for value in pixdim[1:4]]
    return {
        "version": version,
        "shape": list(shape),
        "pixdim": _plain([pixdim[0], *repaired, *pixdim[4:]]),
        "quatern": _plain(raw[f"quatern_{axis}"] for axis in "bcd"),
        "qoffset": _plain(raw[f"qoffset_{axis}"] for axis in "xyz"),
        "srow": [_plain(raw[f"srow_{axis}"]) for axis in "xyz"],
        "xyzt_units": int(raw["xyzt_units"]),
    }


def _read_data(header: Header, stream: BinaryIO, path: Path) -> np.ndarray:
    """The stored values in file order, flat; memory is reserved only where the file can hold that much."""
    count = math.prod(header.shape)
    expected, size = count * header.dtype.itemsize, path.stat().st_size
    possible = size * GZIP_RATIO if path.name.lower().endswith(".gz") else size - header.offset
    if possible < expected:
        raise RejectedInput("truncated", path, f"expected {expected} bytes of data, found a file of {size} bytes")
    stream.seek(header.offset)
    data = np.empty(count, dtype=header.dtype)
    target, filled = memoryview(data.view(np.uint8)), 0
    while filled < expected:
        n_read = stream.readinto(target[filled:])
        if not n_read:
            raise RejectedInput("truncated", path, f"expected {expected} bytes of data, found {filled}")
        filled += n_read
    return data


def _stored_axes(ornt: np.ndarray) -> tuple[int, ...]:
    """For each RAS axis, the stored axis it comes from."""
    return tuple(int(axis) for axis in np.argsort(ornt[:, 0]))


def _plain(values: Iterable[float]) -> list[float | None]:
    """Numbers that JSON can hold: None for NaN and infinity."""
    return [float(value) if math.isfinite(value) else None for value in values]


def _number(value: float | None) -> float:
    """The inverse of `_plain` for one number; infinity becomes NaN."""
    return math.nan if value is None else value
