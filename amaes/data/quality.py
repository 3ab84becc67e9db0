"""Quality control of a store: statistics of every case, those unlike the others, and contact sheets to look at.

    python -m amaes.preprocess --qc STORE [--out FOLDER]

FOLDER/qc.json              statistics of every channel of every case; those worth a look, with the reasons
FOLDER/qc.csv               the statistics as a table
FOLDER/sheet-SOURCE-N.png   three middle slices per case, those worth a look first (needs matplotlib)
"""

from __future__ import annotations

import csv
import io
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from amaes.data.store import Case, Store
from amaes.files import write_json, write_text, written_whole

FORMAT = "amaes-qc-1"
SAMPLES = 100_000  # voxels of a channel that the statistics are made of, about
FAINT = 1e-3  # of the range: what interpolation leaves in an empty background is below it
MIN_GROUP = 6  # rows of one source and sequence, from which they are compared
LIMIT = 5.0  # robust z-score from which a value is unlike the others
OTHERS = 128  # cases of a source that are drawn besides those worth a look
PER_PAGE, COLUMNS, TILE = 64, 4, 96  # cases per sheet and per row; pixels per slice


@dataclass(frozen=True)
class Measure:
    """A statistic that is compared: what it is, its unit, and the spread below which differences do not matter."""

    text: str
    unit: str
    least: float


MEASURES = {
    "fov_x_mm": Measure("extent from left to right", "mm", 4.0),
    "fov_y_mm": Measure("extent from back to front", "mm", 4.0),
    "fov_z_mm": Measure("extent from foot to head", "mm", 4.0),
    "spacing_x_mm": Measure("voxel size of the file from left to right", "mm", 0.1),
    "spacing_y_mm": Measure("voxel size of the file from back to front", "mm", 0.1),
    "spacing_z_mm": Measure("voxel size of the file from foot to head", "mm", 0.1),
    "foreground_fraction": Measure("share of the volume that is foreground", "", 0.02),
    "background_nonzero": Measure("share of the corners that is not empty", "", 0.05),
    "mean": Measure("mean of the foreground", "", 0.02),
    "sd": Measure("standard deviation of the foreground", "", 0.01),
    "p50": Measure("median of the foreground", "", 0.02),
    "p95": Measure("95th percentile of the foreground", "", 0.02),
}


# Statistics -----------------------------------------------------------------------------------------------------------


