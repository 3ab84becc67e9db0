"""Start the training scripts as a user does, and read what they leave."""

import json
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path

import pytest
import torch

from amaes import checkpoint, cli

ROOT = Path(__file__).parent.parent
TINY = ("--arch", "unet_tiny", "--patch-size", "32", "--batch-size", "4", "--device", "cpu")


def command(script, *options, ranks=1):
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launch, script, *map(str, options)]


def run(script, *options, ranks=1, status=0):
    """Run a script to its end. One rank runs in this process: a new one takes seconds to import what it needs."""
    if ranks == 1:
        done = run_here(script, *map(str, options))
    else:
        argv = command(script, *options, ranks=ranks)
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def run_here(script, *words):
    """What `python SCRIPT WORDS` would return and print; signal handlers and sys.argv are put back."""
    module = import_module(script.removesuffix(".py"))
    stdout, stderr, kept_argv = StringIO(), StringIO(), sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    sys.argv = [script, *words]
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr), pytest.raises(SystemExit) as end:
            cli.run(module.main, module.parse_options())
    finally:
        sys.argv = kept_argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(words, end.value.code, stdout.getvalue(), stderr.getvalue())


def weights(run_folder):
    content, _, damaged = checkpoint.latest(Path(run_folder) / "checkpoints")
    assert not damaged
    return content["step"], content["model"]


def assert_equal_weights(a, b):
    (step_a, model_a), (step_b, model_b) = weights(a), weights(b)
    assert step_a == step_b
    assert all(torch.equal(model_a[name], model_b[name]) for name in model_a)


def pretrain_options(store, out, **changed):
    options = {
        "--data": store,
        "--steps": 8,
        "--workers": 0,
        "--log-every": 2,
        "--save-every": 3,
        "--out": out,
    } | changed
    return [*TINY, *(word for pair in options.items() for word in pair)]


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, "the run ended too soon"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lines_of(folder):
    return [line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
