"""One case: intensities, crop, channels, labels, every reason to refuse; then the command line."""

import json
import struct

import nibabel as nib
import numpy as np
import pytest

from amaes.preprocess import normalize
from amaes.preprocess.__main__ import main
from amaes.preprocess.case import preprocess_case
from amaes.preprocess.config import Config
from amaes.preprocess.nifti import RejectedInput
from tests.conftest import AFFINE, SHAPE, make_volume

ISO = np.diag([1.0, 1.0, 1.0, 1.0])  # 1 mm: nothing is resampled


def prepared(path, label=None, **options):
    return preprocess_case([path] if not isinstance(path, list) else path, Config(**options), label)


# Intensities ----------------------------------------------------------------------------------------------------------


def test_unit_is_clip_then_zscore_then_rescale():
    x = np.random.default_rng(0).gamma(2, 100, (20, 21, 22)).astype(np.float32)
    x[:5] = 0
    result, statistics = normalize.normalize(x)
    foreground = x[x != x.min()].astype(np.float64)
    q = np.quantile(foreground, 0.99)
    clipped = np.minimum(x.astype(np.float64), q)
    z = (clipped - clipped[x != x.min()].mean()) / clipped[x != x.min()].std()
    np.testing.assert_allclose(result, (z - z.min()) / (z.max() - z.min()), atol=1e-6)
    assert statistics["q99"] == pytest.approx(q, rel=1e-6)
    assert statistics["mean"] == pytest.approx(clipped[x != x.min()].mean(), rel=1e-6)
    assert statistics["n_foreground"] == foreground.size
    np.testing.assert_allclose(normalize.normalize(x, "zscore")[0], z, atol=1e-5)
    assert np.array_equal(normalize.normalize(x, "none")[0], x)


def test_unit_by_hand():
    x = np.zeros((2, 3, 4), dtype=np.float32)
    x.ravel()[:11] = range(10, 21)  # foreground 10, 11, ..., 20: rank 0.99 * 10 = 9.9, q = 19.9
    result, statistics = normalize.normalize(x)
    assert statistics["q99"] == pytest.approx(19.9)
    assert result.ravel()[:12] == pytest.approx([*(np.arange(10, 20) / 19.9), 1, 0])


@pytest.mark.parametrize("values", [(3, 500), (-70, 900), (0, 1e-3), (1e6, 3e9)])
def test_unit_range_is_exactly_0_to_1(values):
    x = np.random.default_rng(0).uniform(*values, (9, 10, 11)).astype(np.float32)
    result, _ = normalize.normalize(x)
    assert (result.min(), result.max()) == (0, 1)


# Foreground box -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("background", "box"),
    [
        (0, [[2, 5], [1, 7], [3, 9]]),  # > 0
        (-50, [[2, 5], [1, 7], [3, 9]]),  # negative values, hardly a zero: above the minimum
        (3, [[0, 8], [0, 9], [0, 10]]),  # > 0 is everything
    ],
)
def test_foreground_box(background, box):
    x = np.full((8, 9, 10), background, dtype=np.float32)
    x[2:5, 1:7, 3:9] = np.random.default_rng(0).uniform(10, 20, (3, 6, 6))
    assert normalize.foreground_box(x) == box


def test_negative_values_around_a_zero_background_are_foreground():
    x = np.zeros((8, 9, 10), dtype=np.float32)
    x[2:5, 1:7, 3:9] = 10
    x[6, 4, 4] = -3
    assert normalize.foreground_box(x) == [[2, 7], [1, 7], [3, 9]]


def test_crop_box_of_one_case(nifti_file):
    x = np.zeros((9, 10, 11), dtype=np.float32)
    x[2:6, 3:7, 1:9] = make_volume((6, 6, 10))[1:-1, 1:-1, 1:-1]
    path = nifti_file("a.nii", x, ISO)
    case = prepared(path)
    assert case.properties["crop_box"] == [[2, 6], [3, 7], [1, 9]]
    assert case.image.shape == (1, 4, 4, 8)
    assert prepared(path, crop_extra_plane=True).properties["crop_box"] == [[2, 7], [3, 8], [1, 10]]
    full = nifti_file("b.nii", make_volume((7, 8, 9))[1:, 1:, 1:], ISO)  # reaches no upper end
    assert prepared(full, crop_extra_plane=True).properties["crop_box"] == [[0, 6], [0, 7], [0, 8]]


