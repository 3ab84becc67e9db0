"""The whole chain on synthetic heads: draw, preprocess, pretrain, fine-tune twice, evaluate, in minutes on two cores.

    python -m amaes.demo --out runs/demo

Runs the commands that a user would type, prints each of them, and ends with the table of `evaluate`: an encoder from
pretraining beside one from scratch, everything else equal. Synthetic heads, a tiny network and a minute of pretraining
show that the chain works. They do not show what pretraining is worth on patients.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from amaes.__main__ import COMMANDS, find_script, is_installed
from amaes.choices import DEVICES
from amaes.cli import Parser, folds, positive_int, run, seed

TAIL = 20  # lines of a failed step that are shown


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser(description="Run the whole chain on synthetic heads.")
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder for everything")
    add("--device", choices=DEVICES, default="auto", help="auto: CUDA where there is a GPU")
    add("--pretrain-steps", type=positive_int, default=160, metavar="N", help="optimizer steps of pretraining")
    add("--finetune-steps", type=positive_int, default=300, metavar="N", help="optimizer steps of each fine-tuning")
    add("--folds", type=folds, default=2, metavar="N", help="fine-tunings of each kind")
    add("--seed", type=seed, default=0, help="of heads, weights, order, crops and masks")
    return parser.parse_args(argv)


def steps(args: argparse.Namespace) -> dict[str, list[str]]:
    """The command lines, by name, in order. The runs are short: high learning rates, nothing compiled."""
    out, seed, device = shlex.quote(str(args.out)), args.seed, args.device
    command = {name: shlex.join(start_of(name)) for name in COMMANDS}
    network = f"--arch unet_tiny --seed {seed} --device {device} --workers 0 --compile off"
    finetune = (
        f"{command['finetune']} --data {out}/stores/lesions {network} --patch-size 32 --batch-size 2 "
        f"--lr 1e-2 --steps {args.finetune_steps} --folds {args.folds} --train-cases 8 --augment spatial"
    )
    lines = {
        "draw-unlabelled": f"{command['phantom']} --out {out}/scans/unlabelled --subjects 12 --first 101 "
        f"--fov 56 --seed {seed}",
        "draw-lesions": f"{command['phantom']} --out {out}/scans/lesions --subjects 16 --sequences FLAIR --labels "
        f"--fov 56 --seed {seed}",
        "preprocess-unlabelled": f"{command['preprocess']} --images {out}/scans/unlabelled/images "
        f"--out {out}/stores/unlabelled",
        "preprocess-lesions": f"{command['preprocess']} --images {out}/scans/lesions/images "
        f"--labels {out}/scans/lesions/labels --out {out}/stores/lesions",
        "pretrain": f"{command['pretrain']} --data {out}/stores/unlabelled {network} --patch-size 48 "
        f"--batch-size 4 --lr 2e-3 --steps {args.pretrain_steps} --out {out}/pretrain",
        "finetune-scratch": f"{finetune} --weights scratch --out {out}/scratch",
        "finetune-pretrained": f"{finetune} --weights {out}/pretrain/checkpoints/step-{args.pretrain_steps}.pt "
        f"--out {out}/pretrained",
        "evaluate": f"{command['evaluate']} {out}/scratch {out}/pretrained --device {device}",
    }
    return {name: shlex.split(line) for name, line in lines.items()}


def start_of(name: str) -> list[str]:
    """The words that start one of the COMMANDS: `amaes NAME` once installed, its script or module in the source tree.

    Raises:
        FileNotFoundError: the script is missing.
    """
    if is_installed():
        program = Path(sys.executable).with_name("amaes")
        return [str(program), name] if program.is_file() else [sys.executable, "-m", "amaes", name]
    command = COMMANDS[name]
    if not command.is_script:
        return [sys.executable, "-m", command.target]
    path = find_script(command.target)
    return [sys.executable, str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)]


def printed(command: list[str]) -> str:
    """A command line to copy: its program is named without the folder where the shell finds it that way."""
    program = command[0]
    for name in ("python", Path(program).name):
        if shutil.which(name) == program:
            return shlex.join([name, *command[1:]])
    return shlex.join(command)


def run_step(command: list[str], log: Path, shown: bool) -> int:
    """Run a command to its end; its output goes to `log`, or, `shown`, only its standard error. Returns the status.

    Ctrl-C reaches the command as well; it is given the time to save its state.
    """
    # Threads that wait for one another sleep: where other programs run too, spinning takes several times as long.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=None if shown else file, stderr=file, env=environment)
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise


def say(text: str) -> None:
    """Write a line to standard output at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()  # before a step writes to the same place


def main(argv: list[str] | None = None) -> int:
    """Run every step in order; returns the exit status of the first that fails, else 0."""
    args = parse_options(argv)
    todo, seconds = steps(args), {}
    logs = args.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for number, (name, command) in enumerate(todo.items(), 1):
        say(f"[{number}/{len(todo)}] {name}\n$ {printed(command)}")
        began, log = time.perf_counter(), logs / f"{number}-{name}.log"
        status = run_step(command, log, shown=number == len(todo))
        seconds[name] = time.perf_counter() - began
        if status:
            say("\n".join(f"  {line}" for line in log.read_text(errors="replace").splitlines()[-TAIL:]))
            sys.stderr.write(f"{name}: status {status} after {seconds[name]:.0f} s; its output is in {log}\n")
            return status if status > 0 else 128 - status  # a signal, counted as shells do
        say(f"  {seconds[name]:.1f} s\n")
    say("The fine-tunings differ in --weights and --out alone. The commands that made the table, and their seconds:\n")
    say("\n".join(f"{printed(command)}  # {seconds[name]:.0f} s" for name, command in todo.items()))
    say(f"\n{sum(seconds.values()):.0f} s in all. Everything is in {args.out}; the same command again uses it.")
    return 0


if __name__ == "__main__":
    run(main)
