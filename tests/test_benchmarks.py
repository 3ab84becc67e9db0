"""The benchmarks: that of a GPU runs whole on tiny sizes; damaged files are made, and lost ones noticed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from amaes.models import ops

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def start(*options):
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def test_every_section_of_the_quick_run_ends_in_a_file_of_numbers(tmp_path):
    done = start("--quick", "--device", "cpu", "--seconds", 3000, "--json", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["quick"] is True
    assert result["versions"]["torch"] == str(torch.__version__)
    assert {"device", "cores", "commit"} <= set(result)
    needed = {
        "pretraining": {"arch", "batch", "layout", "mode", "ms", "gb", "patches_per_s", "augmentation_share", "tflops"},
        "loop": {"workers", "patches_per_s", "data_share", "augmentation_share"},
        "objectives": {"objective", "arch", "ms", "ms_with_augmentation", "gb", "patches_per_s", "tflops"},
        "mednext": {"arch", "form", "mode", "ms", "gb"},
        "upsampling": {"channels", "form", "ms", "gb"},
        "inference": {"arch", "shape", "seconds"},
    }
    assert set(result["sections"]) == set(needed)
    for name, fields in needed.items():
        rows = result["sections"][name]["rows"]
        assert rows
        for row in rows:
            assert fields <= set(row), (name, row)
            assert all(row[key] > 0 for key in fields & {"ms", "gb", "patches_per_s", "tflops", "seconds"}), (name, row)
    kept = {row["mode"]: row["gb"] for row in result["sections"]["pretraining"]["rows"]}
    assert kept["eager"] < 0.75 * kept["plain"]


def test_rows_after_the_time_is_used_up_and_rows_out_of_memory_are_recorded(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    def too_large(section, name):
        raise torch.OutOfMemoryError

    section = gpu.Section(100, None, torch.device("cpu"))
    section.row(too_large, name="a")
    section.row(lambda section, name: {"ms": 1.0}, name="b")
    section.until = 0
    section.row(lambda section, name: {"ms": 1.0}, name="c")
    results = [row.get("result", row.get("ms")) for row in section.rows]
    assert results == ["out of memory", 1.0, "not measured: time used up"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_what_it_needs(tmp_path):
    done = start("--json", tmp_path / "gpu.json")
    assert done.returncode == 2
    assert "needs one GPU, or --quick --device cpu" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "gpu.json").exists()


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
