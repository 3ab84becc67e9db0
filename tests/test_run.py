import json
import os
import signal
import time

import pytest
import torch

from amaes import distributed
from amaes.run import Clock, Metrics, Progress, StopRequest, open_run

ALONE = distributed.Ranks(0, 1, 0, 1, torch.device("cpu"))


def test_a_new_run_records_what_it_is(tmp_path):
    assert open_run(tmp_path / "run", {"lr": 0.1}, {"store": "abc"}) is False
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["options"] == {"lr": 0.1}
    assert config["record"] == {"store": "abc"}
    assert {"torch", "numpy", "amaes", "python"} <= set(config["versions"])
    assert "command" in config["starts"][0]


def test_the_same_command_continues_and_is_recorded(tmp_path):
    open_run(tmp_path, {"lr": 0.1, "workers": 0}, {})
    assert open_run(tmp_path, {"lr": 0.1, "workers": 4}, {}) is True
    assert len(json.loads((tmp_path / "config.json").read_text())["starts"]) == 2


def test_other_options_are_refused_with_both_values(tmp_path):
    open_run(tmp_path, {"batch_size": 4}, {"store": "abc"})
    with pytest.raises(ValueError, match=r"--batch-size 8: the run in .* has 4"):
        open_run(tmp_path, {"batch_size": 8}, {"store": "abc"})
    with pytest.raises(ValueError, match="abc"):
        open_run(tmp_path, {"batch_size": 4}, {"store": "other"})


def test_resume_never_refuses_a_run_and_overwrite_clears_it(tmp_path):
    open_run(tmp_path, {"lr": 1}, {})
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-1.pt").write_text("x")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds a run already"):
        open_run(tmp_path, {"lr": 1}, {}, resume="never")
    with pytest.raises(ValueError, match="not empty and not a run"):
        open_run(tmp_path, {"lr": 2}, {}, overwrite=True)  # the user's file is in the way, and is not deleted
    (tmp_path / "notes.txt").unlink()
    assert open_run(tmp_path, {"lr": 2}, {}, overwrite=True) is False
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json"]


def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path):
    (tmp_path / "data.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="not empty and not a run"):
            open_run(tmp_path, {}, {}, overwrite=overwrite)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a file, expected a folder"):
        open_run(tmp_path / "file", {}, {})


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
    with pytest.raises(FloatingPointError, match="step 4: the loss is nan"):
        progress.report(4, 0.1, network)


def test_a_signal_is_a_request_and_a_second_one_an_interrupt():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = StopRequest()
        assert not stop.agreed(1, 10, ALONE)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(1, 10, ALONE)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