def test_channels_share_the_union_of_their_boxes(nifti_file):
    first, second = np.zeros((2, 9, 10, 11), dtype=np.float32)
    first[2:5, 2:5, 2:5] = make_volume((5, 5, 5))[1:-1, 1:-1, 1:-1]
    second[4:8, 3:6, 1:4] = make_volume((6, 5, 5))[1:-1, 1:-1, 1:-1]
    paths = [nifti_file("a.nii", first, ISO), nifti_file("b.nii", second, ISO)]
    assert prepared(paths).properties["crop_box"] == [[2, 8], [2, 6], [1, 5]]
    assert prepared(paths, crop_from="first").properties["crop_box"] == [[2, 5], [2, 5], [2, 5]]


def test_negative_background_is_reported_and_can_be_set_to_the_minimum(nifti_file):
    x = make_volume((9, 10, 11))
    x[3, 4, 4:8] = -70
    x[2:7, 2:8, 2:3] = 0
    path = nifti_file("a.nii", x, ISO)
    kept, moved = prepared(path), prepared(path, background_to_min=True)
    assert kept.properties["warnings"][0].startswith("background_not_min: a.nii: most frequent value 0, minimum -70")
    zeros = x[1:-1, 1:-1, 1:-1] == 0
    assert (kept.image[0][zeros] > 0).all()
    assert (moved.image[0][zeros] == 0).all()


# Whole cases ----------------------------------------------------------------------------------------------------------


def test_case_is_turned_cropped_scaled_and_resampled(nifti_file):
    case = prepared(nifti_file("a.nii.gz"))
    properties = case.properties
    assert properties["original_orientation"] == "LPS"
    assert properties["ras_spacing"] == pytest.approx([1.5, 1.25, 2])
    assert properties["crop_box"] == [[1, 11], [1, 13], [1, 9]]
    assert case.image.shape == (1, 15, 15, 16)  # 10 * 1.5, 12 * 1.25, 8 * 2
    assert case.image.dtype == np.float32
    assert case.image.min() >= 0
    assert case.image.max() <= 1
    assert case.label is None
    assert json.loads(json.dumps(properties, allow_nan=False)) == properties


def test_spacing_is_an_option(nifti_file):
    case = prepared(nifti_file("a.nii.gz"), spacing=(2.0, 3.0, 4.0))
    assert case.image.shape == (1, 8, 5, 4)  # round half to even of 7.5, 5, 4
    assert case.properties["target_spacing"] == [2, 3, 4]


def test_four_dimensional_file_holds_declared_channels(nifti_file):
    stack = np.stack([make_volume(seed=k) for k in range(3)], axis=3)
    path = nifti_file("a.nii.gz", stack)
    case = preprocess_case([path], Config(), channels=["FLAIR", "T1", "T2"])
    single = prepared(nifti_file("b.nii.gz", stack[..., 1]))
    assert case.image.shape[0] == 3
    assert np.array_equal(case.image[1], single.image[0])
    with pytest.raises(RejectedInput, match="expected 2 channels in the fourth axis, found 12 x 14 x 10 x 3"):
        preprocess_case([path], Config(), channels=["FLAIR", "T1"])


def test_missing_channel_is_refused_or_zero(nifti_file):
    path = nifti_file("a.nii.gz")
    with pytest.raises(RejectedInput, match="expected channels FLAIR T1, missing FLAIR") as caught:
        preprocess_case([None, path], Config(), channels=["FLAIR", "T1"])
    assert caught.value.code == "missing_channel"
    case = preprocess_case([None, path], Config(missing_channel="zeros"), channels=["FLAIR", "T1"])
    assert not case.image[0].any()
    assert np.array_equal(case.image[1], prepared(path).image[0])
    assert case.properties["intensity"][0] is None
    with pytest.raises(ValueError, match="3 channels .* need as many files or one"):
        preprocess_case([path, path], Config(), channels=["a", "b", "c"])


