"""The header of a NIfTI file, checked: shape, type, orientation and voxel size, or the reason why it cannot be used.

It is parsed from its raw bytes without repairs, so that a zero or negative voxel size is seen before a library repairs
it. What the header alone can tell is refused before data are read. Lengths are in mm here, whatever the file's unit.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.orientations import inv_ornt_aff

from amaes.preprocess.orientation import axis_assignment, is_same_way, letters, stored_axes
from amaes.preprocess.other_formats import START, kind_of

DATA_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
ORIENTATION_CODES = range(6)  # other codes are read as 0, which means unknown
MAX_AXIS, MAX_VOXELS = 4096, 1 << 30  # a header that claims more is taken for damaged; 2^30 voxels of float32 = 4 GiB
MAX_BEYOND = 1 << 24  # bytes before the data: enough for extensions, too few for a gzip bomb
MIN_SPACING, MAX_SPACING = 0.05, 20.0  # mm
SPACING_TOLERANCE = 0.01  # fraction by which pixdim may differ from the affine's column norms
UNITS = {1: ("metre", 1000.0), 3: ("micron", 0.001)}  # of xyzt_units, in mm; every other code is read as mm


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
        ornt: (3, 2), stored axis i becomes RAS axis ornt[i, 0], reversed where ornt[i, 1] is -1; of a file that belongs
            to an image, the axes of that image.
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
        return letters(self.ornt)

    @property
    def ras_shape(self) -> tuple[int, int, int]:
        """(X, Y, Z) after turning to RAS."""
        return tuple(self.shape[axis] for axis in stored_axes(self.ornt))

    @property
    def ras_spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along the RAS axes."""
        return tuple(self.spacing[axis] for axis in stored_axes(self.ornt))

    @property
    def ras_grid(self) -> np.ndarray:
        """(4, 4), voxel of the array turned to RAS to mm."""
        return self.grid @ inv_ornt_aff(self.ornt, self.shape[:3])


@np.errstate(invalid="ignore", over="ignore")  # damaged headers hold signalling NaNs, and numbers without a square
def parse_header(
    path: Path,
    stream: BinaryIO,
    *,
    channels: int,
    verify: bool,
    strict: bool,
    assume_ras: bool,
    axes: np.ndarray | None,
) -> Header:
    """The header at the start of a stream, which is left where the data begin; arguments as of `nifti.read_nifti`."""
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
    if not (raw.single_vox_offset <= offset <= MAX_BEYOND and offset % 1 == 0):
        limits = f"{raw.single_vox_offset} to {MAX_BEYOND}"
        raise RejectedInput("bad_header", path, f"expected data at byte {limits}, found {offset:g}")
    _check_extensions(path, stream.read(int(offset) - len(raw.binaryblock)), raw.endianness, int(offset))
    slope, intercept = float(raw["scl_slope"]), float(raw["scl_inter"])
    slope = slope if math.isfinite(slope) and slope != 0 else None
    if slope is not None and not math.isfinite(intercept):
        raise RejectedInput(
            "bad_header", path, f"expected a finite intercept beside slope {slope:g}, found {intercept}"
        )
    geometry = _geometry(path, raw, strict, assume_ras, axes)
    geometry["warnings"] += _bits_that_differ(path, int(raw["bitpix"]), dtype, verify)
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


