"""Which files make which case."""

import json

import pytest

from amaes.preprocess.find_cases import collect


@pytest.fixture
def tree(tmp_path):
    """Function: make empty files below a folder and return it."""

    def make(*names, root="data"):
        for name in names:
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / root

    return make


def ids(collection):
    return [item.id for item in collection.items]


def write_json(path, content):
    path.write_text(json.dumps(content))


# Any tree -------------------------------------------------------------------------------------------------------------


def test_every_nifti_file_of_a_tree_is_a_case(tree):
    folder = tree("b/two.NII.GZ", "a/one.nii", "top.nii.gz", "notes.txt", "a/scan.v2.nii.gz")
    collection = collect(folder)
    assert ids(collection) == ["a/one", "a/scan.v2", "b/two", "top"]
    assert collection.channels == ["image"]
    assert collection.items[0].images == (folder / "a/one.nii",)


def test_hidden_and_resource_files_are_ignored(tree):
    folder = tree("a.nii.gz", "._a.nii.gz", ".DS_Store", "__MACOSX/._a.nii.gz", "__MACOSX/a.nii.gz", ".git/b.nii.gz")
    assert ids(collect(folder)) == ["a"]


def test_one_file_is_a_folder_of_one(tree):
    assert ids(collect(tree("x/scan.nii.gz") / "x/scan.nii.gz")) == ["scan"]


def test_links_in_a_circle_are_walked_once(tree):
    folder = tree("a/one.nii.gz")
    (folder / "a" / "again").symlink_to(folder)
    (folder / "real").symlink_to(tree("two.nii.gz", root="elsewhere"))
    assert ids(collect(folder)) == ["a/one", "real/two"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("a.nii", "a.nii.gz"), ("a.nii ", "a.nii.gz", "'a'")),
        (("s/a.NII.gz", "s/a.nii"), ("a.NII.gz", "a.nii", "'s/a'")),
        (("a.nii", "a_label.nii"), ("a.nii", "a_label.nii", "`label_name`")),
    ],
)
def test_two_inputs_of_one_id_stop_and_are_both_named(tree, names, said):
    with pytest.raises(ValueError, match="^id_collision: ") as caught:
        collect(tree(*names))
    assert all(part in str(caught.value) for part in said)


def test_errors_name_folder_pattern_and_what_is_there(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`images` .*nope: no such folder"):
        collect(tmp_path / "nope")
    folder = tree(*(f"sub/{k}.mha" for k in range(9)))
    with pytest.raises(
        ValueError, match=r"`images`: no file called \*\.nii or \*\.nii\.gz in .*data; found \d\.mha, "
    ) as caught:
        collect(folder)
    assert str(caught.value).count(".mha") == 5
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found no file"):
        collect(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"expected a folder or a file named \*\.nii"):
        collect(folder / "sub" / "0.mha")


@pytest.mark.parametrize(
    ("name", "advice"), [("a.mgz", "mri_convert"), ("a.MGH", "mri_convert"), ("a.dcm", "dcm2niix"), ("a.img", "a pair")]
)
def test_scans_of_another_format_are_named_with_the_way_to_nifti(tree, name, advice):
    folder = tree(name, "notes.txt")
    for path in (folder, folder / name):
        with pytest.raises(ValueError, match=advice):
            collect(path)
    collection = collect(tree("b.nii", f"c{name}"))
    assert ids(collection) == ["b"]
    assert len(collection.notes) == 1
    assert "2 files are not read; " in collection.notes[0]
    assert advice in collection.notes[0]


# Subject, session, sequence -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "subject", "session"),
    [
        ("sub-01/ses-2/anat/sub-01_ses-2_T1w", "sub-01", "ses-2"),
        ("site/sub-A7_sess-d0129_FLAIR", "sub-A7", "sess-d0129"),
        ("patient01/study1_T1W", "patient01", None),
        ("hippocampus_001", "hippocampus_001", None),
        ("notsub-01/x", "notsub-01", None),
    ],
)
def test_subject_and_session_by_name(tree, name, subject, session):
    item = collect(tree(f"{name}.nii.gz")).items[0]
    assert (item.subject, item.session) == (subject, session)


