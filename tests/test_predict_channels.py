"""Which files are the channels of a case that is to be segmented, and in which order."""

# ruff: noqa: F811 (fixtures of another module)

from __future__ import annotations

import json

import numpy as np
import pytest
from torch import nn

from amaes.predict import cases_to_predict, channel_order, predict_file
from amaes.preprocess.file_names import stem_of
from tests.conftest import make_volume
from tests.test_predict import SCAN, Bands, meta, run, two_channels  # noqa: F401 (fixtures)


class Second(nn.Module):
    """Class by the intensity of the second channel."""

    def forward(self, x):
        return Bands()(x[:, 1:])


def declare(folder, names, **more):
    content = {"channel_names": {str(k): name for k, name in enumerate(names)}, "labels": {"background": 0}, **more}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(content))


@pytest.mark.parametrize("kind", ["files", "4-D"])
def test_declared_channels_are_put_into_the_order_of_the_checkpoint(kind, nifti_file, tmp_path):
    t1, flair = make_volume(SCAN), make_volume(SCAN, 1)
    expected, _ = predict_file(
        Second(), meta(channels=["T1", "FLAIR"]), [nifti_file("T1.nii.gz", t1), nifti_file("F.nii.gz", flair)]
    )
    declare(tmp_path / "d", ["flair", "t1"])
    if kind == "files":
        for k, volume in enumerate((flair, t1)):
            nifti_file(f"d/imagesTs/c_000{k}.nii.gz", volume)
    else:
        nifti_file("d/imagesTs/c.nii.gz", np.stack([flair, t1], axis=3))
    found = cases_to_predict([tmp_path / "d" / "imagesTs"], ["T1", "FLAIR"])
    assert found.channels == ["flair", "t1"]
    labels, _ = predict_file(Second(), meta(channels=["T1", "FLAIR"]), found.items[0].images, channels=found.channels)
    assert np.array_equal(labels, expected)


@pytest.mark.parametrize(
    ("found", "wanted", "order"),
    [
        (["T1", "T2"], ["t2", "t1"], [1, 0]),
        (["T1", "T2"], ["channel_0", "channel_1"], [0, 1]),
        (["channel_0", "channel_1"], ["T1", "T2"], [0, 1]),
        (["FLAIR"], ["image"], [0]),
        (["T1", "T1"], ["T1", "T1"], [0, 1]),
    ],
)
def test_channel_order(found, wanted, order):
    assert channel_order(found, wanted) == order


def test_other_channels_are_refused_with_both_lists(two_channels, nifti_file, tmp_path, capsys):
    declare(tmp_path / "d", ["T1", "ADC"])
    for k in range(2):
        nifti_file(f"d/imagesTs/c_000{k}.nii.gz", make_volume(SCAN, k))
    options = ["--weights", two_channels, "--out", tmp_path / "out"]
    status, _, err = run(capsys, *options, "--images", tmp_path / "d" / "imagesTs")
    assert status == 2
    assert "T1, FLAIR" in err
    assert "T1, ADC" in err
    assert len(err.splitlines()) == 1


def test_a_data_set_needs_no_labels_and_its_training_list_is_not_looked_at(nifti_file, tmp_path):
    names = [f"d/imagesTr/c{k}_0000.nii.gz" for k in range(3)]
    for name in names:
        nifti_file(name)
    nifti_file("d/labelsTr/c0.nii.gz")
    declare(tmp_path / "d", ["T1"], training=[{"image": "./imagesTr/c0_0000.nii.gz"}])
    for folder in ("d", "d/imagesTr"):
        found = cases_to_predict([tmp_path / folder], ["T1"])
        assert [item.id for item in found.items] == ["c0", "c1", "c2"]
        assert not any(item.problem for item in found.items)


@pytest.mark.parametrize(("channels", "expected"), [(4, ["c"]), (1, ["c_0000", "c_0001", "c_0002", "c_0003"])])
@pytest.mark.parametrize("folder", ["scans", "imagesTs"])
def test_numbered_files_are_channels_where_the_checkpoint_has_as_many(nifti_file, tmp_path, folder, channels, expected):
    for k in range(4):
        nifti_file(f"{folder}/c_000{k}.nii.gz")
    names = [f"channel_{k}" for k in range(channels)] if channels > 1 else ["image"]
    assert [item.id for item in cases_to_predict([tmp_path / folder], names).items] == expected


