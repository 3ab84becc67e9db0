"""Trees that are not quite as they should be: folders without access, links, other alphabets, sources that overlap."""

import os

import pytest

from amaes.preprocess.__main__ import main
from amaes.preprocess.find_cases import collect
from amaes.preprocess.source_report import notes
from amaes.preprocess.sources import collect_sources, find_source, hold_out, leave_out_test
from tests.preprocess.test_sources import ids, refused, tree  # noqa: F401


@pytest.fixture
def locked_folder(monkeypatch):
    """Function: a folder that this process may not list; rights do not keep out a superuser."""
    listed = os.scandir

    def make(folder):
        folder.mkdir()

        def scandir(path):
            if os.fspath(path).rstrip("/") == os.fspath(folder):
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return listed(path)

        monkeypatch.setattr(os, "scandir", scandir)
        return folder

    return make


def test_a_folder_without_access_is_told_of_and_the_rest_is_taken(tree, locked_folder):  # noqa: F811
    root = tree("sub-01/anat/sub-01_T1w.nii")
    locked_folder(root / "lost+found")
    folder = find_source("bids", root)
    assert len(folder.items) == 1
    assert notes(folder) == ["bids: 1 volumes or files left out, unreadable (lost+found/)"]
    collection = collect(root)
    assert len(collection.items) == 1
    assert collection.notes == [f"1 folders cannot be read: {root / 'lost+found'}"]


def test_a_root_without_access_is_an_error(tmp_path, locked_folder):
    root = locked_folder(tmp_path / "data")
    with pytest.raises(PermissionError):
        find_source("bids", root)
    with pytest.raises(PermissionError):
        collect(root)


def test_a_link_to_itself_stops_nothing(tree):  # noqa: F811
    root = tree("sub-01/anat/sub-01_T1w.nii")
    (root / "again").symlink_to("again")
    assert len(find_source("bids", root).items) == 1


def test_a_link_does_not_bring_back_a_part_that_is_left_out(tree):  # noqa: F811
    root = tree("training/Utrecht/11/pre/T1.nii.gz", "test/Utrecht/12/pre/T1.nii.gz")
    (root / "a_link").symlink_to("test")
    folder = find_source("wmh", root)
    assert ids(folder) == ["WMH/Utrecht_11/ses-1/T1"]
    assert folder.excluded["other_part"] == ["test/Utrecht/12/pre/T1.nii.gz"]
    (root / "training").rename(root.parent / "elsewhere")
    (root / "training").symlink_to(root.parent / "elsewhere")
    assert ids(find_source("wmh", root)) == ["WMH/Utrecht_11/ses-1/T1"]


def test_letters_of_other_alphabets_stay_in_ids(tree):  # noqa: F811
    folder = find_source("bids", tree("sub-é1/anat/sub-é1_T1w.nii", "sub-ü1/anat/sub-ü1_T1w.nii"))
    assert ids(folder) == ["data/sub-é1/ses-1/T1", "data/sub-ü1/ses-1/T1"]


def test_sources_that_overlap_are_refused(tree, tmp_path, capsys):  # noqa: F811
    """By the file itself: the ids differ, and one path goes through a link."""
    root = tree("ISLES/sub-strokecase0001/ses-0001/anat/sub-strokecase0001_ses-0001_FLAIR.nii.gz")
    (tmp_path / "link").symlink_to(root / "ISLES")
    arguments = ["--source", f"isles22={tmp_path}/link", "--source", f"bids={root}", "--out", tmp_path / "s"]
    line = refused(capsys, *arguments, "--dry-run")
    assert f"--source isles22={tmp_path}/link and --source bids={root} both take one file" in line
    line = refused(capsys, "--source", f"bids={root}", "--source", f"bids={root}/ISLES/..", "--out", tmp_path / "s")
    assert "give each folder once" in line


def test_two_data_sets_of_one_name_are_refused(tree, tmp_path):  # noqa: F811
    """sub-01 of both would be one subject."""
    one = tree("sub-01/anat/sub-01_T1w.nii", root="a/rawdata")
    two = tree("sub-01/ses-2/anat/sub-01_ses-2_T1w.nii", root="b/rawdata")
    with pytest.raises(ValueError, match="ids of both would begin with 'rawdata'; give one by a link of another name"):
        collect_sources([find_source("bids", one), find_source("bids", two)])
    (tmp_path / "other").symlink_to(two)
    subjects = {
        item.subject
        for item in collect_sources([find_source("bids", one), find_source("bids", tmp_path / "other")]).items
    }
    assert subjects == {"rawdata/sub-01", "other/sub-01"}
    parts = [tree(f"training/Utrecht/{k}/pre/T1.nii", root=f"disk{k}") for k in (1, 2)]  # a release on two disks
    assert len(collect_sources([find_source("wmh", part) for part in parts]).items) == 2


def test_hold_out_does_not_depend_on_capitals(tree):  # noqa: F811
    names = [f"BraTS2021_{k:05d}" for k in range(1251)]
    written = [name.upper() if k % 7 == 0 else name for k, name in enumerate(names)]
    folder = find_source("brats21", tree(*(f"{name}/{name}_flair.nii.gz" for name in written)))
    leave_out_test([folder], "brats21")
    kept = {item.subject.split("/")[1].lower() for item in folder.items}
    assert kept == {name.lower() for name in hold_out(names, 4215532)[0]}


def test_shards_do_not_overwrite(tree, tmp_path, capsys):  # noqa: F811
    root = tree("sub-01/anat/sub-01_T1w.nii")
    for more in ([], ["--dry-run"]):
        options = ["--source", f"bids={root}", "--out", tmp_path / "s", "--shard", "0/2", "--overwrite", *more]
        assert "--shard and --overwrite exclude each other" in refused(capsys, *options)
    assert not (tmp_path / "s").exists()


def test_a_home_folder_is_found_behind_the_equals_sign(tree, tmp_path, monkeypatch, capsys):  # noqa: F811
    tree("sub-01/anat/sub-01_T1w.nii")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["--source", "bids=~/data", "--out", str(tmp_path / "s"), "--dry-run"]) == 0
    assert "total: 1 subjects" in capsys.readouterr().out
