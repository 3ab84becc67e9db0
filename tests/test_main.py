"""The command `amaes`: starts what its first word names, and says so in usage and errors."""

import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from amaes import __main__ as command_line
from amaes import __version__, cli
from amaes.__main__ import COMMANDS, find_script
from tests.conftest import save_nifti


def amaes(*words, status=0):
    """`python -m amaes WORDS`: its standard output and error."""
    done = subprocess.run(
        [sys.executable, "-m", "amaes", *map(str, words)], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def called(monkeypatch, capsys, *words):
    """The same in this process, for words that start no command: status, standard output, error."""
    monkeypatch.setattr(sys, "argv", ["amaes", *words])
    status = 0
    try:
        command_line.main()
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_help_lists_every_command(monkeypatch, capsys, words):
    status, out, err = called(monkeypatch, capsys, *words)
    assert (status, err) == (0, "")
    assert re.findall(r"^  (\w+)  +\w", out, flags=re.MULTILINE) == list(COMMANDS)


def test_version(monkeypatch, capsys):
    assert called(monkeypatch, capsys, "--version") == (0, f"amaes {__version__}\n", "")


@pytest.mark.parametrize(
    ("word", "advice"), [("pretrian", "did you mean pretrain?"), ("x", f"choose from {', '.join(COMMANDS)}")]
)
def test_an_unknown_command_is_an_error_of_one_line(monkeypatch, capsys, word, advice):
    assert called(monkeypatch, capsys, word) == (2, "", f"amaes: error: no command '{word}'; {advice}\n")


def test_every_command_has_its_script_or_module():
    for command in COMMANDS.values():
        assert find_script(command.target).is_file() if command.is_script else find_spec(command.target)


def test_a_script_is_missing_or_lies_in_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(command_line, "PACKAGE", tmp_path / "amaes")
    with pytest.raises(FileNotFoundError, match=r"evaluate\.py: not found; install the package again"):
        find_script("evaluate.py")
    (tmp_path / "amaes" / "scripts").mkdir(parents=True)
    (tmp_path / "amaes" / "scripts" / "evaluate.py").touch()
    (tmp_path / "evaluate.py").touch()  # of someone else, beside the package
    assert find_script("evaluate.py") == tmp_path / "amaes" / "scripts" / "evaluate.py"


def test_the_program_is_named_as_it_was_started(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["folder/evaluate.py", "--help"])
    assert cli.program() == "evaluate.py"
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", find_spec("amaes.predict"))
    monkeypatch.setattr(sys, "argv", [find_spec("amaes.predict").origin, "--help"])
    assert cli.program() == "python -m amaes.predict"
    monkeypatch.setattr(cli, "started_as", "amaes predict")
    assert cli.program() == "amaes predict"


@pytest.mark.slow
def test_commands_run_and_report_under_their_own_name(tmp_path):
    for number in range(2):
        save_nifti(tmp_path / "scans" / f"sub-{number}.nii.gz")
    store = tmp_path / "store"
    amaes("preprocess", "--images", tmp_path / "scans", "--out", store, "--workers", 2)  # processes of its own
    assert len(list((store / "cases").glob("*.npy"))) == 2
    out, _ = amaes("pretrain", "--help")
    assert out.startswith("usage: amaes pretrain ")
    _, err = amaes("evaluate", tmp_path / "nothing", status=2)
    assert err.startswith("amaes evaluate: error: ")
    assert len(err.splitlines()) == 1
