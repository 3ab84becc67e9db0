"""Files that say two things, that are something else, or whose name no store can hold."""

import gzip
import json
import os
import struct
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest

from amaes.data.store import Store
from amaes.preprocess import nifti
from amaes.preprocess.__main__ import main
from amaes.preprocess.case import preprocess_case
from amaes.preprocess.config import Config
from amaes.preprocess.nifti_header import RejectedInput
from amaes.preprocess.orientation import axis_assignment
from amaes.preprocess.read_case import read_label
from amaes.preprocess.report import with_remedy
from tests.conftest import AFFINE, SHAPE, make_volume, save_nifti


def short(*values):
    return struct.pack(f"<{len(values)}h", *values)


# Headers that contradict the file -------------------------------------------------------------------------------------

SIZE = 12 * 14 * 10 * 4  # bytes of float32
CONTRADICTIONS = {
    "smaller type": ({70: short(4)}, b"", f"header says {SIZE // 2} bytes of data, file has {SIZE}"),
    "smallest type": ({70: short(2)}, b"", f"header says {SIZE // 4} bytes of data, file has {SIZE}"),
    "fewer planes": ({46: short(7)}, b"", f"header says {SIZE * 7 // 10} bytes of data, file has {SIZE}"),
    "shorter rows": ({42: short(11)}, b"", f"header says {SIZE * 11 // 12} bytes of data, file has {SIZE}"),
    "offset into the data": (
        {108: struct.pack("<f", 352 + 4000), 46: short(7)},
        b"",
        "data begin at byte 4352, found other data than extensions before that",
    ),
    "bytes behind": ({}, bytes(511) + b"x", f"header says {SIZE} bytes of data, file has {SIZE + 512}"),
    "many zeros behind": ({}, bytes(513), f"header says {SIZE} bytes of data, file has {SIZE + 513}"),
    "larger type": ({70: short(64)}, b"", f"expected {2 * SIZE} bytes of data"),
    "more planes": ({46: short(11)}, b"", f"expected {SIZE * 11 // 10} bytes of data"),
    "padding": ({}, bytes(512), None),
    "none": ({}, b"", None),
}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_a_header_that_contradicts_its_file_is_refused(kind, suffix, nifti_file):
    patch, behind, message = CONTRADICTIONS[kind]
    stored = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    content = nifti_file("a.nii", stored, patch=patch).read_bytes() + behind
    path = nifti_file("b" + suffix)
    path.write_bytes(gzip.compress(content) if suffix == ".nii.gz" else content)
    if message is None:
        assert np.array_equal(np.sort(nifti.read_nifti(path)[1], axis=None), np.sort(stored, axis=None))
        return
    with pytest.raises(RejectedInput, match=message):
        nifti.read_nifti(path)


@pytest.mark.parametrize("bits", [0, 8, 16, 32, 64, -1])
def test_two_sizes_of_a_voxel_are_a_warning_or_with_verify_a_fault(bits, nifti_file):
    path = nifti_file("a.nii.gz", patch={72: short(bits)})  # float32
    header, data = nifti.read_nifti(path)
    assert np.array_equal(nifti.to_stored_axes(data, header.ornt), make_volume())
    assert [warning for warning in header.warnings if warning.startswith("bitpix: a.nii.gz: ")] == header.warnings
    assert bool(header.warnings) == (bits not in (0, 32))
    if header.warnings:
        with pytest.raises(
            RejectedInput, match=rf"header says {bits} bits per voxel \(bitpix\), but a data type of 32"
        ):
            nifti.read_nifti(path, verify=True)
    else:
        nifti.read_nifti(path, verify=True)


def test_extensions_lie_between_header_and_data(tmp_path):
    image = nib.Nifti1Image(make_volume(), AFFINE)
    for text in (b"a comment", b"and another that is longer"):
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", text))
    nib.save(image, tmp_path / "a.nii.gz")
    header, data = nifti.read_nifti(tmp_path / "a.nii.gz")
    assert header.offset > 352
    assert np.array_equal(nifti.to_stored_axes(data, header.ornt), make_volume())


# sform and qform ------------------------------------------------------------------------------------------------------

