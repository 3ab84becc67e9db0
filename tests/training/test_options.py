import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from amaes import cli, objectives
from amaes.training import options

ROOT = Path(__file__).parent.parent.parent


def parse(*argv, task="pretrain"):
    parser = cli.Parser()
    options.add_model_options(parser, arch="unet_xl")
    options.add_augment_options(parser.add_argument)
    return options.parse(parser, task, list(argv))


@pytest.mark.parametrize(
    ("argv", "task", "lr", "batch"),
    [
        ([], "pretrain", 1e-4, 16),
        ([], "finetune", 5e-4, 8),
        (["--preset", "appendix_r2"], "finetune", 1e-4, 4),
        (["--lr", "0.3", "--batch-size", "6"], "finetune", 0.3, 6),
    ],
)
def test_presets_set_defaults_that_options_override(argv, task, lr, batch):
    args = parse(*argv, task=task)
    assert (args.lr, args.batch_size) == (lr, batch)


def test_patch_size_is_a_cube_or_three_sides():
    assert parse("--patch-size", "64").patch_size == (64, 64, 64)
    assert parse("--patch-size", "64", "96", "32").patch_size == (64, 96, 32)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arch", "nope"], "invalid choice: 'nope'"),
        (["--preset", "mine"], "invalid choice: 'mine'"),
        (["--arch"], "expected one argument"),
        (["--patch-size", "1", "2"], "--patch-size 1 2: 2 numbers, accepted: N or X Y Z"),
        (["--batch-size", "0"], "'0' is not an integer from 1 to 65536"),
        (["--lr", "nan"], "'nan' is not a number above 0, at most 1e+38"),
        (["--batch", "3"], "unrecognized arguments: --batch"),
        (["--accumulate", "some"], "'some' is not an integer from 1 to 65536"),
    ],
)
def test_wrong_options_are_one_line_and_status_two(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("order=3", ("order", 3)),
        ("bias=exp", ("bias", "exp")),
        ("fill=0.5", ("fill", 0.5)),
        ("clip=false", ("clip", False)),
        ("rotation=0.5", ("rotation", 0.5)),
        ("rotation_degrees=-15,15", ("rotation_degrees", (-15.0, 15.0))),
    ],
)
def test_options_of_the_augmentation(text, expected):
    assert options.augment_option(text) == expected


@pytest.mark.parametrize("text", ["nope=3", "order", "order=x", "clip=maybe", "rotation_degrees=a,b"])
def test_wrong_options_of_the_augmentation_are_named(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}': "):
        options.augment_option(text)


@pytest.mark.parametrize(
    ("given", "message"),
    [(["order=3", "order=1"], "order: given twice"), (["window=parity"], "window: is the option --window here")],
)
def test_an_option_of_the_augmentation_is_given_once(given, message, capsys):
    parser = cli.Parser()
    options.add_model_options(parser, arch="unet_xl")
    options.add_augment_options(parser.add_argument)
    parser.add_argument("--window", default="none")
    with pytest.raises(SystemExit):
        options.parse(parser, "finetune", ["--augment-options", *given])
    assert f"--augment-options {message}" in capsys.readouterr().err


def test_options_become_plain_data():
    assert options.as_plain({"b": Path("x/y"), "a": (1, 2, 3), "c": None}) == {"a": [1, 2, 3], "b": "x/y", "c": None}


@pytest.mark.parametrize(
    "error", ["ValueError('`x_y` 3: no\\n such')", "FileNotFoundError('f: no such')", "KeyboardInterrupt()"]
)
def test_scripts_end_with_one_line(error):
    code = f"from amaes import cli\ndef main():\n    raise {error}\ncli.run(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == (130 if "Interrupt" in error else 2)
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert ("--x-y 3: no such" in done.stderr) == ("ValueError" in error)  # parameters are shown as options


def test_programming_errors_keep_their_traceback():
    code = "from amaes import cli\ndef main():\n    raise KeyError('x')\ncli.run(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("script", ["train_pretrain.py", "train_finetune.py"])
def test_help_shows_the_real_defaults_and_needs_no_torch(script):
    code = f"import runpy, sys; sys.modules['torch'] = None; runpy.run_path('{script}', run_name='__main__')"
    command = [sys.executable, "-c", code, "--arch", "unet_b", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    text = " ".join(done.stdout.split())
    for default in ("(default: unet_xl)", "or X Y Z (default: 128)", "(default: 3e-05)", "(default: auto)"):
        assert default in text
    assert ("base learning rate of AdamW (default: 0.0001)" if "pretrain" in script else "(default: 0.0005)") in text
    assert "of weights, order, crops, augmentation, masks, validation split (default: 0)" in text
    if "pretrain" in script:
        for options_of in (objectives.options_of(name) for name in objectives.OBJECTIVES):
            for name, default in options_of.items():
                line = text.split(f" --{name.replace('_', '-')} ")[-1]
                assert default is False or str(default) in line.split("(default: ")[1].split(")")[0].split(", ")
