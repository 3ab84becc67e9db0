"""The command `amaes`: starts the scripts of the root folder and the modules that are commands, by short names.

amaes pretrain --data stores/brains                                  as train_pretrain.py
torchrun --nproc_per_node=2 -m amaes pretrain --data stores/brains   the same on two GPUs
"""

from __future__ import annotations

import difflib
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

from amaes import __version__, cli

PACKAGE = Path(__file__).resolve().parent


class Command(NamedTuple):
    """What a name starts.

    Attributes:
        target: a script of the root folder, or a module of the package.
        help: one line.
    """

    target: str
    help: str

    @property
    def is_script(self) -> bool:
        return self.target.endswith(".py")


COMMANDS = {
    "preprocess": Command("amaes.preprocess", "turn NIfTI files into a store"),
    "store": Command("amaes.data", "say what a store holds"),
    "pretrain": Command("train_pretrain.py", "pretrain a network on a store, without labels"),
    "finetune": Command("train_finetune.py", "train a segmentation network, from pretrained weights or from scratch"),
    "evaluate": Command("evaluate.py", "measure fine-tuned networks on their test cases"),
    "predict": Command("amaes.predict", "segment NIfTI files"),
    "export": Command("amaes.export", "make a file of weights to give away, with a model card"),
    "augment": Command("amaes.augment", "draw what the augmentation does to a scan"),
    "convert-weights": Command("amaes.weights", "turn an old file of weights into one without code"),
    "phantom": Command("amaes.phantom", "write synthetic heads as NIfTI files"),
    "probe": Command(
        "amaes.evaluation.probe", "compare pretrained encoders by what a linear classifier reads from them"
    ),
    "worth-it": Command("amaes.worth_it", "find out whether pretraining helps on your data, overnight"),
    "demo": Command("amaes.demo", "run the whole chain on synthetic heads, in minutes"),
}


def is_installed() -> bool:
    """Whether this is the package of a wheel, which holds the scripts; in the source tree they lie beside it."""
    return (PACKAGE / "scripts").is_dir()


def find_script(name: str) -> Path:
    """The file of a script of the root folder, such as train_pretrain.py.

    Raises:
        FileNotFoundError: it lies neither in the package nor beside it.
    """
    path = (PACKAGE / "scripts" if is_installed() else PACKAGE.parent) / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; install the package again, or run it from its source tree")
    return path


def main() -> None:
    """Start the command that the first word names, with the words after it."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        sys.stdout.write(help_text())
    elif name == "--version":
        sys.stdout.write(f"amaes {__version__}\n")
    elif name in COMMANDS:
        start(name)
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"did you mean {near[0]}?" if near else f"choose from {', '.join(COMMANDS)}"
        sys.stderr.write(f"amaes: error: no command {name!r}; {advice}\n")
        sys.exit(cli.EXIT_USER_ERROR)


def help_text() -> str:
    """What `amaes --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()]
    usage = "usage: amaes COMMAND [OPTIONS]\n       amaes COMMAND --help\n       amaes --version"
    return "\n".join([usage, "", *lines, ""])


def start(name: str) -> None:
    """Run a command as if its script or module had been started; usage and errors show `amaes NAME`."""
    cli.started_as = f"amaes {name}"
    del sys.argv[1]
    command = COMMANDS[name]
    if command.is_script:
        runpy.run_path(str(find_script(command.target)), run_name="__main__")
    else:
        runpy.run_module(command.target, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