FLIPPED = AFFINE * [[-1], [1], [1], [1]]
EXCHANGED = AFFINE[[1, 0, 2, 3]] * [[-1], [1], [1], [1]]  # of the same handedness
TILTED = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, -0.1, 0.1) @ AFFINE[:3, :3], AFFINE[:3, 3])
FORMS = {  # sform's code, qform's code, qform, what the warning says
    "one flip": (1, 1, FLIPPED, "sform says LPS (code 1), qform RPS (code 1)"),
    "a flip between spaces": (4, 1, FLIPPED, "sform says LPS (code 4), qform RPS (code 1)"),
    "other axes": (2, 2, EXCHANGED, "sform says LPS (code 2), qform"),
    "other axes in another space": (4, 1, EXCHANGED, None),
    "tilted": (1, 1, TILTED, None),
    "equal": (1, 1, AFFINE, None),
    "no qform": (1, 0, FLIPPED, None),
    "no sform": (0, 1, FLIPPED, None),
}


@pytest.mark.parametrize("kind", FORMS)
def test_sform_and_qform_that_differ_are_both_named(kind, tmp_path):
    sform_code, qform_code, qform, said = FORMS[kind]
    image = nib.Nifti1Image(make_volume(), AFFINE)
    image.set_qform(qform, qform_code)
    image.set_sform(AFFINE, sform_code)
    nib.save(image, tmp_path / "a.nii")
    header, _ = nifti.read_nifti(tmp_path / "a.nii")
    found = [warning for warning in header.warnings if warning.startswith("form_mismatch")]
    assert len(found) == (said is not None)
    assert said is None or (said in found[0] and found[0].endswith("the sform is used"))
    np.testing.assert_allclose(header.affine, AFFINE if sform_code else qform, atol=1e-4)


# Units ----------------------------------------------------------------------------------------------------------------

UNITS = {  # code, how many of the unit are 1 mm
    "micron": (3, 1000),
    "metre": (1, 0.001),
    "mm": (2, 1),
    "mm and seconds": (2 | 8, 1),
    "micron and ms": (3 | 16, 1000),
    "unknown": (0, 1),
}


@pytest.mark.parametrize("form", ["sform", "qform", "neither"])
@pytest.mark.parametrize("unit", UNITS)
def test_lengths_in_other_units_become_mm(unit, form, nifti_file):
    code, per_mm = UNITS[unit]
    affine = np.diag([per_mm, per_mm, per_mm, 1]) @ AFFINE
    codes = {"sform": int(form == "sform"), "qform": int(form == "qform")}
    header, _ = nifti.read_nifti(nifti_file("a.nii.gz", affine=affine, **codes, patch={123: bytes([code])}))
    assert header.spacing == pytest.approx((1.5, 1.25, 2.0), rel=1e-5)
    if form != "neither":
        np.testing.assert_allclose(header.affine, AFFINE, atol=1e-4)
    said = [warning for warning in header.warnings if warning.startswith("unit: ")]
    assert len(said) == (per_mm != 1)
    assert per_mm == 1 or unit.split()[0] in said[0]


@pytest.mark.parametrize(("code", "unit", "found"), [(3, "micron", "0.0015 x 0.00125"), (1, "metre", "1500 x 1250")])
def test_voxels_that_are_too_small_or_too_large_name_their_unit(code, unit, found, nifti_file):
    with pytest.raises(RejectedInput, match=rf"found {found} x .* mm, stored in {unit} \(xyzt_units\)"):
        nifti.read_nifti(nifti_file("a.nii", patch={123: bytes([code])}))


def test_the_prediction_is_in_the_unit_of_the_file(nifti_file, tmp_path):
    source = nifti_file("a.nii", affine=np.diag([1000, 1000, 1000, 1]) @ AFFINE, patch={123: b"\x03"})
    nifti.write_like(tmp_path / "out.nii", np.zeros(SHAPE, dtype=int), preprocess_case([source], Config()).properties)
    first, second = nib.load(source).header, nib.load(tmp_path / "out.nii").header
    assert second.get_xyzt_units()[0] == "micron"
    assert np.array_equal(first.get_sform(), second.get_sform())


# Scans turned by 45 degrees -------------------------------------------------------------------------------------------

TIES = [(k, angle) for k in range(3) for angle in (45, 135, -45)]  # axis of the turn, degrees


