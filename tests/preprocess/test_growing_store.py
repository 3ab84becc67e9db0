"""A store that is written to again: what it adds, keeps, finds changed, refuses and takes out."""

import json
import os
import shutil

import numpy as np
import pytest

from amaes.cli import run
from amaes.preprocess.__main__ import main
from amaes.preprocess.config import Config
from amaes.preprocess.find_cases import collect
from amaes.preprocess.several_folders import collect_folders
from amaes.preprocess.write_store import write_store
from tests.conftest import make_volume, save_nifti


@pytest.fixture
def folders(tmp_path):
    """Two folders of two labelled cases each, of different sides: a0, a1 and b0, b1."""
    for k, name in enumerate(("a0", "a1", "b0", "b1")):
        shape = (12 + k, 14, 10)
        label = np.zeros(shape, np.uint8)
        label[3 : 5 + k, 3:6, 3:6] = 1 + k // 2
        save_nifti(tmp_path / name[0] / "i" / f"{name}.nii.gz", make_volume(shape, seed=k))
        save_nifti(tmp_path / name[0] / "l" / f"{name}.nii.gz", label)
    return tmp_path / "a", tmp_path / "b"


def write(store, *folders, config=None, **options):
    """The two folders i and l of each, into the store."""
    collection = collect_folders([folder / "i" for folder in folders], [folder / "l" for folder in folders])
    return write_store(collection, store, config or Config(), **options)


def index(store):
    return json.loads((store / "dataset.json").read_text())


def ids(store):
    return [case["id"] for case in index(store)["cases"]]


def digest(store):
    """What a store holds, without the record of its last run."""
    files = sorted(path for path in store.rglob("*") if path.is_file() and path.name not in ("report.jsonl", ".lock"))
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


def command(*arguments):
    return main(["--workers", "0", *map(str, arguments)])


def refused(capsys, *arguments):
    """The one line of a refusal, and status 2."""
    with pytest.raises(SystemExit) as caught:
        run(lambda: command(*arguments))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_one_after_the_other_or_at_once_is_one_store(folders, tmp_path):
    a, b = folders
    write(tmp_path / "at_once", a, b)
    write(tmp_path / "s", a)
    result = write(tmp_path / "s", b)
    assert "4 cases of 4 subjects" in result.summary()
    assert "cases: 2 added, 0 done again, 2 kept, 0 taken out" in result.summary()
    assert digest(tmp_path / "s") == digest(tmp_path / "at_once")
    assert index(tmp_path / "s")["labels"] == {"0": "background", "1": "label_1", "2": "label_2"}
    before = digest(tmp_path / "s")
    assert "cases: 0 added, 0 done again, 4 kept, 0 taken out" in write(tmp_path / "s", a).summary()
    assert digest(tmp_path / "s") == before


def test_only_prune_takes_cases_out(folders, tmp_path):
    a, b = folders
    store = tmp_path / "s"
    write(store, a, b)
    (a / "i" / "a0.nii.gz").unlink()
    assert ids(store) == [case["id"] for case in write(store, a).entries] == ["a0", "a1", "b0", "b1"]
    result = write(store, a, prune=True)
    assert "cases: 0 added, 0 done again, 1 kept, 3 taken out" in result.summary()
    assert ids(store) == ["a1"]
    assert sorted(path.name for path in (store / "cases").iterdir()) == ["a1.json", "a1.npy", "a1_label.npy"]
    assert index(store)["labels"] == {"0": "background", "1": "label_1"}
    with pytest.raises(ValueError, match="`shard` and `prune` exclude each other"):
        write(store, a, prune=True, shard=(0, 2))


@pytest.mark.parametrize("what", ["i", "l"])
def test_another_file_of_one_id_is_refused(folders, tmp_path, what, capsys):
    a, _ = folders
    store = tmp_path / "s"
    write(store, a)
    before = digest(store)
    shutil.copytree(a / what, tmp_path / "copy")  # sizes and times of change stay
    new = {"i": a / "i", "l": a / "l", what: tmp_path / "copy"}
    arguments = ["--images", new["i"], "--labels", new["l"], "--out", store]
    line = refused(capsys, *arguments)
    assert f"2 cases there were made from other files: a0: was {a / what}/a0.nii.gz, is {tmp_path}/copy" in line
    assert "--overwrite" in line
    assert command(*arguments, "--dry-run") == 0
    out = capsys.readouterr().out
    assert f"{store}: 0 new, 2 there already, 0 of other inputs\n  made from other files: a0: was {a / what}" in out
    assert digest(store) == before
    assert command(*arguments, "--overwrite") == 0
    assert "2 done again" in capsys.readouterr().out
    assert command(*arguments) == 0


def test_a_folder_that_was_moved_or_is_reached_by_a_link_is_the_same(folders, tmp_path):
    a, _ = folders
    store = tmp_path / "s"
    write(store, a)
    arrays = {path.name: path.read_bytes() for path in (store / "cases").glob("*.npy")}
    (tmp_path / "link").symlink_to(a)
    assert write(store, tmp_path / "link").status() == 0
    moved = a.rename(tmp_path / "moved")
    (tmp_path / "link").unlink()
    assert "0 added, 2 done again" in write(store, moved).summary()
    assert {path.name: path.read_bytes() for path in (store / "cases").glob("*.npy")} == arrays
    assert [outcome.row["status"] for outcome in write(store, moved).outcomes] == ["skipped", "skipped"]


