"""What a store holds: cases, subjects, classes with their volumes, shapes and spacings, size, splits."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from amaes.data.store import SPLITS_FORMAT, Store
from amaes.files import read_json


def contents(store: Store) -> dict:
    """Plain data for JSON; volumes are of the label files, before cropping and resampling.

    Raises:
        FileNotFoundError, ValueError: the record of a case is missing or damaged; names the file.
    """
    volumes: dict[int, list[float]] = defaultdict(list)  # ml, of the cases that have the class
    spacings = []
    for case in store.cases:
        record = store.properties(case.id)
        try:
            spacing = [float(side) for side in record["ras_spacing"]]
            for value, count in record["label_counts"].items() if case.labelled else ():
                volumes[int(value)].append(int(count) * float(np.prod(spacing)) / 1000)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{store.path}: the record of {case.id} is damaged ({type(error).__name__}: {error})"
            ) from None
        spacings.append(spacing)
    classes = {value: name for value, name in store.labels.items() if value}
    if store.ignored is not None:
        classes[store.ignored] = "left out"
    return {
        "store": str(store.path),
        "id": store.fingerprint,
        "cases": len(store.cases),
        "subjects": len({case.subject for case in store.cases}),
        "labelled": sum(case.labelled for case in store.cases),
        "bytes": sum(path.stat().st_size for path in (store.path / "cases").rglob("*") if path.is_file()),
        "channels": store.channels,
        "sequences": dict(sorted(Counter(case.sequence for case in store.cases if case.sequence).items())),
        "spacing": list(store.config["spacing"]),
        "shape": _range([case.shape for case in store.cases]),
        "spacing_of_scans": _range(spacings),
        "classes": [
            {"value": value, "name": name, "cases": len(volumes[value]), "ml": _range(volumes[value])}
            for value, name in classes.items()
        ],
        "regions": {name: list(values) for name, values in store.regions.items()},
        "splits": _splits(store),
    }


def _range(rows: Sequence) -> dict | None:
    """Smallest, median and largest value of every column; None without rows."""
    if not len(rows):
        return None
    rows = np.asarray(rows)
    return {"min": rows.min(0).tolist(), "median": np.median(rows, 0).tolist(), "max": rows.max(0).tolist()}


def _splits(store: Store) -> list[dict]:
    """The splits that are saved beside the store: name, whether of its present cases, number of folds, sizes."""
    path = store.path / "splits.json"
    if not path.is_file():
        return []
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != SPLITS_FORMAT:
        raise ValueError(f"{path}: not a file of splits ({SPLITS_FORMAT})")
    rows = []
    for full_name, split in content["splits"].items():
        name, _, of = full_name.rpartition(", store ")
        folds = split if isinstance(split, list) else [split]
        sizes = {side: len(ids) for side, ids in folds[0].items()} if folds else {}
        rows.append({"name": name, "current": of == store.fingerprint, "folds": len(folds), "cases": sizes})
    return rows


def as_text(found: dict) -> str:
    """`contents` on one screen."""
    lines = [
        f"{found['store']}: {found['cases']} cases of {found['subjects']} subjects, {found['labelled']} labelled, "
        f"{found['bytes'] / 1e9:.2f} GB; id {found['id']}",
        f"channels: {' '.join(found['channels'])}",
    ]
    if found["sequences"]:
        lines.append("sequences: " + ", ".join(f"{name} {count}" for name, count in found["sequences"].items()))
    if found["cases"]:
        lines.append(f"voxels of {_times(found['spacing'])} mm: {_text(found['shape'])}")
        lines.append(f"scans had voxels of (mm): {_text(found['spacing_of_scans'])}")
    for row in found["classes"]:
        ml = "" if row["ml"] is None else "; ml: {min:.3g} to {max:.3g}, median {median:.3g}".format(**row["ml"])
        lines.append(f"label {row['value']} {row['name']}: in {row['cases']} cases{ml}")
    lines += [f"region {name}: labels {' '.join(map(str, of))}" for name, of in found["regions"].items()]
    for split in found["splits"]:
        sizes = ", ".join(f"{count} {side}" for side, count in split["cases"].items())
        old = "" if split["current"] else "; of earlier cases, not used any more"
        lines.append(f"split {split['name']!r}: {split['folds']} x ({sizes}){old}")
    return "\n".join(lines) + "\n"


def _times(sides: Sequence[float]) -> str:
    return " x ".join(f"{side:.4g}" for side in sides)


def _text(ranges: dict) -> str:
    return f"{_times(ranges['min'])} to {_times(ranges['max'])}, median {_times(ranges['median'])}"