@pytest.mark.parametrize("change", [0, 1e-7])
@pytest.mark.parametrize(("axis", "angle"), TIES)
def test_image_and_label_of_a_tie_lie_on_one_grid(axis, angle, change, nifti_file):
    """Rounding must not decide along which axes a label is stored; nor may the order in which its axes are stored."""
    angles = np.zeros(3)
    angles[axis] = np.deg2rad(angle)
    affine = nib.affines.from_matvec(nib.eulerangles.euler2mat(*angles[::-1]) @ np.diag([1.5, 1.25, 2]), [5, -7, 9])
    ras = make_volume()
    label = (ras > 500).astype(np.uint8)
    noise = np.random.default_rng(3).choice([-1, 1], (4, 4)) * change
    noise[3] = 0
    header, image = nifti.read_nifti(nifti_file("image.nii", ras, affine))
    for order in permutations(range(3)):
        for signs in ([1, 1, 1], [-1, 1, -1]):
            turned = affine + noise
            stored = nifti.to_stored_axes(label, ornt := np.column_stack([np.argsort(order), signs]))
            turned = turned @ np.linalg.inv(nib.orientations.inv_ornt_aff(ornt, stored.shape))
            found, values = read_label(nifti_file("label.nii", stored, turned), header, Config(), [])
            assert values == [0, 1]
            assert np.array_equal(found, image > 500)


@pytest.mark.parametrize(("axis", "angle"), TIES)
def test_a_tie_stored_in_any_order_is_the_same_volume_in_ras(axis, angle):
    """Six orders of the axes, each with every one of eight signs: one array and one affine, whatever the order."""
    angles = np.zeros(3)
    angles[axis] = np.deg2rad(angle)
    affine = nib.affines.from_matvec(nib.eulerangles.euler2mat(*angles[::-1]) @ np.diag([1.5, 1.25, 2]), [5, -7, 9])
    volume, found = make_volume(), []
    for order in permutations(range(3)):
        for signs in product([1, -1], repeat=3):
            ornt = np.column_stack([np.argsort(order), signs])
            stored = nifti.to_stored_axes(volume, ornt)
            turned = affine @ np.linalg.inv(nib.orientations.inv_ornt_aff(ornt, stored.shape))
            turned[:3] += np.random.default_rng(len(found)).uniform(-1e-7, 1e-7, (3, 4))  # as rounding does
            axes = axis_assignment(turned)
            found.append((nifti.to_ras(stored, axes), turned @ nib.orientations.inv_ornt_aff(axes, stored.shape)))
    assert len(found) == 48
    for array, grid in found[1:]:
        assert np.array_equal(array, found[0][0])
        np.testing.assert_allclose(grid, found[0][1], atol=1e-4)
    assert (np.diag(found[0][1])[:3] > -1e-4).all()  # no axis points away from its own


# Names ----------------------------------------------------------------------------------------------------------------

