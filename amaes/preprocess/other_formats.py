"""What a file is that is no NIfTI file, and what to do about it: for messages."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_DICOM = "DICOM; dcm2niix turns a series into NIfTI"
_MGH = "a FreeSurfer volume (MGH); mri_convert FILE NEW.nii.gz turns it into NIfTI"
_PAGE = "a web page, such as an error message in place of a download; download it again"
_ANNEX = "a git-annex pointer without its content; git annex get FILE fetches it"
_STARTS = {  # in lower case, after white space
    b"version https://git-lfs": "a Git LFS pointer without its content; git lfs pull fetches it",
    b"version https://hawser": "a Git LFS pointer without its content; git lfs pull fetches it",
    b"<!doctype": _PAGE,
    b"<html": _PAGE,
    b"<head": _PAGE,
    b"<?xml": "an XML document, such as an error message in place of a download; download it again",
    b"{": "JSON",
    b"nrrd": "an NRRD volume",
    b"objecttype": "a MetaImage header",
    b"\x89hdf": "HDF5, such as MINC; mnc2nii turns MINC into NIfTI",
    b"cdf": "MINC; mnc2nii turns it into NIfTI",
    b"pk\x03\x04": "a zip archive; unpack it",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"bzh": "bzip2 data; unpack it",
    b"\xfd7zxz": "xz data; unpack it",
    b"(\xb5/\xfd": "zstd data; unpack it",
    b"\x00\x00\x00\x01\x00\x00": _MGH,  # version 1, then the first side as a big-endian number below 65536
}
_ENDINGS = {
    ".mgz": _MGH,
    ".mgh": _MGH,
    ".dcm": _DICOM,
    ".ima": _DICOM,
    ".img": "the half of a pair; nib-convert or fslchfiletype NIFTI_GZ makes one file of it",
    ".hdr": "the half of a pair; nib-convert or fslchfiletype NIFTI_GZ makes one file of it",
    ".mnc": "MINC; mnc2nii turns it into NIfTI",
}
START = 512  # bytes that `kind_of` wants to see


def kind_of(start: bytes) -> str | None:
    """What a file is that begins with these bytes, and what to do; None where that is not known."""
    if start[128:132] == b"DICM":
        return _DICOM
    if start[257:262] == b"ustar":
        return "a tar archive; unpack it"
    text = start.lstrip(b" \t\r\n\xef\xbb\xbf").lower()
    if re.match(rb"[./\\]*(git[/\\])?annex[/\\]objects[/\\]", text):  # also a link that was stored as a text
        return _ANNEX
    return next((kind for beginning, kind in _STARTS.items() if text.startswith(beginning)), None)


def has_known_format(path: Path) -> bool:
    """The name's ending is that of scans in another format, which has a known way to NIfTI."""
    return path.suffix.lower() in _ENDINGS


def kind_by_name(paths: Iterable[Path]) -> str:
    """For an error that lists these files: "; .mgz is ..." for each ending that has a known way to NIfTI."""
    endings = dict.fromkeys(path.suffix.lower() for path in paths)
    return "".join(f"; {ending} is {_ENDINGS[ending]}" for ending in endings if ending in _ENDINGS)


def missing(path: Path) -> str:
    """Why there is no file of that name: where a link leads, or that there is none."""
    if not path.is_symlink():
        return f"no such file ({path})" if not path.exists() else f"no file but a folder or device ({path})"
    target = path.readlink()
    if "annex/objects" in target.as_posix():
        return "a git-annex link whose content is not here; git annex get FILE (or datalad get FILE) fetches it"
    return f"a link to {target}, which does not exist"
