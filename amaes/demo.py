"""The whole chain on synthetic heads: draw, preprocess, pretrain, fine-tune twice, evaluate, in minutes on two cores.

    python -m amaes.demo --out runs/demo

Runs the commands that a user would type, prints each of them, and ends with the table of `evaluate` and lines that say
what the pretrained encoder knew before fine-tuning, and whether pretraining gained anything at the end: an encoder from
pretraining beside one from scratch, on few labelled heads, everything else equal. Synthetic heads, a tiny network and a
minute of pretraining show that the chain works, not what pretraining is worth on patients. With matplotlib it draws
what was rebuilt and what was predicted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from amaes.__main__ import COMMANDS, find_script, is_installed
from amaes.choices import DEVICES
from amaes.cli import Parser, folds, positive_int, run, say, seed

TAIL = 20  # lines of a failed step that are shown
TRAIN_CASES = 4  # labelled heads of a fold


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser(description="Run the whole chain on synthetic heads.")
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder for everything")
    add("--device", choices=DEVICES, default="auto", help="auto: CUDA where there is a GPU")
    add("--pretrain-steps", type=positive_int, default=100, metavar="N", help="optimizer steps of pretraining")
    add("--finetune-steps", type=positive_int, default=200, metavar="N", help="optimizer steps of each fine-tuning")
    add("--folds", type=folds, default=2, metavar="N", help="fine-tunings of each kind")
    add("--seed", type=seed, default=0, help="of heads, weights, order, crops and masks")
    return parser.parse_args(argv)


def steps(args: argparse.Namespace) -> dict[str, list[str]]:
    """The command lines, by name, in order. The runs are short: high learning rates, nothing compiled."""
    out, seed, device = shlex.quote(str(args.out)), args.seed, args.device
    command = {name: shlex.join(start_of(name)) for name in COMMANDS}
    pictures = "--panels-every 1000" if find_spec("matplotlib") else ""  # epochs: at the end alone
    network = f"--arch unet_tiny --seed {seed} --device {device} --workers 0 --compile off"
    finetune = (
        f"{command['finetune']} --data {out}/stores/lesions {network} --patch-size 32 --batch-size 2 "
        f"--lr 1e-2 --steps {args.finetune_steps} --folds {args.folds} --train-cases {TRAIN_CASES} --augment spatial"
    )
    pretrained = f"{out}/pretrain/checkpoints/step-{args.pretrain_steps}.pt"
    lines = {
        "draw-unlabelled": f"{command['phantom']} --out {out}/scans/unlabelled --subjects 12 --first 101 "
        f"--fov 56 --seed {seed}",
        "draw-lesions": f"{command['phantom']} --out {out}/scans/lesions --subjects 16 --sequences FLAIR --labels "
        f"--fov 56 --seed {seed}",
        "preprocess-unlabelled": f"{command['preprocess']} --images {out}/scans/unlabelled/images "
        f"--out {out}/stores/unlabelled",
        "preprocess-lesions": f"{command['preprocess']} --images {out}/scans/lesions/images "
        f"--labels {out}/scans/lesions/labels --out {out}/stores/lesions",
        "pretrain": f"{command['pretrain']} --data {out}/stores/unlabelled {network} --patch-size 32 "
        f"--batch-size 8 --lr 2e-3 --crop patch --val-fraction 0.2 --val-every 40 {pictures} "
        f"--steps {args.pretrain_steps} --out {out}/pretrain",
        "probe": f"{command['probe']} --data {out}/stores/lesions --arch unet_tiny --seed {seed} --device {device} "
        f"--weights scratch {pretrained} --folds {args.folds} --train-cases {TRAIN_CASES} --json {out}/probe.json",
        "finetune-scratch": f"{finetune} --weights scratch --out {out}/scratch",
        "finetune-pretrained": f"{finetune} --weights {pretrained} --out {out}/pretrained",
        "evaluate": f"{command['evaluate']} {out}/scratch {out}/pretrained --device {device}",
    }
    return {name: shlex.split(line) for name, line in lines.items()}


def finished(args: argparse.Namespace) -> list[str]:
    """What has come out, a line each: pretraining, what the encoder knew, the comparison, the pictures."""
    lines = [(args.out / "logs" / "5-pretrain.log").read_text().rstrip().splitlines()[-1]]
    lines.append(known([encoder["mean"] for encoder in json.loads((args.out / "probe.json").read_text())["encoders"]]))
    runs = {name: args.out / name for name in ("scratch", "pretrained")}
    dice = [json.loads((run / "summary.json").read_text())["dice"]["folds"] for run in runs.values()]
    lines.append(gain(*dice))
    if find_spec("matplotlib"):
        path = args.out / "predictions.png"
        draw_predictions(path, args.out / "scans" / "lesions", {name: run / "fold0" for name, run in runs.items()})
        lines.append(f"pictures: {args.out}/pretrain/panels/step-{args.pretrain_steps}.png, {path}")
    return lines


def known(dice: list[float | None]) -> str:
    """One line: Dice, percent or None, of a linear classifier on the encoder at random and on the pretrained one."""
    random, pretrained = ("no Dice" if value is None else f"{value:.1f} %" for value in dice)
    return f"before fine-tuning, a linear classifier reads from an encoder at random {random}, pretrained {pretrained}"


def gain(scratch: list[float | None], pretrained: list[float | None]) -> str:
    """One line: whether the pretrained encoder was ahead; Dice of the folds, in [0, 1], None where there is none."""
    pairs = [(a, b) for a, b in zip(scratch, pretrained, strict=True) if a is not None and b is not None]
    differences = [100 * (b - a) for a, b in pairs]
    if not differences:
        return "no fold of both has a Dice: nothing to compare"
    mean, ahead = sum(differences) / len(differences), sum(d > 0 for d in differences)
    shown = f"{mean:+.1f} points of Dice ({', '.join(f'{d:+.1f}' for d in differences)})"
    if mean <= 0:
        return f"NO gain from pretraining here: {shown} against scratch"
    if ahead < len(differences):
        of_all = f"ahead in {ahead} of {len(differences)} folds"
        return f"NO clear gain from pretraining here: {shown} against scratch, {of_all}"
    return f"pretraining was ahead of scratch in every fold: {shown}"


def draw_predictions(path: Path, scans: Path, folds: Mapping[str, Path], count: int = 3) -> None:
    """Write test scans with the outlines of the reference and of what each network found, in the slice with most label.

    Args:
        path: of the PNG file.
        scans: folder with `images` and `labels`.
        folds: evaluated folders of a fold, by caption; cases that all of them tested are drawn.
        count: scans.
    """
    import nibabel as nib
    import numpy as np

    from amaes.pictures import Panel, Row, write_sheet

    def volume(folder: Path, name: str) -> np.ndarray:
        return np.asarray(nib.as_closest_canonical(nib.load(folder / f"{name}.nii.gz")).dataobj)

    tested = [json.loads((fold / "results.json").read_text())["cases"] for fold in folds.values()]
    rows = []
    for name in sorted(set.intersection(*({case["id"] for case in cases} for cases in tested)))[:count]:
        image, label = volume(scans / "images", name), volume(scans / "labels", name)
        found = {caption: volume(fold / "predictions", name) for caption, fold in folds.items()}
        height = int(np.argmax((label == 1).sum(axis=(0, 1))))
        grey = image[:, ::-1, height].T / np.quantile(image, 0.995)
        outlines = {"scan": None, "reference": label, **found}
        panels = [Panel(grey, caption, None if o is None else o[:, ::-1, height].T) for caption, o in outlines.items()]
        rows.append(Row(name, panels))
    write_sheet(path, "Test heads: lesion (orange) and ventricle (blue)", rows, zoom=4)


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

    Ctrl-C reaches the command as well, SIGTERM is passed on to it; it is given the time to save its state.
    """
    # Threads that wait for one another sleep: where other programs run too, spinning takes several times as long.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=None if shown else file, stderr=file, env=environment)
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


def report_failure(name: str, status: int, log: Path) -> int:
    """Show the end of a failed step's output; returns the exit status for it."""
    say("\n".join(f"  {line}" for line in log.read_text(errors="replace").splitlines()[-TAIL:]))
    sys.stderr.write(f"{name}: status {status}; its output is in {log}\n")
    return status if status > 0 else 128 - status  # a signal, counted as shells do


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
            return report_failure(name, status, log)
        say(f"  {seconds[name]:.1f} s\n")
    say("\n".join(finished(args)) + "\n")
    say("The fine-tunings differ in --weights and --out alone. The commands that made the table, and their seconds:\n")
    say("\n".join(f"{printed(command)}  # {seconds[name]:.0f} s" for name, command in todo.items()))
    say(f"\n{sum(seconds.values()):.0f} s in all. Everything is in {args.out}; the same command again uses it.")
    return 0


if __name__ == "__main__":
    run(main)