UNPRINTABLE = {
    "no-break space": b"a\xc2\xa0b",
    "newline": b"a\nb",
    "tab": b"a\tb",
    "not UTF-8": b"a\xff\xfeb",
    "zero width": b"a\xe2\x80\x8bb",
    "right to left": b"a\xe2\x80\xaeb",
    "escape": b"a\x1b[31mb",
}


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("kind", UNPRINTABLE)
def test_a_name_that_cannot_be_printed_is_rejected_and_the_rest_kept(kind, as_folder, tmp_path, capsys):
    save_nifti(tmp_path / "in/good.nii")
    odd = b"in/" + UNPRINTABLE[kind] + (b"/scan.nii" if as_folder else b".nii")
    path = tmp_path / os.fsdecode(odd)
    try:
        path.parent.mkdir(exist_ok=True)
        save_nifti(tmp_path / "x.nii").rename(path)
    except (OSError, UnicodeError):
        pytest.skip("the file system refuses such names")
    arguments = ["--images", str(tmp_path / "in"), "--out", str(tmp_path / "s"), "--workers", "0"]
    assert main(arguments) == 1
    assert "1 ok, 0 skipped, 1 rejected" in capsys.readouterr().out
    assert [case.id for case in Store(tmp_path / "s").cases] == ["good"]
    rows = [json.loads(line) for line in (tmp_path / "s/report.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["status"] != "ok"]
    assert row["reason"] == "bad_name"
    assert "cannot be printed; rename the file or its folder" in row["message"]
    assert row["message"].isprintable()


@pytest.mark.parametrize("name", ["ä ö", "受試者", "a b", "it's (1)", "a&b;c", "-x", "🧠"])
def test_names_of_every_script_are_kept(name, tmp_path):
    save_nifti(tmp_path / f"in/{name}.nii")
    assert main(["--images", str(tmp_path / "in"), "--out", str(tmp_path / "s"), "--workers", "0"]) == 0
    assert [case.id for case in Store(tmp_path / "s").cases] == [name]


# What is no NIfTI file ------------------------------------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
OTHERS = {
    "lfs": (LFS, "Git LFS pointer"),
    "annex": (b"/annex/objects/MD5E-s1234--abc.nii.gz\n", "git annex get"),
    "annex link of Windows": (b"..\\.git\\annex\\objects\\xy\\MD5E-s1234", "git annex get"),
    "annex link as text": (b"../../.git/annex/objects/xy/MD5E-s1234--abc.nii.gz", "git annex get"),
    "web page": (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "web page"),
    "web page of one tag": (b"\xef\xbb\xbf<HTML>Please log in</HTML>", "web page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML"),
    "json": (b'{"error": "no such file"}', "JSON"),
    "zip": (b"PK\x03\x04" + bytes(40), "zip archive"),
    "tar": (bytes(257) + b"ustar" + bytes(300), "tar archive"),
    "dicom": (bytes(128) + b"DICM" + bytes(300), "dcm2niix"),
    "mgh": (struct.pack(">7i", 1, 256, 200, 180, 1, 3, 0) + bytes(300), "mri_convert"),
    "nrrd": (b"NRRD0004\ntype: short\n", "NRRD"),
}


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_that_is_something_else_says_what_it_is(kind, name, tmp_path):
    content, said = OTHERS[kind]
    for suffix_fits, stored in ((name == "a.nii", content), (name == "a.nii.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(stored)
        with pytest.raises(RejectedInput, match=said) as caught:
            nifti.read_nifti(tmp_path / name)
        assert caught.value.code == "not_nifti", suffix_fits
        assert "rename" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("../.git/annex/objects/1x/MD5E-s1--a.nii.gz/MD5E-s1--a.nii.gz", "git annex get FILE"),
        ("/nowhere/scan.nii.gz", "a link to /nowhere/scan.nii.gz, which does not exist"),
        ("a.nii.gz", "a link to a.nii.gz"),  # to itself
        (None, "no such file"),
    ],
)
def test_a_link_that_leads_nowhere_says_where(target, said, tmp_path):
    path = tmp_path / "a.nii.gz"
    if target is not None:
        path.symlink_to(target)
    with pytest.raises(RejectedInput, match=said) as caught:
        nifti.read_nifti(path)
    assert caught.value.code == "missing_file"


# NaN background -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["image", "label", "second channel", "infinite"])
def test_nan_background_zero_takes_nan_as_0(which, nifti_file):
    scan, label = make_volume(), (make_volume() > 500).astype(np.float32)
    outside = scan == 0
    holed, holed_label = np.where(outside, np.nan, scan), np.where(outside, np.nan, label)
    if which == "infinite":
        holed[outside] = np.inf
    sound = [nifti_file("scan.nii", scan), nifti_file("more.nii", scan)]
    images = {"label": sound, "second channel": [sound[0], nifti_file("more_nan.nii", holed)]}
    images = images.get(which, [nifti_file("nan.nii", holed), sound[1]])
    label_file = nifti_file("label_nan.nii", holed_label) if which == "label" else nifti_file("label.nii", label)
    with pytest.raises(RejectedInput) as caught:
        preprocess_case(images, Config(), label_file)
    assert caught.value.code == "nonfinite_many"
    assert "`nan_background` zero takes NaN as 0, as SPM" in with_remedy(caught.value.code, str(caught.value))
    if which == "infinite":  # no statistics package means 0 by it
        with pytest.raises(RejectedInput, match="NaN or infinite"):
            preprocess_case(images, Config(nan_background="zero"), label_file)
        return
    found = preprocess_case(images, Config(nan_background="zero"), label_file)
    expected = preprocess_case(sound, Config(), nifti_file("label.nii", label))
    assert np.array_equal(found.image, expected.image)
    assert np.array_equal(found.label, expected.label)
    count = np.count_nonzero(outside)
    assert any(text.startswith("nan_background: ") and f"{count} NaN" in text for text in found.properties["warnings"])
    assert Config(nan_background="zero").hash() != Config().hash()
