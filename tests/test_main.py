"""The command `amaes`: starts what its first word names, and says so in usage and errors."""

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from amaes import __main__ as command_line
from amaes import __version__, cli
from amaes.__main__ import COMMANDS, find_script
from tests.conftest import save_nifti

ROOT = Path(__file__).parent.parent


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


@pytest.mark.slow
def test_of_two_ranks_the_first_gives_the_reason_at_the_end_of_what_torchrun_prints(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfrom amaes import cli\n"
        "def main():\n    raise ValueError(f'`steps` {os.environ[\"RANK\"]}: accepted: at least 1')\n"
        "cli.run(main)\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(launch, capture_output=True, text=True, check=False, timeout=100, env=environment)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if not set(line) <= set("=")]
    assert "script.py: error: --steps 0: accepted: at least 1" in lines[-1]
    assert "--steps 1" not in done.stderr


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


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"pretrain", "finetune"}))  # those: training/test_options.py
def test_help_needs_no_torch(name):
    code = "import sys; sys.modules['torch'] = None; from amaes.__main__ import main; main()"
    command = [sys.executable, "-c", code, name, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: amaes {name} ")


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


# Numbers beyond reason

HAVE_OPTIONS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("amaes/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    if re.search(r"parser = (cli\.)?Parser\(", path.read_text())
)
HUGE = 10**19
TEXTS = {  # what an option may take, the same with a number that is too large, and which part of its value that is
    **dict.fromkeys(("1", "40", "0.5"), (f"{HUGE}", 0)),
    **{"1:2": (f"1:{HUGE}", 1), "2:1": (f"{HUGE}:1", 0), "0/2": (f"0/{HUGE}", 1)},
}


class Parsed(Exception):
    pass


def parser_of(path, monkeypatch):
    """The parser of a script, a module's command or a benchmark."""

    def stop(parser, argv=None):
        raise Parsed(parser)

    monkeypatch.setattr(cli.Parser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [path])
    monkeypatch.syspath_prepend(str((ROOT / path).parent))
    spec = importlib.util.spec_from_file_location("has_options", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "has_options", module)
    spec.loader.exec_module(module)
    with pytest.raises(Parsed) as parsed:
        getattr(module, "parse_options", module.main)()
    return parsed.value.args[0]


def test_every_command_was_found():
    assert {f"{name}.py" for name in ("train_pretrain", "train_finetune", "evaluate", "benchmarks/fuzz")} <= set(
        HAVE_OPTIONS
    )
    assert {f"amaes/{name}.py" for name in ("predict", "demo", "preprocess/__main__", "phantom/__main__")} <= set(
        HAVE_OPTIONS
    )


@pytest.mark.parametrize("path", HAVE_OPTIONS)
def test_every_number_has_a_range(path, monkeypatch):
    parser = parser_of(path, monkeypatch)
    numeric = 0
    for action in parser._actions:
        kind = action.type or str
        for text, (huge, part) in TEXTS.items():
            with suppress(argparse.ArgumentTypeError, ValueError):
                value = kind(text)
                value = value[part] if isinstance(value, tuple) else value
                if action.choices is not None or isinstance(value, str | Path):
                    continue
                numeric += 1
                huge = "1e39" if kind is cli.learning_rate else huge  # float32 holds numbers up to 1e38
                for beyond in (huge, "nan", "inf"):
                    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
                        kind(beyond)
                        pytest.fail(f"{path} {action.option_strings[0]} takes {beyond}")
    assert numeric or not any(action.type in (int, float) for action in parser._actions)