def test_subject_by_expression(tree):
    folder = tree("A_12_x.nii.gz", "B_12_y.nii.gz", "A_13_z.nii.gz")
    assert [item.subject for item in collect(folder, subject=r"_(\d+)_").items] == ["12", "13", "12"]
    assert [item.subject for item in collect(folder, subject=r"(.)_(?P<subject>\d+)").items] == ["12", "13", "12"]
    with pytest.raises(ValueError, match="no subject in 1 ids, such as B_12_y"):
        collect(folder, subject="(A)")
    with pytest.raises(ValueError, match="has no group"):
        collect(folder, subject="A")
    with pytest.raises(ValueError, match="not a regular expression"):
        collect(folder, subject="(A")


@pytest.mark.parametrize(
    ("name", "sequence"),
    [
        ("study1_FLAIR", "FLAIR"),
        ("x_t1ce", "T1ce"),
        ("sub-1_T1w", "T1"),
        ("MPRAGE_sag", "T1"),
        ("T2W", "T2"),
        ("Axial_T2_star_GRE", "T2star"),
        ("t2_in_t1_space", "T2"),
        ("t1_in_t2_space", "T1"),
        ("PD", "PD"),
        ("ADC", "ADC"),
        ("dti_b1000", "DWI"),
        ("SWI", "SWI"),
        ("tof_angio", "TOF"),
        ("scan7", None),
        ("t2flair", "FLAIR"),
    ],
)
def test_sequence_by_name(tree, name, sequence):
    assert collect(tree(f"{name}.nii.gz")).items[0].sequence == sequence


# Labels ---------------------------------------------------------------------------------------------------------------


def test_labels_are_matched_by_relative_name(tree):
    images = tree("p1/a.nii.gz", "p2/a.nii.gz", "p3/a.nii.gz", root="images")
    labels = tree("p1/a.nii", "p2/a.nii.gz", "p9/a.nii.gz", root="labels")
    collection = collect(images, labels)
    assert [item.label for item in collection.items] == [labels / "p1/a.nii", labels / "p2/a.nii.gz", None]
    assert [item.problem and item.problem[0] for item in collection.items] == [None, None, "missing_label"]
    assert collection.notes == ["1 labels belong to no image: p9/a"]


def test_labels_within_the_images_folder_are_no_images(tree):
    folder = tree("a.nii.gz", "labels/a.nii.gz")
    collection = collect(folder, folder / "labels")
    assert ids(collection) == ["a"]
    assert collection.items[0].label == folder / "labels/a.nii.gz"


def test_labels_that_match_nothing_stop_with_both_names(tree):
    images, labels = tree("case_1.nii.gz", root="i"), tree("seg_1.nii.gz", root="l")
    with pytest.raises(ValueError, match=r"no label matches .* 'seg_1', images such as 'case_1'"):
        collect(images, labels)
    with pytest.raises(FileNotFoundError, match="`labels` .*nope"):
        collect(images, images / "nope")
    with pytest.raises(ValueError, match="both .*`label_name`"):
        collect(images, images)
    with pytest.raises(ValueError, match=r"`label_name`: no file called seg, \*_seg or \*-seg in .*found seg_1.nii.gz"):
        collect(images, labels, label_name="seg")


def test_labels_beside_the_images(tree):
    folder = tree(
        "p1/FLAIR.nii.gz",
        "p1/T1.nii.gz",
        "p1/lesion.nii.gz",
        "p2/x_T1.nii",
        "p2/x_Lesion.nii",
        "p2/y_T1.nii",
        "p3/T1.nii",
    )
    collection = collect(folder, label_name="lesion")
    assert ids(collection) == ["p1/FLAIR", "p1/T1", "p2/x_T1", "p2/y_T1", "p3/T1"]
    lesion, x_lesion = folder / "p1/lesion.nii.gz", folder / "p2/x_Lesion.nii"
    assert [item.label for item in collection.items] == [lesion, lesion, x_lesion, None, None]
    assert [item.problem and item.problem[0] for item in collection.items] == [None] * 3 + ["missing_label"] * 2
    assert collection.foreground_name == "lesion"
    with pytest.raises(
        ValueError, match=r"`label_name`: no file called seg, \*_seg or \*-seg in .*; found FLAIR.nii.gz, "
    ):
        collect(folder, label_name="seg")


# Channels -------------------------------------------------------------------------------------------------------------


