"""The benchmarks: that of a GPU runs whole on tiny sizes; damaged files are made, and lost ones noticed."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from amaes.models import ops

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SIZES = {"channels": 4, "side": 3, "batch": 1}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The script, with its function `start(*options)`: tiny sizes on the CPU, the exit status, and its file."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    def start(*options):
        command = ["gpu.py", "--quick", "--device", "cpu", "--json", str(tmp_path / "gpu.json"), *options]
        monkeypatch.setattr(sys, "argv", command)
        status = gpu.main()
        return status, json.loads((tmp_path / "gpu.json").read_text())

    monkeypatch.setattr(gpu, "start", start, raising=False)
    return gpu


def test_every_operation_is_measured_or_named_with_a_reason(gpu):
    import gpu_operations

    names = set(gpu.OPERATIONS)
    assert names.isdisjoint(gpu_operations.NOT_MEASURED)
    assert names | set(gpu_operations.NOT_MEASURED) == set(ops.__all__)
    assert {name for name, _ in gpu.SIZES} == names
    kernels = Path(ops.__file__).parent / "kernels"
    registered = {name for file in kernels.glob("*.py") for name in re.findall(r'"amaes::(\w+)"', file.read_text())}
    assert "norm_act_gradients" in registered
    assert [name for name in registered if not any(f"{name}_".startswith(f"{own}_") for own in names)] == []


def test_every_section_of_the_quick_run_ends_in_a_file_of_numbers_and_budgets(gpu, capsys):
    status, result = gpu.start()
    said = capsys.readouterr().out
    assert status == 0
    assert result["quick"] is True
    assert result["versions"]["torch"] == str(torch.__version__)
    assert {"device", "cores", "commit"} <= set(result)
    assert result["limits"].keys() == {"copy_tb_per_s", "matrix_tflops"}
    step = {"arch", "batch", "form", "mode", "way", "ms", "gb_per_patch", "patches_per_s"}
    needed = {
        "operations": {"operation", "form", "sizes", "forward_ms", "forward_of_floor", "backward_ms"},
        "store": {"arch", "batch", "workers", "ms", "patches_per_s", "share"},
        "steps": step,
        "inference": {"arch", "form", "shape", "seconds", "gb"},
        "objectives": step | {"objective", "ms_without_augmentation", "tflops"},
    }
    assert set(result["sections"]) == set(needed) == set(gpu.SECTIONS)
    numbers = {
        "ms",
        "gb_per_patch",
        "patches_per_s",
        "tflops",
        "seconds",
        "forward_ms",
        "forward_of_floor",
        "backward_ms",
    }
    for name, fields in needed.items():
        assert name in said
        rows = result["sections"][name]["rows"]
        assert rows
        for row in rows:
            assert fields <= set(row), (name, row)
            assert all(row[key] > 0 for key in fields & numbers), (name, row)
    operations = {(row["operation"], row["form"]) for row in result["sections"]["operations"]["rows"]}
    assert operations == {(name, form) for name in gpu.OPERATIONS for form in ("ours", "plain")}
    kept = {(row["arch"], row["form"]): row["gb_per_patch"] for row in result["sections"]["steps"]["rows"]}
    assert kept["unet_tiny", "ours"] < 0.85 * kept["unet_tiny", "plain"]
    assert kept["mednext_s", "ours"] < 0.4 * kept["mednext_s", "plain"]
    of_networks = [line for line in result["budgets"] if "depthwise" not in line["budget"]]
    assert {line["verdict"] for line in of_networks} == {"not run"}
    assert said.count("not run ") == len(of_networks)


def test_every_budget_is_read_from_the_rows_and_met_or_not(gpu):
    step = {"form": "ours", "gb_per_patch": 2.0}
    v2, b = {"arch": "mednext_v2_base"}, {"arch": "mednext_b"}
    depthwise = {"operation": "depthwise", "form": "ours", "kernel": 3, "resample": "same", "weight_of_floor": 2.1}
    sections = {
        "store": [
            {"arch": a, "patches_per_s": 79 if a == "unet_b" else 80.5, "share": 0.04} for a in ("unet_xl", "unet_b")
        ],
        "steps": [
            {"arch": "unet_xl", **step},
            {**v2, "form": "ours", "patches_per_s": 9.0},
            {**v2, "form": "plain", "mode": "eager", "patches_per_s": 2.0},
            {**b, "form": "ours", "error": "out of memory"},
        ],
        "operations": [depthwise | {"forward_of_floor": 1.1}, depthwise | {"forward_of_floor": 1.4}],
    }
    found = {line["budget"]: line for line in gpu.judge({name: {"rows": rows} for name, rows in sections.items()})}
    verdicts = {
        "U-Net XL, read and augmented, patches/s": (80.5, "met"),
        "U-Net B, read and augmented, patches/s": (79, "not met"),
        "U-Net XL, reading and augmentation, part of the step": (0.04, "met"),
        "U-Net XL, peak GB per patch": (2.0, "met"),
        "MedNeXt-B, time / plain compiled": (None, "not run"),
        "MedNeXt-v2 base, time / plain": (2 / 9, "not met"),
        "depthwise forward, passes over a tensor": (2.8, "met"),
        "depthwise weight gradient, passes over a tensor": (4.2, "not met"),
    }
    assert {name: (line["value"], line["verdict"]) for name, line in found.items()} == verdicts
    assert {line["verdict"] for line in gpu.judge({})} == {"not run"}


def broken(error):
    def build(device, **sizes):
        raise error

    return build


def test_a_row_that_fails_holds_its_error_and_the_others_go_on(gpu, monkeypatch, capsys):
    builds = {"large": broken(torch.OutOfMemoryError()), "faulty": broken(RuntimeError("a fault\nand more"))}
    monkeypatch.setattr("gpu.OPERATIONS", builds | {"norm_act": gpu.OPERATIONS["norm_act"]})
    monkeypatch.setattr("gpu.SIZES", [(name, SIZES) for name in ("large", "faulty", "norm_act")])
    status, result = gpu.start("--only", "operations")
    said = capsys.readouterr()
    assert status == 1
    rows = result["sections"]["operations"]["rows"]
    faults = ["out of memory", "RuntimeError: a fault", None]
    assert [row.get("error") for row in rows] == [fault for fault in faults for _ in ("ours", "plain")]
    assert "6 rows, 4 failed" in said.out
    assert "and more" in said.err  # the whole of it

    measured = []
    monkeypatch.setattr("gpu.measure", lambda *arguments: measured.append(arguments))
    status, again = gpu.start("--only", "operations", "--resume")
    assert (measured, again["sections"]) == ([], result["sections"])
    with pytest.raises(ValueError, match="was measured with another repeats; take another --json"):
        gpu.start("--resume", "--repeats", "3")


def test_rows_after_the_time_is_used_up_are_not_measured(gpu, monkeypatch):
    monkeypatch.setattr("gpu.SIZES", [("norm_act", SIZES)])
    monkeypatch.setattr(gpu.time, "monotonic", iter(range(0, 10**6, 100)).__next__)
    status, result = gpu.start("--only", "operations", "--seconds", "50")
    assert status == 0
    assert [row["result"] for row in result["sections"]["operations"]["rows"]] == 2 * ["not measured: time used up"]


@pytest.fixture
def cuda(monkeypatch):
    """Stands for a GPU where nothing is computed: what was called of `torch.cuda`."""
    called = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            called.append("record")

        def elapsed_time(self, last):
            return 6.0

    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device, name=name: called.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3e9)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return called


def test_on_a_gpu_events_take_the_time_and_the_peak_is_the_memory(gpu, cuda, monkeypatch):
    device = SimpleNamespace(type="cuda")
    clock = gpu.Clock(torch.device("cpu"), repeats=3)
    clock.device = device
    assert clock.milliseconds(lambda: cuda.append("call")) == 2.0
    assert cuda == 2 * ["call"] + ["synchronize", "record"] + 3 * ["call"] + ["record", "synchronize"]
    cuda.clear()
    run = SimpleNamespace(
        args=SimpleNamespace(quick=False, repeats=4), device=device, result={"sections": {}}, write=lambda: None
    )
    section = gpu.Section("steps", run, 1e12)
    assert section.memory(lambda: cuda.append("step")) == 3.0
    assert section.seconds(lambda: cuda.append("step")) > 0
    assert cuda.count("step") == 1 + 2 + 4
    assert cuda[-1] == "synchronize"


def test_where_a_fault_takes_the_gpu_away_a_new_process_goes_on(gpu, cuda, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", "--device", "cpu", "--only", "steps"])
    run = gpu.Run(gpu.parse_options())
    monkeypatch.setattr(run, "write", lambda: None)
    started = []
    monkeypatch.setattr(gpu.os, "execv", lambda *command: started.append(command))
    section = gpu.Section("steps", run, 1e12)
    section.device = SimpleNamespace(type="cuda")
    section.row(lambda section, arch: {}["ms"], arch="a")
    assert started == []  # an error, and the GPU is still there

    def lost(device):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    section.row(lambda section, arch: {"ms": 1.0}, arch="b")
    assert [row["error"].split(":")[0] for row in section.rows] == ["KeyError", "AcceleratorError"]
    assert started == [(sys.executable, [sys.executable, *sys.argv, "--resume"])]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_what_it_needs(gpu, tmp_path):
    with pytest.raises(ValueError, match="needs one GPU, or --quick --device cpu"):
        gpu.start("--device", "cuda")
    assert not (tmp_path / "gpu.json").exists()


def test_of_swin_the_network_has_two_views_of_a_patch(gpu, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", "--device", "cpu"])
    section = SimpleNamespace(args=gpu.parse_options(), device=torch.device("cpu"), autocast=None)
    training = gpu.Training(section, "swin_tiny", 1, objective="swin")
    inputs, _ = training.objective.prepare(next(training.batches), section.device)
    assert inputs.shape == (2, 1, *section.args.patch_size)
    assert training.flop() > 1e9


def test_views_of_weights_are_not_counted_as_kept_memory(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from models import kept_bytes

    from amaes.models.mednext import Block

    layer = torch.nn.Conv3d(4, 64, 1)
    x = torch.rand(1, 4, 2, 3, 4, requires_grad=True)
    assert kept_bytes(lambda: ops.pointwise(x, layer.weight, layer.bias)) == x.numel() * 4
    block = Block(64, 64, 4)  # 130 kB of weights, kept as views
    assert kept_bytes(lambda: block(x.expand(1, 4, 2, 3, 4).repeat(1, 16, 1, 1, 1))) < 4 * 4 * 64 * 24 + 4096


def test_damaged_files_are_answered_one_by_one(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fuzz

    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--count", "25", "--seed", "5", "--keep", str(tmp_path / "kept")])
    assert fuzz.main() == 0
    said = capsys.readouterr()
    assert said.err == ""
    (line,) = said.out.splitlines()
    counts = {name: int(count) for count, name in re.findall(r"(\d+) (\w[\w ]*)", line)}
    assert line.startswith("25 files, seed 5: ")
    assert counts["ok"] > 0 < counts["rejected"]
    assert counts["ok"] + counts["rejected"] == 25
    report = tmp_path / "kept" / "000000" / "store" / "report.jsonl"
    lines = report.read_text().splitlines(keepends=True)

    def preprocess(command, **options):  # as if a run had lost an input and named another one twice
        report.write_text("".join([*lines[1:], lines[1]]))
        return subprocess.CompletedProcess(command, 1, b"", b"Traceback (most recent call last):")

    monkeypatch.setattr(fuzz.subprocess, "run", preprocess)
    _, _, faults = fuzz.preprocess(report.parent.parent, [], 20)
    assert [text.split(": ")[0] for text in faults] == ["tracebacks", "counted wrongly"]
