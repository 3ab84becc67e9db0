"""What the command lines share."""

from __future__ import annotations

import pytest

from amaes import cli


@pytest.fixture
def parser():
    parser = cli.Parser(["--data STORE", "--data STORE --arch unet_b"], prog="train.py", description="Train.")
    parser.add_argument("runs", metavar="RUN")
    parser.add_argument("--arch", choices=["unet_b", "unet_xl"], default="unet_xl", help="network")
    parser.add_argument("--patch-size")
    return parser


def test_help_names_the_choices_once_and_ends_with_examples(parser):
    text = parser.format_help()
    assert text.startswith("usage: train.py RUN [OPTIONS]\n\nTrain.")
    assert text.count("{unet_b,unet_xl}") == 1
    assert "network (default: unet_xl)" in text
    assert text.endswith("examples:\n  python train.py --data STORE\n  python train.py --data STORE --arch unet_b\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "--patchsize", "3"], "unrecognized arguments: --patchsize (did you mean --patch-size?) 3"),
        (["RUN", "--patchsize=3"], "unrecognized arguments: --patchsize=3 (did you mean --patch-size?)"),
        (["RUN", "--xyz"], "unrecognized arguments: --xyz"),
        (["RUN", "--arch", "unet_xxl"], "(did you mean unet_xl?)"),
        (["RUN", "--arch", "zzz"], ")"),
    ],
)
def test_a_mistyped_word_is_answered_with_the_nearest(parser, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(words)
    assert stop.value.code == cli.EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.endswith(f"{message}\n")
    assert ("did you mean" in error) == ("did you mean" in message)


def test_all_contradictions_are_told_at_once(parser, capsys):
    parser.refuse([])
    with pytest.raises(SystemExit):
        parser.refuse(["--a: needs --b", "--c: not with --d"])
    assert capsys.readouterr().err == "train.py: error: --a: needs --b; --c: not with --d\n"


def test_an_error_with_control_characters_stays_one_plain_line(capsys):
    def main():
        raise ValueError("class \x1b[2Jred \ud800 größe")

    with pytest.raises(SystemExit, match="2"):
        cli.run(main)
    assert capsys.readouterr().err.endswith(r"error: class \x1b[2Jred \ud800 größe" + "\n")
