"""The demo: commands as a user types them, and what happens when one of them fails. The whole demo takes minutes."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from amaes import __main__ as main_module
from amaes import demo, pictures
from tests.conftest import save_nifti

ROOT = Path(demo.__file__).resolve().parent.parent


def commands(*argv):
    return demo.steps(demo.parse_options(list(argv)))


def options(command):
    """Long options of a command line, with their values."""
    found, name = {}, None
    for word in command[2:]:
        if word.startswith("--"):
            name = word
            found[name] = []
        elif name:
            found[name].append(word)
    return found


def test_the_two_fine_tunings_differ_in_weights_and_folder_alone():
    scratch, pretrained = (options(commands()[name]) for name in ("finetune-scratch", "finetune-pretrained"))
    assert {name for name in scratch if scratch[name] != pretrained[name]} == {"--weights", "--out"}
    assert set(scratch) == set(pretrained)
    assert scratch["--weights"] == ["scratch"]


def test_each_step_reads_what_an_earlier_one_wrote(tmp_path):
    written = []
    for command in commands("--out", str(tmp_path)).values():
        found = options(command)
        for name in ("--images", "--labels", "--data", "--weights"):
            for value in found.get(name, []):
                assert value == "scratch" or any(Path(value).is_relative_to(out) for out in written)
        if "--out" in found:
            written.append(Path(found["--out"][0]))
            assert written[-1].is_relative_to(tmp_path)
    assert len(set(written)) == len(written) == 7


def test_no_head_is_in_both_sets():
    subjects = []
    for name in ("draw-unlabelled", "draw-lesions"):
        found = options(commands()[name])
        first = int(found.get("--first", ["1"])[0])
        subjects.append(set(range(first, first + int(found["--subjects"][0]))))
    assert not subjects[0] & subjects[1]


def test_options_reach_the_commands():
    found = commands(
        "--device", "cuda", "--seed", "7", "--pretrain-steps", "9", "--finetune-steps", "8", "--folds", "3"
    )
    for name in ("pretrain", "finetune-scratch", "finetune-pretrained"):
        assert options(found[name])["--device"] == ["cuda"]
        assert options(found[name])["--seed"] == ["7"]
    assert options(found["pretrain"])["--steps"] == ["9"]
    assert options(found["finetune-scratch"])["--steps"] == ["8"]
    assert options(found["finetune-scratch"])["--folds"] == ["3"]
    assert options(found["finetune-pretrained"])["--weights"][0].endswith("step-9.pt")


@pytest.mark.slow
def test_commands_use_options_that_exist():
    """Every long option is in the help of its program, and so is every value that a help lists as a choice."""
    programs = {}
    for command in commands().values():
        start = command[:3] if command[1] == "-m" else command[:2]
        programs.setdefault(tuple(start), set()).update(options(command))
    for start, used in programs.items():
        shown = subprocess.run([*start, "--help"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
        assert used <= set(shown.replace(",", " ").replace("[", " ").replace("]", " ").split()), start


def test_printed_commands_can_be_copied(tmp_path):
    command = commands("--out", str(tmp_path / "my runs"))["pretrain"]
    words = shlex.split(demo.printed(command))
    assert words[1:] == command[1:]
    assert words[0] in ("python", sys.executable)


def python(code):
    return [sys.executable, "-c", code]


def test_a_failing_step_shows_its_end_and_stops(monkeypatch, capfd, tmp_path):
    steps = {
        "work": python("print('qui' + 'et')"),
        "fail": python("print(*range(100), sep='\\n'); import sys; sys.exit('disk ' + 'is full')"),
        "never": python(f"open({str(tmp_path / 'never')!r}, 'w')"),
    }
    monkeypatch.setattr(demo, "steps", lambda args: steps)
    assert demo.main(["--out", str(tmp_path / "out")]) == 1
    out, err = capfd.readouterr()
    assert "disk is full" in out
    assert "  99\n" in out
    assert "  50\n" not in out
    assert "quiet" not in out
    assert "fail: status 1" in err
    assert not (tmp_path / "never").exists()
    assert (tmp_path / "out" / "logs" / "2-fail.log").read_text().startswith("0\n1\n")


@pytest.mark.parametrize(("ending", "status"), [("sys.exit(2)", 2), ("os.kill(os.getpid(), 9)", 137)])
def test_the_status_is_that_of_the_failed_step(monkeypatch, capfd, tmp_path, ending, status):
    monkeypatch.setattr(demo, "steps", lambda args: {"fail": python(f"import os, sys; {ending}")})
    assert demo.main(["--out", str(tmp_path)]) == status


def test_a_good_run_shows_the_table_and_ends_with_the_commands(monkeypatch, capfd, tmp_path):
    steps = {"work": python("print('qui' + 'et')"), "evaluate": python("print('Dice ' + '0.5')")}
    monkeypatch.setattr(demo, "steps", lambda args: steps)
    monkeypatch.setattr(demo, "finished", lambda args: ["so it came out"])
    assert demo.main(["--out", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    assert "[1/2] work\n$ " in out
    assert "quiet" not in out
    assert out.count("Dice 0.5\n") == 1
    assert out.index("Dice 0.5\n") < out.index("so it came out\n")
    for command in steps.values():
        assert out.count(demo.printed(command)) == 2  # before it runs, and in the list at the end
    assert out.index("Dice 0.5\n") > out.index("[2/2] evaluate")  # not overtaken by buffered output


@pytest.mark.parametrize(
    ("scratch", "pretrained", "said"),
    [
        ([0.5, 0.6], [0.52, 0.61], "pretraining was ahead of scratch in every fold: +1.5 points of Dice (+2.0, +1.0)"),
        ([0.5, 0.6], [0.55, 0.58], "NO clear gain from pretraining here: +1.5 points of Dice (+5.0, -2.0) against"),
        ([0.5, 0.6], [0.5, 0.58], "NO gain from pretraining here: -1.0 points"),
        ([0.5, None], [0.5, 0.58], "NO gain from pretraining here: +0.0 points of Dice (+0.0) against"),
        ([None], [None], "no fold of both has a Dice"),
    ],
)
def test_it_says_plainly_whether_pretraining_gained(scratch, pretrained, said):
    assert demo.gain(scratch, pretrained).startswith(said)


def test_the_end_has_the_verdict_and_draws_what_all_networks_tested(monkeypatch, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "5-pretrain.log").write_text("step 1\nvalidation is 40 % below\n")
    (tmp_path / "probe.json").write_text(json.dumps({"encoders": [{"mean": None}, {"mean": 17.04}]}))
    label = np.zeros((8, 10, 12), np.uint8)
    label[2:5, 3:6, 7], label[6:, 7:, 7] = 1, 2
    for name in ("case1", "case2"):
        for folder, data in {
            "scans/lesions/images": label + 0.5,
            "scans/lesions/labels": label,
            "scratch/fold0/predictions": label,
            "pretrained/fold0/predictions": label,
        }.items():
            save_nifti(tmp_path / folder / f"{name}.nii.gz", data, np.eye(4))
    for run, cases in {"scratch": ["case1", "case2"], "pretrained": ["case2"]}.items():
        (tmp_path / run / "summary.json").write_text(json.dumps({"dice": {"folds": [0.5]}}))
        (tmp_path / run / "fold0" / "results.json").write_text(json.dumps({"cases": [{"id": c} for c in cases]}))
    drawn = []
    monkeypatch.setattr(pictures, "write_sheet", lambda path, heading, rows, zoom: drawn.extend(rows))
    monkeypatch.setattr(demo, "find_spec", lambda name: True)
    verdict, known, gained, painted = demo.finished(demo.parse_options(["--out", str(tmp_path)]))
    assert (verdict, gained[:7]) == ("validation is 40 % below", "NO gain")
    assert known.endswith("reads from an encoder at random no Dice, pretrained 17.0 %")
    assert f"{tmp_path}/predictions.png" in painted
    (row,) = drawn
    assert row.title == "case2"
    assert [panel.caption for panel in row.panels] == ["scan", "reference", "scratch", "pretrained"]
    assert np.array_equal(row.panels[1].label, label[:, ::-1, 7].T)
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert len(demo.finished(demo.parse_options(["--out", str(tmp_path)]))) == 3


def test_without_the_scripts_it_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(main_module, "PACKAGE", tmp_path / "amaes")
    with pytest.raises(FileNotFoundError, match=r"train_pretrain\.py: not found; install the package again, or run it"):
        demo.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_once_installed_the_commands_are_those_of_amaes(monkeypatch, tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "amaes").touch()
    monkeypatch.setattr(main_module, "PACKAGE", tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    started = [command[:2] for command in commands().values()]
    names = ["phantom", "phantom", "preprocess", "preprocess", "pretrain", "probe", "finetune", "finetune", "evaluate"]
    assert started == [[str(tmp_path / "amaes"), name] for name in names]
    assert demo.printed(started[0]) == f"{tmp_path}/amaes phantom"
    monkeypatch.setattr(shutil, "which", lambda name: str(tmp_path / name))
    assert demo.printed(started[0]) == "amaes phantom"
    (tmp_path / "amaes").unlink()
    assert commands()["evaluate"][:4] == [str(tmp_path / "python"), "-m", "amaes", "evaluate"]


@pytest.mark.parametrize(("given", "seen"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_unless_the_user_says_otherwise(monkeypatch, tmp_path, given, seen):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    assert demo.run_step(python("import os; print(os.environ['OMP_WAIT_POLICY'])"), tmp_path / "log", False) == 0
    assert (tmp_path / "log").read_text() == f"{seen}\n"


def test_sigterm_ends_the_step_that_runs(tmp_path):
    def ours(*_):
        """In place of the handler that would end the tests."""

    before = signal.signal(signal.SIGTERM, ours)
    try:
        code = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(5)"
        assert demo.run_step(python(code), tmp_path / "log", False) == -signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)
