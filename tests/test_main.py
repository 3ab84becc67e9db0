"""The command `amaes`: starts what its first word names, and says so in usage and errors."""

import argparse
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

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
    assert re.findall(r"^  ([\w-]+)  +\w", out, flags=re.MULTILINE) == list(COMMANDS)


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
    assert (cli.program(), cli.command("evaluate")) == ("python -m amaes.predict", "python evaluate.py")
    monkeypatch.setattr(cli, "started_as", "amaes predict")
    assert (cli.program(), cli.command("evaluate")) == ("amaes predict", "amaes evaluate")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_reason_is_the_last_that_torchrun_prints(monkeypatch, capsys, tmp_path, rank):
    for name, value in (("RUN_ID", "none"), ("ERROR_FILE", str(tmp_path / "error.json"))):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("RANK", rank)
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    before = signal.getsignal(signal.SIGTERM)

    def main():
        signal.signal(signal.SIGTERM, lambda *_: None)  # as training does
        raise ValueError("`steps` 0:\naccepted: at least 1")

    try:
        for start in (
            lambda: cli.run(main),
            lambda: cli.Parser(prog=cli.program()).error("--steps 0: accepted: at least 1"),
        ):
            with pytest.raises(SystemExit) as stop:
                start()
            assert stop.value.code == 2
            line = f"{cli.program()}: error: --steps 0: accepted: at least 1"
            assert capsys.readouterr().err == f"{line}\n"
            failure = ProcessFailure(int(rank), 1, 2, str(tmp_path / "error.json"))
            assert line in ChildFailedError("x", {0: failure}).format_msg().splitlines()[-2]
        assert len(waited) == (0 if rank == "0" else 2)  # the first rank speaks, and torchrun ends the others
        assert (signal.getsignal(signal.SIGTERM) is signal.SIG_DFL) == (rank == "1")
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    accepted = [(cli.output_file, name) for name in ("file", "new", "folder/new", "new/new")]
    accepted += [(cli.output_folder, name) for name in ("folder", "new", "folder/new/new")]
    refused = [(cli.output_file, name) for name in ("folder", "file/new", "file/new/new")]
    refused += [(cli.output_folder, name) for name in ("file", "file/new")]
    for kind, name in accepted:
        assert kind(str(tmp_path / name)) == tmp_path / name
    for kind, name in refused:
        with pytest.raises(argparse.ArgumentTypeError, match="is a (file|folder); expected"):
            kind(str(tmp_path / name))
    assert cli.output_file("x" * 9999) == Path("x" * 9999)  # writing says what is wrong


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
