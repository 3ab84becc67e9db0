"""The recipes of the README, typed as they stand there; only the sizes are made small."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import signal
import sys

import nibabel as nib
import numpy as np
import pytest

from tests.conftest import save_nifti
from tests.launch import ROOT

SMALL = "--arch unet_tiny --patch-size 32 --batch-size 2 --steps 1 --workers 0 --device cpu --compile off"
ADDED = {
    "train_pretrain.py": SMALL,
    "train_finetune.py": SMALL,
    "evaluate.py": "--device cpu",
    "predict": "--device cpu",
}
RECIPES = (ROOT / "README.md").read_text().partition("## Recipes")[2].partition("\n## ")[0].partition("### ")[0]


def scan(path, bright, label=None):
    """A small head with a bright ball, and perhaps its label file."""
    grid = np.indices((24, 30, 18)).transpose(1, 2, 3, 0) - (11.5, 14.5, 8.5)
    head, ball = (np.linalg.norm(grid / radius, axis=3) < 1 for radius in ((11, 14, 8), (4, 4, 3)))
    save_nifti(path, np.where(ball, bright, 300.0 * head).astype(np.float32))
    if label is not None:
        save_nifti(label, ball.astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the recipes name in capitals, except what they write themselves."""
    folder = tmp_path_factory.mktemp("recipes")
    for k in range(4):
        scan(folder / "SCANS" / f"head{k}.nii.gz", 500 + k)
        scan(folder / "IMAGES" / f"case{k}.nii.gz", 600 + k, folder / "LABELS" / f"case{k}.nii.gz")
        scan(folder / "imagesTr" / f"brain{k}_0000.nii.gz", 700 + k, folder / "labelsTr" / f"brain{k}.nii.gz")
    scan(folder / "MORE" / "case9.nii.gz", 900, folder / "MORE_LABELS" / "case9.nii.gz")
    scan(folder / "NEW" / "new.nii.gz", 800)
    scan(folder / "imagesTs" / "last_0000.nii.gz", 850)
    roles = ["train", "train", "validation", "test"]
    rows = [f"case{k},{fold},{roles[(k + fold) % 4]}" for fold in (0, 1) for k in range(4)]
    (folder / "folds.csv").write_text("\n".join(["case,fold,role", *rows, ""]))
    named = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "ball": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps({**named, "numTraining": 4}))
    halves = [["brain0", "brain1"], ["brain2", "brain3"]]
    splits = [{"train": a, "val": b} for a, b in (halves, halves[::-1])]
    (folder / "splits_final.json").write_text(json.dumps(splits))
    return folder


def start(line, monkeypatch):
    """Run a command line in this process; its exit status."""
    python, *words = shlex.split(line)
    assert python == "python"
    is_module = words[0] == "-m"
    name = words[1] if is_module else words[0]
    words = words[2 if is_module else 1 :] + shlex.split(ADDED.get(name.removeprefix("amaes."), ""))
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(SystemExit) as end:
        if is_module:
            runpy.run_module(name, run_name="__main__")
        else:
            runpy.run_path(str(ROOT / name), run_name="__main__")
    return end.value.code


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_recipes_run_as_they_stand(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    blocks = re.findall(r"```bash\n(.*?)```", RECIPES, re.DOTALL)
    assert len(blocks) == 5
    try:
        for line in "".join(blocks).splitlines():
            assert start(line, monkeypatch) in (0, None), f"{line}\n{capsys.readouterr()}"
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)
    assert "| mean ± sd |" in (folder / "FOLDS" / "summary.md").read_text()
    cases = {case["id"] for case in json.loads((folder / "TASK" / "dataset.json").read_text())["cases"]}
    assert cases == {"case0", "case1", "case2", "case3", "case9"}
    assert "# " in (folder / "net.md").read_text()
    for file, source in (
        ("MASKS/new.nii.gz", "NEW/new.nii.gz"),
        ("PREDICTED/last.nii.gz", "imagesTs/last_0000.nii.gz"),
    ):
        mask, scan = nib.load(folder / file), nib.load(folder / source)
        assert mask.shape == scan.shape
        assert np.array_equal(mask.affine, scan.affine)
