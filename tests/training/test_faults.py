"""Runs that lose a rank, a machine or a checkpoint, and must end as if nothing had happened."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from amaes import hardware
from amaes.data.splits import pretrain_split
from amaes.data.store import Store
from amaes.training import validation
from tests.launch import (
    ROOT,
    assert_equal_weights,
    command,
    fork,
    fork_ranks,
    lines_of,
    pretrain_options,
    run,
    wait_for,
    weights,
)
from tests.stores import make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "store", count=9, labels=True)


@pytest.fixture(scope="module")
def two_ranks(store, tmp_path_factory):
    """A run of two ranks that nothing disturbed."""
    out = tmp_path_factory.mktemp("two") / "run"
    run("train_pretrain.py", *options(store, out), ranks=2)
    return out


def options(store, out, **changed):
    return pretrain_options(
        store, out, **({"--steps": 12, "--save-every": 2, "--log-every": 1, "--accumulate": 1} | changed)
    )


def launched(argv, **more):
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)


def torchrun(*more):
    return [sys.executable, "-m", "torch.distributed.run", *map(str, more)]


def everything_below(pid):
    found = [
        int(child) for table in Path(f"/proc/{pid}/task").glob("*/children") for child in table.read_text().split()
    ]
    return found + [below for child in found for below in everything_below(child)]


def ranks_below(pid):
    """Processes of the training script that torchrun has started."""
    lines = {child: Path(f"/proc/{child}/cmdline").read_text() for child in everything_below(pid)}
    return [child for child, line in lines.items() if "train_pretrain.py" in line]


def has_ended(pid):
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or ") Z " in status.read_text()


def test_torchrun_restarts_ranks_after_one_was_killed(store, two_ranks, tmp_path):
    out = tmp_path / "run"
    # A restart must neither delete the run again nor refuse it.
    argv = torchrun("--standalone", "--nproc_per_node=2", "--max-restarts=2", "train_pretrain.py")
    process = launched([*argv, *map(str, options(store, out)), "--overwrite"])
    wait_for(out / "checkpoints" / "step-4.pt", process)
    os.kill(ranks_below(process.pid)[1], signal.SIGKILL)
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 0, said
    assert "continuing at step" in said
    assert_equal_weights(two_ranks, out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_saves_and_the_same_command_continues(store, two_ranks, tmp_path, number):
    out = tmp_path / "run"
    with_workers = options(store, out, **{"--workers": 1})
    process = launched(torchrun("--standalone", "--nproc_per_node=2", "train_pretrain.py", *with_workers))
    wait_for(out / "checkpoints" / "step-2.pt", process)
    for pid in (process.pid, *everything_below(process.pid)):  # as a scheduler does: torchrun, ranks and workers
        os.kill(pid, number)
    said = process.communicate(timeout=100)[0]
    assert process.returncode != 0
    assert "saved at step" in said
    assert 2 <= weights(out)[0] < 12
    run("train_pretrain.py", *options(store, out), ranks=2)
    assert_equal_weights(two_ranks, out)


def test_a_signal_that_torchrun_does_not_know_saves_too(store, two_ranks, tmp_path):
    out = tmp_path / "run"
    ranks = fork_ranks("train_pretrain.py", options(store, out, **{"--workers": 1}), 2, tmp_path)
    wait_for(out / "checkpoints" / "step-2.pt", ranks[0])
    for pid in [pid for rank in ranks for pid in (rank.pid, *everything_below(rank.pid))]:
        os.kill(pid, signal.SIGUSR1)
    for rank in ranks:
        rank.join(100)
        assert rank.exitcode not in (0, None)
    assert "saved at step" in (tmp_path / "rank0.txt").read_text()
    assert 2 <= weights(out)[0] < 12
    run("train_pretrain.py", *options(store, out), ranks=2)
    assert_equal_weights(two_ranks, out)


VALIDATING = {"--steps": 4, "--save-every": 100, "--val-every": 2, "--val-fraction": 0.3}


@pytest.fixture(scope="module")
def validating(store, tmp_path_factory):
    """A run of one rank with two validations that nothing disturbed."""
    out = tmp_path_factory.mktemp("validating") / "run"
    run("train_pretrain.py", *options(store, out, **VALIDATING))
    return out


@pytest.mark.parametrize("at", [2, 4])  # in the middle, and at the end
def test_a_signal_during_validation_cuts_it_short_and_the_same_command_makes_up_for_it(store, validating, tmp_path, at):
    argv = [str(word) for word in options(store, tmp_path / "cut", **VALIDATING)]
    said = tmp_path / "said.txt"
    process = fork("train_pretrain.py", argv, said, before=partial(signal_in_validation, at // 2))
    process.join()
    assert process.exitcode == 130
    assert f"saved at step {at}; the same command continues" in said.read_text()
    assert f"step {at}: validation" not in said.read_text()
    run("train_pretrain.py", *argv)
    assert_equal_weights(validating, tmp_path / "cut")
    assert validations_of(tmp_path / "cut") == validations_of(validating)


def signal_in_validation(number):
    """Let validation `number` of this process, counted from 1, begin with a signal."""
    loader, calls = validation.loader, []

    def signalled(*about, **more):
        calls.append(about)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return loader(*about, **more)

    validation.loader = signalled


def validations_of(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "val_loss" in line]


def test_two_machines_meet_over_tcp(store, two_ranks, tmp_path):
    out = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    meeting = ["--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]
    argv = torchrun(*meeting, "--rdzv-id=test", "train_pretrain.py", *options(store, out))
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as torchrun sets where it starts several ranks itself
    agents = [launched(argv, env=one_thread) for _ in range(2)]
    for agent in agents:
        said = agent.communicate(timeout=200)[0]
        assert agent.returncode == 0, said
    assert_equal_weights(two_ranks, out)


def test_another_number_of_ranks_continues_with_the_same_cases_and_says_so(store, two_ranks, tmp_path):
    out = tmp_path / "run"
    ranks = fork_ranks("train_pretrain.py", options(store, out), 2, tmp_path)
    wait_for(out / "checkpoints" / "step-4.pt", ranks[0])
    for rank in ranks:
        rank.kill()
        rank.join()
    done = run("train_pretrain.py", *options(store, out, **{"--accumulate": 4}))
    assert "the run had 2 ranks, now 1: cases, draws and masks stay the same" in done.stdout
    pairs = zip(lines_of(out), lines_of(two_ranks), strict=True)
    assert all(line["loss"] == pytest.approx(other["loss"], rel=1e-3) for line, other in pairs)


@pytest.fixture(scope="module")
def four_steps(store, tmp_path_factory):
    """A run of one rank and four steps."""
    out = tmp_path_factory.mktemp("four") / "run"
    run("train_pretrain.py", *options(store, out, **{"--steps": 4}))
    return out


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(store, four_steps, tmp_path, damage):
    out = tmp_path / "run"
    shutil.copytree(four_steps, out)
    newest = out / "checkpoints" / "step-4.pt"
    content = newest.read_bytes()
    if damage == "cut":
        newest.write_bytes(content[: len(content) // 2])
    else:
        newest.unlink()
    done = run("train_pretrain.py", *options(store, out, **{"--steps": 4}))
    assert "continuing at step 2 from" in done.stdout
    assert ("skipped, it is damaged" in done.stdout) == (damage != "missing")
    assert "nothing is left to train" not in done.stdout
    assert_equal_weights(out, four_steps)


def test_a_killed_sweep_of_folds_loses_none(store, tmp_path):
    def sweep(out):
        fixed = "--arch unet_tiny --patch-size 32 --batch-size 2 --device cpu --workers 1 --steps 6 --save-every 2"
        return [*fixed.split(), "--folds", 2, "--train-cases", 3, "--data", store, "--out", tmp_path / out]

    run("train_finetune.py", *sweep("whole"))
    process = fork("train_finetune.py", sweep("killed"), tmp_path / "said.txt")
    wait_for(tmp_path / "killed" / "fold1" / "checkpoints" / "step-2.pt", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    run("train_finetune.py", *sweep("killed"))
    for fold in ("fold0", "fold1"):
        assert_equal_weights(tmp_path / "whole" / fold, tmp_path / "killed" / fold)


def test_checkpoints_come_by_the_clock_too(store, tmp_path):
    out = tmp_path / "run"
    run(
        "train_pretrain.py",
        *options(store, out, **{"--steps": 5, "--save-every": 1000, "--save-minutes": 1e-4, "--keep": 99}),
    )
    assert len(list((out / "checkpoints").glob("step-*.pt"))) > 2


def test_steps_with_a_gradient_that_is_not_finite_are_left_out_and_counted(store, tmp_path):
    out = tmp_path / "run"
    exploding = {"--steps": 10, "--lr": 1e30, "--warmup": 0, "--log-every": 1, "--val-fraction": 0}
    done = run("train_pretrain.py", *options(store, out, **exploding), "--on-nan", "skip", status=2)
    assert "steps skipped" in done.stdout
    assert "of 10 steps were skipped" in done.stderr  # the network is saved, and the exit status says what it is worth
    assert lines_of(out)[-1]["skipped_steps"] >= 8
    assert json.loads(next(out.glob("not-finite-step-*.json")).read_text())["samples"]
    assert all(tensor.isfinite().all() for tensor in weights(out)[1].values())


def test_the_benchmark_tells_where_time_goes_and_leaves_the_run_alone(store, tmp_path):
    done = run("train_pretrain.py", *options(store, tmp_path / "run"), "--benchmark", 2, ranks=2)
    for row in ("gradients not exchanged", "network alone", "with augmentation", "with reading of data", "verdict: "):
        assert row in done.stdout
    assert not (tmp_path / "run").exists()


def test_ranks_whose_torchrun_was_killed_save_and_end_so_that_two_runs_do_not_share_a_folder(store, tmp_path):
    out = tmp_path / "run"
    # Files, not pipes: the ranks go on writing after their torchrun.
    with (tmp_path / "said").open("w") as said:
        argv = command("train_pretrain.py", *options(store, out, **{"--steps": 10**6}), ranks=2)
        process = subprocess.Popen(argv, cwd=ROOT, stdout=said, stderr=said)
        wait_for(out / "checkpoints" / "step-2.pt", process)
        ranks = ranks_below(process.pid)
        process.kill()
        process.wait()
        try:
            deadline = time.monotonic() + 60
            while not all(map(has_ended, ranks)) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert all(map(has_ended, ranks))
        finally:
            for pid in ranks:
                if not has_ended(pid):
                    os.kill(pid, signal.SIGKILL)
    assert "saved at step" in (tmp_path / "said").read_text()


def test_an_unreadable_validation_case_is_replaced_too(tmp_path):
    store = make_store(tmp_path / "store", count=9)
    (bad,) = pretrain_split(Store(store))["validation"]
    array = store / "cases" / f"{bad}.npy"
    array.write_bytes(array.read_bytes()[:-100])
    brief = {"--steps": 2, "--val-every": 1}
    done = run("train_pretrain.py", *options(store, tmp_path / "run", **brief), "--on-bad-case", "skip")
    assert done.stdout.count("replaced by another case") == 1
    assert re.search(r"step 2: validation loss \d", done.stdout)  # a number


@pytest.mark.parametrize(("accumulate", "share", "advice"), [(1, 3, "`accumulate` 3 (now 1)"), (3, 3, "no finer")])
def test_out_of_memory_advises_no_micro_steps_that_would_be_refused(accumulate, share, advice):
    error = RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
    explained = hardware.out_of_memory_explained(torch.device("cpu"), accumulate, (32, 32, 32), share)
    with pytest.raises(ValueError, match="out of memory") as caught, explained:
        raise error
    assert advice in str(caught.value)


def test_a_lost_rank_ends_the_run_in_time(store, tmp_path):
    out = tmp_path / "run"
    process = launched(command("train_pretrain.py", *options(store, out, **{"--steps": 1000}), ranks=2))
    wait_for(out / "checkpoints" / "step-2.pt", process)
    began = time.monotonic()
    os.kill(ranks_below(process.pid)[0], signal.SIGKILL)
    process.communicate(timeout=100)
    assert process.returncode != 0
    assert time.monotonic() - began < 60
