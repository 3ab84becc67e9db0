"""Quality control of a store: statistics of every case, cases unlike the others, and sheets of slices to look at.

    python -m amaes.preprocess --qc STORE [--out FOLDER]

FOLDER/qc.json              statistics of every channel of every case; cases worth a look, with the reasons
FOLDER/qc.csv               the statistics as a table
FOLDER/sheet-SOURCE-N.png   three middle slices per case, cases worth a look first (needs matplotlib)
"""

from __future__ import annotations

import csv
import io
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from amaes.data.store import Case, Store
from amaes.files import write_json, write_text
from amaes.pictures import Panel, Row, centred, middle_slices, write_sheet

QC_FORMAT = "amaes-qc-1"
SAMPLES = 100_000  # about so many voxels of a channel go into the statistics
FAINT = 1e-3  # share of the range; values that interpolation leaves in an empty background are below it
MIN_GROUP = 6  # smaller groups of images of one source and sequence are not compared
LIMIT = 5.0  # robust z-score from which a value is unlike the others
OTHERS = 128  # images of a source that are drawn besides those worth a look
PER_PAGE, COLUMNS, TILE = 64, 4, 96  # images per sheet and per row; pixels per slice


@dataclass(frozen=True)
class Statistic:
    """A statistic that is compared between images."""

    text: str  # what it is
    unit: str
    min_spread: float  # the spread of a group counts as at least this


COMPARED = {
    "fov_x_mm": Statistic("extent from left to right", "mm", 4.0),
    "fov_y_mm": Statistic("extent from back to front", "mm", 4.0),
    "fov_z_mm": Statistic("extent from foot to head", "mm", 4.0),
    "spacing_x_mm": Statistic("voxel size of the file from left to right", "mm", 0.1),
    "spacing_y_mm": Statistic("voxel size of the file from back to front", "mm", 0.1),
    "spacing_z_mm": Statistic("voxel size of the file from foot to head", "mm", 0.1),
    "foreground_fraction": Statistic("share of the volume that is foreground", "", 0.02),
    "background_nonzero": Statistic("share of the corners that is not empty", "", 0.05),
    "mean": Statistic("mean of the foreground", "", 0.02),
    "sd": Statistic("standard deviation of the foreground", "", 0.01),
    "p50": Statistic("median of the foreground", "", 0.02),
    "p95": Statistic("95th percentile of the foreground", "", 0.02),
}


# Statistics -----------------------------------------------------------------------------------------------------------


