"""Two checks of long runs: memory does not grow, and a run that is killed many times ends with the right weights.

    python benchmarks/soak.py [--steps 500] [--kills 30]

1. Memory: a pretraining run with 2 workers; a straight line through the memory of the run and its workers, from the
   first fifth of the steps to the end, must rise by less than 1 %. (Single samples move by 3 %: batches come and go.)
2. Kills: a run of 2 ranks under torchrun is killed (SIGKILL, one rank or all) at random moments and started again by
   the same command until it ends. The step of its newest sound checkpoint must never fall, and the final weights must
   equal those of a run that nothing disturbed, bit for bit.

Prints both results and, with --json, writes them to a file. Status 1 where one does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

from amaes import checkpoint, cli
from amaes.files import write_json
from amaes.phantom import make_demo_data
from amaes.training.run_folder import commit, versions

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = cli.Parser(description="Memory over many steps, and weights after many kills.")
    parser.add_argument("--steps", type=cli.positive_int, default=500, help="optimizer steps of the memory run")
    parser.add_argument("--kills", type=cli.positive_int, default=30, help="kills in all")
    parser.add_argument("--killed-steps", type=cli.positive_int, default=300, help="optimizer steps of a killed run")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the moments of the kills")
    parser.add_argument("--json", type=cli.output_file, metavar="FILE", help="also write the result there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = make_demo_data(Path(folder) / "demo")
        result = {"versions": versions(), "commit": commit(), "cores": os.cpu_count()}
        result["memory"] = memory(store, Path(folder), args.steps)
        print(json.dumps(result["memory"]), flush=True)
        result["kills"] = kills(store, Path(folder), args)
        print(json.dumps(result["kills"]), flush=True)
    if args.json:
        write_json(args.json, result)
    held = result["memory"]["growth_percent"] < 1 and result["kills"]["lost"] == result["kills"]["different"] == 0
    print("holds" if held else "DOES NOT HOLD")
    return 0 if held else 1


def command(store: Path, out: Path, steps: int, *more: str) -> list[str]:
    """train_pretrain.py on the CPU, a tiny network."""
    network = ["--arch", "unet_tiny", "--patch-size", "32", "--batch-size", "4", "--device", "cpu"]
    fixed = [*network, "--workers", "2", "--val-every", "1000000"]
    return ["train_pretrain.py", "--data", str(store), *fixed, "--steps", str(steps), "--out", str(out), *more]


# Memory ---------------------------------------------------------------------------------------------------------------


def memory(store: Path, folder: Path, steps: int) -> dict:
    """Proportional set size of the run and its children, sampled twice a second."""
    process = subprocess.Popen(
        [sys.executable, *command(store, folder / "memory", steps, "--save-every", "100", "--log-every", "1")],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    samples: list[tuple[int, float]] = []  # step, MB
    while process.poll() is None:
        samples.append((_step(folder / "memory"), _family_mb(process.pid)))
        time.sleep(0.5)
    if process.returncode:
        raise OSError(f"the memory run ended with status {process.returncode}")
    after = [(step, mb) for step, mb in samples if 0.2 * steps <= step < steps]
    slope, start = statistics.linear_regression(*zip(*after, strict=True))
    first, last = start + slope * 0.2 * steps, start + slope * steps
    return {
        "steps": steps,
        "samples": len(after),
        "mb_at_first": first,
        "mb_at_last": last,
        "growth_percent": 100 * (last / first - 1),
    }


def _step(run: Path) -> int:
    """The last step in metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    steps = [int(line.split('"step": ')[1].split(",")[0]) for line in lines if '"step": ' in line and '"loss"' in line]
    return max(steps, default=0)


def _family_mb(pid: int) -> float:
    """Memory of a process and all below it, pages that several share counted once, MB."""
    total = 0.0
    for one in (pid, *_below(pid)):
        try:
            table = Path(f"/proc/{one}/smaps_rollup").read_text()
        except OSError:  # it has just ended
            continue
        total += sum(int(line.split()[1]) for line in table.splitlines() if line.startswith("Pss:")) / 1000
    return total


def _below(pid: int) -> list[int]:
    """Its child processes, their children, and so on."""
    children = []
    for table in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children += [int(child) for child in table.read_text().split()]
        except OSError:
            continue
    return children + [below for child in children for below in _below(child)]


# Kills ----------------------------------------------------------------------------------------------------------------


def kills(store: Path, folder: Path, args: argparse.Namespace) -> dict:
    """Kill runs until there were enough kills, then let the last one end."""
    steps, chance = args.killed_steps, random.Random(args.seed)
    _ranks(store, folder / "undisturbed", steps).wait()
    expected = _weights(folder / "undisturbed")
    count, runs, lost, different, of_one_rank = 0, 0, 0, 0, 0
    while count < args.kills:
        out, newest = folder / f"killed{runs}", 0
        runs += 1
        while True:
            process = _ranks(store, out, steps)
            try:
                process.wait(chance.uniform(4, 16) if count < args.kills else None)
            except subprocess.TimeoutExpired:
                count += 1
                of_one_rank += _kill(process, one=chance.random() < 0.5)
            else:
                if process.returncode == 0:
                    break
                raise OSError(f"a restarted run ended with status {process.returncode}")
            content, _, _ = checkpoint.latest(out / "checkpoints")
            step = content["step"] if content else 0
            lost += step < newest
            newest = max(newest, step)
        different += not _equal(_weights(out), expected)
    return {
        "kills": count,
        "of_one_rank": of_one_rank,
        "runs": runs,
        "steps": steps,
        "lost": lost,
        "different": different,
    }


def _ranks(store: Path, out: Path, steps: int) -> subprocess.Popen:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen(
        [*launch, *command(store, out, steps, "--save-every", "10")],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _kill(process: subprocess.Popen, one: bool) -> bool:
    """Kill one rank, if there are ranks already, or all at once; returns whether it was one. No process is left."""
    ranks = [pid for pid in _below(process.pid) if "train_pretrain.py" in _line(pid)]
    if one and ranks:
        os.kill(ranks[0], signal.SIGKILL)
        process.wait()
    if process.poll() is None:
        for pid in (process.pid, *_below(process.pid)):  # torchrun gives every rank a process group of its own
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    return one and bool(ranks)


def _line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.latest(run / "checkpoints")[0]["model"]


def _equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


if __name__ == "__main__":
    cli.run(main)
