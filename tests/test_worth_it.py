"""Whether pretraining is worth it: the commands, what continues, the numbers of the page. No network is trained."""

import json
import math
import shlex
import sys

import pytest

import evaluate
import train_finetune
import train_pretrain
from amaes import worth_it
from amaes.worth_it import Comparison
from tests.stores import make_store


def options(out, *more):
    words = ("--unlabelled", "u", "--images", "my scans", "--labels", "l", "--out", out, "--cases", 9, 3, *more)
    return worth_it.parse_options([*map(str, words)])


def test_the_commands_are_understood_and_pairs_differ_in_weights_and_folder_alone(tmp_path):
    found = worth_it.steps(
        options(tmp_path, "--folds", 2, "--seeds", 2, "--finetune=--warmup 0.1", "--arch", "unet_tiny")
    )
    words = {
        name: command[command.index("--images" if "preprocess" in name else "--data") :]
        for name, command in found.items()
        if not name.startswith("evaluate")
    }
    assert words["preprocess-labelled"][1] == "my scans"
    pretrain = train_pretrain.parse_options(words["pretrain"])
    assert (pretrain.steps, pretrain.arch, pretrain.patch_size) == (10_000, "unet_tiny", (128, 128, 128))
    tuned = {name: vars(train_finetune.parse_options(w)) for name, w in words.items() if name.startswith("finetune")}
    assert list(tuned) == [f"finetune-{n}-cases-{s}-seed{k}" for n in (3, 9) for k in (0, 1) for s in worth_it.STARTS]
    for name in [name for name in tuned if "scratch" in name]:
        scratch, pretrained = tuned[name], tuned[name.replace("scratch", "pretrained")]
        assert {key for key in scratch if scratch[key] != pretrained[key]} == {"weights", "out"}
        assert scratch["warmup"] == 0.1
    first = next(command for name, command in found.items() if name.startswith("evaluate"))
    runs = evaluate.parse_options(first[first.index(f"{tmp_path}/3-cases-scratch-seed0") :]).runs
    assert [str(run) for run in runs] == [str(tuned[name]["out"]) for name in list(tuned)[:4]]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--finetune=--lr 1e-3 --seed=3", "--finetune --lr 1e-3 --seed=3: --seed=3 is for this command to set"),
        ("--finetune=--folds 5", "--folds is for this command"),
        ("--pretrain=--epochs 5", "--epochs is for this command"),
        ("--preprocess=--out x", "--out is for this command"),
        ("--pretrain='a", "--pretrain 'a: No closing quotation"),
    ],
)
def test_options_that_the_comparison_rests_on_are_refused(tmp_path, capsys, given, said):
    with pytest.raises(SystemExit, match="2"):
        options(tmp_path, given)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"), [("--pretrain=--lrr 1", "did you mean --lr?"), ("--finetune=--lr 0", "'0'")]
)
def test_mistyped_options_of_the_scripts_are_found_before_any_work(tmp_path, capsys, given, said):
    with pytest.raises(SystemExit, match="2"):
        worth_it.check_options(worth_it.steps(options(tmp_path, given)))
    assert said in capsys.readouterr().err


def test_a_patch_that_the_network_cannot_divide_is_found_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="`patch_size` 100 100 100: 100 is not accepted"):
        worth_it.check_options(worth_it.steps(options(tmp_path, "--patch-size", 100)))