def test_one_channel_takes_every_name(nifti_file, tmp_path):
    for name in ("a_T1", "b_T1", "c"):
        nifti_file(f"s/{name}.nii.gz")
    assert [item.id for item in cases_to_predict([tmp_path / "s"], ["T1"]).items] == ["a_T1", "b_T1", "c"]
    (tmp_path / "s" / "c.nii.gz").unlink()
    assert [item.id for item in cases_to_predict([tmp_path / "s"], ["T1"]).items] == ["a", "b"]


@pytest.mark.parametrize(
    ("channels", "names", "cases", "unused"),
    [
        (["T1", "FLAIR"], ["a_T1", "a_FLAIR", "a_seg", "a_T2"], ["s/a"], []),
        (["T1", "FLAIR"], ["p/T1", "p/FLAIR", "p/lesions"], ["p"], []),
        (["T1", "FLAIR"], ["a-T1", "a-FLAIR", "b-T1", "b-FLAIR_1"], ["a", "b"], ["b-FLAIR_1"]),  # b has none
        (["T1", "FLAIR"], ["a_T1", "a_FLAIR", "other"], ["a"], ["other"]),
        (["T1", "FLAIR"], ["a_T1", "a_FLAIR", "b_T1", "b-seg", "p/Mask"], ["a", "b"], []),  # b lacks a channel
        (["T1"], ["a_T1", "a_seg", "b_T1", "b-seg"], ["a_T1", "b_T1"], []),
        (["image"], ["a", "a-seg", "b_label"], ["a"], []),
        (["image"], ["a_seg", "b_seg"], ["a_seg", "b_seg"], []),  # all are: the name says nothing
        (["image"], ["a", "unseg", "segment"], ["a", "segment", "unseg"], []),
    ],
)
def test_what_lies_beside_the_scans_is_no_case(nifti_file, tmp_path, channels, names, cases, unused):
    for name in names:
        nifti_file(f"s/{name}.nii.gz")
    found = cases_to_predict([tmp_path / "s"], channels)
    assert [item.id for item in found.items] == [case.removeprefix("s/") for case in cases]
    assert [stem_of(path.name) for path in found.unused] == unused
    used = [file for item in found.items for file in item.files]
    labels = 0 if len(used) == len(names) else sum(name.lower().endswith(("seg", "label", "mask")) for name in names)
    aside = len(names) - len(used) - len(unused) - labels
    told = [f"{labels} label files are left out, by their names: "] * (labels > 0)
    told += [f"{aside} files beside the scans are not used: "] * (aside > 0)
    assert [note[: len(start)] for note, start in zip(found.notes, told, strict=True)] == told


def test_files_that_no_channel_takes_are_listed(two_channels, nifti_file, tmp_path, capsys):
    for name in ("a_T1", "a_FLAIR", "a_mask"):
        nifti_file(f"s/{name}.nii.gz", make_volume(SCAN))
    options = ["--weights", two_channels, "--out", tmp_path / "out", "--images", tmp_path / "s"]
    status, out, err = run(capsys, *options)
    assert (status, len(out.splitlines())) == (0, 1)
    assert err == "note: 1 label files are left out, by their names: a_mask.nii.gz\n"
    nifti_file("s/b_T2.nii.gz", make_volume(SCAN))
    status, out, err = run(capsys, *options)
    assert (status, len(out.splitlines())) == (1, 1)
    assert f"not predicted: {tmp_path / 's' / 'b_T2.nii.gz'}: not used" in err
    assert "1 of 1 cases predicted" in err


def test_what_lies_one_folder_up_is_not_declared(nifti_file, tmp_path):
    nifti_file("d/scans/a.nii.gz")
    declare(tmp_path / "d", ["T1", "T2"])
    assert [item.id for item in cases_to_predict([tmp_path / "d" / "scans"], ["T1"]).items] == ["a"]
