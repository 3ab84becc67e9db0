"""What a run tells while it runs, when it saves, and what it does about losses that are not finite."""

import json
import os
import signal
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from amaes import distributed
from amaes.training import progress
from amaes.training.optim import build_optimizer, skip_if_not_finite
from amaes.training.progress import Clock, Progress
from amaes.training.stopping import SavePoints, StopRequest

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


def watch(folder, **options):
    return Progress(folder, ALONE, **({"step": 0, "total": 4, "every": 2, "batch_size": 3} | options))


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
    network, watched = network_with_gradient(), watch(tmp_path)
    for step, loss in enumerate((1.0, 3.0, 5.0, 9.0)):
        watched.add(step, {"reconstruction": torch.tensor(loss)})
        watched.report(step + 1, 0.1, network)
    first, second = lines(tmp_path)
    assert (first["step"], first["loss"], first["lr"]) == (2, 2.0, 0.1)
    assert (second["step"], second["loss"]) == (4, 7.0)
    assert first["grad_norm"] == pytest.approx(3**0.5, rel=1e-5)
    assert first["resident_gb"] > 0.05
    assert "loss_reconstruction" not in first


def test_terms_and_micro_steps_are_summed_to_the_loss(tmp_path):
    watched = watch(tmp_path, every=1, total=1, accumulate=2)
    for rotation, contrast in ((1.0, 2.0), (3.0, 6.0)):
        watched.add(0, {"rotation": torch.tensor(rotation), "contrast": torch.tensor(contrast)})
    watched.report(1, 0.1, network_with_gradient())
    line = lines(tmp_path)[0]
    assert (line["loss_rotation"], line["loss_contrast"], line["loss"]) == (2.0, 4.0, 6.0)


@pytest.mark.parametrize(("start", "total", "every", "written"), [(0, 3, 10, [3]), (3, 9, 4, [4, 8, 9])])
def test_lines_come_at_multiples_and_at_the_last_step(tmp_path, start, total, every, written):
    watched, network = watch(tmp_path, step=start, total=total, every=every), network_with_gradient()
    for step in range(start, total):
        watched.add(step, {"loss": torch.tensor(1.5)})
        watched.report(step + 1, 0.1, network)
    assert [line["step"] for line in lines(tmp_path)] == written
    assert all(line["loss"] == 1.5 for line in lines(tmp_path))


def test_lines_that_never_come_take_no_memory(tmp_path):
    watched = watch(tmp_path, every=10**12, step=2)
    for step in (2, 3):
        watched.add(step, {"reconstruction": torch.tensor(float(step))})
        watched.report(step + 1, 0.1, network_with_gradient())
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(4, 2.5)]


def test_a_loss_that_is_not_finite_stops_and_names_the_step_and_leaves_a_report(tmp_path):
    watched = watch(tmp_path, every=4, describe=lambda step: {"samples": [{"epoch": 0, "case": f"c{step}"}]})
    network = network_with_gradient()
    for step, loss in enumerate((1.0, NAN)):
        watched.add(step, {"loss": torch.tensor(loss)})
        watched.report(step + 1, 0.1, network)
    with pytest.raises(ValueError, match=r"step 2: the loss is nan.*not-finite-step-2.json.*--on-nan skip"):
        watched.check_before_saving(2, network)
    report = json.loads((tmp_path / "not-finite-step-2.json").read_text())
    assert report == {"step": 2, "samples": [{"epoch": 0, "case": "c2"}]}
    watched.add(2, {"loss": torch.tensor(NAN)})
    watched.report(3, 0.1, network)
    watched.add(3, {"loss": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="step 2: the loss is nan"):
        watched.report(4, 0.1, network)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    network, watched = torch.nn.Linear(2, 1), watch(tmp_path)
    watched.add(0, {"loss": torch.tensor(1.0)})
    watched.check_before_saving(1, network)
    with torch.no_grad():
        network.weight.fill_(1e30)  # finite, though the sum of squares is not
        watched.check_before_saving(1, network)
        network.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="step 1: the largest weight is inf"):
        watched.check_before_saving(1, network)


def test_a_step_with_a_gradient_that_is_not_finite_can_be_left_out(tmp_path):
    torch.manual_seed(0)
    network, twin = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    twin.load_state_dict(network.state_dict())
    watched = watch(tmp_path, every=3, total=3)
    for net, losses in ((network, (1.0, NAN, 2.0)), (twin, (1.0, 2.0))):
        optimizer = build_optimizer(net.parameters(), 0.1, 0.01, amsgrad=True)
        for step, loss in enumerate(losses):
            optimizer.zero_grad()
            (net(torch.ones(1, 2)).sum() * loss).backward()
            flag = skip_if_not_finite(optimizer, net)
            optimizer.step()
            if net is network:
                watched.add(step, {"loss": torch.tensor(loss)})
                watched.skip(step, flag)
                watched.report(step + 1, 0.1, net)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), twin.parameters(), strict=True))
    line = lines(tmp_path)[0]
    assert (line["loss"], line["skipped_steps"]) == (1.5, 1)
    assert (tmp_path / "not-finite-step-2.json").is_file()


