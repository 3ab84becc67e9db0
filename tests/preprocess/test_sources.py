"""The sources of BRAINS-45K: every layout of their releases and what else lies in them; a store of two sources."""

import json

import numpy as np
import pytest

from amaes.cli import run
from amaes.preprocess.__main__ import main
from amaes.preprocess.source_report import describe
from amaes.preprocess.source_tables import SOURCES, source_name
from amaes.preprocess.sources import collect_sources, find_source, hold_out, leave_out_test
from tests.conftest import make_volume, save_nifti
from tests.preprocess.source_layouts import CASES, LONI


@pytest.fixture
def tree(tmp_path):
    """Function: empty files, and resource files that no collector may see."""

    def make(*names, root="data"):
        for name in names:
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            path.with_name(f"._{path.name}").touch()
            (path.parent / ".DS_Store").touch()
        junk = tmp_path / root / "__MACOSX" / names[0]
        junk.parent.mkdir(parents=True, exist_ok=True)
        junk.touch()
        return tmp_path / root

    return make


def ids(folder):
    return sorted(item.id for item in folder.items)


def refused(capsys, *arguments):
    """The one line with which a command line is refused."""
    with pytest.raises(SystemExit) as caught:
        run(lambda: main([str(argument) for argument in arguments]))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(("name", "volumes", "left_out", "unmatched"), CASES, ids=[case[0] for case in CASES])
def test_every_layout_of_a_source(name, volumes, left_out, unmatched, tree):
    lines = [line.strip().replace("LONI", LONI) for line in volumes.strip().splitlines()]
    left_out = {reason: [path.replace("LONI", LONI) for path in paths] for reason, paths in left_out.items()}
    root = tree(*lines[::2], *(path for paths in left_out.values() for path in paths), *unmatched, "readme.txt")
    folder = find_source(name, root)
    expected = {}
    for path, end in zip(lines[::2], lines[1::2], strict=True):
        base, _, several = end.partition("{")
        for part in several.rstrip("}").split(","):
            expected[f"{folder.source.dataset or 'data'}/{base}{part}"] = path
    assert {item.id: item.images[0].relative_to(root).as_posix() for item in folder.items} == expected
    for item in folder.items:
        dataset, subject, visit, sequence = item.id.split("/")
        assert (item.subject, item.session) == (f"{dataset}/{subject}", visit)
        assert item.sequence == sequence.split("-")[0]
    assert {reason: sorted(paths) for reason, paths in folder.excluded.items()} == left_out
    assert folder.unmatched == unmatched


def test_every_source_is_tested():
    assert {source_name(case[0]) for case in CASES} == set(SOURCES)


def test_sums_of_table_1():
    published = [source.published for source in SOURCES.values() if source.published]
    assert len(published) == 9
    assert [sum(column) for column in zip(*published, strict=True)] == [7140, 16040, 44756]


def test_a_part_left_out_by_default_is_taken_where_its_folder_is_given(tree):
    root = tree(
        "test/Amsterdam/Philips_VU .PETMR_01./160/pre/FLAIR.nii.gz",
        "test/Amsterdam/Philips_VU .PETMR_01./160/wmh.nii.gz",
        "imagesTr/BRATS_001.nii.gz",
        "Testing/Center_03/Patient_01/Preprocessed_Data/T1_preprocessed.nii.gz",
    )
    assert ids(find_source("wmh", root / "test")) == ["WMH/Amsterdam_Philips_VU-PETMR_01_160/ses-1/FLAIR"]
    assert len(find_source("msd_task01", root / "imagesTr").items) == 4
    assert len(find_source("msseg1", root / "Testing").items) == 1
    assert sum(len(find_source(name, root).items) for name in ("wmh", "msd_task01", "msseg1")) == 0


def test_a_folder_within_the_tree_may_be_given(tree):
    root = tree("OAS30001_MR_d0129/anat1/sub-OAS30001_ses-d0129_T1w.nii.gz")
    assert ids(find_source("OASIS3", root / "OAS30001_MR_d0129")) == ids(find_source("oasis3", root))


def test_volumes_of_a_4d_file(tree):
    folder = find_source("msd_task01", tree("imagesTs/BRATS_485.nii.gz"))
    assert [(item.sequence, item.volume) for item in folder.items] == [
        ("FLAIR", (0, 4)),
        ("T1", (1, 4)),
        ("T1ce", (2, 4)),
        ("T2", (3, 4)),
    ]


