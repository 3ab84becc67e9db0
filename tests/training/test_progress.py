"""What a run tells while it runs, when it saves, and what it does about losses that are not finite."""

import json
import os
import signal
import time
from collections import Counter

import pytest
import torch

from amaes import distributed
from amaes.data.order import Batches, Share
from amaes.training import progress, stopping
from amaes.training.optim import build_optimizer, optimizer_step
from amaes.training.progress import Clock, Progress
from amaes.training.stopping import Stop

ALONE = distributed.Ranks(0, 1, 0, 1, torch.device("cpu"))
NAN = float("nan")


@pytest.fixture
def handlers():
    """The process's own signal handlers are back after the test."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def network_with_gradient():
    network = torch.nn.Linear(2, 1)
    network(torch.ones(1, 2)).sum().backward()  # every gradient is 1
    return network


def watch(folder, network=None, *, start=0, total=4, every=2, accumulate=1):
    order = Batches(range(9), Share(3 * accumulate, accumulate), seed=0, start=start, stop=total)
    return Progress(folder, ALONE, network or network_with_gradient(), order, None, None, every)


@pytest.fixture
def described(monkeypatch):
    """A step is described by its number alone."""
    monkeypatch.setattr(progress, "describe_step", lambda step, *about: {"samples": [{"epoch": 0, "case": f"c{step}"}]})


def test_clock_means_per_step_and_leaves_out_pauses():
    clock = Clock(torch.device("cpu"))
    for _ in range(2):
        time.sleep(0.01)
        clock.lap("data", on_host=True)
        time.sleep(0.03)
        clock.lap("step")
        clock.step()
        time.sleep(0.1)  # validation, saving
        clock.start()
    means = clock.read()
    assert 10 <= means["data"] < 30
    assert 30 <= means["step"] < 60
    assert means["wall"] == pytest.approx(means["data"] + means["step"], rel=0.1)
    assert clock.read() == {"wall": 0.0}


def test_the_mean_loss_of_the_steps_since_the_last_line_is_written(tmp_path):
    watched = watch(tmp_path)
    for loss in (1.0, 3.0, 5.0, 9.0):
        watched.add({"reconstruction": torch.tensor(loss)})
        watched.step(0.1)
    first, second = lines(tmp_path)
    assert (first["step"], first["loss"], first["lr"]) == (2, 2.0, 0.1)
    assert (second["step"], second["loss"]) == (4, 7.0)
    assert first["grad_norm"] == pytest.approx(3**0.5, rel=1e-5)
    assert first["resident_gb"] > 0.05
    assert "loss_reconstruction" not in first


def test_terms_and_micro_steps_are_summed_to_the_loss(tmp_path):
    watched = watch(tmp_path, every=1, total=1, accumulate=2)
    for rotation, contrast in ((1.0, 2.0), (3.0, 6.0)):
        watched.add({"rotation": torch.tensor(rotation), "contrast": torch.tensor(contrast)})
    watched.step(0.1)
    line = lines(tmp_path)[0]
    assert (line["loss_rotation"], line["loss_contrast"], line["loss"]) == (2.0, 4.0, 6.0)


@pytest.mark.parametrize(("start", "total", "every", "written"), [(0, 3, 10, [3]), (3, 9, 4, [4, 8, 9])])
def test_lines_come_at_multiples_and_at_the_last_step(tmp_path, start, total, every, written):
    watched = watch(tmp_path, start=start, total=total, every=every)
    for _ in range(start, total):
        watched.add({"loss": torch.tensor(1.5)})
        watched.step(0.1)
    assert [line["step"] for line in lines(tmp_path)] == written
    assert all(line["loss"] == 1.5 for line in lines(tmp_path))


def test_lines_that_never_come_take_no_memory(tmp_path):
    watched = watch(tmp_path, every=10**12, start=2)
    for loss in (2.0, 3.0):
        watched.add({"reconstruction": torch.tensor(loss)})
        watched.step(0.1)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(4, 2.5)]


def test_a_loss_that_is_not_finite_stops_and_names_the_step_and_leaves_a_report(tmp_path, described):
    watched = watch(tmp_path, every=4)
    for loss in (1.0, NAN):
        watched.add({"loss": torch.tensor(loss)})
        watched.step(0.1)
    with pytest.raises(ValueError, match=r"step 2: the loss is nan.*not-finite-step-2.json.*`on_nan` skip"):
        watched.check_finite()
    report = json.loads((tmp_path / "not-finite-step-2.json").read_text())
    assert report == {"step": 2, "samples": [{"epoch": 0, "case": "c2"}]}
    watched.add({"loss": torch.tensor(NAN)})
    watched.step(0.1)
    watched.add({"loss": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="step 2: the loss is nan"):
        watched.step(0.1)


def test_weights_that_are_not_finite_are_not_saved(tmp_path, described):
    network = network_with_gradient()
    watched = watch(tmp_path, network)
    watched.add({"loss": torch.tensor(1.0)})
    watched.step(0.1)
    watched.check_finite()
    with torch.no_grad():
        network.weight.fill_(1e30)  # finite, though the sum of squares is not
        watched.check_finite()
        network.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="step 1: the largest weight is inf"):
        watched.check_finite()


def test_a_step_with_a_gradient_that_is_not_finite_can_be_left_out(tmp_path, described):
    torch.manual_seed(0)
    network, twin = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    twin.load_state_dict(network.state_dict())
    watched = watch(tmp_path, network, every=3, total=3)
    for net, losses in ((network, (1.0, NAN, 2.0)), (twin, (1.0, 2.0))):
        optimizer = build_optimizer(net.parameters(), 0.1, 0.01, amsgrad=True)
        for loss in losses:
            optimizer.zero_grad()
            (net(torch.ones(1, 2)).sum() * loss).backward()
            skipped = optimizer_step(optimizer, net, on_nan="skip")
            if net is network:
                watched.add({"loss": torch.tensor(loss)})
                watched.step(0.1, skipped)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), twin.parameters(), strict=True))
    line = lines(tmp_path)[0]
    assert (line["loss"], line["skipped_steps"]) == (1.5, 1)
    assert (tmp_path / "not-finite-step-2.json").is_file()


def test_too_many_steps_left_out_stop_the_run(tmp_path, described):
    watched = watch(tmp_path, every=1, total=50)
    with pytest.raises(ValueError, match="step 11: 11 steps were skipped, at most 10 may"):
        for _ in range(50):
            watched.add({"loss": torch.tensor(NAN)})
            watched.step(0.1, torch.ones(()))


def test_replaced_cases_are_logged_once_and_counted(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(progress.tqdm, "write", logged.append)
    watched = watch(tmp_path, every=1, total=1, accumulate=2)
    for bad_cases in (
        ["a: cut short; c in its place"],
        ["a: cut short; d in its place", "b: not finite; c in its place"],
    ):
        watched.add({"loss": torch.tensor(1.0)}, bad_cases)
    watched.step(0.1)
    expected = ("a: cut short; c in its place", "b: not finite; c in its place")
    assert logged[:2] == [f"replaced by another case: {line}" for line in expected]
    assert lines(tmp_path)[0]["bad_cases"] == 3


def test_cases_replaced_on_other_ranks_are_counted_too(tmp_path, monkeypatch):
    monkeypatch.setattr(
        distributed, "gather_from_ranks", lambda own: [own, Counter({"a: cut short": 2, "c: missing": 1})]
    )
    watched = watch(tmp_path, every=1, total=2)
    watched.replaced(["a: cut short"])
    for _ in range(2):  # what was counted once is not added again by the next line
        watched.add({"loss": torch.tensor(1.0)})
        watched.step(0.1)
    assert [line["bad_cases"] for line in lines(tmp_path)] == [4, 4]


def test_a_line_of_nothing_but_left_out_steps_has_no_loss(tmp_path, described):
    watched = watch(tmp_path, every=1, total=1)
    watched.add({"rotation": torch.tensor(NAN), "contrastive": torch.tensor(1.0)})
    watched.step(0.1, torch.ones(()))
    line = lines(tmp_path)[0]
    assert (line["loss"], line["loss_contrastive"], line["skipped_steps"]) == (None, None, 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_request_and_a_later_one_an_interrupt(handlers, monkeypatch, number):
    stop = Stop(ALONE, save_minutes=60)
    assert (stop.ask(1), stop.agreed) == (False, False)
    for _ in range(2):  # torchrun and the terminal send the same Ctrl-C
        os.kill(os.getpid(), number)
    assert (stop.ask(2), stop.agreed) == (True, True)
    monkeypatch.setattr(stopping, "REPEAT_SIGNAL_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


@pytest.mark.parametrize(("device", "asked"), [("cuda", [10, 20]), ("cpu", list(range(1, 22)))])
def test_hosts_of_gpus_ask_each_other_every_tenth_step(handlers, monkeypatch, device, asked):
    steps = []
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda wishes: steps.append(step) or 2 * wishes)
    stop = Stop(distributed.Ranks(0, 2, 0, 2, torch.device(device)), save_minutes=60)
    for step in range(1, 22):
        assert not stop.ask(step)
    assert steps == asked
    os.kill(os.getpid(), signal.SIGTERM)
    saves = [stop.ask(step) for step in range(22, 33)]
    first = 30 - 22 if device == "cuda" else 0
    assert saves == [False] * first + [True] * (11 - first)
    assert stop.agreed


def test_what_another_rank_was_asked_stops_this_one_too(handlers, monkeypatch):
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda wishes: wishes + torch.tensor([1.0, 0.0]))
    stop = Stop(distributed.Ranks(0, 2, 0, 2, torch.device("cpu")), save_minutes=60)
    assert (stop.ask(1), stop.agreed, stop.requested) == (True, True, False)


def test_a_rank_without_its_torchrun_saves_and_stops(handlers):
    for launcher, gone in ((os.getppid(), False), (os.getpid(), True), (None, False)):
        ranks = distributed.Ranks(0, 1, 0, 1, torch.device("cpu"), launcher=launcher)
        stop = Stop(ranks, save_minutes=60)
        assert (stop.ask(1), stop.agreed) == (gone, gone)


def test_a_checkpoint_is_due_after_so_many_minutes(handlers):
    stop = Stop(ALONE, save_minutes=0.02 / 60)
    assert not stop.ask(1)
    time.sleep(0.03)
    assert stop.ask(2)
    stop.saved()
    assert not stop.ask(3)
    assert not stop.agreed
