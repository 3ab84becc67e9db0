import json
import os
import signal
import time

import pytest
import torch

from amaes import distributed, run
from amaes.run import Clock, Metrics, Progress, StopRequest

CHOSEN = {"accumulate": 1, "world": 1}


def open_run(folder, options, record, **more):
    return run.open_run(folder, **({"task": "pretrain", "chosen": CHOSEN} | more), options=options, record=record)


ALONE = distributed.Ranks(0, 1, 0, 1, torch.device("cpu"))


def test_a_new_run_records_what_it_is(tmp_path):
    assert open_run(tmp_path / "run", {"lr": 0.1}, {"store": "abc"}) == CHOSEN
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["options"] == {"lr": 0.1}
    assert config["record"] == {"store": "abc"}
    assert {"torch", "numpy", "amaes", "python"} <= set(config["versions"])
    assert "command" in config["starts"][0]


def test_the_same_command_continues_and_is_recorded(tmp_path):
    open_run(tmp_path, {"lr": 0.1, "workers": 0, "pairs": [("order", 3)]}, {})
    open_run(tmp_path, {"lr": 0.1, "workers": 4, "pairs": [("order", 3)]}, {})
    assert len(json.loads((tmp_path / "config.json").read_text())["starts"]) == 2


def test_other_options_are_refused_with_both_values(tmp_path):
    open_run(tmp_path, {"batch_size": 4}, {"store": "abc"})
    with pytest.raises(ValueError, match=r"--batch-size 8: the run in .* has 4"):
        open_run(tmp_path, {"batch_size": 8}, {"store": "abc"})
    with pytest.raises(ValueError, match="store other: the run in .* has abc"):
        open_run(tmp_path, {"batch_size": 4}, {"store": "other"})


def test_what_was_chosen_holds_for_the_same_number_of_ranks(tmp_path):
    open_run(tmp_path, {}, {}, chosen={"accumulate": 4, "world": 2})
    assert open_run(tmp_path, {}, {}, chosen={"accumulate": 8, "world": 2}) == {"accumulate": 4, "world": 2}
    assert open_run(tmp_path, {}, {}, chosen={"accumulate": 8, "world": 1}) == {"accumulate": 8, "world": 1}


def test_resume_never_refuses_a_run_and_overwrite_clears_what_is_its_own(tmp_path):
    open_run(tmp_path, {"lr": 1}, {})
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-1.pt").write_text("x")
    elsewhere = tmp_path.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "step-1.pt").write_text("x")
    (tmp_path / "fold0").symlink_to(elsewhere)
    with pytest.raises(ValueError, match="holds a run already"):
        open_run(tmp_path, {"lr": 1}, {}, resume="never")
    open_run(tmp_path, {"lr": 2}, {}, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json"]
    assert (elsewhere / "step-1.pt").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_a_run_of_this_task_is_left_alone(tmp_path, overwrite):
    folder = tmp_path / "other"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "mine.bin").write_text("x")
    for text in ('{"model_type": "bert"}', "hello", "[]"):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match="its config.json is not of a run"):
            open_run(folder, {}, {}, overwrite=overwrite)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="not a run, and holds checkpoints"):
        open_run(folder, {}, {}, overwrite=overwrite)
    assert (folder / "checkpoints" / "mine.bin").exists()

    open_run(tmp_path / "run", {}, {})
    with pytest.raises(ValueError, match="holds a run of task 'pretrain', this is 'segment'"):
        open_run(tmp_path / "run", {}, {}, task="segment", overwrite=overwrite)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a file, expected a folder"):
        open_run(tmp_path / "file", {}, {}, overwrite=overwrite)


def test_a_killed_start_and_the_demo_data_are_not_in_the_way(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / ".config.json.77.tmp").write_text("{")
    assert open_run(tmp_path, {}, {}) == CHOSEN


def test_metrics_after_the_step_are_dropped_with_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 1}\n{"step": 20, "loss": 2}\n{"step": 3')
    metrics = Metrics(path, step=10)
    metrics.write(step=20, loss=0.123456789, note="x")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 10, "loss": 1},
        {"step": 20, "loss": 0.123457, "note": "x"},
    ]


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


def test_progress_writes_the_mean_loss_and_stops_on_nan(tmp_path):
    network = torch.nn.Linear(2, 1)
    network(torch.ones(1, 2)).sum().backward()
    progress = Progress(tmp_path, ALONE, step=0, total=4, every=2, batch_size=3)
    for step, loss in enumerate((1.0, 3.0), 1):
        progress.add(torch.tensor(loss))
        progress.report(step, 0.1, network)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line["step"], line["loss"], line["lr"]) == (2, 2.0, 0.1)
    assert line["grad_norm"] == pytest.approx(3**0.5, rel=1e-5)
    progress.add(torch.tensor(float("nan")))
    progress.report(3, 0.1, network)
    with pytest.raises(ValueError, match="step 3: sum of losses nan"):
        progress.check_before_saving(3, network)
    with pytest.raises(ValueError, match="step 4: the loss is nan"):
        progress.report(4, 0.1, network)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["loss"] is None


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    network = torch.nn.Linear(2, 1)
    progress = Progress(tmp_path, ALONE, step=0, total=4, every=2, batch_size=3)
    progress.check_before_saving(1, network)
    with torch.no_grad():
        network.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="step 1: .* norm of weights inf"):
        progress.check_before_saving(1, network)


def test_the_last_step_is_always_written(tmp_path):
    network = torch.nn.Linear(2, 1)
    network(torch.ones(1, 2)).sum().backward()
    progress = Progress(tmp_path, ALONE, step=0, total=3, every=10, batch_size=3)
    for step in (1, 2, 3):
        progress.add(torch.tensor(1.5))
        progress.report(step, 0.1, network)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [3]


def test_a_signal_is_a_request_and_a_second_one_an_interrupt():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = StopRequest()
        assert not stop.agreed(1, ALONE)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(1, ALONE)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
