"""A store of random volumes with three different sides, written without going through preprocessing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

SHAPES = [(40, 52, 36), (36, 44, 50), (20, 60, 34)]


def make_store(
    folder: Path, count: int = 6, channels: int = 1, labels: bool = False, subjects: int | None = None
) -> Path:
    """`count` cases of which every voxel has a different intensity."""
    (folder / "cases").mkdir(parents=True)
    cases = []
    for i in range(count):
        shape = SHAPES[i % len(SHAPES)]
        case = {
            "id": f"case{i:02d}",
            "subject": f"s{i % (subjects or count):02d}",
            "session": None,
            "sequence": None,
            "labelled": labels,
            "shape": shape,
        }
        cases.append(case)
        np.save(folder / "cases" / f"{case['id']}.npy", position_image(channels, shape))
        properties = dict(case)
        if labels:
            label = np.zeros(shape, np.uint8)
            label[5:9, 20:26, 10:14], label[12:14, 30:32, 20:22] = 1, 2
            np.save(folder / "cases" / f"{case['id']}_label.npy", label)
            flat = {str(v): np.flatnonzero(label == v).tolist() for v in (1, 2)}
            properties |= {"foreground": flat, "label_counts": {v: len(at) for v, at in flat.items()}}
        (folder / "cases" / f"{case['id']}.json").write_text(json.dumps(properties))
    content = {
        "format": "amaes-store-1",
        "config": {"normalization": "unit", "spacing": [1.0, 1.0, 1.0]},
        "config_hash": "0" * 16,
        "channels": [f"C{c}" for c in range(channels)],
        "labels": {"0": "background", "1": "one", "2": "two"} if labels else {},
        "cases": cases,
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def position_image(channels: int, shape: tuple[int, int, int]) -> np.ndarray:
    """(C, X, Y, Z) float32: a different number in every voxel, > 0."""
    index = np.arange(1, channels * np.prod(shape) + 1, dtype=np.float32)
    return (index / (index.size + 1)).reshape(channels, *shape)
