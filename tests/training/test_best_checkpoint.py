"""Own folds, validation on whole scans, the best checkpoint, folds that end early: train, continue, evaluate."""

from __future__ import annotations

import json

import pytest

import train_finetune
from amaes import checkpoint
from amaes.choices import CHECKPOINTS
from amaes.evaluation.folds import open_run
from amaes.training import whole_scans
from tests.launch import TINY, run
from tests.stores import make_store

ENDING = "--steps 20 --val-every 2 --patience 2"


@pytest.fixture
def finetune(tmp_path, monkeypatch):
    """Function: fine-tune a fold with these words; the Dice of its validations is as in the list given."""
    store = make_store(tmp_path / "store", labels=True)
    rows = ["case,fold,role", "case00,0,train", "case01,0,train", "case02,0,validation", "case03,0,test", ""]
    (tmp_path / "splits.csv").write_text("\n".join(rows))

    def finetune(dice, words, status=0):
        given = iter(dice)
        monkeypatch.setattr(whole_scans, "validation_dice", lambda *_, **__: next(given))
        options = ("--data", store, "--splits", tmp_path / "splits.csv", "--out", tmp_path / "run", "--workers", 0)
        return tmp_path / "run" / "fold0", run(
            "train_finetune.py", *options, *TINY, "--batch-size", 2, *words.split(), status=status
        )

    return finetune


def lines(fold):
    return [json.loads(line) for line in (fold / "metrics.jsonl").read_text().splitlines()]


def test_the_best_network_is_kept_and_a_fold_without_progress_ends(finetune):
    fold, done = finetune([0.25, 0.5, 0.375, 0.5], ENDING)
    assert [(line["step"], line["val_dice"]) for line in lines(fold) if "val_dice" in line] == [
        (2, 0.25),
        (4, 0.5),
        (6, 0.375),
        (8, 0.5),
    ]
    best = checkpoint.read(fold / "checkpoints" / "best.pt")
    assert (best["step"], best["validation_dice"], "optimizer" in best) == (4, 0.5, False)
    assert checkpoint.saved(fold / "checkpoints")[0].name == "step-8.pt"
    split = json.loads((fold / "config.json").read_text())
    assert split == {"train": ["case00", "case01"], "validation": ["case02"], "test": ["case03"], "ended_at": 8}
    assert "best validation Dice 50.00 % at step 4: best.pt; ended at step 8, 2 validations later" in done.stdout

    finetune([], ENDING)  # ended: nothing is done again
    assert [open_run(fold.parent, which=which).folds[0].checkpoint.name for which in CHECKPOINTS] == [
        "step-8.pt",
        "best.pt",
    ]
    # These stores cannot be scored; the checkpoint that was taken is told all the same.
    run("evaluate.py", fold.parent, "--checkpoint", "best", "--space", "store", "--device", "cpu", status=1)
    used = json.loads((fold.parent / "summary-best-store.json").read_text())["checkpoints"][0]
    assert (used["file"], used["step"]) == ("best.pt", 4)


def test_a_run_that_continues_knows_its_best_and_refuses_other_folds(finetune, tmp_path):
    fold, _ = finetune([1 / 3, 0.25], "--steps 5 --val-every 3 --save-every 4")  # the last step is validated, too
    (fold / "checkpoints" / "step-5.pt").unlink()  # as if it had been killed before
    finetune([1 / 3], "--steps 5 --val-every 3 --save-every 4")  # as good as the best, not better
    _, done = finetune([], "--steps 5 --val-every 3 --save-every 4 --compile on")
    assert "nothing is left to train, nothing is compiled" in done.stdout
    assert [(line["step"], line["val_dice"]) for line in lines(fold) if "val_dice" in line] == [
        (3, 0.333333),
        (5, 0.333333),
    ]
    assert checkpoint.read(fold / "checkpoints" / "best.pt")["step"] == 3
    splits = tmp_path / "splits.csv"
    splits.write_text(splits.read_text().replace("case03,0,test", "case03,0,train") + "case04,0,test\n")
    _, done = finetune([], "--steps 5 --class-weights 1:2 3:4", status=2)
    assert "--class-weights 3: no class of" in done.stderr
    _, done = finetune([], "--steps 5 --fold 1", status=2)
    assert f"--fold 1: {tmp_path}/splits.csv has no fold above 0" in done.stderr
    _, done = finetune([], "--steps 5", status=2)
    assert "fold 0: case case03 is train, was test; take another --out" in done.stderr


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        ("--splits a.json --protocol wmh", ["--splits a.json: --protocol wmh sets the folds; leave one out"]),
        ("--splits a.json --folds 3", ["--folds 3: --splits a.json names the cases; leave one out"]),
        (
            "--patience 2 --fold 7 --transfer all",
            ["--patience 2: needs validation cases", "--fold 7: accepted: all, or 0 to 5", "--transfer all: accepted"],
        ),
        ("--train-cases all --val-cases 2", ["--val-cases 2: --train-cases all leaves no case for validation"]),
        ("--class-weights 2:1 2:3 0:1", ["--class-weights: class 2 is given 2 times"]),
        ("--class-weights 2", ["--class-weights: '2': expected CLASS:WEIGHT"]),
        ("--class-weights 2:0", ["--class-weights: '0' is not a number above 0"]),
        ("--train-cases some", ["--train-cases: 'some' is not an integer"]),
    ],
)
def test_contradictions_are_told_together(words, messages, capsys):
    with pytest.raises(SystemExit):
        train_finetune.parse_options(["--data", "STORE", *words.split()])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for message in messages:
        assert message in error


def test_a_run_without_test_cases_goes_on_to_predict_and_has_nothing_to_validate(tmp_path):
    store = make_store(tmp_path / "store", labels=True)
    ids = ["case00", "case01", "case02"]
    (tmp_path / "all.json").write_text(json.dumps([{"train": ids, "test": []}]))
    options = ["--data", store, "--splits", tmp_path / "all.json", "--out", tmp_path / "run", "--workers", 0, *TINY]
    done = run("train_finetune.py", *options, "--patience", 2, status=2)
    assert done.stderr.endswith("--patience 2: " + f"{tmp_path}/all.json has no validation cases\n")
    done = run("train_finetune.py", *options, "--steps", 1)
    assert done.stdout.endswith(f"next: python -m amaes.predict --weights {tmp_path}/run\n")
