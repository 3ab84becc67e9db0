"""Damaged NIfTI files through preprocessing: every one of them must be answered, none may end the run.

    python benchmarks/fuzz.py [--count 2000] [--seed 0]

Each file is a small sound scan with one kind of damage: fields of the header, bits, a cut, other sizes, broken gzip, an
odd name, or something that is no file. They are preprocessed a hundred at a time, with other options each time, every
second time with labels, of which some are damaged instead. It holds where no run ends with a traceback or hangs, every
input has exactly one line in the report, none of them an unexpected error, and the store that is left can be read.

Prints one line. Status 1 where something does not hold; what, is on stderr. The same seed makes the same files; --keep
leaves them.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from amaes import cli
from amaes.data.store import Store

ROOT = Path(__file__).resolve().parent.parent
AT_A_TIME = 100
SHAPE = (12, 14, 10)
TYPES = ("<i2", "<f4", ">u2", "<f8", "|u1", "<i4")
OPTIONS = (
    *([], ["--verify"], ["--nan-background", "zero"], ["--on-geometry-mismatch", "resample"], ["--assume-ras"]),
    *(["--spacing", "2", "1.5", "3"], ["--strict-orientation"], ["--crop-extra-plane", "--dtype", "float16"]),
    ["--normalization", "zscore", "--background-to-min", "--label-resampling", "onehot_linear"],
)


def main() -> int:
    parser = cli.Parser(description="Damaged NIfTI files through preprocessing.")
    parser.add_argument("--count", type=cli.integer(1, 10**6), default=2000, help="files, labels aside")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the damages")
    parser.add_argument("--seconds", type=cli.integer(1, 3600), default=20, help="that one file may take")
    parser.add_argument("--keep", type=cli.output_folder, metavar="DIR", help="leave files and stores there")
    args = parser.parse_args()
    began, total, faults, slowest = time.perf_counter(), Counter(), [], 0.0
    with tempfile.TemporaryDirectory() as temporary:
        for start in range(0, args.count, AT_A_TIME):
            folder = Path(args.keep or temporary) / f"{start:06d}"
            labels = make_files(folder, range(start, min(start + AT_A_TIME, args.count)), args.seed)
            statuses, seconds, wrong = preprocess(folder, labels, args.seconds)
            total, slowest = total + statuses, max(slowest, seconds)
            faults += [f"{folder.name}: {text}" for text in wrong]
    for text in faults:
        print(text, file=sys.stderr)
    kinds = Counter(text.split(": ")[1] for text in faults)
    told = ", ".join(f"{total[status]} {status}" for status in ("ok", "skipped", "rejected", "failed"))
    bad = ", ".join(f"{kinds[kind]} {kind}" for kind in KINDS)
    took = f"slowest file {slowest:.1f} s, {time.perf_counter() - began:.0f} s in all"
    print(f"{args.count} files, seed {args.seed}: {told}; {bad}; {took}; {'DOES NOT HOLD' if faults else 'holds'}")
    return 1 if faults else 0


# Files ----------------------------------------------------------------------------------------------------------------


def make_files(folder: Path, numbers: range, seed: int) -> list[str]:
    """Scans in folder/images, and in half of all folders labels of the same names; the options of preprocessing."""
    chance = random.Random(f"{seed} {numbers.start}")
    with_labels = chance.random() < 0.5
    for number in numbers:
        draw = random.Random(f"{seed} {number}")
        name, damage = f"{number:06d}{draw.choice(STEMS)}{draw.choice(ENDINGS)}", draw.choice(DAMAGES)
        scan, label = sound(draw, 0), sound(draw, 1)
        of_label = with_labels and draw.random() < 0.3
        write(folder / "images", name, scan, draw, None if of_label else damage)
        if with_labels:
            write(folder / "labels", name, label, draw, damage if of_label else None)
    options = list(chance.choice(OPTIONS))
    return [*options, "--labels", str(folder / "labels")] if with_labels else options


def sound(draw: random.Random, labels: int) -> bytes:
    """A file that is right: a box of noise, or of the labels 1 and 2."""
    noise = np.random.default_rng(draw.getrandbits(32)).integers(1, 3 if labels else 250, [n - 2 for n in SHAPE])
    data = np.pad(noise, 1).astype("|u1" if labels else draw.choice(TYPES))
    kind = nib.Nifti2Image if draw.random() < 0.2 else nib.Nifti1Image
    image = kind(data, np.diag([-1.5, -1.25, 2, 1]))
    image.set_qform(image.affine, 1)
    return image.to_bytes()


def write(folder: Path, name: str, content: bytes, draw: random.Random, damage: Callable | None) -> None:
    """Write a file with its damage; where a name is refused by the file system, under its number alone."""
    path = folder / os.fsdecode(name.encode("utf-8", "surrogateescape"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except (OSError, UnicodeError):
        path = folder / f"{name[:6]}.nii"
        folder.mkdir(parents=True, exist_ok=True)
    if damage in (no_file, broken_gzip):
        damage(path, content, draw)
        return
    if damage is not None:
        content = damage(content, draw)
    path.write_bytes(gzip.compress(content, 1) if path.name.lower().endswith(".gz") else content)


# Damages --------------------------------------------------------------------------------------------------------------


def fields(content: bytes, draw: random.Random) -> bytes:
    """One to three numbers of the header become odd ones."""
    is_first = content[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c")
    order = "<" if content[0] else ">"
    known = (nib.Nifti1Header if is_first else nib.Nifti2Header).template_dtype.fields
    changed = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        kind, at = known[draw.choice([name for name in known if known[name][0].base.kind in "iuf"])][:2]
        at += kind.base.itemsize * draw.randrange(int(np.prod(kind.shape, dtype=int)))
        changed[at : at + kind.base.itemsize] = odd_number(kind.base, order, draw)
    return bytes(changed)


def odd_number(kind: np.dtype, order: str, draw: random.Random) -> bytes:
    """A number of this type that a header should not hold, or that another field contradicts; its bytes."""
    if draw.random() < 0.2:
        return draw.randbytes(kind.itemsize)
    if kind.kind == "f":
        value = draw.choice([0.0, -1.0, 1e-45, 1e38, 1e-3, 19.0, 352.0, 1000.0, *map(float, ("nan", "inf", "-inf"))])
    else:
        limits = np.iinfo(kind)
        common = [0, 1, 2, 3, 4, 7, 8, 9, 11, 16, 64, 255, 348, 512, 540, 4096, limits.max, limits.min, -1]
        value = draw.choice([value for value in common if limits.min <= value <= limits.max])
    return np.array(value).astype(kind.newbyteorder(order)).tobytes()


def bits(content: bytes, draw: random.Random) -> bytes:
    """One to twenty bits are flipped."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 20)):
        changed[draw.randrange(draw.choice([348, len(changed)]))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(content: bytes, draw: random.Random) -> bytes:
    """The end is missing."""
    return content[: draw.choice([0, 1, 4, 100, 347, 348, 352, draw.randrange(len(content)), len(content) - 1])]


def longer(content: bytes, draw: random.Random) -> bytes:
    """More follows: zeros, noise, or the file again."""
    size = draw.choice([1, 511, 512, 513, 100_000, 1 << 20])
    return content + draw.choice([bytes(size), draw.randbytes(size), content])


def no_number(content: bytes, draw: random.Random) -> bytes:
    """Voxels of a type that holds them are NaN or infinite; else the largest number there is."""
    at = len(content) - draw.randrange(1, 500) * 8
    special = struct.pack("<d", draw.choice([float("nan"), float("inf"), 1e300])) * draw.choice([1, 60])
    return content[:at] + special + content[at + len(special) :]


def something_else(content: bytes, draw: random.Random) -> bytes:
    """No NIfTI file at all."""
    texts = (
        b"<html>not found</html>",
        b"version https://git-lfs.github.com/spec/v1\noid 1\n",
        b"{}",
        b"PK\x03\x04",
        b"",
    )
    return draw.choice([*texts, draw.randbytes(5000), bytes(5000), struct.pack(">7i", 1, 9, 9, 9, 1, 3, 0)])


def broken_gzip(path: Path, content: bytes, draw: random.Random) -> None:
    """Compressed data with a flipped bit, cut, followed by others, twice compressed, or under a wrong name."""
    packed = bytearray(gzip.compress(content, 1))
    way = draw.randrange(5)
    if way == 0:
        packed[draw.randrange(len(packed))] ^= 1 << draw.randrange(8)
    elif way == 1:
        del packed[draw.randrange(len(packed)) :]
    elif way == 2:
        packed += draw.choice([b"more", bytes(1000), bytes(packed)])
    elif way == 3:
        packed = gzip.compress(packed)
    path.write_bytes(packed)


def no_file(path: Path, content: bytes, draw: random.Random) -> None:
    """A link that leads nowhere, to itself or into an annex, a pipe, a sound file that may be reached by a link."""
    path.unlink()
    way = draw.randrange(5)
    if way == 0 and hasattr(os, "mkfifo"):
        os.mkfifo(path)
    elif way == 1:
        path.symlink_to(path.name)
    elif way == 2:
        path.symlink_to("../.git/annex/objects/x/y/MD5E-s1--z/MD5E-s1--z")
    elif way == 3:
        path.symlink_to("/dev/null")
    else:
        path.symlink_to("nowhere")


DAMAGES = (
    fields,
    fields,
    fields,
    bits,
    bits,
    cut,
    longer,
    no_number,
    something_else,
    broken_gzip,
    broken_gzip,
    no_file,
)
STEMS = (
    *[""] * 40,
    *("ä ö", "🧠", "a b", "-x", "$(id)", "'\"", "%s{}", "x" * 200, "_0000", "_label", ".nii", "a/b", "{0}/x"),
    *("\u00a0", "\n", "\t", "\u202e", "\u200b", "\x1b[31m", "\udcff"),  # cannot be printed
)
ENDINGS = (".nii", ".nii.gz", ".nii", ".nii.gz", ".NII.GZ", ".Nii")


# Preprocessing --------------------------------------------------------------------------------------------------------

KINDS = ("tracebacks", "hangs", "counted wrongly", "unexpected errors", "unreadable stores", "too slow")


def preprocess(folder: Path, options: list[str], limit: int) -> tuple[Counter, float, list[str]]:
    """Preprocess a folder of files: how many have which status, the most seconds of a file, "kind: text" of faults."""
    files = [file for file in (folder / "images").rglob("*") if not file.is_dir() or file.is_symlink()]
    images, store = folder / "images", folder / "store"
    command = [sys.executable, "-m", "amaes.preprocess", "--images", images, *options, "--out", store, "--workers", "0"]
    try:
        done = subprocess.run(
            list(map(str, command)), cwd=ROOT, capture_output=True, timeout=limit + 60 + len(files), check=False
        )
    except subprocess.TimeoutExpired:
        return Counter(), limit, [f"hangs: {' '.join(map(str, command))}"]
    errors, said = done.stderr.decode(errors="replace"), done.stdout.decode(errors="replace")
    faults = []
    if "Traceback" in errors or "Warning: " in errors or done.returncode not in (0, 1, 2):
        faults.append(f"tracebacks: status {done.returncode}: {errors[-2000:]}")
    report = store / "report.jsonl"
    rows = [json.loads(line) for line in report.read_text().splitlines()] if report.is_file() else []
    statuses = Counter(row["status"] for row in rows)
    times = Counter(row["files"][0] for row in rows)
    if sorted(times) != sorted(map(str, files)) or max(times.values(), default=0) > 1 or not _is_told(said, statuses):
        faults.append(
            f"counted wrongly: {len(files)} files, {len(rows)} lines, {sum(statuses.values())} counted: {said}"
        )
    for row in rows:
        if str(row["reason"]).startswith("unexpected"):
            faults.append(f"unexpected errors: {row['files'][0]}: {row['message']}")
        if row["seconds"] > limit:
            faults.append(f"too slow: {row['files'][0]}: {row['seconds']} s")
    return statuses, max((row["seconds"] for row in rows), default=0.0), faults + _faults_of(store, statuses)


def _is_told(said: str, statuses: Counter) -> bool:
    """The summary counts as the report does; nothing is printed where not one input could be used."""
    counts = {name: int(count) for count, name in re.findall(r"(\d+) (ok|skipped|rejected|failed)", said[:200])}
    return counts == {name: statuses[name] for name in counts} and bool(counts or not statuses["ok"])


def _faults_of(store: Path, statuses: Counter) -> list[str]:
    """What is wrong with the store that is left."""
    if not statuses["ok"]:
        return []
    try:
        content = Store(store)
        sound = all(np.isfinite(content.image(case.id)).all() for case in content.cases)
    except (ValueError, OSError) as error:
        return [f"unreadable stores: {error}"]
    found = len(content.cases)
    return [] if sound and found == statuses["ok"] else [f"unreadable stores: {found} of {statuses['ok']} cases in it"]


if __name__ == "__main__":
    cli.run(main)