def case_statistics(store: Store, case: Case) -> list[dict]:
    """One row of plain data per channel of a case, from every k-th voxel along each axis, about 100,000 in all.

    Foreground is every voxel that exceeds the smallest value by more than a thousandth of the range.
    `background_nonzero` is the share of foreground in the eight corners of the volume (an eighth of each side): near 0
    where the background was set to zero, as skull stripping does, so `stripped_guess` is a guess. `crop_touches` counts
    the sides, of six, on which the crop ends where the file does: the anatomy may go on outside.

    Raises:
        FileNotFoundError, ValueError: the case cannot be read.
    """
    properties, image = store.properties(case.id), store.image(case.id)
    step = max(1, round((math.prod(case.shape) / SAMPLES) ** (1 / 3)))
    sampled = image[(slice(None), *[slice(min(step // 2, side - 1), None, step) for side in case.shape])]
    spacing = properties.get("ras_spacing") or [None] * 3
    of_case = {
        "id": case.id,
        "subject": case.subject,
        "source": source_of(case),
        **{f"fov_{a}_mm": side * mm for a, side, mm in zip("xyz", case.shape, store.config["spacing"], strict=True)},
        **{f"spacing_{a}_mm": mm for a, mm in zip("xyz", spacing, strict=True)},
        "crop_touches": _crop_touches(properties.get("crop_box"), properties.get("ras_shape")),
    }
    return [
        {**of_case, "channel": channel, "sequence": case.sequence or channel, **_statistics(volume.astype(np.float32))}
        for channel, volume in zip(store.channels, sampled, strict=True)
    ]


def source_of(case: Case) -> str:
    """The data set of a case: the first part of its id if that is not the subject, else "all"."""
    first, separator, _ = case.id.partition("/")
    return first if separator and first != case.subject else "all"


def _crop_touches(box: Sequence | None, shape: Sequence | None) -> int | None:
    if not box or not shape:
        return None
    return sum((start == 0) + (stop == side) for (start, stop), side in zip(box, shape, strict=True))


def _statistics(volume: np.ndarray) -> dict:
    """Intensities of the sampled voxels, (X, Y, Z)."""
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

    A value v is unlike the others where |v - median| / (1.4826 MAD) is at least 5, MAD = median of |v - median|. The
    divisor is never less than the statistic's `min_spread`, so that small differences among equal values do not count.

    Args:
        rows: of `case_statistics`.
        unit_range: intensities must be in [0, 1].

    Returns:
        {"id", "channel", "source", "sequence", "score", "reasons"}: the largest |z|, None where a value is wrong in
        itself, and a list of sentences.
    """
    reasons: dict[int, list[tuple[float, str]]] = defaultdict(list)
    groups = defaultdict(list)
    for k, row in enumerate(rows):
        groups[row["source"], row["sequence"]].append(k)
        reasons[k] += [(math.inf, text) for text in _wrong(row, unit_range)]
    for members in groups.values():
        for name, statistic in COMPARED.items() if len(members) >= MIN_GROUP else ():
            known = [k for k in members if rows[k][name] is not None]
            for k, z, text in _unlike_others([rows[k][name] for k in known], statistic):
                reasons[known[k]].append((abs(z), text))
    ranked = sorted((k for k in reasons if reasons[k]), key=lambda k: -max(score for score, _ in reasons[k]))
    return [_entry(rows[k], reasons[k]) for k in ranked]


def _entry(row: dict, scored: Sequence[tuple[float, str]]) -> dict:
    """An entry of `outliers`: where it is, its largest score, and its reasons in that order."""
    scored = sorted(scored, key=lambda pair: -pair[0])
    place = {name: row[name] for name in ("id", "channel", "source", "sequence")}
    score = round(scored[0][0], 2) if math.isfinite(scored[0][0]) else None
    return {**place, "score": score, "reasons": [text for _, text in scored]}


def _unlike_others(values: Sequence[float], statistic: Statistic) -> Iterable[tuple[int, float, str]]:
    """Index, z-score and reason of every value that is unlike the others."""
    if not values:
        return
    middle = float(np.median(values))
    spread = max(1.4826 * float(np.median(np.abs(np.array(values, np.float64) - middle))), statistic.min_spread)
    unit = f" {statistic.unit}" if statistic.unit else ""
    for k, value in enumerate(values):
        z = (value - middle) / spread
        if abs(z) >= LIMIT:
            yield k, z, f"{statistic.text} {value:.3g}{unit}, median {middle:.3g}{unit} (z {z:+.1f})"


def _wrong(row: dict, unit_range: bool) -> Iterable[str]:
    """What is wrong with an image whatever the others are."""
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
    """Examine all cases of a store, write qc.json, qc.csv and sheets of slices; returns a summary of one screen.

    Args:
        store: folder written by preprocessing.
        out: folder to write into; by default "qc" in the store.
        progress: show bars on stderr.

    Raises:
        FileNotFoundError, ValueError: no store there, or one without cases.
    """
    store = Store(store)
    if not store.cases:
        raise ValueError(f"{store.path}: the store has no cases")
    out = store.path / "qc" if out is None else Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"`out` {out}: a file, expected a folder")
    rows, unreadable = [], []
    for case in _bar(store.cases, "statistics", progress):
        try:
            rows += case_statistics(store, case)
        except (OSError, ValueError) as error:
            place = {"id": case.id, "channel": None, "source": source_of(case), "sequence": case.sequence}
            unreadable.append({**place, "score": None, "reasons": [f"cannot be read: {error}"]})
    listed = unreadable + outliers(rows, store.config["normalization"] == "unit")
    content = {"format": QC_FORMAT, "store": str(store.path.absolute()), "fingerprint": store.fingerprint}
    write_json(out / "qc.json", {**content, "outliers": listed, "cases": rows})
    _write_csv(out / "qc.csv", rows)
    try:
        sheets = f"{write_sheets(store, rows, listed, out, progress)} contact sheets"
    except ImportError:
        sheets = "no contact sheets, they need matplotlib: pip install 'amaes[plots]'"
    return _summary(store, rows, listed, out, sheets)


def _summary(store: Store, rows: Sequence[dict], listed: Sequence[dict], out: Path, sheets: str) -> str:
    """What the command prints."""
    lines = [f"{store.path}: {len(store.cases)} cases, {len({entry['id'] for entry in listed})} worth a look"]
    lines += [_line(entry) for entry in listed[:20]]
    lines += [f"  ... and {len(listed) - 20} more in {out / 'qc.json'}"] if len(listed) > 20 else []
    groups = Counter((row["source"], row["sequence"]) for row in rows)
    if alone := sum(count for count in groups.values() if count < MIN_GROUP):
        lines.append(
            f"  note: {alone} images were not compared with others, fewer than {MIN_GROUP} of one source and sequence"
        )
    return "\n".join([*lines, f"qc.json and qc.csv in {out}; {sheets}"]) + "\n"


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


def _bar(items: Sequence, label: str, progress: bool) -> Iterable:
    return tqdm(items, label, file=sys.stderr, leave=False, disable=None if progress else True)


# Contact sheets -------------------------------------------------------------------------------------------------------


def write_sheets(store: Store, rows: Sequence[dict], listed: Sequence[dict], out: Path, progress: bool = False) -> int:
    """Write the sheets of every source, sheet-SOURCE-1.png, ...; returns their number.

    Args:
        store: the images.
        rows: of `case_statistics`.
        listed: of `outliers`.
        out: folder to write into; the sheets of an earlier run there are removed.
        progress: show a bar on stderr.

    Raises:
        ImportError: matplotlib is not installed; nothing was written or removed.
    """
    import matplotlib  # noqa: F401  (before the sheets of an earlier run are removed)

    for old in out.glob("sheet-*-[0-9]*.png"):
        old.unlink()
    reasons = {(entry["id"], entry["channel"]): entry["reasons"][0] for entry in listed}
    sources = defaultdict(list)
    for row in rows:
        sources[row["source"]].append(row)
    pages = []
    for source, members in sorted(sources.items()):
        drawn = drawn_rows(members, reasons)
        count = math.ceil(len(drawn) / PER_PAGE)
        for page in range(count):
            title = f"{source}: {len(drawn)} of {len(members)} images, sheet {page + 1} of {count}"
            name = re.sub(r"[^\w+-]+", "-", source)
            pages.append((f"sheet-{name}-{page + 1}.png", title, drawn[page * PER_PAGE : (page + 1) * PER_PAGE]))
    for name, title, part in _bar(pages, "sheets", progress):
        _write_page(out / name, title, store, part, reasons)
    return len(pages)


def drawn_rows(rows: Sequence[dict], reasons: Mapping[tuple, str]) -> list[dict]:
    """All rows with a reason to look at them, then at most 128 of the others, evenly spaced."""
    striking = [row for row in rows if (row["id"], row["channel"]) in reasons]
    others = [row for row in rows if (row["id"], row["channel"]) not in reasons]
    count = min(OTHERS, len(others))
    return striking + [others[k * len(others) // count] for k in range(count)]


def _write_page(path: Path, title: str, store: Store, rows: Sequence[dict], reasons: Mapping[tuple, str]) -> None:
    widest = max(row[f"fov_{axis}_mm"] for row in rows for axis in "xyz")
    panels = []
    for row in rows:
        reason = reasons.get((row["id"], row["channel"]))
        name = row["id"] if len(store.channels) == 1 else f"{row['id']} [{row['channel']}]"
        caption = f"{name[-48:]}\n{reason or ' '}"
        panels.append(Panel(slices(store, row, pixel=widest / TILE), caption, marked=reason is not None))
    heading = f"{title}; axial, coronal, sagittal, left of the subject on the left; {widest:.0f} mm a tile"
    write_sheet(path, heading, [Row("", panels[k : k + COLUMNS]) for k in range(0, len(panels), COLUMNS)])


def slices(store: Store, row: dict, pixel: float) -> np.ndarray:
    """The middle axial, coronal and sagittal slice side by side, (TILE, 3 TILE), black = 0, white = 1.

    Args:
        store: the images.
        row: of `case_statistics`: the case, the channel and its range.
        pixel: side of a pixel, mm.
    """
    volume = store.image(row["id"])[store.channels.index(row["channel"])]
    black, white = (0.0, 1.0) if store.config["normalization"] == "unit" else (row["min"], row["max"])
    tiles = [
        centred(plane, (TILE, TILE), fill=black) for plane in middle_slices(volume, store.config["spacing"], pixel)
    ]
    return np.nan_to_num((np.concatenate(tiles, axis=1).astype(np.float32) - black) / max(white - black, 1e-6))
