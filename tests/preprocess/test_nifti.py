"""Reading, turning and writing NIfTI files."""

import gzip
import itertools
import struct

import nibabel as nib
import numpy as np
import pytest

from amaes.preprocess import nifti
from amaes.preprocess.case import preprocess_case
from amaes.preprocess.config import Config
from tests.conftest import AFFINE, SHAPE, make_volume

TURNS = [
    np.column_stack([order, signs])
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.2, -0.15, 0.3) @ np.diag([0.9, 1.1, 3.0]) @ [[0, -1, 0], [0, 0, 1], [1, 0, 0]],
    [11, -7, 30],
)


def stored_as(ras, affine, ornt):
    """A RAS volume as a file would hold it whose axes are turned by `ornt`, and that file's affine."""
    return nifti.to_stored_axes(ras, ornt), affine @ np.linalg.inv(
        nib.orientations.inv_ornt_aff(ornt, nifti.to_stored_axes(ras, ornt).shape)
    )


@pytest.mark.parametrize("ornt", TURNS, ids=lambda ornt: "".join(map(str, ornt.ravel())))
def test_every_orientation_gives_one_array_and_turns_back(ornt, nifti_file):
    ras = np.arange(3 * 4 * 5, dtype=np.float32).reshape(3, 4, 5)
    stored, affine = stored_as(ras, np.diag([1.0, 2.0, 3.0, 1.0]), ornt)
    header, data = nifti.read_nifti(nifti_file("a.nii", stored, affine))
    assert np.array_equal(data, ras)
    assert header.ras_shape == (3, 4, 5)
    assert header.ras_spacing == pytest.approx((1, 2, 3))
    np.testing.assert_allclose(header.ras_grid, np.diag([1.0, 2.0, 3.0, 1.0]), atol=1e-5)
    assert np.array_equal(nifti.to_stored_axes(data, header.ornt), stored)


def test_oblique_scan_is_turned_but_not_rotated(nifti_file, volume):
    stored = volume()
    header, data = nifti.read_nifti(nifti_file("a.nii.gz", stored, OBLIQUE, qform=0))
    assert sorted(data.shape) == sorted(stored.shape)
    assert np.array_equal(np.sort(data, axis=None), np.sort(stored, axis=None))
    assert np.array_equal(nifti.to_stored_axes(data, header.ornt), stored)
    reference = nib.as_closest_canonical(nib.Nifti1Image(stored, OBLIQUE))
    assert np.array_equal(data, reference.get_fdata())
    np.testing.assert_allclose(header.ras_grid, reference.affine, atol=1e-5)


@pytest.mark.parametrize("ornt", TURNS[::5], ids=str)
def test_preprocessing_does_not_depend_on_the_stored_orientation(ornt, nifti_file, volume):
    ras, affine = volume(), np.diag([1.5, 1.25, 2.0, 1.0])
    expected = preprocess_case([nifti_file("ras.nii.gz", ras, affine)], Config()).image
    stored, turned = stored_as(ras, affine, ornt)
    assert np.array_equal(preprocess_case([nifti_file("turned.nii.gz", stored, turned)], Config()).image, expected)


def big_endian(path):
    image = nib.Nifti1Image(make_volume(), AFFINE, nib.Nifti1Header(endianness=">"))
    image.set_data_dtype(">i2")
    nib.save(image, path)


def second_version(path):
    nib.save(nib.Nifti2Image(make_volume(), OBLIQUE), path)


def different_forms(path):
    image = nib.Nifti1Image(make_volume(), OBLIQUE)
    image.set_qform(AFFINE, 1)
    image.set_sform(OBLIQUE, 4)
    nib.save(image, path)


def trailing_axis(path):
    nib.save(nib.Nifti1Image(make_volume()[..., None], AFFINE), path)


def only(sform, qform, affine):
    def write(path):
        image = nib.Nifti1Image(make_volume(), affine)
        image.set_sform(affine, sform)
        image.set_qform(affine, qform)
        image.header.set_xyzt_units("mm", "msec")
        nib.save(image, path)

    return write


FILES = {
    "sform": only(2, 0, OBLIQUE),
    "qform": only(0, 3, AFFINE),
    "neither": only(0, 0, AFFINE),
    "two_forms": different_forms,
    "big_endian": big_endian,
    "nifti2": second_version,
    "trailing_axis": trailing_axis,
}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", FILES)
def test_labels_are_written_on_the_files_own_grid(kind, suffix, tmp_path):
    FILES[kind](tmp_path / f"scan{suffix}")
    source = nib.load(tmp_path / f"scan{suffix}")
    properties = preprocess_case([tmp_path / f"scan{suffix}"], Config()).properties
    labels = np.random.default_rng(1).integers(0, 4, source.shape[:3])
    nifti.write_like(tmp_path / f"out{suffix}", labels, properties)
    written = nib.load(tmp_path / f"out{suffix}")
    assert written.shape == source.shape
    assert written.affine.tobytes() == source.affine.tobytes()
    assert np.array_equal(written.get_fdata().reshape(labels.shape), labels)
    assert written.get_data_dtype() == np.uint8
    for field in (
        "pixdim",
        "sform_code",
        "qform_code",
        "xyzt_units",
        "srow_x",
        "srow_y",
        "srow_z",
        "quatern_b",
        "qoffset_x",
    ):
        np.testing.assert_array_equal(written.header[field], source.header[field])
    assert (written.dataobj.slope, written.dataobj.inter) == (1, 0)
    assert written.header.get_xyzt_units() == source.header.get_xyzt_units()