def test_corpus_filter_is_that_of_the_four_large_sources(tree):
    assert [name for name, source in SOURCES.items() if source.corpus_filter] == ["adni", "oasis3", "oasis4", "ppmi"]
    wmh = find_source("wmh", tree("training/Utrecht/11/pre/T1.nii.gz", root="w"))
    oasis = find_source("oasis4", tree("OAS42510_MR_d3133/anat1/sub-OAS42510_sess-d3133_T1w.nii.gz", root="o"))
    for choice, expected in (("auto", [True, False]), ("on", [True, True]), ("off", [False, False])):
        assert [item.corpus_filter for item in collect_sources([wmh, oasis], choice).items] == expected


def test_two_files_of_one_id_stop_and_are_both_named(tree, tmp_path, capsys):
    root = tree("sub-01/anat/sub-01_T1w.nii", "copy/sub-01/anat/sub-01_T1w.nii.gz", "sub-02/anat/sub-02_T1w.nii")
    line = refused(capsys, "--source", f"bids={root}", "--out", tmp_path / "s", "--workers", 0)
    assert "id_collision: 1 ids come from two files" in line
    assert f"{root}/copy/sub-01/anat/sub-01_T1w.nii.gz" in line
    assert f"{root}/sub-01/anat/sub-01_T1w.nii both map to 'data/sub-01/ses-1/T1'" in line
    assert not (tmp_path / "s").exists()


def test_dicom_is_named(tree, tmp_path, capsys):
    root = tree("002_S_0295/a/1.dcm", "002_S_0295/b/IM0001", "002_S_0295/c/IM0002")
    (root / "002_S_0295/b/IM0001").write_bytes(bytes(128) + b"DICM")
    assert find_source("adni", root).dicom == ["002_S_0295/a/1.dcm", "002_S_0295/b/IM0001"]
    line = refused(capsys, "--source", f"adni={root}", "--out", tmp_path / "s")
    assert "no volume was found" in line
    assert "dcm2niix" in line


def test_links_in_a_circle_are_walked_once(tree):
    root = tree("sub-01/anat/sub-01_T1w.nii")
    (root / "sub-01" / "again").symlink_to(root)
    assert len(find_source("bids", root).items) == 1


# Held-out cases -------------------------------------------------------------------------------------------------------


def test_hold_out_by_hand():
    """RandomState(4215532).permutation(10) is 6 9 0 3 5 4 8 2 7 1; ceil(2.5) = 3 cases are the test set."""
    pool, test = hold_out([f"c{k}" for k in (3, 1, 0, 2, 5, 4, 9, 8, 7, 6)], 4215532)
    assert test == ["c6", "c9", "c0"]
    assert pool == ["c3", "c5", "c4", "c8", "c2", "c7", "c1"]


def test_hold_out_refuses_a_name_twice():
    with pytest.raises(ValueError, match="expected different names, found 1 of 3 repeated"):
        hold_out(["a", "b", "a"], 1)


def test_published_hold_out_of_brats(tree):
    names = [f"BraTS2021_{k:05d}" for k in range(1251)]
    root = tree(*(f"{name}/{name}_{part}.nii.gz" for name in names for part in ("flair", "t1")))
    folder = find_source("brats21", root)
    assert "1251 subjects and 2502 volumes become 938 and 1876" in describe([folder])
    leave_out_test([folder], "brats21")
    assert folder.counts == (938, 938, 1876)
    test = set(hold_out(names, 4215532)[1])
    assert len(test) == 313
    assert not test & {item.subject.removeprefix("BraTS21/") for item in folder.items}
    assert len(folder.excluded["hold_out"]) == 626
    assert "THE TEST CASES" not in describe([folder])


def test_hold_out_is_only_of_all_cases(tree):
    folder = find_source("brats21", tree("BraTS2021_00000_t1.nii.gz"))
    with pytest.raises(ValueError, match="permutation of all 1251 cases, found 1"):
        leave_out_test([folder], "brats21")
    with pytest.raises(ValueError, match="no test cases were published; choose from brats21, isles22"):
        leave_out_test([folder], "wmh")
    with pytest.raises(ValueError, match="no `source` isles22=DIR is given"):
        leave_out_test([folder], "isles22")


# The command line -----------------------------------------------------------------------------------------------------


