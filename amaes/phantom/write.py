"""Synthetic heads as NIfTI files, and as the store that training on `demo` data uses."""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np

from amaes.phantom.scan import phantom
from amaes.phantom.tables import LABELS, SCANNERS, SIGNAL, Scanner
from amaes.preprocess.config import Config
from amaes.preprocess.find_cases import collect
from amaes.preprocess.write_store import write_store

DEMO = {"subjects": 12, "fov": 96.0}  # the heads of `make_demo_data`


def write_phantoms(
    folder: Path,
    subjects: int,
    seed: int = 0,
    *,
    sequences: Sequence[str] = tuple(SIGNAL),
    labels: bool = False,
    fov: float = 64.0,
    first: int = 1,
) -> Path:
    """Write `images/sub-0001_FLAIR.nii.gz`, ..., with `labels` the same names in `labels/`, and a dataset.json.

    Subjects take the SCANNERS in turn. The folder appears complete or not at all.

    Args:
        folder: new or empty, or written before by the same call, which is then left as it is.
        subjects: number of heads.
        seed: of the set, >= 0.
        sequences: scans of each head, keys of SIGNAL.
        labels: also write label maps, values as in LABELS.
        fov: field of view, mm.
        first: number of the first subject; sets that must not share a head take different ones.

    Raises:
        ValueError: the folder holds something else.
    """
    settings = {
        "subjects": subjects,
        "seed": seed,
        "sequences": list(sequences),
        "labels": labels,
        "fov": float(fov),
        "first": first,
    }
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        record = folder / "dataset.json"
        if record.is_file() and json.loads(record.read_text()).get("phantoms") == settings:
            return folder
        raise ValueError(f"{folder}: not empty, and not this set of phantoms; take another folder or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        new.chmod(0o755)  # mkdtemp hides it from everyone else
        for path, content in _files(settings):
            (new / path).parent.mkdir(exist_ok=True)
            (new / path).write_bytes(content)
        names = {str(value): name for value, name in LABELS.items()} if labels else {}
        content = {"name": "synthetic heads", "labels": names, "phantoms": settings}
        (new / "dataset.json").write_text(json.dumps(content, indent=1) + "\n")
        new.rename(folder)
    except OSError:
        if not (folder / "dataset.json").is_file():  # else another process was faster
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def _files(settings: dict) -> Iterator[tuple[str, bytes]]:
    """Path in the folder and content of every scan and label map; the settings are those of `write_phantoms`."""
    subjects = range(settings["first"], settings["first"] + settings["subjects"])
    for subject, (turn, sequence) in product(subjects, enumerate(settings["sequences"])):
        scanner = SCANNERS[(subject + turn) % len(SCANNERS)]
        drawn = phantom(settings["seed"], subject, sequence, scanner, fov=settings["fov"])
        name = f"sub-{subject:04d}_{sequence}.nii.gz"
        yield f"images/{name}", _nifti(drawn.image, drawn.affine, scanner)
        if settings["labels"]:
            yield f"labels/{name}", _nifti(drawn.label, drawn.affine, replace(scanner, dtype="uint8", slope=1.0))


def _nifti(values: np.ndarray, affine: np.ndarray, scanner: Scanner) -> bytes:
    """A gzipped NIfTI file; the same bytes for the same arguments (no time stamp)."""
    is_integer = np.issubdtype(scanner.dtype, np.integer)
    if is_integer:
        limits = np.iinfo(scanner.dtype)
        values = np.rint(values / scanner.slope).clip(limits.min, limits.max)
    image = nib.Nifti1Image(values.astype(scanner.dtype), affine)
    image.set_qform(affine, code=int(scanner.form != "sform"))
    image.set_sform(affine, code=int(scanner.form != "qform"))
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"synthetic head"
    if is_integer:
        image.header.set_slope_inter(scanner.slope, 0)
    return gzip.compress(image.to_bytes(), compresslevel=4, mtime=0)


def make_demo_data(folder: Path, labels: bool = False) -> Path:
    """Write the store that training on `demo` data uses, three scans of each of 12 heads; does nothing where it is.

    Args:
        folder: gets the scans and the store.
        labels: with label maps, in folders of their own.

    Returns:
        The folder of the store.
    """
    kind = "labelled-" if labels else ""
    heads = write_phantoms(folder / f"{kind}phantoms", labels=labels, **DEMO)
    cases = collect(heads / "images", heads / "labels" if labels else None)
    result = write_store(cases, folder / f"{kind}store", Config())
    assert result.status() == 0, result.summary()
    return result.store
