import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from amaes import hardware
from amaes.distributed import Ranks
from amaes.files import hold
from amaes.training.run_folder import LOCK, MetricsFile, RunFolder


def run_in(folder, options, kind="pretrain", world=1):
    ranks = Ranks(0, world, 0, world, torch.device("cpu"))
    return RunFolder(folder, kind, ranks, kind, {}, None, (16, 16, 16), options, keep=2)


def open_run(folder, options, record, kind="pretrain", accumulate=1, world=1, resume="auto", overwrite=False):
    run = run_in(folder, options, kind, world)
    run.open(record, accumulate, resume=resume, overwrite=overwrite, log=lambda line: None)


def test_a_new_run_records_what_it_is(tmp_path):
    open_run(tmp_path / "run", {"lr": 0.1}, {"store": "abc"})
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["options"] == {"lr": 0.1}
    assert config["record"] == {"store": "abc"}
    assert config["machine_choice"] == {"accumulate": 1, "world": 1}
    assert {"torch", "numpy", "amaes", "python"} <= set(config["versions"])
    assert "command" in config["starts"][0]


def test_the_same_command_continues_and_is_recorded(tmp_path):
    open_run(tmp_path, {"lr": 0.1, "workers": 0, "pairs": [("order", 3)]}, {})
    open_run(tmp_path, {"lr": 0.1, "workers": 4, "pairs": [("order", 3)]}, {})
    assert len(json.loads((tmp_path / "config.json").read_text())["starts"]) == 2


def test_other_options_are_refused_with_both_values(tmp_path):
    open_run(tmp_path, {"batch_size": 4}, {"store": "abc"})
    with pytest.raises(ValueError, match=r"`batch_size` 8: the run in .* has 4"):
        open_run(tmp_path, {"batch_size": 8}, {"store": "abc"})
    with pytest.raises(ValueError, match="store other: the run in .* has abc"):
        open_run(tmp_path, {"batch_size": 4}, {"store": "other"})


@pytest.mark.parametrize("name", ["machine_choice", "chosen"])  # now, and in earlier versions
def test_micro_steps_stay_as_chosen_for_the_same_number_of_ranks(tmp_path, monkeypatch, name):
    monkeypatch.setattr(hardware, "fit_micro_batch", lambda *about: 8)  # what memory asks for now

    def settled(accumulate="auto", world=2, restarts=0, **more):
        run = run_in(tmp_path, {}, world=world)
        run = replace(run, ranks=replace(run.ranks, restarts=restarts))
        return run.settle_micro_steps(accumulate, None, 16, bf16=False, **more)

    assert settled() == 8
    open_run(tmp_path, {}, {}, accumulate=4, world=2)
    config = json.loads((tmp_path / "config.json").read_text())
    config[name] = config.pop("machine_choice")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert settled() == 4
    assert settled(accumulate=2) == 2
    assert settled(world=1) == 8
    assert settled(begin_anew=True) == 8
    assert settled(begin_anew=True, restarts=1) == 4  # torchrun started the ranks of a run that began anew again
    assert settled(views=2) == 1  # its loss compares the patches of a micro-step
    open_run(tmp_path, {}, {}, accumulate=8, world=1)
    assert settled(world=1) == 8


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
    assert sorted(p.name for p in tmp_path.iterdir()) == [LOCK, "config.json"]
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
        open_run(tmp_path / "run", {}, {}, kind="segment", overwrite=overwrite)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a file, expected a folder"):
        open_run(tmp_path / "file", {}, {}, overwrite=overwrite)


def test_a_killed_start_and_the_demo_data_are_not_in_the_way(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / ".config.json.77.tmp").write_text("{")
    open_run(tmp_path, {}, {})
    assert (tmp_path / "config.json").is_file()


def test_metrics_after_the_step_are_dropped_with_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 1}\n{"step": 20, "loss": 2}\n{"step": 3')
    metrics = MetricsFile(path, step=10)
    metrics.write(step=20, loss=0.123456789, note="x")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 10, "loss": 1},
        {"step": 20, "loss": 0.123457, "note": "x"},
    ]


def test_foreign_lines_of_the_metrics_are_dropped_and_skipped_steps_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ["null", "7", "[]", "{}", '{"step": "2"}', '{"step": null}', '{"step": true}', '{"step": 2.5}', "x"]
    lines += ["[" * 100_000, '{"step": 1, "x": "\udcff"']  # nested without end, and not UTF-8
    text = "\n".join([*lines, '{"step": 4, "skipped_steps": 3}', '{"step": 8, "skipped_steps": 5}', ""])
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert MetricsFile(path, step=4).skipped == 3
    assert path.read_text() == '{"step": 4, "skipped_steps": 3}\n'


def test_a_line_of_the_metrics_is_written_whole_or_the_file_is_named(tmp_path, monkeypatch):
    import resource

    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, step=0)
    metrics.write(step=1)
    before, limits = path.read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))  # as a disk with five bytes left
    try:
        with pytest.raises(OSError, match="metrics.jsonl: could not be written"):
            metrics.write(step=2, loss=0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == before


HELD_BY = """
import sys, pathlib
from amaes.files import hold
held = [hold(pathlib.Path(folder), "", name=sys.argv[1]) for folder in sys.argv[2:]]
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def elsewhere():
    """Function: another process holds the training locks of these folders."""
    processes = []

    def hold(*folders):
        command = [sys.executable, "-c", HELD_BY, LOCK, *map(str, folders)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


def test_a_second_training_process_is_told_who_trains_in_the_folder(tmp_path, elsewhere):
    open_run(tmp_path / "run", {}, {})  # of this process: ends with it, or with the object
    run, folds = run_in(tmp_path / "run", {}), run_in(tmp_path / "folds", {}, "segment")
    options = {"resume": "auto", "overwrite": False, "log": lambda line: None}
    folds.open({}, 1, part="fold1", **options)
    other = elsewhere(tmp_path / "run", tmp_path / "folds" / "fold0")
    with pytest.raises(ValueError, match=rf"another process trains here.*\(process {other.pid} on .* since 20"):
        open_run(tmp_path / "run", {}, {})
    with pytest.raises(ValueError, match=r"fold0: another process trains here"):
        folds.open({}, 1, part="fold0", **options)
    folds.open({}, 1, part="fold1", **options)
    other.kill()
    other.wait()
    run.open({}, 1, **options)  # a holder that died is in nobody's way


def test_who_held_a_folder_before_is_not_named(tmp_path):
    hold(tmp_path, "busy", name=LOCK).close()
    shared = hold(tmp_path, "busy", name=LOCK, shared=True)
    code = (
        "import sys, pathlib; from amaes.files import hold; hold(pathlib.Path(sys.argv[1]), 'busy', name=sys.argv[2])"
    )
    second = subprocess.run([sys.executable, "-c", code, tmp_path, LOCK], capture_output=True, text=True, check=False)
    assert second.stderr.endswith(f"ValueError: {tmp_path}: busy\n")
    shared.close()


OTHER_TYPES = [None, 7, [], "x", True]


@pytest.mark.parametrize("name", ["task", "options", "record", "machine_choice", "starts"])
def test_a_field_of_config_json_that_is_missing_or_of_another_type_is_named(tmp_path, name):
    open_run(tmp_path, {}, {})
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    damaged = [{key: value for key, value in whole.items() if key != name}]
    damaged += [whole | {name: value} for value in OTHER_TYPES if type(value) is not type(whole[name])]
    for content in damaged:
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"config.json is damaged: '{name}' is"):
            open_run(tmp_path, {}, {})
