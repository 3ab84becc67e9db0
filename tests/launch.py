"""Start the training scripts as a user does, and read what they leave."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from amaes import checkpoint, cli

ROOT = Path(__file__).parent.parent
TINY = ("--arch", "unet_tiny", "--patch-size", "32", "32", "16", "--batch-size", "4", "--device", "cpu")


def command(script, *options, ranks=1):
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launch, script, *map(str, options)]


def run(script, *options, ranks=1, status=0):
    """Run a script to its end, with the ranks that torchrun would start; starting Python anew takes seconds."""
    words = list(map(str, options))
    done = run_here(script, *words) if ranks == 1 else run_ranks(script, words, ranks)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def run_ranks(script, words, ranks):
    """What `torchrun --nproc_per_node=RANKS SCRIPT WORDS` would return and print."""
    with TemporaryDirectory() as folder:
        processes = fork_ranks(script, words, ranks, Path(folder))
        deadline = time.monotonic() + 200
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        for process in processes:
            process.kill()
            process.join()
        said = "".join(log.read_text() for log in sorted(Path(folder).glob("rank*.txt")))
    return subprocess.CompletedProcess(words, max(abs(process.exitcode) for process in processes), said, "")


def fork_ranks(script, words, ranks, logs):
    """The processes that torchrun would start, which print into files in the folder `logs`."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    environments = [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    return [fork(script, words, logs / f"rank{e['RANK']}.txt", e) for e in environments]


_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.preloaded"])


def fork(script, words, log, environment=None, before=None):
    """Start `python SCRIPT WORDS` in a fork of a process that has imported what it needs.

    It leads a process group, prints into the file `log` and calls `before` first.
    """
    process = _forks.Process(target=_run_forked, args=(script, list(map(str, words)), log, environment or {}, before))
    process.start()
    return process


def _run_forked(script, words, log, environment, before):
    os.setsid()
    if "WORLD_SIZE" in environment:
        torch.set_num_threads(1)  # as torchrun sets where it starts several ranks
    os.environ.update({name: str(value) for name, value in environment.items()})
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [script, *words]
    module = import_module(script.removesuffix(".py"))
    if before is not None:
        before()
    cli.run(module.main, module.parse_options())


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
    """Wait until the running process of `fork` or `subprocess` has written `path`."""
    deadline = time.monotonic() + 120
    while not path.exists():
        ended = process.poll() if hasattr(process, "poll") else process.exitcode
        assert ended is None, "the run ended too soon"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lines_of(folder):
    return [line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