def test_too_many_steps_left_out_stop_the_run(tmp_path):
    watched, network = watch(tmp_path, every=1, total=50), network_with_gradient()
    with pytest.raises(ValueError, match="step 11: 11 steps were skipped since step 0, at most 10 may"):
        for step in range(50):
            watched.add(step, {"loss": torch.tensor(NAN)})
            watched.skip(step, torch.ones(()))
            watched.report(step + 1, 0.1, network)


def test_replaced_cases_are_told_once_and_counted(tmp_path):
    watched, said = watch(tmp_path, every=1, total=1), []
    for complaints in (
        ["a: cut short; c in its place"],
        ["a: cut short; d in its place", "b: not finite; c in its place"],
    ):
        watched.bad_cases(complaints, said.append)
    watched.add(0, {"loss": torch.tensor(1.0)})
    watched.report(1, 0.1, network_with_gradient())
    assert said == [f"replaced by another case: {text}; c in its place" for text in ("a: cut short", "b: not finite")]
    assert lines(tmp_path)[0]["bad_cases"] == 3


def test_cases_replaced_on_other_ranks_are_counted_too(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda own: [own, Counter({"a: cut short": 2, "c: missing": 1})])
    watched = watch(tmp_path, every=1, total=2)
    watched.bad_cases(["a: cut short"], lambda line: None)
    for step in range(2):  # what was counted once is not added again by the next line
        watched.add(step, {"loss": torch.tensor(1.0)})
        watched.report(step + 1, 0.1, network_with_gradient())
    assert [line["bad_cases"] for line in lines(tmp_path)] == [4, 4]


def test_a_line_of_nothing_but_left_out_steps_has_no_loss(tmp_path):
    watched = watch(tmp_path, every=1, total=1)
    watched.add(0, {"rotation": torch.tensor(NAN), "contrastive": torch.tensor(1.0)})
    watched.skip(0, torch.ones(()))
    watched.report(1, 0.1, network_with_gradient())
    line = lines(tmp_path)[0]
    assert (line["loss"], line["loss_contrastive"], line["skipped_steps"]) == (None, None, 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_request_and_a_later_one_an_interrupt(handlers, monkeypatch, number):
    stop = StopRequest()
    saving = SavePoints(stop, ALONE, every=10, minutes=60, total=100)
    assert (saving.due(1), saving.stopping) == (False, False)
    for _ in range(2):  # torchrun and the terminal send the same Ctrl-C
        os.kill(os.getpid(), number)
    assert (saving.due(2), saving.stopping) == (True, True)
    monkeypatch.setattr(progress, "SAME_REQUEST", 0.0)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


@pytest.mark.parametrize(("seconds", "asked"), [(0.1, [1, 11, 21]), (2.5, [1, 3, 5]), (9.0, [1, 2, 3])])
def test_hosts_of_gpus_ask_each_other_more_often_where_steps_are_long(handlers, monkeypatch, seconds, asked):
    clock, asking = SimpleNamespace(monotonic=lambda: clock.now, now=0.0), []
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda own: asking.append(step) or 2 * own)
    ranks = distributed.Ranks(0, 2, 0, 2, torch.device("cuda"))
    saving = SavePoints(StopRequest(), ranks, every=1000, minutes=60, total=1000)
    for step in range(1, 22):
        clock.now += seconds
        assert not saving.due(step)
    assert asking[:3] == asked
    os.kill(os.getpid(), signal.SIGTERM)
    due = []
    while not saving.stopping:
        step += 1
        clock.now += seconds
        due.append(saving.due(step))
    assert due[-1]
    assert len(due) <= 10
    assert len(due) * seconds <= max(progress.ASK_SECONDS, seconds)


def test_a_rank_without_its_torchrun_saves_and_stops(handlers):
    for launcher, gone in ((os.getppid(), False), (os.getpid(), True), (None, False)):
        ranks = distributed.Ranks(0, 1, 0, 1, torch.device("cpu"), launcher=launcher)
        saving = SavePoints(StopRequest(), ranks, every=10, minutes=60, total=100)
        assert (saving.due(1), saving.stopping) == (gone, gone)


def test_saving_is_due_every_so_many_steps_and_minutes_and_at_the_end(handlers):
    saving = SavePoints(StopRequest(), ALONE, every=4, minutes=60, total=10)
    assert [step for step in range(1, 11) if saving.due(step)] == [4, 8, 10]
    often = SavePoints(StopRequest(), ALONE, every=1000, minutes=0.02 / 60, total=1000)
    assert not often.due(1)
    time.sleep(0.03)
    assert often.due(2)
    assert not often.due(3)