def test_dry_run_counts_beside_table_1_and_writes_nothing(tree, tmp_path, capsys):
    wmh = tree("training/Utrecht/1/pre/T1.nii.gz", "training/Utrecht/1/pre/FLAIR.nii.gz", "lost.nii", root="wmh")
    brats = tree("BraTS2021_00000_t1.nii.gz", root="brats")
    given = ["--source", f"wmh={wmh}", "--source", f"brats21={brats}"]
    assert main([*given, "--out", str(tmp_path / "s"), "--dry-run"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["volumes", "2", "120"] in lines
    assert ["subjects", "1", "938"] in lines
    assert ["total:", "2", "subjects,", "2", "visits,", "3", "volumes"] in lines
    text = "\n".join(" ".join(line) for line in lines)
    assert "sequences FLAIR 1, T1 1 (Table 1: T1, FLAIR)" in text
    assert "1 NIfTI files match no rule (lost.nii)" in text
    assert "--hold-out brats21, which needs all 1251 cases (found 1)" in text
    assert "not out-of-domain" in text
    assert not (tmp_path / "s").exists()


def test_dry_run_of_a_folder(tree, tmp_path, capsys):
    root = tree("sub-1/T1.nii", "sub-1/FLAIR.nii", "sub-2/T1.nii")
    assert main(["--images", str(root), "--out", str(tmp_path / "s"), "--dry-run"]) == 0
    assert "3 cases of 2 subjects, 0 labelled; FLAIR 1, T1 2" in capsys.readouterr().out
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--source", "nope=."], "choose from adni, oasis3, oasis4, ppmi, brats21, isles22, wmh"),
        (["--source", "wmh"], "'wmh' is not NAME=DIR"),
        (["--source", "wmh=/no/such"], "no such folder"),
        (["--source", "wmh=.", "--images", "."], "not allowed with argument"),
        (["--source", "wmh=.", "--labels", "."], "--labels: goes with --images"),
        (["--source", "wmh=.", "--missing-channel", "zeros"], "--missing-channel: goes with --images"),
        (["--images", ".", "--hold-out", "brats21"], "--hold-out brats21: goes with --source"),
        (["--images", ".", "--shard", "2/2"], "'2/2' is not I/N"),
    ],
)
def test_combinations_are_refused(options, said, tmp_path, capsys):
    assert said in refused(capsys, *options, "--out", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_store_of_two_sources(tmp_path, capsys):
    """Volumes of a 4-D file are cases of their own; what the published corpus leaves out is skipped, not an error."""
    root = tmp_path / "d"
    volumes = np.stack([make_volume((16, 18, 17), seed=k) for k in range(4)], axis=3)
    save_nifti(root / "msd/imagesTs/BRATS_485.nii.gz", volumes)
    scan = "oasis/OAS42510_MR_d{day}/anat1/sub-OAS42510_sess-d{day}_T1w.nii.gz"
    negative = make_volume((16, 18, 17))
    negative[5, 5, 5] = -1
    for day, data in enumerate([make_volume((16, 18, 17)), make_volume((14, 18, 17)), negative, volumes]):
        save_nifti(root / scan.format(day=day), data)
    options = ["--source", f"msd_task01={root}/msd", "--source", f"oasis4={root}/oasis", "--workers", "0"]
    assert main([*options, "--out", str(tmp_path / "s")]) == 0
    out = capsys.readouterr().out
    assert "8 inputs: 5 ok, 3 skipped, 0 rejected, 0 failed" in out
    assert "5 cases of 2 subjects" in out
    assert "of MSD_Task01 4, OASIS4 1" in out
    rows = [json.loads(line) for line in (tmp_path / "s" / "report.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in rows if row["id"].startswith("OASIS4")] == [None, *["corpus_filter"] * 3]
    said = ["at least 15 voxels per axis, found 14 x 18 x 17", "no negative value, found -1", "3-D"]
    for row, part in zip(rows[5:], said, strict=True):
        assert (row["status"], part in row["message"]) == ("skipped", True)
    content = json.loads((tmp_path / "s" / "dataset.json").read_text())
    assert content["channels"] == ["image"]
    assert [case["id"] for case in content["cases"]] == [
        *(f"MSD_Task01/BRATS_485/ses-1/{name}" for name in ("FLAIR", "T1", "T1ce", "T2")),
        "OASIS4/OAS42510/d0/T1-anat1",
    ]
    assert content["cases"][0]["subject"] == "MSD_Task01/BRATS_485"
    for k, case in enumerate(content["cases"][:4]):
        save_nifti(tmp_path / f"alone{k}/{k}.nii.gz", volumes[..., k])
        assert main(["--images", str(tmp_path / f"alone{k}"), "--out", str(tmp_path / f"s{k}"), "--workers", "0"]) == 0
        alone = np.load(tmp_path / f"s{k}/cases/{k}.npy")
        assert np.array_equal(np.load(tmp_path / "s/cases" / f"{case['id']}.npy"), alone)
    assert main([*options, "--out", str(tmp_path / "s")]) == 0
    assert "8 inputs: 0 ok, 8 skipped, 0 rejected, 0 failed" in capsys.readouterr().out
