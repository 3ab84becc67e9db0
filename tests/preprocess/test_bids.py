"""BIDS: what is no image, which sequences are one case, which mask is whose, and what a dry run says."""

import pytest

from amaes.preprocess.__main__ import main
from amaes.preprocess.file_names import subject_of
from amaes.preprocess.find_cases import collect
from amaes.preprocess.sources import find_source


@pytest.fixture
def tree(tmp_path):
    """Function: make empty files of these names below a folder and return it."""

    def make(*names, root="bids"):
        for name in names:
            path = tmp_path / root / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / root

    return make


def files(collection):
    """{id: names of its images, then of its label}"""
    return {item.id: [name.rpartition("/")[2][:-7] for name in item.files] for item in collection.items}


def anat(session, *names, subject="01", folder=""):
    start = f"sub-{subject}_ses-{session}"
    return [f"{folder}sub-{subject}/ses-{session}/anat/{start}_{name}" for name in names]


NO_IMAGES = [
    "derivatives/fs/sub-01/anat/sub-01_T1w",
    "sub-01/anat/sub-01_dseg",
    "sub-01/anat/sub-01_label-lesion_mask",
    "sub-01/anat/sub-01_part-phase_T1w",
    "sub-01/anat/sub-01_part-real_T1w",
    "sub-01/anat/sub-01_part-imag_T1w",
]


def test_what_is_no_image_is_left_out_and_counted(tree):
    folder = tree("sub-01/anat/sub-01_part-mag_T1w", "sub-01/anat/sub-01_FLAIR", "other/brain_dsegment", *NO_IMAGES)
    collection = collect(folder)
    assert [item.id for item in collection.items] == [
        "other/brain_dsegment",
        "sub-01/anat/sub-01_FLAIR",
        "sub-01/anat/sub-01_part-mag_T1w",
    ]
    (note,) = collection.notes
    assert note.startswith("6 files are left out, as they are no images: ")
    assert "1 below a folder derivatives" in note
    assert "3 a phase, real or imaginary part" in note
    assert "2 a segmentation (*_mask, *_dseg, *_probseg)" in note
    assert list(files(collect(folder, channels=["T1w"]))) == ["sub-01/anat/sub-01_part-mag"]
    assert "sub-01/anat/sub-01_label-lesion" in files(collect(folder, channels=["FLAIR", "mask"]))  # asked for
    assert len(collect(folder / "derivatives").items) == 1  # folders above do not count
    with pytest.raises(ValueError, match="no image there; 1 files are left out"):
        collect(tree("sub-01_mask", root="masks"))


def test_the_bids_source_leaves_the_same_out(tree):
    folder = tree("sub-01/anat/sub-01_part-mag_T1w", *NO_IMAGES)
    assert len(find_source("bids", folder).items) == 1


def test_a_network_gets_no_derivatives(tree):
    folder = tree("sub-01/anat/sub-01_T1w", *NO_IMAGES)
    found = [id.removeprefix("sub-01/anat/sub-01_") for id in files(collect(folder, network_channels=1))]
    assert found == ["T1w", "dseg", "label-lesion_mask"]  # prediction itself sets masks aside, and takes them if asked


def test_sequences_of_a_session_are_one_case_although_their_acq_differs(tree):
    folder = tree(
        *anat(1, "acq-3D_FLAIR", "acq-mprage_T1w"),
        *anat(2, "acq-a_FLAIR", "acq-a_T1w"),
        *anat(3, "acq-a_FLAIR", "acq-a_T1w", "acq-b_FLAIR", "acq-b_T1w"),
        *anat(4, "FLAIR", "acq-x_T1w"),
        "s/x_acq-1_FLAIR",
        "s/x_acq-2_T1w",
    )
    found = collect(folder, channels=["FLAIR", "T1w"])
    good = {item.id.rpartition("/")[2]: len(item.files) for item in found.items if item.problem is None}
    assert good == {
        "sub-01_ses-1": 2,
        "sub-01_ses-2_acq-a": 2,  # as it was before
        "sub-01_ses-3_acq-a": 2,
        "sub-01_ses-3_acq-b": 2,
        "sub-01_ses-4": 2,
    }
    assert [item.id for item in found.items if item.problem] == ["s/x_acq-1", "s/x_acq-2"]
    chosen = collect(folder, channels=["acq-b_FLAIR", "acq-b_T1w"])
    assert files(chosen)["sub-01/ses-3/anat/sub-01_ses-3"] == ["sub-01_ses-3_acq-b_FLAIR", "sub-01_ses-3_acq-b_T1w"]