def header_of_array(shape: Sequence[int], affine: np.ndarray, name: str = "array") -> Header:
    """The header that a file of an array would have, checked like that of a file.

    Args:
        shape: (X, Y, Z) of the array.
        affine: (4, 4), voxel to RAS+ mm.
        name: of the array, for messages.

    Raises:
        RejectedInput: the affine is no sound geometry.
    """
    affine = np.asarray(affine, np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise RejectedInput("singular_affine", name, f"expected an affine of 4 x 4 numbers, found {affine.shape}")
    raw = nib.Nifti1Header(endianness="<")
    raw.set_data_dtype(np.float32)
    raw.set_data_shape(tuple(shape))
    raw.set_zooms(np.linalg.norm(affine[:3, :3], axis=0))
    raw.set_sform(affine, code=1)
    raw.set_xyzt_units("mm")
    raw["vox_offset"], raw["magic"] = raw.single_vox_offset, raw.single_magic
    stream = io.BytesIO(raw.binaryblock + bytes(4))
    return parse_header(Path(name), stream, channels=1, strict=False, assume_ras=False, axes=None, verify=False)


def _raw_header(path: Path, stream: BinaryIO) -> tuple[nib.Nifti1Header, int]:
    """The header as stored, without repairs, and the NIfTI version."""
    start = stream.read(4)
    endianness, size = "<", int.from_bytes(start, "little")
    if size not in (348, 540):
        endianness, size = ">", int.from_bytes(start, "big")
    if len(start) < 4 or size not in (348, 540):
        if kind := kind_of(start + stream.read(START)):
            raise RejectedInput("not_nifti", path, f"expected a NIfTI file, found {kind}")
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


def _bits_that_differ(path: Path, bits: int, dtype: np.dtype, verify: bool) -> list[str]:
    """A warning where the header gives two sizes of a voxel, or a refusal; 0 bits say nothing."""
    if bits in (0, 8 * dtype.itemsize):
        return []
    text = f"{bits} bits per voxel (bitpix), but a data type of {8 * dtype.itemsize}"
    if verify:
        raise RejectedInput("bad_header", path, f"header says {text}")
    return [f"bitpix: {path.name}: header says {text}, which is used"]


def _check_extensions(path: Path, between: bytes, endianness: str, offset: int) -> None:
    """Refuse data that begin earlier than the header says: what lies before them must be extensions or zero."""
    position = 4  # bytes that say whether there are extensions
    while position + 8 <= len(between):
        size = int.from_bytes(between[position : position + 4], "little" if endianness == "<" else "big")
        if size < 8 or position + size > len(between):
            break
        position += size
    if between[position:].strip(b"\0"):
        text = f"header says that data begin at byte {offset}, found other data than extensions before that"
        raise RejectedInput("bad_header", path, text)


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


def _geometry(path: Path, raw: nib.Nifti1Header, strict: bool, assume_ras: bool, axes: np.ndarray | None) -> dict:
    """The fields of `Header` that say where the voxels are; refuses what cannot be known."""
    warnings = []
    unit, mm = UNITS.get(int(raw["xyzt_units"]) & 7, ("mm", 1.0))
    pixdim = np.array(raw["pixdim"][1:4], dtype=np.float64) * mm
    sound = bool(np.isfinite(pixdim).all() and (pixdim > 0).all())
    repaired = np.where(np.isfinite(pixdim) & (pixdim != 0), np.abs(pixdim), 1.0)
    stored_text = _mm_text(pixdim)
    affine, trusted = _affine(raw, repaired, mm), bool(raw["sform_code"] > 0 or raw["qform_code"] > 0)
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
    sizes = _mm_text(norms) + ("" if mm == 1 else f" mm, stored in {unit} (xyzt_units)")
    if norms.min() < MIN_SPACING or norms.max() > MAX_SPACING:
        limits = f"{MIN_SPACING:g} to {MAX_SPACING:g} mm"
        raise RejectedInput("implausible_spacing", path, f"expected voxels of {limits}, found {sizes}")
    if mm != 1:
        warnings.append(f"unit: {path.name}: voxels of {sizes}")
    if trusted:
        warnings += _forms_that_differ(path, raw)
    return {
        "affine": affine,
        "grid": grid,
        "trusted": trusted,
        "ornt": axis_assignment(grid, axes) if trusted and axes is not None else axis_assignment(grid),
        "spacing": tuple(float(value) for value in norms),
        "warnings": warnings,
    }


def _mm_text(lengths: np.ndarray) -> str:
    return " x ".join(f"{value:g}" for value in lengths)


def _forms_that_differ(path: Path, raw: nib.Nifti1Header) -> list[str]:
    """A warning where sform and qform say different sides: of one space any other axes, of two spaces a mirror."""
    codes = int(raw["sform_code"]), int(raw["qform_code"])
    if min(codes) <= 0:
        return []
    try:
        sform, qform = raw.get_sform(), raw.get_qform()
    except (ValueError, nib.spatialimages.HeaderDataError):  # quaternion longer than 1: unusable, and not used
        return []
    if not (_is_regular(sform) and _is_regular(qform)):
        return []
    mirrored = np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0
    if not mirrored and (codes[0] != codes[1] or is_same_way(axis_assignment(qform, sform))):
        return []
    first, second = (letters(axis_assignment(form)) for form in (sform, qform))
    text = f"sform says {first} (code {codes[0]}), qform {second} (code {codes[1]}); the sform is used"
    return [f"form_mismatch: {path.name}: {text}"]


def _affine(raw: nib.Nifti1Header, spacing: np.ndarray, mm: float) -> np.ndarray:
    """sform, else qform, else what other tools assume (first axis reversed, origin at the centre); may be singular.

    Args:
        raw: the header.
        spacing: voxel size, repaired, mm.
        mm: of one unit of length of the file.
    """
    repaired = raw.copy()
    repaired["pixdim"][1:4] = spacing / mm
    try:
        if raw["sform_code"] > 0:
            affine = raw.get_sform()
        else:
            affine = repaired.get_qform() if raw["qform_code"] > 0 else repaired.get_base_affine()
    except (ValueError, nib.spatialimages.HeaderDataError):  # quaternion longer than 1
        return np.full((4, 4), np.nan)
    affine[:3] *= mm
    return affine


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


def _plain(values: Iterable[float]) -> list[float | None]:
    """Numbers that JSON can hold: None for NaN and infinity."""
    return [float(value) if math.isfinite(value) else None for value in values]