def test_channels_of_a_folder_are_one_case(tree):
    folder = tree(*(f"p{k}/{name}.nii.gz" for k in (1, 2) for name in ("FLAIR", "T1", "T1ce", "T2", "lesion", "mask")))
    collection = collect(folder, channels=["FLAIR", "T1", "T1ce", "T2"], label_name="lesion")
    assert ids(collection) == ["p1", "p2"]
    assert [path.name for path in collection.items[0].images] == [
        "FLAIR.nii.gz",
        "T1.nii.gz",
        "T1ce.nii.gz",
        "T2.nii.gz",
    ]
    assert collection.items[1].label == folder / "p2/lesion.nii.gz"
    assert collection.channels == ["FLAIR", "T1", "T1ce", "T2"]
    assert collection.notes == [
        "2 files are none of the channels FLAIR T1 T1ce T2 (called NAME, *_NAME or *-NAME): they end in mask "
        "(2, such as p1/mask.nii.gz)"
    ]


def test_channels_by_the_end_of_the_name(tree):
    names = [f"BraTS_7/BraTS_7_{s}.nii.gz" for s in ("flair", "t1", "t1ce", "seg")]
    names += [f"p/s{k}-{s}.nii" for k in (1, 2) for s in ("T1", "T1CE", "Flair")] + ["T1.nii", "T1ce.nii", "FLAIR.nii"]
    folder = tree(*names)
    collection = collect(folder, channels=["T1ce", "T1", "FLAIR"])
    assert ids(collection) == ["BraTS_7", "data", "p/s1", "p/s2"]
    assert [path.name for path in collection.items[2].images] == ["s1-T1CE.nii", "s1-T1.nii", "s1-Flair.nii"]
    assert collection.items[2].subject == "p"


def test_missing_channel_is_named_or_filled(tree):
    folder = tree("p1/FLAIR.nii", "p1/T1.nii", "p2/T1.nii")
    items = collect(folder, channels=["FLAIR", "T1"]).items
    assert items[0].problem is None
    assert items[1].problem[0] == "missing_channel"
    assert items[1].problem[1] == "p2: expected channels FLAIR T1, missing FLAIR"
    filled = collect(folder, channels=["FLAIR", "T1"], missing_channel="zeros").items[1]
    assert filled.problem is None
    assert filled.images == (None, folder / "p2/T1.nii")


def test_files_that_did_not_group_are_named_with_the_case_that_lacks_them(tree):
    folder = tree(*(f"p{k}/x_{name}.nii" for k in (1, 2) for name in ("FLAIR", "T1w")), "p2/x_T1.nii")
    collection = collect(folder, channels=["FLAIR", "T1"])
    assert [item.problem and item.problem[1] for item in collection.items] == [
        "p1/x: expected channels FLAIR T1, missing T1; beside them x_T1w.nii, which no channel is called after",
        None,
    ]
    assert "they end in T1w (2, such as p1/x_T1w.nii)" in collection.notes[0]


def test_channel_errors(tree):
    folder = tree("p1/a_T1.nii", "p1/a-T1.nii")
    with pytest.raises(ValueError, match=r"id_collision: .*a-T1.nii and .*a_T1.nii are both channel T1"):
        collect(folder, channels=["T1"])
    with pytest.raises(
        ValueError, match=r"`channels`: no file called PD, \*_PD, \*-PD in .*; found a-T1.nii, a_T1.nii"
    ):
        collect(folder, channels=["PD"])
    with pytest.raises(ValueError, match="expected different names"):
        collect(folder, channels=["T1", "t1"])


# dataset.json and nnU-Net ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
def test_nnunet_channels(tree, whole):
    folder = tree(
        *(f"imagesTr/c{k}_000{c}.nii.gz" for k in (1, 2) for c in (0, 1)), "labelsTr/c1.nii.gz", "labelsTr/c2.nii.gz"
    )
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    write_json(folder / "dataset.json", {"channel_names": {"0": "T2", "1": "ADC"}, "labels": labels, "numTraining": 2})
    collection = collect(folder) if whole else collect(folder / "imagesTr", folder / "labelsTr")
    assert ids(collection) == ["c1", "c2"]
    assert [path.name for path in collection.items[0].images] == ["c1_0000.nii.gz", "c1_0001.nii.gz"]
    assert collection.items[0].label == folder / "labelsTr/c1.nii.gz"
    assert collection.channels == ["T2", "ADC"]
    assert collection.classes == {0: "background", 1: "label_1", 2: "core"}


def test_nnunet_names_without_dataset_json(tree):
    folder = tree("imagesTr/a_0000.nii.gz", "imagesTr/b_0000.nii.gz", "labelsTr/a.nii.gz", "labelsTr/b.nii.gz")
    collection = collect(folder / "imagesTr", folder / "labelsTr")
    assert ids(collection) == ["a", "b"]
    assert collection.channels == ["image"]
    folder = tree("x/a_0000.nii.gz", "x/a_0001.nii.gz", "y/a.nii.gz", root="other")
    assert collect(folder / "x", folder / "y").channels == ["channel_0", "channel_1"]