def test_shards_add_to_a_store(folders, tmp_path):
    a, b = folders
    write(tmp_path / "s", a)
    for shard in (0, 1):
        write(tmp_path / "s", b, shard=(shard, 2))
    assert ids(tmp_path / "s") == ["a0", "a1"]
    assert [outcome.row["status"] for outcome in write(tmp_path / "s", b).outcomes] == ["skipped", "skipped"]
    assert ids(tmp_path / "s") == ["a0", "a1", "b0", "b1"]


def test_other_content_is_refused_and_touched_files_are_not(folders, tmp_path):
    a, _ = folders
    store, image = tmp_path / "s", a / "i" / "a0.nii.gz"
    save_nifti(image.with_name("a0.nii"), make_volume((12, 14, 10), seed=0)).rename(image)
    image.rename(image.with_name("a0.nii"))  # not compressed, so that sizes stay
    image = image.with_name("a0.nii")
    write(store, a)
    before = (store / "cases/a0.npy").read_bytes()
    os.utime(image, (1, 1))
    assert [outcome.row["status"] for outcome in write(store, a).outcomes] == ["ok", "skipped"]
    save_nifti(image, make_volume((12, 14, 10), seed=9))
    result = write(store, a)
    assert [outcome.row["reason"] for outcome in result.outcomes] == ["changed", None]
    assert "`overwrite` takes the new one" in result.outcomes[0].row["message"]
    assert (result.status(), ids(store)) == (1, ["a0", "a1"])
    assert (store / "cases/a0.npy").read_bytes() == before
    assert write(store, a, overwrite=True).status() == 0
    assert (store / "cases/a0.npy").read_bytes() != before
    label = a / "l" / "a1.nii.gz"
    save_nifti(label, np.ones((13, 14, 10), np.uint8))
    with pytest.raises(ValueError, match=r"a1.nii.gz had \d+ bytes, has \d+"):
        write(store, a)


def test_overwrite_with_other_settings_needs_all_cases(folders, tmp_path):
    a, b = folders
    store, config = tmp_path / "s", Config(spacing=(2, 2, 2))
    write(store, a, b)
    with pytest.raises(ValueError, match=r"2 of its cases are not among these inputs .*\(b0, b1\).*`prune`"):
        write(store, a, config=config, overwrite=True)
    assert ids(store) == ["a0", "a1", "b0", "b1"]
    write(store, a, config=config, overwrite=True, prune=True)
    assert (ids(store), index(store)["config"]["spacing"]) == (["a0", "a1"], [2, 2, 2])


def test_an_interrupted_overwrite_leaves_a_store_of_what_is_whole(folders, tmp_path, monkeypatch):
    a, b = folders
    store = tmp_path / "s"
    write(store, a, b)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("amaes.preprocess.store_case.preprocess_case", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(store, b, overwrite=True)
    assert ids(store) == ["a0", "a1"]
    write(store, b)
    assert ids(store) == ["a0", "a1", "b0", "b1"]


def test_names_of_classes_must_agree(folders, tmp_path):
    a, b = folders
    store = tmp_path / "s"
    for folder, name in ((a, "tumour"), (b, "oedema")):
        content = {"modality": {"0": "T1"}, "labels": {"0": "background", "1": name, "2": "other"}}
        (folder / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="calls label 1 'oedema', others call it 'tumour'"):
        write(store, a, b)
    write(store, a)
    with pytest.raises(ValueError, match="label 1 is 'tumour' there, 'oedema' here"):
        write(store, b)
    assert ids(store) == ["a0", "a1"]


def test_folders_are_joined_and_what_contradicts_is_named(folders, tmp_path):
    a, b = folders
    shutil.copy(a / "i" / "a0.nii.gz", b / "i")
    shutil.copy(a / "l" / "a0.nii.gz", b / "l")
    with pytest.raises(ValueError, match=r"id_collision: .*both map to 'a0'; the folder above both"):
        write(tmp_path / "s", a, b)
    with pytest.raises(ValueError, match="1 folders for 2 of `images`; expected one for each"):
        collect_folders([a / "i", b / "i"], [a / "l"])
    save_nifti(tmp_path / "c" / "imagesTr" / "c_0000.nii.gz")
    save_nifti(tmp_path / "c" / "imagesTr" / "c_0001.nii.gz")
    with pytest.raises(ValueError, match=r"c has the channels channel_0 channel_1, .*a/i has image"):
        collect_folders([a / "i", tmp_path / "c"])
    save_nifti(tmp_path / "d" / "a0_label.nii.gz")
    write(tmp_path / "s", a)
    with pytest.raises(ValueError, match="id_collision: .*a0_label would lie where the label of a0 does"):
        write_store(collect(tmp_path / "d"), tmp_path / "s", Config())


def test_an_index_that_leads_out_of_the_store_deletes_nothing(folders, tmp_path):
    a, _ = folders
    write(tmp_path / "s", a)
    content = index(tmp_path / "s")
    content["cases"][1]["id"] = "../../outside"
    (tmp_path / "s/dataset.json").write_text(json.dumps(content))
    (tmp_path / "outside.npy").touch()
    with pytest.raises(ValueError, match="not the index of a store"):
        write(tmp_path / "s", a, prune=True)
    assert (tmp_path / "outside.npy").exists()