def test_more_than_255_classes_need_two_bytes(nifti_file, tmp_path):
    properties = preprocess_case([nifti_file("a.nii")], Config()).properties
    labels = np.zeros(SHAPE, dtype=np.int64)
    labels[3, 4, 5] = 300
    nifti.write_like(tmp_path / "out.nii.gz", labels, properties)
    written = nib.load(tmp_path / "out.nii.gz")
    assert written.get_data_dtype() == np.uint16
    assert np.asarray(written.dataobj)[3, 4, 5] == 300


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("out.nii", np.zeros((14, 12, 10), dtype=int), r"out.nii: labels have shape \(14, 12, 10\)"),
        ("out.nii", np.full(SHAPE, -1), "0..65535"),
        ("out.mha", np.zeros(SHAPE, dtype=int), ".nii or .nii.gz"),
    ],
)
def test_writing_refuses_what_does_not_fit(name, labels, message, nifti_file, tmp_path):
    properties = preprocess_case([nifti_file("a.nii")], Config()).properties
    with pytest.raises(ValueError, match=message):
        nifti.write_like(tmp_path / name, labels, properties)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".NII.GZ"])
def test_slope_and_intercept_are_applied(suffix, nifti_file):
    stored = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    patch = {112: struct.pack("<2f", 0.5, -3)}
    _, data = nifti.read_nifti(nifti_file(f"a{suffix}", stored, np.eye(4), patch=patch))
    assert np.array_equal(data, stored * 0.5 - 3)


@pytest.mark.parametrize("slope", [0.0, np.nan])
def test_no_slope_keeps_the_stored_type(slope, nifti_file):
    stored = np.arange(60, dtype=np.uint16).reshape(3, 4, 5)
    _, data = nifti.read_nifti(nifti_file("a.nii", stored, np.eye(4), patch={112: struct.pack("<2f", slope, 7)}))
    assert data.dtype == np.uint16
    assert np.array_equal(data, stored)


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_every_real_type_is_read(dtype, tmp_path):
    stored = np.arange(60).reshape(3, 4, 5).astype(dtype)
    nib.save(nib.Nifti1Image(stored, np.eye(4), dtype=dtype), tmp_path / "a.nii.gz")
    assert np.array_equal(nifti.read_nifti(tmp_path / "a.nii.gz")[1], stored)


def test_corner_distance_in_mm():
    moved = AFFINE.copy()
    moved[1, 3] += 2
    assert nifti.corner_distance(AFFINE, moved, SHAPE) == pytest.approx(2)
    wider = AFFINE.copy()
    wider[0, 0] *= 1.1  # -1.65 mm; voxel edges from -0.5 to 11.5: 0.15 * 11.5 at the far one
    assert nifti.corner_distance(AFFINE, wider, SHAPE) == pytest.approx(0.15 * 11.5)


@pytest.mark.parametrize(
    ("patch", "code"),
    [
        ({0: b"\x00\x00"}, "bad_header"),  # size of header
        ({40: struct.pack("<h", 9)}, "bad_header"),  # number of dimensions
        ({42: struct.pack("<h", 0)}, "bad_header"),
        ({42: struct.pack("<3h", 32000, 32000, 32000)}, "bad_header"),  # 65 TB are not reserved
        ({42: struct.pack("<3h", 900, 900, 900)}, "truncated"),  # more than the file can hold
        ({70: struct.pack("<h", 128)}, "bad_header"),  # RGB
        ({70: struct.pack("<h", 999)}, "bad_header"),
        ({108: struct.pack("<f", 0)}, "bad_header"),  # data would begin inside the header
        ({108: struct.pack("<f", np.nan)}, "bad_header"),
        ({112: struct.pack("<2f", 2, np.inf)}, "bad_header"),
        ({344: b"ni1\0"}, "bad_header"),
        ({344: b"n\0\0\0"}, "bad_header"),
        ({80: struct.pack("<f", np.nan), 252: bytes(2)}, "accepted"),
    ],
)
def test_damaged_headers_are_named(patch, code, nifti_file):
    path = nifti_file("damaged.nii.gz", patch=patch)
    if code == "accepted":  # the sform is sound
        assert nifti.read_nifti(path)[0].warnings[0].startswith("bad_spacing_repaired")
        return
    with pytest.raises(nifti.RejectedInput, match="^damaged.nii.gz: ") as caught:
        nifti.read_nifti(path)
    assert caught.value.code == code
    assert caught.value.path == path


def test_gzip_under_a_plain_name_says_so(nifti_file):
    path = nifti_file("a.nii.gz")
    path = path.rename(path.with_name("a.nii"))
    with pytest.raises(nifti.RejectedInput, match="rename it to .nii.gz"):
        nifti.read_nifti(path)


@pytest.mark.parametrize("keep", [100, 348, 360])
@pytest.mark.parametrize("compressed", [False, True])
def test_short_files_are_truncated(keep, compressed, nifti_file):
    path = nifti_file("a.nii")
    content = path.read_bytes()[:keep]
    path.write_bytes(content)
    if compressed:
        path = path.with_name("b.nii.gz")
        path.write_bytes(gzip.compress(content))
    with pytest.raises(nifti.RejectedInput) as caught:
        nifti.read_nifti(path)
    assert caught.value.code == "truncated"


def test_damage_within_the_stream_is_found(nifti_file):
    path = nifti_file("a.nii.gz", np.random.default_rng(0).random((20, 21, 22)))
    content = bytearray(path.read_bytes())
    content[2000:2100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(nifti.RejectedInput) as caught:
        nifti.read_nifti(path, verify=True)
    assert caught.value.code in ("truncated", "corrupt_gzip")