def measure(store: Store, case: Case) -> list[dict]:
    """One row of plain data per channel of a case, from every k-th voxel along each axis, about 100,000 in all.

    Foreground is what exceeds the smallest value by a thousandth of the range. `background_nonzero` is the share of
    foreground in the eight corners (an eighth of each side): near 0 where the background was set to zero, as skull
    stripping does, so that `stripped_guess` is a guess. `crop_touches` counts the sides, of six, on which the crop ends
    where the file does: what it shows may go on outside.

    Raises:
        FileNotFoundError, ValueError: the case cannot be read.
    """
    properties, image = store.properties(case.id), store.image(case.id)
    step = max(1, round((math.prod(case.shape) / SAMPLES) ** (1 / 3)))
    sampled = image[(slice(None), *[slice(min(step // 2, side - 1), None, step) for side in case.shape])]
    spacing = properties.get("ras_spacing") or [None] * 3
    place = {
        "id": case.id,
        "subject": case.subject,
        "source": source_of(case),
        **{f"fov_{a}_mm": side * mm for a, side, mm in zip("xyz", case.shape, store.config["spacing"], strict=True)},
        **{f"spacing_{a}_mm": mm for a, mm in zip("xyz", spacing, strict=True)},
        "crop_touches": _touches(properties.get("crop_box"), properties.get("ras_shape")),
    }
    return [
        {**place, "channel": channel, "sequence": case.sequence or channel, **_statistics(volume.astype(np.float32))}
        for channel, volume in zip(store.channels, sampled, strict=True)
    ]


def source_of(case: Case) -> str:
    """The data set of a case: the first part of its id, where that is not the subject; else "all"."""
    first, separator, _ = case.id.partition("/")
    return first if separator and first != case.subject else "all"


def _touches(box: Sequence | None, shape: Sequence | None) -> int | None:
    if not box or not shape:
        return None
    return sum((start == 0) + (stop == side) for (start, stop), side in zip(box, shape, strict=True))


def _statistics(volume: np.ndarray) -> dict:
    """Of the sampled voxels, (X, Y, Z)."""
    finite = np.isfinite(volume)
    values = volume[finite]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    inside = finite & (volume > low + FAINT * (high - low))
    foreground = volume[inside].astype(np.float64)
    ends = [np.r_[0 : max(1, side // 8), side - max(1, side // 8) : side] for side in volume.shape]
    corners = float(inside[np.ix_(*ends)].mean())
    named = dict.fromkeys(("mean", "sd", "p50", "p95"))
    if foreground.size:
        p50, p95 = np.percentile(foreground, (50, 95)).tolist()
        named = {"mean": float(foreground.mean()), "sd": float(foreground.std()), "p50": p50, "p95": p95}
    rounded = {name: None if value is None else float(f"{value:.6g}") for name, value in named.items()}
    return {
        "min": low,
        "max": high,
        "foreground_fraction": round(float(inside.mean()), 6),
        **rounded,
        "zero_fraction": round(float((volume == 0).mean()), 6),
        "background_nonzero": round(corners, 6),
        "stripped_guess": corners < 0.01,
        "nonfinite": int((~finite).sum()),
    }


# Outliers -------------------------------------------------------------------------------------------------------------


def outliers(rows: Sequence[dict], unit_range: bool = True) -> list[dict]:
    """Rows unlike the others of their source and sequence, the most unlike first.

    A value v is unlike where |v - median| / (1.4826 MAD) is at least 5, MAD = median of |v - median|. The divisor is
    never less than the measure's `least`, so that among equal values small differences stay unnoticed.

    Args:
        rows: of `measure`.
        unit_range: intensities must be in [0, 1].

    Returns:
        {"id", "channel", "source", "sequence", "score", "reasons"}: the largest |z|, infinite (None) where a value is
        wrong in itself, and a list of sentences.
    """
    reasons: dict[int, list[tuple[float, str]]] = defaultdict(list)
    groups = defaultdict(list)
    for k, row in enumerate(rows):
        groups[row["source"], row["sequence"]].append(k)
        reasons[k] += [(math.inf, text) for text in _wrong(row, unit_range)]
    for members in groups.values():
        if len(members) < MIN_GROUP:
            continue
        for name, kind in MEASURES.items():
            known = [k for k in members if rows[k][name] is not None]
            values = np.array([rows[k][name] for k in known], np.float64)
            middle = float(np.median(values)) if len(values) else 0.0
            spread = max(1.4826 * float(np.median(np.abs(values - middle))), kind.least) if len(values) else 1.0
            for k, value in zip(known, values.tolist(), strict=True):
                z = (value - middle) / spread
                if abs(z) >= LIMIT:
                    unit = f" {kind.unit}" if kind.unit else ""
                    text = f"{kind.text} {value:.3g}{unit}, median {middle:.3g}{unit} (z {z:+.1f})"
                    reasons[k].append((abs(z), text))
    found = []
    for k, told in sorted(reasons.items(), key=lambda pair: -max((score for score, _ in pair[1]), default=0)):
        if told:
            told.sort(key=lambda pair: -pair[0])
            place = {name: rows[k][name] for name in ("id", "channel", "source", "sequence")}
            score = round(told[0][0], 2) if math.isfinite(told[0][0]) else None
            found.append({**place, "score": score, "reasons": [text for _, text in told]})
    return found


def _wrong(row: dict, unit_range: bool) -> Iterable[str]:
    if row["nonfinite"]:
        yield "values that are not finite"
    if row["mean"] is None:
        yield "no foreground: all sampled values are equal"
    elif row["sd"] < 1e-3 * (row["max"] - row["min"]):
        yield "a foreground of one value, as in a mask"
    if unit_range and not (row["min"] >= 0 and row["max"] <= 1):
        yield f"values from {row['min']:.3g} to {row['max']:.3g}, expected 0 to 1"


# Report ---------------------------------------------------------------------------------------------------------------


def report(store: str | Path, out: str | Path | None = None, progress: bool = False) -> str:
    """Measure all cases of a store, write qc.json, qc.csv and contact sheets; a summary of one screen.

    Args:
        store: folder written by preprocessing.
        out: folder to write into; by default "qc" in the store.
        progress: bars on stderr.

    Raises:
        FileNotFoundError, ValueError: no store there, or one without cases.
    """
    store = Store(store)
    if not store.cases:
        raise ValueError(f"{store.path}: the store has no cases")
    out = store.path / "qc" if out is None else Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: a file, expected a folder")
    rows, unread = [], []
    for case in _bar(store.cases, "statistics", progress):
        try:
            rows += measure(store, case)
        except (OSError, ValueError) as error:
            told = {"channel": None, "source": source_of(case), "sequence": case.sequence, "score": None}
            unread.append({"id": case.id, **told, "reasons": [f"cannot be read: {error}"]})
    found = unread + outliers(rows, store.config["normalization"] == "unit")
    content = {"format": FORMAT, "store": str(store.path.absolute()), "fingerprint": store.fingerprint}
    write_json(out / "qc.json", {**content, "outliers": found, "cases": rows})
    _write_csv(out / "qc.csv", rows)
    try:
        pages = draw(store, rows, found, out, progress)
        drawn = f"{pages} contact sheets"
    except ImportError:
        drawn = "no contact sheets, they need matplotlib: pip install 'amaes[plots]'"
    lines = [f"{store.path}: {len(store.cases)} cases, {len({entry['id'] for entry in found})} worth a look"]
    lines += [_line(entry) for entry in found[:20]]
    lines += [f"  ... and {len(found) - 20} more in {out / 'qc.json'}"] if len(found) > 20 else []
    groups = defaultdict(int)
    for row in rows:
        groups[row["source"], row["sequence"]] += 1
    if few := [count for count in groups.values() if count < MIN_GROUP]:
        text = f"fewer than {MIN_GROUP} of one source and sequence"
        lines.append(f"  note: {sum(few)} images were not compared with others, {text}")
    return "\n".join([*lines, f"qc.json and qc.csv in {out}; {drawn}"]) + "\n"


def _line(entry: dict) -> str:
    channel = "" if entry["channel"] in (None, "image") else f" [{entry['channel']}]"
    more = f" (+{len(entry['reasons']) - 1} more)" if len(entry["reasons"]) > 1 else ""
    return f"  {entry['id']}{channel}: {entry['reasons'][0]}{more}"


def _write_csv(path: Path, rows: Sequence[dict]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["id"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _bar(items: Sequence, what: str, progress: bool) -> Iterable:
    return tqdm(items, what, file=sys.stderr, leave=False, disable=None if progress else True)


# Contact sheets -------------------------------------------------------------------------------------------------------


def draw(store: Store, rows: Sequence[dict], found: Sequence[dict], out: Path, progress: bool = False) -> int:
    """Write the contact sheets of every source, sheet-SOURCE-1.png, ...; how many there are.

    Raises:
        ImportError: matplotlib is not there; nothing was written.
    """
    import matplotlib  # noqa: F401  (before the sheets of an earlier run are removed)

    for old in out.glob("sheet-*-[0-9]*.png"):
        old.unlink()
    reasons = {(entry["id"], entry["channel"]): entry["reasons"][0] for entry in found}
    sources = defaultdict(list)
    for row in rows:
        sources[row["source"]].append(row)
    pages = []
    for source, members in sorted(sources.items()):
        chosen = drawn_rows(members, reasons)
        count = math.ceil(len(chosen) / PER_PAGE)
        for page in range(count):
            part = chosen[page * PER_PAGE : (page + 1) * PER_PAGE]
            title = f"{source}: {len(chosen)} of {len(members)} images, sheet {page + 1} of {count}"
            name = re.sub(r"[^\w+-]+", "-", source)
            pages.append((out / f"sheet-{name}-{page + 1}.png", title, part))
    for path, title, part in _bar(pages, "sheets", progress):
        _save_sheet(path, title, store, part, reasons)
    return len(pages)


def drawn_rows(rows: Sequence[dict], reasons: dict) -> list[dict]:
    """All rows worth a look, then at most 128 of the others, evenly spaced."""
    striking = [row for row in rows if (row["id"], row["channel"]) in reasons]
    others = [row for row in rows if (row["id"], row["channel"]) not in reasons]
    count = min(OTHERS, len(others))
    return striking + [others[k * len(others) // count] for k in range(count)]


def _save_sheet(path: Path, title: str, store: Store, rows: Sequence[dict], reasons: dict) -> None:
    from matplotlib.figure import Figure

    widest = max(row[f"fov_{axis}_mm"] for row in rows for axis in "xyz")
    columns, lines = min(COLUMNS, len(rows)), math.ceil(len(rows) / COLUMNS)
    height, width = TILE + 22, 3 * TILE + 8  # of a cell in pixels, with its caption
    figure = Figure(figsize=(columns * width / 100, (lines * height + 30) / 100), dpi=100, facecolor="black")
    heading = f"{title}; axial, coronal, sagittal, left of the subject on the left; {widest:.0f} mm a tile"
    figure.text(0.01, 1 - 6 / (lines * height + 30), heading, color="white", fontsize=7, va="top")
    sheet = np.zeros((lines * height, columns * width), np.float32)
    axes = figure.add_axes((0, 0, 1, lines * height / (lines * height + 30)))
    for k, row in enumerate(rows):
        top, left = k // columns * height + 22, k % columns * width
        sheet[top : top + TILE, left : left + 3 * TILE] = tiles(store, row, TILE / widest)
        reason = reasons.get((row["id"], row["channel"]))
        color = "white" if reason is None else "orange"
        name = row["id"] if len(store.channels) == 1 else f"{row['id']} [{row['channel']}]"
        axes.text(left + 2, top - 20, name[-48:], color=color, fontsize=6, va="top")
        axes.text(left + 2, top - 11, (reason or "")[:72], color=color, fontsize=5, va="top")
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    with written_whole(path) as file:
        figure.savefig(file, format="png", facecolor="black")


def tiles(store: Store, row: dict, scale: float) -> np.ndarray:
    """The middle axial, coronal and sagittal slice side by side, (TILE, 3 TILE), black = 0, white = 1.

    Voxels have their true proportions: `scale` pixels per mm. Anterior or superior is up; the sagittal slice looks to
    the left.

    Args:
        row: of `measure`: the case, the channel and its range.
    """
    volume = store.image(row["id"])[store.channels.index(row["channel"])]
    x, y, z = (side // 2 for side in volume.shape)
    across, along, up = store.config["spacing"]
    planes = (
        (volume[:, :, z].T, (along, across)),
        (volume[:, y, :].T, (up, across)),
        (volume[x, ::-1, :].T, (up, along)),
    )
    black, white = (0.0, 1.0) if store.config["normalization"] == "unit" else (row["min"], row["max"])
    result = np.zeros((TILE, 3 * TILE), np.float32)
    for k, (plane, sides) in enumerate(planes):
        index = []
        for side, mm in zip(plane.shape, sides, strict=True):
            pixels = min(TILE, max(1, round(side * mm * scale)))
            index.append((np.arange(pixels) + 0.5) * side / pixels)
        small = plane[np.ix_(*(at.astype(int) for at in index))][::-1]  # up is up
        top, left = (TILE - small.shape[0]) // 2, k * TILE + (TILE - small.shape[1]) // 2
        shown = (np.asarray(small, np.float32) - black) / max(white - black, 1e-6)
        result[top : top + small.shape[0], left : left + small.shape[1]] = shown
    return np.nan_to_num(result)