def test_few_nonfinite_voxels_become_the_minimum(nifti_file):
    x = make_volume()
    x[4, 4, 4] = np.nan
    case = prepared(nifti_file("a.nii", x, ISO))
    assert case.image[0, 3, 3, 3] == 0
    assert case.properties["intensity"][0]["n_nonfinite"] == 1
    assert case.properties["warnings"] == ["nonfinite: a.nii: 1 NaN or infinite voxels set to the minimum"]


@pytest.mark.parametrize(
    ("options", "patch", "code"),
    [
        ({"qform": 0, "sform": 0}, None, "no_orientation"),
        ({}, {80: struct.pack("<f", 2.0)}, "spacing_mismatch"),  # pixdim[1]
        ({}, {80: struct.pack("<f", -1.5)}, "bad_spacing_repaired"),
        ({}, {84: struct.pack("<f", 0)}, "bad_spacing_repaired"),
    ],
)
def test_doubtful_geometry_is_used_with_a_warning(options, patch, code, nifti_file):
    case = prepared(nifti_file("a.nii", patch=patch, **options))
    assert [text.split(":")[0] for text in case.properties["warnings"]] == [code]
    assert case.properties["ras_spacing"] == pytest.approx([1.5, 1.25, 2])
    assert case.properties["orientation_trusted"] == (code != "no_orientation")


def test_singular_affine_can_be_assumed_ras(bad_files):
    case = prepared(bad_files["singular_affine"], assume_ras=True)
    assert case.properties["original_orientation"] == "RAS"
    assert case.properties["ras_spacing"] == pytest.approx([1.5, 1.25, 2])


# Labels and grids -----------------------------------------------------------------------------------------------------


def test_label_is_cropped_and_resampled_with_the_image(nifti_file):
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[3:6, 4:8, 2:5] = 1
    label[0, 0, 0] = 2
    case = prepared(nifti_file("a.nii"), nifti_file("l.nii.gz", label))
    assert case.label.dtype == np.uint8
    assert case.label.shape == case.image.shape[1:]
    assert np.array_equal(np.unique(case.label), [0, 1])
    assert case.properties["label_counts"] == {"1": 36, "2": 1}
    assert case.properties["label_values"] == [0, 1, 2]
    assert case.properties["label_voxels_outside_crop"] == 1
    assert case.properties["warnings"][0].startswith("label_outside_crop: l.nii.gz: 1 label voxels")
    # 3 x 4 x 3 voxels of 1.5 x 1.25 x 2 mm = 135 mm3; the crop's sides are whole numbers of mm
    assert 100 <= np.count_nonzero(case.label) <= 170


def test_label_in_another_orientation_is_the_same(nifti_file):
    label = (make_volume() > 500).astype(np.uint8)
    image = nifti_file("a.nii")
    expected = prepared(image, nifti_file("l.nii", label)).label
    turned = nib.as_closest_canonical(nib.Nifti1Image(label, AFFINE))
    assert np.array_equal(
        prepared(image, nifti_file("t.nii", np.asarray(turned.dataobj), turned.affine)).label, expected
    )


def test_empty_label_is_legal(nifti_file):
    case = prepared(nifti_file("a.nii"), nifti_file("l.nii", np.zeros(SHAPE, dtype=np.uint8)))
    assert not case.label.any()
    assert case.properties["label_counts"] == {}


def test_label_values_are_mapped_and_checked(nifti_file):
    image, label = nifti_file("a.nii", affine=ISO), np.zeros(SHAPE)
    label[2:4, 2:4, 2:4], label[5:7, 2:4, 2:4] = 4.0005, 300  # close to whole: rounded
    path = nifti_file("l.nii", label, ISO, dtype="float32")
    with pytest.raises(RejectedInput, match=r"l.nii: expected label values 0..255, found also 300") as caught:
        prepared(image, path)
    assert caught.value.code == "label_values"
    assert prepared(image, path, label_map={4: 3, 300: 0}).properties["label_counts"] == {"3": 8}
    with pytest.raises(RejectedInput, match="expected label values 0 1 2 300, found also 4"):
        preprocess_case([image], Config(label_map={300: 1}), path, classes=[0, 1, 2])
    for wrong in (0.5, np.nan):
        with pytest.raises(RejectedInput, match="expected whole numbers"):
            prepared(image, nifti_file("w.nii", np.where(label > 0, wrong, 0), ISO, dtype="float32"))