def test_masks_of_derivatives_are_matched_by_entities(tree):
    folder = tree(
        *anat(1, "acq-3D_FLAIR", "acq-mprage_T1w"),
        *anat(2, "run-1_FLAIR", "run-1_T1w", "run-2_FLAIR", "run-2_T1w"),
        *anat(3, "FLAIR", "T1w"),
        *anat(1, "FLAIR", "T1w", subject="02"),
        *anat(1, "space-T1w_label-lesion_mask", "label-brain_mask", folder="derivatives/m/"),
        *anat(2, "run-2_label-lesion_mask", "label-lesion_mask", folder="derivatives/m/"),
        *anat(1, "desc-a_label-lesion_mask", "desc-b_label-lesion_mask", subject="02", folder="derivatives/m/"),
        *anat(9, "label-lesion_mask", folder="derivatives/m/"),
    )
    options = {"channels": ["FLAIR", "T1w"], "label_name": "label-lesion_mask"}
    found = collect(folder, folder / "derivatives" / "m", **options)
    assert {item.id.rpartition("/")[2]: item.label and item.label.name[:-7] for item in found.items} == {
        "sub-01_ses-1": "sub-01_ses-1_space-T1w_label-lesion_mask",
        "sub-01_ses-2_run-1": "sub-01_ses-2_label-lesion_mask",
        "sub-01_ses-2_run-2": "sub-01_ses-2_run-2_label-lesion_mask",
        "sub-01_ses-3": None,
        "sub-02_ses-1": None,
    }
    assert [item.problem[0] for item in found.items if item.problem] == ["missing_label", "ambiguous_label"]
    assert found.notes == ["1 labels belong to no image: sub-01_ses-9_label-lesion_mask.nii.gz"]
    assert found.foreground_name == "lesion"
    chosen = collect(folder, folder / "derivatives", **{**options, "label_name": "desc-b_label-lesion_mask"})
    assert chosen.items[-1].label.name == "sub-02_ses-1_desc-b_label-lesion_mask.nii.gz"


def test_masks_of_derivatives_without_a_name_are_told_how(tree):
    folder = tree(*anat(1, "T1w"), *anat(1, "label-lesion_mask", folder="derivatives/x/"))
    with pytest.raises(ValueError, match="no label matches an image by name: .*; `label_name`, such as label-lesion"):
        collect(folder, folder / "derivatives")


def test_labels_of_another_tree_with_a_name_of_their_own(tree):
    images = tree("a", "p/b", "p/c", root="i")
    labels = tree("a_seg", "p/b-seg", "p/other", root="l")
    found = collect(images, labels, label_name="seg")
    assert files(found) == {"a": ["a", "a_seg"], "p/b": ["b", "b-seg"], "p/c": ["c"]}
    assert found.items[2].problem[0] == "missing_label"
    with pytest.raises(
        ValueError, match=r"no label matches an image: labels such as x_seg.nii.gz, images such as .*a\."
    ):
        collect(images, tree("x_seg", root="m"), label_name="seg")


@pytest.mark.parametrize(
    ("id", "subject"),
    [
        ("BraTS-GLI-00005-100", "BraTS-GLI-00005"),
        ("BraTS-GLI-00005-101/BraTS-GLI-00005-101-t1c", "BraTS-GLI-00005"),
        ("BraTS-GLI-00005-101-t1c", "BraTS-GLI-00005"),
        ("UPENN-GBM-00001_21", "UPENN-GBM-00001"),
        ("hippocampus_001", "hippocampus_001"),
        ("BRATS_00001", "BRATS_00001"),
        ("scan_2019-01", "scan_2019-01"),
        ("site-12-003", "site-12-003"),
        ("sub-10001-001/x", "sub-10001"),
    ],
)
def test_a_trailing_number_of_a_visit_is_not_the_subject(id, subject):
    assert subject_of(id) == subject


def test_a_dry_run_lists_cases_and_what_will_be_rejected(tree, tmp_path, capsys):
    folder = tree(*anat(1, "FLAIR", "T1w"), *anat(2, "T1w"))
    line = ["--images", str(folder), "--channels", "FLAIR", "T1w", "--out", str(tmp_path / "s"), "--dry-run"]
    assert main(line) == 0
    out = capsys.readouterr().out
    expected = (
        "sub-01/ses-2/anat/sub-01_ses-2: expected channels FLAIR T1w, missing FLAIR; --missing-channel zeros fills"
    )
    assert f"  1 will be rejected: {expected}\n" in out
    assert len(out.splitlines()) == 2
    assert main([*line, "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()[2:]
    assert listed[0] == f"sub-01/ses-1/anat/sub-01_ses-1: {'; '.join(map(str, sorted(folder.rglob('*ses-1_*.gz'))))}"
    assert listed[1].startswith("sub-01/ses-2/anat/sub-01_ses-2: missing_channel; ")
    assert not (tmp_path / "s").exists()
    with pytest.raises(SystemExit):
        main([word for word in line if word != "--dry-run"] + ["--list"])
    assert "--list: goes with --dry-run" in capsys.readouterr().err
