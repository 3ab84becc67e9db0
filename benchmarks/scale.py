"""What the number of cases costs: time to the first batch, memory of a rank and of its workers, milliseconds per step.

    python benchmarks/scale.py [--cases 100 1000 10000 50000 --json FILE]

The stores are synthetic: each file holds a header and a hole, so that 50,000 volumes take no disk. Every store is
measured in a process of its own. A step reads patches, from files that are in memory already, and does nothing else.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from amaes import cli
from amaes.data.loader import loader
from amaes.data.order import Batches, Share
from amaes.data.patches import Patches
from amaes.data.splits import pretrain_split, saved_split
from amaes.data.store import Store
from amaes.files import write_json
from amaes.preprocess.config import STORE_FORMAT
from amaes.training.run_folder import commit, versions

SHAPE, PATCH, BATCH, STEPS = (160, 192, 160), (64, 64, 64), 8, 60
MAX_SECONDS, MAX_MB = 5.0, 200.0  # of the largest store: to the first batch, and in addition to what the imports take


def main() -> int:
    """Measure every store and print a table; the exit status."""
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=cli.positive_int, nargs="+", default=[100, 1000, 10000, 50000], metavar="N")
    parser.add_argument("--store", type=Path, help="measure this store in this process, and print JSON alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    args = parser.parse_args()
    if args.store:
        print(json.dumps(measure(args.store)))
        return cli.EXIT_OK
    rows = []
    print("  cases  index MB  first batch s  memory MB  worker MB  ms per step, 0 workers  2 workers")
    for count in sorted(args.cases):
        with tempfile.TemporaryDirectory() as folder:
            write_store(Path(folder), count)
            command = [sys.executable, __file__, "--store", folder]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        row = rows[-1]
        print(
            f"{row['cases']:7d} {row['index_mb']:9.2f} {row['first_batch_s']:14.2f} {row['memory_mb']:10.0f} "
            f"{row['worker_mb']:10.0f} {row['step_ms']['0']:23.1f} {row['step_ms']['2']:10.1f}"
        )
    last = rows[-1]
    within = last["first_batch_s"] <= MAX_SECONDS and last["memory_mb"] <= MAX_MB
    ratio = last["step_ms"]["0"] / rows[0]["step_ms"]["0"]
    print(
        f"{'within' if within else 'BEYOND'} the budget of {MAX_SECONDS:g} s and {MAX_MB:g} MB at {last['cases']} "
        f"cases; a step takes {ratio:.2f} times what it takes with {rows[0]['cases']}"
    )
    if args.json:
        write_json(args.json, {"versions": versions(), "commit": commit(), "rows": rows, "within_budget": within})
    return cli.EXIT_OK


def write_store(folder: Path, count: int) -> None:
    """`count` float16 volumes of zeros, two of each subject."""
    (folder / "cases").mkdir()
    header = io.BytesIO()
    description = {"descr": "<f2", "fortran_order": False, "shape": (1, *SHAPE)}
    np.lib.format.write_array_header_1_0(header, description)
    size = len(header.getvalue()) + 2 * int(np.prod(SHAPE))
    cases = []
    for i in range(count):
        names = {"subject": f"sub-{i // 2:06d}", "session": f"ses-{i % 2}", "sequence": "T1w"}
        id = "_".join(names.values())
        cases.append({"id": id, **names, "labelled": False, "shape": SHAPE})
        with (folder / "cases" / f"{id}.npy").open("wb") as file:
            file.write(header.getvalue())
            file.truncate(size)
    content = {"format": STORE_FORMAT, "config": {"normalization": "unit", "spacing": [1.0, 1.0, 1.0]}}
    content |= {"config_hash": "0" * 16, "channels": ["T1w"], "labels": {}, "cases": cases}
    write_json(folder / "dataset.json", content)


def measure(folder: Path) -> dict:
    """Start-up, memory and steps of one store."""
    before, began = megabytes("self", "VmRSS"), time.perf_counter()
    store = Store(folder)
    split = saved_split(store, "benchmark", lambda: pretrain_split(store))
    train = [store.index(id) for id in split["train"]]
    patches, batches = Patches(store, PATCH), Batches(train, Share(BATCH), seed=0, start=0, stop=STEPS)
    next(loader(patches, batches, 0, pin_memory=False))
    row = {
        "cases": len(store.cases),
        "index_mb": (folder / "dataset.json").stat().st_size / 1e6,
        "first_batch_s": time.perf_counter() - began,
        "memory_mb": megabytes("self", "VmHWM") - before,  # the peak
        "step_ms": {},
    }
    for _ in loader(patches, batches, 0, pin_memory=False):
        pass  # brings the files into memory
    for workers in (0, 2):
        arriving = loader(patches, batches, workers, pin_memory=False)
        next(arriving)
        began = time.perf_counter()
        for step, _ in enumerate(arriving, start=2):
            if step == STEPS // 2 and workers:
                processes = multiprocessing.active_children()
                row["worker_mb"] = max(private_megabytes(process.pid) for process in processes)
        row["step_ms"][str(workers)] = 1000 * (time.perf_counter() - began) / (STEPS - 1)
    return row


def megabytes(process: object, field: str) -> float:
    """A memory figure of a process, from Linux's /proc."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field))


def private_megabytes(process: int) -> float:
    """Memory that a process shares with no other: what a worker takes in addition to its parent's."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(float(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("Private_"))


if __name__ == "__main__":
    cli.run(main)