@pytest.mark.parametrize("mode", ["none", "unit"])
def test_what_half_precision_cannot_hold_is_refused(nifti_file, mode):
    path = nifti_file("a.nii", make_volume() * 100, ISO)
    if mode == "unit":
        assert prepared(path, dtype="float16").image.max() == 1
        return
    with pytest.raises(RejectedInput, match=r"a.nii: expected values up to 65504 \(float16\), found 9\d+") as caught:
        prepared(path, normalization=mode, dtype="float16")
    assert caught.value.code == "overflow"
    assert prepared(path, normalization=mode).image.max() > 65504


@pytest.mark.parametrize(
    ("moved", "outcome"), [(0.0, "same"), (1e-4, "same"), (0.3, "warning"), (0.7, "rejected"), (2.0, "rejected")]
)
def test_grids_may_differ_by_half_a_voxel(moved, outcome, nifti_file):
    affine = AFFINE.copy()
    affine[2, 3] += moved  # smallest side 1.25 mm
    image = nifti_file("a.nii")
    files = {"channel_geometry": ([image, nifti_file("b.nii", make_volume(seed=1), affine)], None)}
    files["label_geometry"] = (image, nifti_file("l.nii", make_volume() > 500, affine, dtype="uint8"))
    for code, (images, label) in files.items():
        if outcome == "rejected":
            with pytest.raises(RejectedInput, match=r"corners differ by .* mm, accepted up to 0.625 mm") as caught:
                prepared(images, label)
            assert caught.value.code == code
        else:
            warnings = prepared(images, label).properties["warnings"]
            assert [text.split(":")[0] for text in warnings] == ([code] if outcome == "warning" else [])


def test_other_shape_is_refused_or_resampled(nifti_file):
    image = nifti_file("a.nii")
    finer = np.repeat(make_volume(), 2, axis=2)
    affine = AFFINE @ np.diag([1, 1, 0.5, 1])
    affine[2, 3] -= 0.5  # the same outer edges
    channel, label = nifti_file("b.nii", finer, affine), nifti_file("l.nii", finer > 500, affine, dtype="uint8")
    with pytest.raises(RejectedInput, match=r"expected one grid, found 12 x 14 x 20 voxels .* a.nii has 12 x 14 x 10"):
        prepared([image, channel])
    with pytest.raises(RejectedInput, match=r"l.nii: expected one grid"):
        prepared(image, label)
    case = prepared([image, channel], label, on_geometry_mismatch="resample")
    reference = prepared(image, nifti_file("r.nii", make_volume() > 500, dtype="uint8"))
    np.testing.assert_allclose(case.image[1], case.image[0], atol=1e-4)
    assert np.array_equal(case.label, reference.label)
    assert [text.split(":")[0] for text in case.properties["warnings"]] == ["label_geometry", "channel_geometry"][::-1]


@pytest.mark.parametrize(("affine", "accepted"), [(np.diag([1.5, 1.25, 2.0, 1.0]), True), (AFFINE, False)])
def test_label_without_orientation_fits_an_image_stored_as_ras_only(affine, accepted, nifti_file):
    image = nifti_file("a.nii", affine=affine)
    label = nifti_file("l.nii", make_volume() > 500, affine, dtype="uint8", sform=0, qform=0)
    if accepted:
        assert prepared(image, label).properties["warnings"][0].startswith("no_orientation: l.nii")
    else:
        with pytest.raises(RejectedInput, match="one of them has no orientation"):
            prepared(image, label)


# Refusals -------------------------------------------------------------------------------------------------------------

IMAGE_CODES = [
    "missing_file",
    "empty_file",
    "not_gzip",
    "truncated",
    "corrupt_gzip",
    "bad_header",
    "bad_ndim",
    "too_small",
    "bad_spacing",
    "implausible_spacing",
    "singular_affine",
    "no_orientation",
    "nonfinite_many",
    "empty_volume",
    "constant_foreground",
    "degenerate_range",
]


def test_there_is_a_file_for_every_reason(bad_files):
    assert set(bad_files) == set(IMAGE_CODES)


@pytest.mark.parametrize("code", IMAGE_CODES)
def test_every_fault_has_its_reason(code, bad_files):
    with pytest.raises(RejectedInput) as caught:
        prepared(bad_files[code], verify=True, strict_orientation=True)
    assert caught.value.code == code
    assert str(caught.value).startswith(f"{code}.nii.gz: ")


