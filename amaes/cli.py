"""What the command lines share: help with real defaults, argument types, one-line errors, exit statuses."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

RANK_0_SPEAKS_FIRST = 5  # seconds that other ranks wait before they say what is wrong
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


def command(name: str) -> str:
    """How evaluate or predict is started where this command was started so: `amaes NAME`, or with `python`."""
    if started_as is not None:
        return f"amaes {name}"
    return f"python {name}.py" if name == "evaluate" else f"python -m amaes.{name}"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Prints the real default of every option, also of those whose help names none; several values as typed."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == [] or action.required:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(EXAMPLES) else super()._fill_text(text, width, indent)


EXAMPLES = "examples:\n"


class Parser(argparse.ArgumentParser):
    """ArgumentParser with our help format and no abbreviated options (a typo must not select another option).

    Args:
        examples: the words after the program's name of commands that --help shows last.
        options: of ArgumentParser.
    """

    def __init__(self, examples: Sequence[str] = (), **options) -> None:
        prog = options.setdefault("prog", program())
        python = "" if started_as or prog.startswith("python") else "python "
        epilog = EXAMPLES + "\n".join(f"  {python}{prog} {words}" for words in examples) if examples else None
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, epilog=epilog, **options)

    def format_help(self) -> str:
        """The help; its usage is one line, since every option stands below."""
        names = [action.metavar or action.dest for action in self._actions if not action.option_strings]
        self.usage = " ".join([self.prog, *names, "[OPTIONS]"])
        return super().format_help()

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            names = [name for action in self._actions for name in action.option_strings]
            shown = [f"{word}{_did_you_mean(word.partition('=')[0], names)}" for word in unknown]
            self.error(f"unrecognized arguments: {' '.join(shown)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """End with status 2 and one line; a mistyped choice is answered with the nearest."""
        if match := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            message += _did_you_mean(match[1], [name.strip("'\"") for name in match[2].split(", ")])
        _end_with_error(f"{self.prog}: error: {message}")

    def add_patch_size(self, add: Callable) -> None:
        """--patch-size, where `add` adds an option; `three_sides` takes what was given."""
        add("--patch-size", type=side, nargs="+", default=[128], metavar="N", help="voxels: N for a cube, or X Y Z")

    def three_sides(self, sides: Sequence[int]) -> tuple[int, ...]:
        """(X, Y, Z) from the numbers of --patch-size."""
        if len(sides) not in (1, 3):
            shown = " ".join(map(str, sides))
            self.error(f"--patch-size {shown}: {len(sides)} numbers, accepted: N or X Y Z")
        return tuple(sides) if len(sides) == 3 else (sides[0],) * 3

    def refuse(self, contradictions: Sequence[str]) -> None:
        """End with all of them, if there are any."""
        if contradictions:
            self.error("; ".join(contradictions))


def _did_you_mean(word: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, names, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


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
        _end_with_error(f"{program()}: error: {_one_line(error)}")
    sys.stdout.flush()
    sys.exit(status)


def say(text: str) -> None:
    """Write a line to standard output at once, before a program that is started next writes to the same place."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _end_with_error(line: str) -> NoReturn:
    """Print why the command cannot be done, and exit with status 2; of several ranks of torchrun, the first prints it.

    torchrun ends the other ranks then. One that is still there had an error of its own, and says so. torchrun's last
    lines, which come below ours, repeat what stands in the file that it names.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if os.environ.get("RANK", "0") != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(RANK_0_SPEAKS_FIRST)
        with suppress(KeyError, OSError):
            message = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": message}))
    print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.exit(EXIT_USER_ERROR)


def logger(on: bool) -> Callable[[str], None]:
    """What takes the lines of a run's log, beside a progress bar; where `on` is False it drops them."""
    from tqdm import tqdm

    return (lambda text: tqdm.write(as_options(text))) if on else (lambda text: None)


def as_options(text: str) -> str:
    """A message of the library, which names parameters as `patch_size`, with the options of the command line."""
    return re.sub(r"`([a-z][a-z0-9]*(?:_[a-z0-9]+)*)`", lambda match: "--" + match[1].replace("_", "-"), text)


def _one_line(error: Exception) -> str:
    text = as_options(" ".join(str(error).split())) or type(error).__name__
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)  # names from files can hold anything


def output_file(text: str) -> Path:
    """argparse type: a file to write; refused, before any work, where a folder stands there or a file above it."""
    with suppress(OSError):  # of a folder that may not be looked into; writing says so
        if Path(text).is_dir():
            raise argparse.ArgumentTypeError(f"{text} is a folder; expected the name of a file")
    return output_folder(Path(text).parent) / Path(text).name


def output_folder(text: str | Path) -> Path:
    """argparse type: a folder to write; refused, before any work, where it or one above it is a file."""
    path = Path(text)
    with suppress(OSError):
        there = next((one for one in (path, *path.parents) if one.exists()), None)
        if there is not None and not there.is_dir():
            raise argparse.ArgumentTypeError(f"{there} is a file; expected a folder")
    return path


def integer(low: int, high: int) -> Callable[[str], int]:
    """argparse type: integer from `low` to `high`."""

    def convert(text: str) -> int:
        return _number(text, int, lambda value: low <= value <= high, f"an integer from {low} to {high}")

    return convert


def real(low: float, high: float, above: bool = False) -> Callable[[str], float]:
    """argparse type: finite number from `low` to `high`; larger than `low` where `above`."""
    limits = f"a number above {low:g}, at most {high:g}" if above else f"a number from {low:g} to {high:g}"

    def convert(text: str) -> float:
        return _number(text, float, lambda value: low <= value <= high and not (above and value == low), limits)

    return convert


# argparse types. Every number has a range: what lies beyond is a mistake, which would otherwise be noticed late.
positive_int = integer(1, 10**9)  # steps, cases, files
non_negative_int = integer(0, 10**9)
side = integer(1, 2048)  # voxels, of a patch or a token
batch = integer(1, 1 << 16)  # patches
folds = integer(1, 1000)
epochs = integer(1, 10**6)
workers = integer(0, 1024)  # processes
seed = integer(0, 2**32 - 1)
split_seed = integer(0, 4_000_000)  # the folds' generator takes 1000 times it, in 32 bits
positive_float = real(0, 1e6, above=True)
learning_rate = real(0, 1e38, above=True)  # what float32 holds
non_negative_float = real(0, 1e6)
correlation = real(0, 1, above=True)


def fraction(text: str) -> float:
    """argparse type: number in [0, 1)."""
    return _number(text, float, lambda value: 0 <= value < 1, "a number in [0, 1)")


def _number(text: str, kind: type, accepted: Callable, what: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accepted(value):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not {what}")
    return value
