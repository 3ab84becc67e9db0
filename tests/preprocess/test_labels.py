"""What labels become: names of classes, values that are left out, contradictions."""

import json

import numpy as np
import pytest

from amaes.data.classes import check_labels
from amaes.data.store import Store
from amaes.preprocess.config import Config
from amaes.preprocess.find_cases import collect
from amaes.preprocess.write_store import write_store
from tests.conftest import save_nifti
from tests.preprocess.test_growing_store import command, refused


@pytest.fixture
def folder(tmp_path):
    """One case with the labels 0 to 3: imagesTr, labelsTr."""
    label = np.zeros((12, 14, 10), np.uint8)
    label[2:4], label[5:7], label[8:10, 3:6] = 1, 2, 3
    label[0] = 3  # outside of what is above zero
    save_nifti(tmp_path / "d/imagesTr/a.nii.gz")
    save_nifti(tmp_path / "d/labelsTr/a.nii.gz", label)
    return tmp_path / "d"


def write_dataset_json(folder, labels):
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1"}, "labels": labels}))


@pytest.mark.parametrize("how", ["dataset.json", "option"])
def test_what_is_left_out_is_no_class_and_no_place_for_a_patch(folder, tmp_path, how):
    options = ["--images", folder / "imagesTr", "--labels", folder / "labelsTr", "--out", tmp_path / "s"]
    if how == "option":
        options += ["--label-map", "3:ignore", "--label-names", "1:core", "2:oedema"]
    else:
        write_dataset_json(folder, {"background": 0, "core": 1, "oedema": 2, "ignore": 3})
    assert command(*options) == 0
    store = Store(tmp_path / "s")
    assert store.labels == {0: "background", 1: "core", 2: "oedema"}
    assert (store.ignored, store.num_classes, store.config["label_map"]) == (255, 3, {"3": 255})
    properties = store.properties("a")
    assert list(properties["foreground"]) == ["1", "2"]
    outside = 2 * 2 * (14 * 10 - 12 * 8)  # of two classes of two planes each
    assert (properties["label_values"], properties["label_voxels_outside_crop"]) == ([0, 1, 2, 255], outside)
    assert np.unique(store.label("a")).tolist() == [0, 1, 2, 255]
    check_labels(store, ["a"])
    assert command(*options) == 0  # the same settings again


def test_a_store_with_a_class_255_stays_what_it_is(folder, tmp_path):
    label = np.zeros((12, 14, 10), np.uint8)
    label[2:4] = 255
    save_nifti(folder / "labelsTr/a.nii.gz", label)
    write_store(collect(folder), tmp_path / "s", Config())
    assert Store(tmp_path / "s").ignored is None
    assert Store(tmp_path / "s").labels == {0: "background", 255: "label_255"}
    label[5:7] = 3
    save_nifti(folder / "labelsTr/a.nii.gz", label)
    with pytest.raises(ValueError, match="label_values: a.nii.gz: found label 255, which stands for"):
        write_store(collect(folder), tmp_path / "t", Config(label_map={3: 255}))


def test_names_are_given_and_changed(folder, tmp_path):
    write_dataset_json(folder, {"background": 0, "a": 1, "b": 2, "c": 3})
    options = ["--images", folder, "--out", tmp_path / "s", "--label-map", "3:2"]
    assert command(*options, "--label-names", "1:one voxel", "3:big") == 0
    assert Store(tmp_path / "s").labels == {0: "background", 1: "one voxel", 2: "big"}
    assert command(*options) == 0
    assert Store(tmp_path / "s").labels == {0: "background", 1: "a", 2: "b"}


@pytest.mark.parametrize("how", ["dataset.json", "option"])
def test_regions_are_kept_as_classes_of_the_store(folder, tmp_path, how):
    options = ["--images", folder / "imagesTr", "--labels", folder / "labelsTr", "--out", tmp_path / "s"]
    if how == "option":
        options += ["--regions", "1,2,3:whole", "1,3:core", "3:small"]
    else:
        write_dataset_json(folder, {"background": 0, "whole": [1, 2, 3], "core": [1, 3], "small": 3})
    assert command(*options) == 0
    store = Store(tmp_path / "s")
    assert store.regions == {"whole": (1, 2, 3), "core": (1, 3), "small": (3,)}
    assert store.scored(4) == store.regions
    assert store.scored(3) == {}
    fingerprint = store.fingerprint
    if how == "option":
        assert command(*options[:6]) == 0
        assert Store(tmp_path / "s").regions == store.regions  # kept
        assert command(*options[:6], "--regions", "2:x") == 0
        assert Store(tmp_path / "s").regions == {"x": (2,)}
        assert Store(tmp_path / "s").fingerprint == fingerprint  # they change no training
    assert command(*options[:5], tmp_path / "t", "--label-map", "3:1", "--regions", "1,2,3:whole", "3:core") == 0
    assert Store(tmp_path / "t").regions == {"whole": (1, 2), "core": (1,)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["1,7:whole"], "--regions: whole has the classes 1 7, the labels hold 1 label_1, 2 label_2, 3 label_3"),
        (["1:nothing", "--label-map", "1:0"], "--regions: nothing has the classes (none)"),
        (["1:all"], "--regions: 'all' is the name of a score already"),
    ],
)
def test_regions_of_no_class_are_refused(folder, tmp_path, capsys, options, said):
    line = ["--images", folder, "--out", tmp_path / "s", "--regions", *options]
    assert said in refused(capsys, *line)
    assert not (tmp_path / "s/dataset.json").exists()


def test_names_and_regions_stay_when_the_store_grows(folder, tmp_path):
    options = ["--images", folder / "imagesTr", "--labels", folder / "labelsTr", "--out", tmp_path / "s"]
    assert command(*options, "--label-names", "1:one", "--regions", "1,2:both") == 0
    save_nifti(folder / "imagesTr/b.nii.gz")
    save_nifti(folder / "labelsTr/b.nii.gz", np.full((12, 14, 10), 4, np.uint8))
    assert command(*options) == 0
    store = Store(tmp_path / "s")
    assert (store.labels[1], store.labels[4], store.regions) == ("one", "label_4", {"both": (1, 2)})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--label-map", "1:2", "1:3"], "--label-map: 1 becomes both 2 and 3"),
        (["--label-map", "1:255"], "'1:255' is not OLD:NEW, two whole numbers, the new one in 0..254 or ignore"),
        (["--label-map", "1:ignored"], "'1:ignored' is not OLD:NEW"),
        (["--label-names", "1:a", "1:b"], "--label-names: 1 becomes both a and b"),
        (["--label-names", "1:a", "2:a"], "--label-names: two labels are called 'a'; --label-map makes them one"),
        (["--regions", "1,2:a", "3:a"], "--regions: a becomes both (1, 2) and (3,)"),
        (["--regions", "0,2:a"], "'0,2:a': value 0 is background, in no region"),
        (["--regions", "1,:a"], "'1,:a' is not VALUES:NAME"),
        (["--label-names", "1"], "'1' is not VALUE:NAME"),
        (["--label-map", "2:1", "--label-names", "1:a", "2:b"], "--label-names 2:b and a are one label by --label-map"),
        (["--label-map", "3:ignore", "--label-names", "3:c"], "--label-names 3:c is left out by --label-map"),
    ],
)
def test_contradictions_are_refused(folder, tmp_path, capsys, options, said):
    assert said in refused(capsys, "--images", folder, "--out", tmp_path / "s", *options)
    assert not (tmp_path / "s").exists()