@pytest.mark.parametrize("code", ["corrupt_gzip", "no_orientation"])
def test_stricter_checks_are_optional(code, bad_files):
    assert prepared(bad_files[code]).image.max() == 1


@pytest.mark.parametrize(("shape", "spacing"), [((4, 5, 130), 10.0), ((60, 61, 62), 11.0)])
def test_arrays_that_would_be_too_large_are_refused(shape, spacing, nifti_file):
    path = nifti_file("a.nii", make_volume(shape), np.diag([spacing] * 3 + [1]))
    with pytest.raises(RejectedInput, match="at most 1024 voxels per axis and 134217728 in all") as caught:
        prepared(path)
    assert caught.value.code == "implausible_spacing"


def test_float64_beyond_float32_is_not_finite(nifti_file):
    x = make_volume().astype(np.float64)
    x[2:6] *= 1e300
    with pytest.raises(RejectedInput) as caught:
        prepared(nifti_file("a.nii", x))
    assert caught.value.code == "nonfinite_many"


# Configuration and command line ---------------------------------------------------------------------------------------


def test_config_survives_json_and_hashes_what_matters():
    config = Config(spacing=(1.0, 2.0, 3.0), label_map={4: 3}, verify=True, dtype="float16")
    assert Config.from_dict(json.loads(json.dumps(config.as_dict()))) == config
    assert len(config.hash()) == 16
    assert config.hash() == Config(spacing=(1, 2, 3), label_map={4: 3}, dtype="float16").hash()
    others = [
        {"spacing": (1, 2, 2)},
        {"normalization": "zscore"},
        {"min_axis": 4},
        {"label_map": {4: 2}},
        {"dtype": "float16"},
    ]
    assert len({Config(**options).hash() for options in [{}, *others]}) == 6


@pytest.mark.parametrize(
    "wrong",
    [
        {"spacing": (1, 0, 1)},
        {"spacing": (1, 1)},
        {"normalization": "minmax"},
        {"min_axis": 0},
        {"label_map": {1: 256}},
        {"dtype": "int8"},
    ],
)
def test_config_refuses_what_it_does_not_know(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config(**wrong)
    with pytest.raises(ValueError, match="unknown field colour"):
        Config.from_dict({"colour": 1})


OPTIONS = {  # option: what it changes in the store's configuration
    ("--spacing", "2", "2", "3"): ("spacing", [2, 2, 3]),
    ("--normalization", "zscore"): ("normalization", "zscore"),
    ("--crop-from", "first"): ("crop_from", "first"),
    ("--crop-extra-plane",): ("crop_extra_plane", True),
    ("--label-resampling", "onehot_linear"): ("label_resampling", "onehot_linear"),
    ("--missing-channel", "zeros"): ("missing_channel", "zeros"),
    ("--on-geometry-mismatch", "resample"): ("on_geometry_mismatch", "resample"),
    ("--background-to-min",): ("background_to_min", True),
    ("--strict-orientation",): ("strict_orientation", True),
    ("--assume-ras",): ("assume_ras", True),
    ("--min-axis", "5"): ("min_axis", 5),
    ("--verify",): ("verify", True),
    ("--dtype", "float16"): ("dtype", "float16"),
    ("--label-map", "2:1", "3:0"): ("label_map", {"2": 1, "3": 0}),
}


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option[0])
def test_options_reach_the_configuration(option, nifti_file, tmp_path, capsys):
    nifti_file("images/a.nii.gz")
    assert main(["--images", str(tmp_path / "images"), "--out", str(tmp_path / "s"), "--workers", "0", *option]) == 0
    index = json.loads((tmp_path / "s" / "dataset.json").read_text())
    name, value = OPTIONS[option]
    assert index["config"][name] == value
    assert index["config"] != Config().as_dict()
    assert "1 inputs: 1 ok" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["4", "4:", ":3", "a:1", "4:256", "4:-1"])
def test_label_map_must_be_pairs(text, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--images", str(tmp_path), "--out", str(tmp_path / "s"), "--label-map", text])
    assert caught.value.code == 2
    assert "is not OLD:NEW" in capsys.readouterr().err
