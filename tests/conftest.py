"""NIfTI files for tests: sound ones, and one for each fault that preprocessing names."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

# Before torch is imported: threads that wait for one another sleep. Where other programs run too, spinning makes the
# suite several times slower; the training scripts started by tests inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes that share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SHAPE = (12, 14, 10)  # three different sides
AFFINE = np.array([[-1.5, 0, 0, 40], [0, -1.25, 0, 50], [0, 0, 2.0, -60], [0, 0, 0, 1]])  # L-P-S, mm


def make_volume(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    """Integers 1..999 inside a box, 0 in its margin of one voxel: float32."""
    volume = np.zeros(shape, dtype=np.float32)
    inside = tuple(slice(1, n - 1) for n in shape)
    volume[inside] = np.random.default_rng(seed).integers(1, 1000, [n - 2 for n in shape])
    return volume


def save_nifti(
    path: Path,
    data: np.ndarray | None = None,
    affine: np.ndarray = AFFINE,
    *,
    dtype: str | None = None,
    sform: int = 1,
    qform: int = 1,
    patch: dict[int, bytes] | None = None,
) -> Path:
    """Write a volume; `patch` replaces header bytes ({offset: bytes}) afterwards, where nibabel repairs nothing."""
    data = make_volume() if data is None else data
    image = nib.Nifti1Image(data.astype(dtype or data.dtype), affine)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    image.header.set_xyzt_units("mm", "sec")
    content = bytearray(image.to_bytes())
    for offset, new in (patch or {}).items():
        content[offset : offset + len(new)] = new
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(bytes(content), 1, mtime=0) if path.name.lower().endswith(".gz") else bytes(content))
    return path


@pytest.fixture
def volume():
    """Function: a small volume, `volume(shape, seed)`."""
    return make_volume


@pytest.fixture
def nifti_file(tmp_path):
    """Function: write a NIfTI file below the test's folder, `nifti_file("a/b.nii.gz", data, affine, ...)`."""

    def write(name: str, *arguments, **options) -> Path:
        return save_nifti(tmp_path / name, *arguments, **options)

    return write


@pytest.fixture
def bad_files(tmp_path):
    """{reason code: image file that has this fault}, all in one folder."""
    folder = tmp_path / "bad"
    folder.mkdir()
    good = make_volume()
    nan = good.copy()
    nan[2:6, 2:6, 2:6] = np.nan
    tiny = np.zeros(SHAPE, dtype=np.float32)
    tiny[2:9, 2:9, 2:9] = 1e-45
    tiny[3:6, 3:6, 3:6] = 3e-45
    tiny[7, 7, 7] = 6e-45
    missing = folder / "missing_file.nii.gz"
    missing.symlink_to(folder / "nowhere")
    (folder / "empty_file.nii.gz").touch()
    save_nifti(folder / "plain.nii").rename(folder / "not_gzip.nii.gz")
    whole = save_nifti(folder / "whole.nii.gz").read_bytes()
    (folder / "whole.nii.gz").unlink()
    (folder / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "corrupt_gzip.nii.gz").write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])
    zero, ones = struct.pack("<f", 0.0), struct.pack("<3f", 1, 1, 1)
    save_nifti(folder / "bad_header.nii.gz", patch={70: struct.pack("<h", 32)})  # complex64
    save_nifti(folder / "bad_ndim.nii.gz", np.stack([good, good], axis=3))
    save_nifti(folder / "too_small.nii.gz", good[:, :, 4:6])
    save_nifti(folder / "bad_spacing.nii.gz", sform=0, patch={80: zero})
    save_nifti(folder / "implausible_spacing.nii.gz", affine=AFFINE * [[25], [1], [1], [1]])
    save_nifti(folder / "singular_affine.nii.gz", patch={280: bytes(16)})  # srow_x = 0
    save_nifti(folder / "no_orientation.nii.gz", sform=0, qform=0, patch={80: ones})
    save_nifti(folder / "nonfinite_many.nii.gz", nan)
    save_nifti(folder / "empty_volume.nii.gz", np.zeros(SHAPE, dtype=np.float32))
    save_nifti(folder / "constant_foreground.nii.gz", (good > 500).astype(np.float32))
    save_nifti(folder / "degenerate_range.nii.gz", tiny)
    return {path.name.split(".")[0]: path for path in sorted(folder.iterdir())}


LONGEST = ("tests/training/test_faults.py", "tests/training/test_train.py", "tests/test_benchmarks.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: where two processes share the tests, neither is left with one of them at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
