"""What the command lines share: help with real defaults, argument types, one-line errors, exit statuses."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

EXIT_OK, EXIT_REJECTED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130

started_as: str | None = None  # such as `amaes pretrain`; `amaes.__main__` sets it before it starts a command


def program() -> str:
    """The command as the user typed it, for usage and errors: amaes predict, python -m amaes.predict, evaluate.py."""
    if started_as is not None:
        return started_as
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.origin == sys.argv[0]:
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return Path(sys.argv[0]).name


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Prints the real default of every option, also of those whose help names none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.required:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """ArgumentParser with our help format and no abbreviated options (a typo must not select another option)."""

    def __init__(self, **options) -> None:
        options.setdefault("prog", program())
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        self.exit(EXIT_USER_ERROR, f"{self.prog}: error: {message}\n")


def run(main: Callable[..., int | None], *arguments: object) -> None:
    """Call a command's main: user errors become one line on stderr and status 2, Ctrl-C status 130.

    `python -X dev script.py` keeps the traceback.
    """
    try:
        status = main(*arguments) or EXIT_OK
    except KeyboardInterrupt as interrupt:
        print(": ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        status = EXIT_INTERRUPTED
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"{program()}: error: {_one_line(error)}", file=sys.stderr)
        status = EXIT_USER_ERROR
    sys.stdout.flush()
    sys.exit(status)


def logger(on: bool) -> Callable[[str], None]:
    """What takes the lines of a run's log, beside a progress bar; where `on` is False it drops them."""
    from tqdm import tqdm

    return (lambda text: tqdm.write(as_options(text))) if on else (lambda text: None)


def as_options(text: str) -> str:
    """A message of the library, which names parameters as `patch_size`, with the options of the command line."""
    return re.sub(r"`([a-z][a-z0-9]*(?:_[a-z0-9]+)*)`", lambda match: "--" + match[1].replace("_", "-"), text)


def _one_line(error: Exception) -> str:
    return as_options(" ".join(str(error).split())) or type(error).__name__


def positive_int(text: str) -> int:
    """argparse type: integer >= 1."""
    return _number(text, int, lambda value: value >= 1, "an integer >= 1")


def non_negative_int(text: str) -> int:
    """argparse type: integer >= 0."""
    return _number(text, int, lambda value: value >= 0, "an integer >= 0")


def seed(text: str) -> int:
    """argparse type: integer from 0 to 2^32 - 1."""
    return _number(text, int, lambda value: 0 <= value < 2**32, "an integer from 0 to 2^32 - 1")


def positive_float(text: str) -> float:
    """argparse type: finite number > 0."""
    return _number(text, float, lambda value: 0 < value < float("inf"), "a number > 0")


def non_negative_float(text: str) -> float:
    """argparse type: finite number >= 0."""
    return _number(text, float, lambda value: 0 <= value < float("inf"), "a number >= 0")


def fraction(text: str) -> float:
    """argparse type: number in [0, 1)."""
    return _number(text, float, lambda value: 0 <= value < 1, "a number in [0, 1)")


def correlation(text: str) -> float:
    """argparse type: number above 0, at most 1."""
    return _number(text, float, lambda value: 0 < value <= 1, "a number above 0, at most 1")


def split_seed(text: str) -> int:
    """argparse type: integer from 0 to 4 million (the folds' generator takes 1000 times it, 32 bits)."""
    return _number(text, int, lambda value: 0 <= value <= 4_000_000, "an integer from 0 to 4000000")


def _number(text: str, kind: type, accepted: Callable, what: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accepted(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value