def test_a_preprocessing_that_crashed_is_not_done(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(worth_it, "steps", lambda args: {"preprocess-labelled": [sys.executable, "-c", "1 / 0"]})
    monkeypatch.setattr(worth_it, "check_options", lambda todo: None)
    assert worth_it.main(["--unlabelled", "u", "--images", "i", "--labels", "l", "--out", str(tmp_path)]) == 1
    assert "preprocess-labelled: status 1" in capsys.readouterr().err


def test_what_rests_on_a_step_is_done_again():
    todo = ["preprocess-labelled", "pretrain", "finetune-3-cases-scratch-seed0", "evaluate-3", "evaluate-30"]
    assert worth_it.resting_on("pretrain", todo) == todo[2:]
    assert worth_it.resting_on("finetune-3-cases-scratch-seed0", todo) == ["evaluate-3"]
    assert worth_it.resting_on("evaluate-3", todo) == []


def test_it_says_what_is_ahead():
    todo = ["preprocess-a", "pretrain", "finetune-1", "finetune-2", "finetune-3", "evaluate-1"]
    said = worth_it.ahead(todo, {"preprocess-a": 9.0})
    assert said == "1 of 6 steps done, not known yet how long: 1 x pretrain, 3 x finetune, 1 x evaluate"
    said = worth_it.ahead(todo, {"pretrain": 9.0, "finetune-1": 60.0})
    assert said == "2 of 6 steps done, 0:02:00 ahead, and not known yet how long: 1 x preprocess, 1 x evaluate"
    said = worth_it.ahead(todo, {"preprocess-a": 9.0, "pretrain": 9.0, "finetune-1": 7200.0, "evaluate-1": 1.0})
    assert said == "4 of 6 steps done, 4:00:00 ahead"


def comparison(cases, pretrained, scratch, networks=None, **more):
    networks = networks or [(fold, 0) for fold in range(len(scratch))]
    return Comparison(cases, networks, scratch, pretrained, **({"tested": 20, "p": 0.5, "steps": {}} | more))


@pytest.mark.parametrize(
    ("networks", "differences", "half"),
    [
        ([(0, 0), (1, 0), (2, 0)], [1.0, 2.0, 3.0], 4.3027 / 3**0.5),  # folds alone: over pairs
        ([(0, 0), (0, 1), (0, 2)], [1.0, 2.0, 3.0], 4.3027 / 3**0.5),
        ([(0, 0), (1, 0), (0, 1), (1, 1)], [1.0, 1.0, 3.0, 3.0], 12.706),  # what seeds have in common
        ([(0, 0), (0, 1), (1, 0), (1, 1)], [1.0, 1.0, 3.0, 3.0], 12.706),
        ([(0, 0), (1, 0), (0, 1), (1, 1)], [1.0, 3.0, 3.0, 1.0], 3.1824 * (4 / 3) ** 0.5 / 2),  # nothing in common
    ],
)
def test_the_interval_by_hand(networks, differences, half):
    row = comparison(3, differences, [0.0] * len(differences), networks)
    mean, low, high = row.interval
    assert (mean, high - mean, mean - low) == pytest.approx((2.0, half, half), rel=1e-4)


def test_one_pair_has_no_interval():
    assert math.isnan(comparison(3, [1.0], [2.0]).interval[1])


ROWS = [
    comparison(
        *(3, [73.0, 74.1, 74.9], [70.0, 71.0, 72.0]), p=0.001, steps={"scratch": [9, 30, 20], "pretrained": [9, 7, 8]}
    ),
    comparison(
        *(9, [81.0, 80.0, 83.0], [80.0, 81.0, 82.0]), tested=14, steps=dict.fromkeys(worth_it.STARTS, [math.inf] * 3)
    ),
]


def test_the_verdict_names_where_it_helps_and_where_nothing_is_shown():
    said = worth_it.verdict(ROWS)
    assert said.startswith(
        "Pretraining here: worth it with 3 (+3.0 points, +2.8 to +3.2); no difference shown with 9 (+0.3"
    )
    assert worth_it.verdict([comparison(3, [1.0, 0.1], [9.0, 8.0])]).startswith("Pretraining here: worse than")


def test_the_page_has_a_row_per_number_of_cases():
    text = worth_it.page(ROWS, ["python x"], "worth-it.png", "WARNING: nothing was learned")
    assert "| 3 | 71.00 ± 1.00 | 74.00 ± 0.95 | +3.00 (+2.75 to +3.25) | 3 of 3 | 20 | 0.001 | 20, 8 |" in text
    assert "| 9 | 81.00 ± 1.00 |" in text
    assert "The last line of pretraining: WARNING: nothing was learned\n" in text
    assert "| 14 | 0.5 | never, never |" in text
    assert "(worth-it.png)" in text
    assert "(worth-it.png)" not in worth_it.page(ROWS, [], None, "")


def test_networks_without_a_dice_leave_their_pair_out(tmp_path):
    row = {"1": {"dice": None}}
    for start, of_folds in (("scratch", (0.5, None)), ("pretrained", (0.6, 0.7))):
        for fold, dice in enumerate(of_folds):
            folder = tmp_path / worth_it.name_of(3, start, 0) / f"fold{fold}"
            folder.mkdir(parents=True)
            content = {"fold": fold, "dice": dice, "cases": [{"id": "a", "classes": row}]}
            (folder / "results.json").write_text(json.dumps(content))
    found = worth_it.read_comparison(options(tmp_path, "--folds", 2, "--seeds", 1), 3)
    assert (found.networks, found.scratch, found.pretrained) == ([(0, 0)], [50.0], [60.0])
    assert "no pair has a Dice" in worth_it.page([comparison(3, [], [], steps=found.steps)], [], None, "")


RESULTS = """
import json, pathlib, sys
for folder, dice in zip(sys.argv[1::2], map(float, sys.argv[2::2])):
    cases = [{"id": f"c{k}", "classes": {"1": {"dice": dice + k / 100}, "2": {"dice": None}}} for k in range(3)]
    path = pathlib.Path(folder) / "fold0" / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = [{"step": 10, "dice": None}, {"step": 20, "dice": dice + 0.25}, {"step": 30, "dice": 0.9}]
    path.with_name("metrics.jsonl").write_text(chr(10).join(map(json.dumps, steps)))
    path.write_text(json.dumps({"fold": 0, "dice": dice, "cases": cases, "failed": []}))
"""


def test_it_continues_after_a_failure_and_does_nothing_twice(monkeypatch, tmp_path, capsys):
    args = ["--unlabelled", "u", "--images", "i", "--labels", "l", "--out", str(tmp_path), "--cases", "2"]
    args += ["--folds", "1", "--seeds", "1"]
    make_store(tmp_path / "stores" / "labelled", 3, labels=True)
    mark = f"open({str(tmp_path / 'marks')!r}, 'a').write"
    python = [sys.executable, "-c"]
    folders = [tmp_path / worth_it.name_of(2, start, 0) for start in worth_it.STARTS]
    todo = {
        "preprocess-labelled": [*python, "import sys; sys.exit(1)"],
        "pretrain": [*python, f"{mark}('p'); print('validation is 40 % below')"],
        "finetune-a": [*python, "import sys; sys.exit('no memory')"],
        "evaluate-2": [*python, RESULTS, str(folders[0]), "0.5", str(folders[1]), "0.6"],
    }
    monkeypatch.setattr(worth_it, "steps", lambda args: todo)
    monkeypatch.setattr(worth_it, "check_options", lambda todo: None)
    monkeypatch.setattr(worth_it, "find_spec", lambda name: None)
    assert worth_it.main(args) == 1
    out, err = capsys.readouterr()
    assert "WARNING: some inputs were rejected" in out
    assert "validation is 40 % below\n" in out
    assert "no memory" in out
    assert "finetune-a: status 1" in err
    todo["finetune-a"] = [*python, f"{mark}('f')"]
    assert worth_it.main(args) == 0
    assert worth_it.main(args) == 0
    assert (tmp_path / "marks").read_text() == "pf"
    said = "Pretraining here: no difference shown with 2 (+10.0 points, one pair, no interval) labelled cases"
    assert capsys.readouterr().out.endswith(f"worth-it.md: {said}\n")
    text = (tmp_path / "worth-it.md").read_text()
    assert "| 2 | 50.00 ± nan | 60.00 ± nan | +10.00 (one pair, no interval) | 1 of 1 | 3 | 0.25 | 30, 20 |" in text
    assert "The last line of pretraining: validation is 40 % below\n" in text
    assert shlex.join(["-c", f"{mark}('f')"]) in text
    todo["pretrain"] = [*python, f"{mark}('q')"]  # another encoder
    with pytest.raises(ValueError, match="`cases` 3"):
        worth_it.main([*args, "--cases", "3"])
    assert worth_it.main(args) == 0
    assert (tmp_path / "marks").read_text() == "pfqf"


def test_more_cases_than_are_labelled_are_refused_before_pretraining(tmp_path):
    make_store(tmp_path / "stores" / "labelled", 6, labels=True, subjects=2)
    worth_it.check_cases(options(tmp_path, "--cases", 3))
    with pytest.raises(ValueError, match="`cases` 9: .* has 6 labelled cases of 2 subjects; a fold needs"):
        worth_it.check_cases(options(tmp_path))


def test_the_learning_curve_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    worth_it.draw_curve(tmp_path / "curve.png", ROWS)
    assert (tmp_path / "curve.png").stat().st_size > 5000