def test_missing_nnunet_channel_is_named(tree):
    folder = tree("imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "imagesTr/b_0000.nii.gz")
    collection = collect(folder / "imagesTr")
    assert [item.problem and item.problem[0] for item in collection.items] == [None, "missing_channel"]


@pytest.mark.parametrize(
    "names",
    [
        ["images/scan_2019.nii.gz", "images/scan_2020.nii.gz"],  # years
        ["images/case_0000.nii.gz", "images/case_0001.nii.gz"],  # numbered cases
        ["imagesTr/case_0001.nii.gz", "imagesTr/case_0002.nii.gz"],  # no channel 0
        [
            "imagesTr/case_0000.nii.gz",
            "imagesTr/case_0001.nii.gz",
            "labelsTr/case_0000.nii.gz",
            "labelsTr/case_0001.nii.gz",
        ],
    ],
)
def test_numbered_cases_are_not_taken_for_channels(tree, names):
    folder = tree(*names)
    images = folder / names[0].split("/")[0]
    labels = folder / "labelsTr" if len(names) > 2 else None
    assert ids(collect(images, labels)) == [name.split("/")[1][:-7] for name in names[:2]]


def test_decathlon_file_with_several_modalities(tree):
    folder = tree(
        "imagesTr/BRATS_001.nii.gz",
        "imagesTr/._BRATS_001.nii.gz",
        "labelsTr/BRATS_001.nii.gz",
        "imagesTs/BRATS_9.nii.gz",
    )
    modality = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
    training = [{"image": f"./imagesTr/BRATS_00{k}.nii.gz", "label": f"./labelsTr/BRATS_00{k}.nii.gz"} for k in (1, 2)]
    content = {"modality": modality, "labels": {"0": "background", "1": "edema"}, "training": training}
    write_json(folder / "dataset.json", content)
    collection = collect(folder)
    assert ids(collection) == [
        "BRATS_001",
        "BRATS_002",
    ]  # the second is listed, but not there: reported as missing_file
    assert collection.channels == ["FLAIR", "T1w", "t1gd", "T2w"]
    assert collection.items[0].images == (folder / "imagesTr/BRATS_001.nii.gz",)
    assert collection.classes == {0: "background", 1: "edema"}
    assert ids(collect(folder / "imagesTs")) == ["BRATS_9"]


def test_files_outside_the_training_list_are_counted(tree):
    folder = tree(*(f"imagesTr/c{k}.nii.gz" for k in range(3)), *(f"labelsTr/c{k}.nii.gz" for k in range(3)))
    (folder / "imagesTr/c3.nii.gz").symlink_to(tree("x.nii.gz", root="elsewhere") / "x.nii.gz")
    training = [{"image": f"./imagesTr/c{k}.nii.gz"} for k in (0, 3)] + [{"scan": "y"}, {"image": ["z"]}, "text"]
    write_json(folder / "dataset.json", {"modality": ["T1"], "labels": ["background", "tumour"], "training": training})
    collection = collect(folder)
    assert ids(collection) == ["c0", "c3"]  # the link as well
    assert collection.notes[0] == "2 files are not in the training list of dataset.json: c1.nii.gz, c2.nii.gz"
    assert collection.channels == ["T1"]
    assert collection.classes == {0: "background", 1: "tumour"}


def test_labels_in_the_folder_of_the_images_by_name(tree):
    folder = tree("p1/T1.nii.gz", "p1/seg.nii.gz")
    for labels in (folder, folder / "p1" / ".."):
        assert collect(folder, labels, label_name="seg") == collect(folder, label_name="seg")


LABELS = [
    ({"0": "background", "1": "tumour"}, {0: "background", 1: "tumour"}),
    ({"background": 0, "tumour": 1}, {0: "background", 1: "tumour"}),
    ({"background": "0", "tumour": "1"}, {0: "background", 1: "tumour"}),
    ({"0": 0, "1": 1}, {0: "0", 1: "1"}),
    ({"background": "0", "whole": ["1", 2], "core": "2"}, {0: "background", 1: "label_1", 2: "core"}),
    (["background", "tumour"], {0: "background", 1: "tumour"}),
    ({}, {}),
]


@pytest.mark.parametrize(("labels", "classes"), LABELS)
def test_labels_of_dataset_json_as_people_write_them(tree, labels, classes):
    folder = tree("a.nii.gz")
    write_json(folder / "dataset.json", {"labels": labels})
    assert collect(folder).classes == classes


CASE = {"images": ["a_0000.nii.gz"], "label": "b.nii.gz"}
BROKEN = [
    ([1], "expected an object, found list"),
    ({"modality": [1]}, "expected names of channels"),
    ({"labels": {"a": "b"}}, "the label 'a' is 'b', expected a whole number"),
    ({"labels": {"a": None}}, "the label 'a' is None"),
    ({"labels": {"a": 0.5}}, "the label 'a' is 0.5"),
    ({"labels": {"a": True}}, "the label 'a' is True"),
    ({"labels": {"a": [1, "x"]}}, r"the label 'a' is \[1, 'x'\]"),
    ({"labels": {"0": ["background"]}}, r"the label '0' is \['background'\]"),
    ({"labels": "a"}, "expected labels as names and values"),
    ({"labels": [1, 2]}, "expected a list of names of labels"),
    ({"channel_names": {"0": None}}, "expected names of channels"),
    ({"dataset": {"a": {"images": ["a\0.nii"], "label": "b"}}}, "the case 'a' of 'dataset' is"),
    ({"dataset": ["a"]}, "expected 'dataset' to list the files of each case"),
    ({"dataset": {"a": "a.nii"}}, "the case 'a' of 'dataset' is 'a.nii', expected its images and label"),
    ({"dataset": {"a": {"images": []}}}, "the case 'a' of 'dataset' is"),
    ({"dataset": {"a": {"images": [1]}}}, "the case 'a' of 'dataset' is"),
    ({"dataset": {"a": {"images": ["a.nii"], "label": 7}}}, "the case 'a' of 'dataset' is"),
    ({"dataset": {"a": CASE, "b": {"images": ["a", "b"]}}}, "the case 'b' of 'dataset' has 2 images, expected 1"),
    ({"dataset": {"a": CASE}, "channel_names": {"0": "T1", "1": "T2"}}, "the case 'a' of .* has 1 images, expected 2"),
]


@pytest.mark.parametrize(("content", "message"), [*BROKEN, ("{", "JSONDecodeError")])
def test_broken_dataset_json_is_named(tree, content, message):
    folder = tree("a.nii.gz")
    (folder / "dataset.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=rf"dataset.json: not a dataset.json of MSD or nnU-Net \({message}"):
        collect(folder)


def test_cases_whose_files_dataset_json_lists(tree):
    elsewhere = tree("c.nii.gz", root="elsewhere")
    folder = tree("scans/x.nii.gz", "scans/y.nii.gz", "masks/m.nii.gz", "imagesTr/z_0000.nii.gz")
    listed = {
        "p1": {"images": ["scans/x.nii.gz", "scans/y.nii.gz"], "label": "masks/m.nii.gz"},
        "p2": {"images": [str(elsewhere / "c.nii.gz"), "scans/gone.nii.gz"]},
        "p\n3": {"images": ["scans/x.nii.gz", "scans/y.nii.gz"], "label": "masks/m.nii.gz"},
    }
    names = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "lesion": 1}}
    write_json(folder / "dataset.json", {**names, "dataset": listed})
    collection = collect(folder)
    assert ids(collection) == ["p\n3", "p1", "p2"]
    assert [item.problem and item.problem[0] for item in collection.items] == ["bad_name", None, "missing_label"]
    assert collection.items[1].images == (folder / "scans/x.nii.gz", folder / "scans/y.nii.gz")
    assert collection.items[1].label == folder / "masks/m.nii.gz"
    assert collection.items[2].images == (elsewhere / "c.nii.gz", folder / "scans/gone.nii.gz")
    assert (collection.channels, collection.classes) == (["T1", "T2"], {0: "background", 1: "lesion"})
    assert collection.notes == ["the files of 3 cases are those that dataset.json lists"]
    assert ids(collect(folder / "scans", folder / "scans" / ".." / "scans", label_name="y")) == ["x"]  # as asked for


def test_a_store_beside_the_images_declares_nothing(tree):
    folder = tree("a.nii.gz")
    write_json(folder / "dataset.json", {"format": "amaes-store-1", "channels": ["x", "y"], "labels": {"0": "b"}})
    assert collect(folder).channels == ["image"]
