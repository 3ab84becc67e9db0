"""Synthetic heads: brain-like MRI with lesions, drawn from seeded parameters, for the demo, the tests and a first run.

A head is a set of signed distances (mm, positive inside) in its own coordinates: scalp, skull, a cavity with fluid, a
folded grey ribbon over white matter, ventricles, deep nuclei, cerebellum, lesions. A scan samples them on the grid of
a scanner (spacing, orientation, obliquity), paints tissue by tissue with edges one voxel wide, and adds what scanners
add: texture, bias field, noise, an arbitrary intensity scale. The scans of a subject share the anatomy, not the grid.

They are drawings, not simulations: good for seeing whether the whole chain works, not for judging a method.
"""

from __future__ import annotations

import gzip
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from amaes.cli import Parser, non_negative_int, positive_float, positive_int, run
from amaes.preprocess.config import Config
from amaes.preprocess.find_cases import collect
from amaes.preprocess.write_store import write_store
from amaes.rng import stream

LABELS = {0: "background", 1: "lesion", 2: "ventricle"}
DEMO = {"subjects": 12, "fov": 96.0}  # the heads of `make_demo_data`

# Relative signal of each tissue, in the order of painting; from fluid on inside the skull. Lesions are bright on FLAIR
# and T2w, dark against white matter on T1w. Fat, choroid plexus and pulsating fluid come close to them, so that a
# threshold does not solve the task.
TISSUES = (
    "air",
    "skin",
    "fat",
    "muscle",
    "eye",
    "skull",
    "marrow",
    "fluid",
    "grey",
    "white",
    "deep",
    "rim",
    "ventricle",
    "choroid",
    "lesion",
)
SIGNAL = {
    "T1w": (0, 0.42, 1.00, 0.42, 0.18, 0.08, 0.45, 0.16, 0.52, 0.76, 0.62, 0.66, 0.14, 0.40, 0.50),
    "T2w": (0, 0.38, 0.75, 0.25, 0.98, 0.06, 0.40, 0.95, 0.60, 0.42, 0.48, 0.55, 1.00, 0.75, 0.74),
    "FLAIR": (0, 0.42, 0.90, 0.35, 0.12, 0.06, 0.35, 0.12, 0.62, 0.47, 0.57, 0.68, 0.08, 0.74, 0.84),
}


@dataclass(frozen=True)
class Scanner:
    """How a head is sampled and stored."""

    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)  # voxel size along the stored axes, mm
    orientation: str = "RAS"  # where the stored axes point
    oblique: float = 0.0  # angle between the stored axes and the room's, degrees
    contrast: float = 1.0  # exponent on SIGNAL; above 1 the tissues lie further apart
    noise: float = 0.02  # standard deviation of the Rician noise; the brightest tissue is 1
    air: str = "noise"  # "noise" as reconstructed, "zero" set to 0, "stripped" everything outside the brain 0
    dtype: str = "float32"  # on disk
    full_scale: float = 1.0  # value of the brightest tissue
    slope: float = 1.0  # scl_slope of integer files
    form: str = "both"  # what carries the geometry: "sform", "qform" or "both"


SCANNERS = (
    Scanner(),
    Scanner((0.9, 0.9, 3.0), "LPS", 9.0, 0.95, 0.03, dtype="uint16", full_scale=1250),
    Scanner((1.0, 1.0, 1.2), "PSR", 0.0, 1.1, 0.025, dtype="int16", full_scale=4000, slope=0.25, form="qform"),
    Scanner((1.2, 1.0, 1.5), "LAS", 4.0, 1.0, 0.03, "zero", "float32", 3.1e4, form="sform"),
    Scanner((1.0, 2.0, 1.0), "RIA", 12.0, 0.9, 0.02, dtype="uint16", full_scale=600),
    Scanner((1.0, 1.0, 1.0), "LAS", 0.0, 1.05, 0.02, "stripped", "int16", 900, slope=2.0),
)


@dataclass(frozen=True)
class Phantom:
    """One scan: image (X, Y, Z) float32 >= 0; label (X, Y, Z) uint8, see LABELS; tissue (X, Y, Z) uint8, index into
    TISSUES, without lesions; affine (4, 4), stored voxel to RAS+ mm."""

    image: np.ndarray
    label: np.ndarray
    tissue: np.ndarray
    affine: np.ndarray


class Grid(NamedTuple):
    """Sampling points: position (mm, head coordinates) = matrix @ index + offset."""

    shape: tuple[int, int, int]
    matrix: np.ndarray
    offset: np.ndarray

    def positions(self) -> list[np.ndarray]:
        """Three arrays (X, Y, Z): right, anterior, superior, mm."""
        i, j, k = np.ix_(*(np.arange(n, dtype=np.float32) for n in self.shape))
        rows = np.column_stack([self.matrix, self.offset]).astype(np.float32)
        return [a * i + (b * j + (c * k + start)) for a, b, c, start in rows]


class Waves:
    """A smooth random field of unit variance: a sum of plane waves with wavelengths in [shortest, longest] mm."""

    def __init__(self, rng: np.random.Generator, shortest: float, longest: float, count: int = 48) -> None:
        direction = rng.standard_normal((count, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        self.number = direction * (2 * math.pi / rng.uniform(shortest, longest, (count, 1)))  # rad / mm
        self.phase = rng.uniform(0, 2 * math.pi, count)

    def on(self, grid: Grid) -> np.ndarray:
        """The field on a grid, (X, Y, Z) float32. A plane wave on an affine grid is a product of one factor per axis,
        exp(ia) exp(ib) exp(ic), so the sum over waves is one matrix product."""
        step = self.number @ grid.matrix  # (waves, 3), rad / voxel
        start = self.phase + self.number @ grid.offset
        x, y, z = (np.exp(1j * np.outer(np.arange(n), step[:, axis])) for axis, n in enumerate(grid.shape))
        xy = ((x * np.exp(1j * start))[:, None] * y[None]).astype(np.complex64)  # (X, Y, waves)
        xy = np.concatenate([xy.real, xy.imag], axis=2).reshape(-1, 2 * len(start))  # (X * Y, 2 waves)
        z = np.concatenate([z.real, -z.imag], axis=1).astype(np.float32)  # (Z, 2 waves)
        return (xy @ z.T * np.float32(math.sqrt(2 / len(start)))).reshape(grid.shape)


class Lesion(NamedTuple):
    """An ellipsoid with an irregular border: centre and semi-axes in mm, rotation (3, 3), brightness in (0, 1]."""

    centre: np.ndarray
    axes: np.ndarray
    rotation: np.ndarray
    brightness: float


def ellipsoid(at: Sequence[np.ndarray], centre: Sequence[float], axes: Sequence[float]) -> np.ndarray:
    """Signed distance to an ellipsoid, to first order exact at the surface: mm, positive inside."""
    scaled = [(x - np.float32(c)) / np.float32(a) for x, c, a in zip(at, centre, axes, strict=True)]
    radius = np.sqrt(sum(s * s for s in scaled))
    slope = np.sqrt(sum((s / np.float32(a)) ** 2 for s, a in zip(scaled, axes, strict=True)))
    return radius * (1 - radius) / np.maximum(slope, np.float32(1e-6))


class Head:
    """The anatomy of one subject, in millimetres, around the middle of the cerebrum.

    Args:
        rng: source of every parameter.
        fov: field of view the head is made for, mm; an adult head needs about 200, 64 gives a quick miniature.
            Bodies scale with it, fine structure (cortical thickness, folds, lesions) with its square root.
        lesions: number of lesions, or None to draw 4 to 10.
    """

    def __init__(self, rng: np.random.Generator, fov: float, lesions: int | None = None) -> None:
        self.half, self.fine = fov / 2, math.sqrt(fov / 64)
        self.girth = rng.normal(1.0, 0.035, 3).clip(0.92, 1.06)  # head size along right, anterior, superior
        self.egg = rng.uniform(0.05, 0.16)  # the back of the head is wider than the front
        self.ribbon = rng.uniform(1.7, 2.2) * self.fine  # cortical thickness, mm
        self.depth = rng.uniform(0.08, 0.11) * fov  # of the sulci, mm
        self.atrophy = rng.uniform(0.3, 1.0)  # widens sulci and ventricles
        self.sides = rng.normal(1.0, 0.08, (2, 3)).clip(0.8, 1.2)  # left and right ventricle, asymmetric
        self.plexus = rng.uniform(-0.12, 0.05, 2)
        self.fold = rng.uniform(12.0, 15.0) * self.fine  # twice the distance between sulci, mm
        self.folds = Waves(rng, self.fold * 0.85, self.fold * 1.2)
        self.bumps = Waves(rng, 0.3 * fov, 0.8 * fov)
        self.ripple = Waves(rng, 4.0 * self.fine, 8.0 * self.fine)
        self.lesions = self._place_lesions(rng, int(rng.integers(4, 11)) if lesions is None else lesions)

    def distances(self, grid: Grid) -> dict[str, np.ndarray]:
        """Signed distance of every grid point to each body: (X, Y, Z) float32, mm, positive inside."""
        x, y, z = grid.positions()
        half, (gx, gy, gz) = self.half, self.girth * self.half
        bump = self.bumps.on(grid) * np.float32(0.012 * half)
        x = x * (1 + np.float32(self.egg / half) * y) + np.float32(0.4) * bump

        def body(centre: Sequence[float], axes: Sequence[float], mirrored: bool = False) -> np.ndarray:
            at = (np.abs(x) if mirrored else x, y, z)
            return ellipsoid(at, np.multiply(centre, half), np.multiply(axes, (gx, gy, gz)))

        skin = body((0, 0, 0.05), (0.79, 0.92, 0.84)) + bump
        face = body((0, 0.42, -0.58), (0.48, 0.44, 0.46)) - bump
        neck = body((0, -0.18, -0.95), (0.42, 0.46, 0.62))
        # The cerebrum ends at the tentorium and on the skull base; temporal lobes and cerebellum fill the fossae.
        base = z + np.float32(half) * (0.10 - 0.30 * np.clip(y / half, -0.2, 0.5))
        cerebrum = np.minimum(body((0, 0, 0.12), (0.62, 0.76, 0.62)) + np.float32(0.8) * bump, base)
        cerebrum = np.maximum(cerebrum, body((0.33, 0.10, -0.20), (0.23, 0.40, 0.24), True))
        cerebellum = body((0, -0.42, -0.38), (0.46, 0.30, 0.25))
        stem = body((0, -0.16, -0.55), (0.13, 0.14, 0.50))
        brain = np.maximum(np.maximum(cerebrum, cerebellum), stem)
        pial = self._pial(cerebrum, (x, y, z))
        white = pial - np.float32(self.ribbon)
        thalamus = body((0.14, -0.10, 0.02), (0.105, 0.15, 0.10), True)
        putamen = body((0.29, 0.06, 0.02), (0.06, 0.18, 0.11), True)
        rings = np.float32(0.9 * self.fine) * np.cos(np.hypot(y + 0.30 * half, z + 0.36 * half) * (2.2 / self.fine))
        ventricle, choroid = self._ventricles((x, y, z))
        return {
            "skin": np.maximum(np.maximum(skin, face), neck),
            "face": np.maximum(face, neck),
            "cavity": brain + np.float32((0.5 + 0.7 * self.atrophy) * self.fine),
            "brain": brain,
            "grey": np.maximum(pial, cerebellum),
            "white": np.maximum(np.maximum(white, cerebellum - np.float32(1.6 * self.fine) + rings), stem),
            "cerebral white": white,
            "deep": np.maximum(thalamus, putamen),
            "ventricle": ventricle,
            "choroid": choroid,
            "eye": body((0.25, 0.66, -0.34), (0.12, 0.11, 0.12), True),
        }

    def _pial(self, hull: np.ndarray, at: Sequence[np.ndarray]) -> np.ndarray:
        """Signed distance to the folded surface: the hull, cut by sulci and by the fissure between the hemispheres."""
        inside = hull > -2  # nothing else needs the costly part
        points = np.stack([axis[inside] for axis in at])
        # Sulci go inwards: the field that places them is read at the nearest point of a shell.
        radius = np.sqrt((points**2).sum(0)).clip(1e-3)
        points *= (0.62 + 0.1 * radius / self.half) * self.half / radius
        reach, side = 1.1 * self.half, 48
        step = 2 * reach / (side - 1)
        coarse = self.folds.on(Grid((side,) * 3, np.eye(3) * step, np.full(3, -reach)))
        fold = map_coordinates(coarse, (points + reach) / step, order=1, mode="nearest")
        open_by = np.float32(0.35 + 0.45 * self.atrophy) * self.fine
        sulcus = np.abs(fold) * np.float32(self.fold / 5.0) - open_by  # > 0 outside the sulcus, mm
        depth = np.float32(self.depth)
        pial = np.full(hull.shape, np.float32(-2))
        pial[inside] = np.minimum(hull[inside], np.maximum(sulcus, hull[inside] - depth))
        fissure = np.maximum(np.abs(at[0]) - np.float32(0.4 * self.fine), hull - np.float32(0.30 * self.half))
        return np.minimum(pial, fissure)

    def _ventricles(self, at: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Signed distances to the ventricles and to the choroid plexus in them."""
        x, y, z = (axis / np.float32(self.half) for axis in at)
        size = 0.8 + 0.45 * self.atrophy
        bodies, choroid = [], []
        for side, axes, along in zip((-1, 1), self.sides, self.plexus, strict=True):
            # A horn: it flares sideways at both ends and bends down at the back.
            across = side * x - (0.085 + 0.45 * (y + 0.02) ** 2)
            up = z - (0.13 - 0.9 * (y - 0.08) ** 2)
            bodies.append(ellipsoid((across, y, up), (0, -0.04, 0), np.multiply(axes, (0.058, 0.36, 0.085)) * size))
            choroid.append(ellipsoid((across, y, up), (0, along, -0.05), (0.028, 0.085, 0.028)))
        bodies.append(ellipsoid((x, y, z), (0, -0.02, -0.02), (0.022 * size, 0.11, 0.13)))  # third
        bodies.append(ellipsoid((x, y, z), (0, -0.24, -0.40), (0.05, 0.045 * size, 0.06)))  # fourth
        ventricle = np.maximum.reduce(bodies) * np.float32(self.half)
        return ventricle, np.minimum(np.maximum(*choroid) * np.float32(self.half), ventricle)

    def _place_lesions(self, rng: np.random.Generator, count: int) -> list[Lesion]:
        """Lesions in cerebral white matter: by the ventricles, under the cortex or anywhere, by turns."""
        step = self.half / 24
        bodies = self.distances(Grid((48,) * 3, np.eye(3) * step, np.full(3, -23.5 * step)))
        white, fluid = bodies["cerebral white"], bodies["ventricle"]
        # Everything that is not deep nuclei or fluid, and deep enough for a lesion to show.
        room = (white > 1.0 * self.fine) & (fluid < -0.4 * self.fine) & (bodies["deep"] < -0.5 * self.fine)
        kinds = (room & (fluid > -3 * self.fine), room & (white < 2.2 * self.fine) & (fluid < -4 * self.fine), room)
        found = []
        for index in range(count):
            kind = kinds[index % 3]
            cells = np.argwhere(kind if kind.any() else white == white.max())
            centre = (cells[rng.integers(len(cells))] + rng.uniform(-0.5, 0.5, 3) - 23.5) * step
            radius = self.fine * rng.choice((2.0, 2.6, 3.3, 4.4), p=(0.2, 0.35, 0.3, 0.15)) * rng.uniform(0.9, 1.2)
            axes = radius * rng.uniform(0.75, 1.3, 3)
            turn = Rotation.from_rotvec(rng.uniform(-1.5, 1.5, 3)).as_matrix()
            found.append(Lesion(centre, axes, turn, float(rng.uniform(0.65, 1.0))))
        return found

    def lesion_distance(self, lesion: Lesion, grid: Grid) -> tuple[tuple[slice, ...], np.ndarray]:
        """The part of the grid around a lesion, and the signed distance there, mm; white matter bounds it elsewhere."""
        middle = np.linalg.solve(grid.matrix, lesion.centre - grid.offset)
        reach = (1.5 * lesion.axes.max() + 1) / np.linalg.norm(grid.matrix, axis=0)
        start = np.floor(middle - reach).clip(0, grid.shape).astype(int)
        stop = np.ceil(middle + reach + 1).clip(0, grid.shape).astype(int)
        part = Grid(tuple(stop - start), grid.matrix, grid.offset + grid.matrix @ start)
        around = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        turned = Grid(part.shape, lesion.rotation @ part.matrix, lesion.rotation @ (part.offset - lesion.centre))
        distance = ellipsoid(turned.positions(), (0, 0, 0), lesion.axes)
        return around, distance + self.ripple.on(part) * np.float32(0.22 * lesion.axes.mean())


def phantom(
    seed: int,
    subject: int = 1,
    sequence: str = "FLAIR",
    scanner: Scanner = SCANNERS[0],
    *,
    fov: float = 64.0,
    lesions: int | None = None,
) -> Phantom:
    """Draw one scan of one head; the same arguments give the same arrays.

    Args:
        seed: of the whole set, >= 0.
        subject: number of the head, >= 0. Its sequences show the same anatomy, each with a pose of its own.
        sequence: a key of SIGNAL.
        scanner: its grid and its intensities.
        fov: field of view, mm; see Head.
        lesions: number of lesions, or None to draw 4 to 10.

    Raises:
        ValueError: unknown sequence, or a field of view below 32 mm, where nothing but the skull would be left.
    """
    if sequence not in SIGNAL:
        raise ValueError(f"sequence {sequence!r} is unknown; choose from {', '.join(SIGNAL)}")
    if not 32 <= fov <= 256:
        raise ValueError(f"fov is {fov:g} mm; accepted: 32 to 256")
    head = Head(stream(seed, 0, subject, "phantom-head"), fov, lesions)
    rng = stream(seed, list(SIGNAL).index(sequence), subject, "phantom-scan")
    affine, grid = _place(head, scanner, rng)
    # Thick voxels average what lies in them: draw on thinner ones and take the mean.
    spacing = np.asarray(scanner.spacing)
    parts = np.maximum(1, np.round(spacing / (1.2 * spacing.min()))).astype(int)
    thin = Grid(
        tuple(int(n * p) for n, p in zip(grid.shape, parts, strict=True)),
        grid.matrix / parts,
        grid.offset + grid.matrix @ ((1 - parts) / (2 * parts)),
    )
    signal = np.power(SIGNAL[sequence], scanner.contrast) * np.exp(rng.normal(0, 0.04, len(TISSUES)))
    image, tissue, ventricle, lesion = _paint(head, thin, signal, rng)
    blocks = [size for pair in zip(grid.shape, parts, strict=True) for size in pair]
    image, ventricle, lesion = (part.reshape(blocks).mean((1, 3, 5)) for part in (image, ventricle, lesion))
    tissue = tissue[tuple(slice(p // 2, None, p) for p in parts)]
    label = np.where(lesion > 0.5, 1, np.where(ventricle > 0.5, 2, 0)).astype(np.uint8)

    image *= 1 + np.float32(0.035) * Waves(rng, 4.0 * head.fine, 16.0 * head.fine).on(grid)
    image *= np.exp(np.float32(rng.uniform(0.04, 0.12)) * Waves(rng, 1.2 * head.half, 4 * head.half, 16).on(grid))
    sigma = np.float32(scanner.noise * rng.uniform(0.7, 1.3))
    noise = rng.standard_normal((2, *grid.shape), dtype=np.float32) * sigma
    image = np.hypot(image + noise[0], noise[1])  # magnitude of a complex signal: Rician
    if scanner.air == "zero":
        image[tissue == 0] = 0
    elif scanner.air == "stripped":
        image[tissue < TISSUES.index("fluid")] = 0
    return Phantom(image * np.float32(scanner.full_scale), label, tissue, affine)


def _place(head: Head, scanner: Scanner, rng: np.random.Generator) -> tuple[np.ndarray, Grid]:
    """Stored voxel to RAS+ mm, and the same points in head coordinates."""
    axes, reverse = np.divmod(["RLAPSI".index(letter) for letter in scanner.orientation], 2)
    extent = 2 * head.half * np.array([0.92, 1.0, 0.96])[axes]
    shape = tuple(int(n) for n in np.round(extent / scanner.spacing))
    tilt = rng.standard_normal(3) * (1.0, 0.4, 0.4)  # mostly a nod
    tilt = Rotation.from_rotvec(np.radians(scanner.oblique) * tilt / np.linalg.norm(tilt)).as_matrix()
    direction = np.zeros((3, 3))
    direction[axes, range(3)] = 1 - 2 * reverse
    affine = np.eye(4)
    affine[:3, :3] = tilt @ direction * scanner.spacing
    centre = rng.uniform(-15, 15, 3)  # scanner coordinates have their origin anywhere
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    pose = tilt @ Rotation.from_rotvec(np.radians(rng.normal(0, 3.5, 3))).as_matrix()
    middle = centre + rng.uniform(-0.02, 0.02, 3) * 2 * head.half
    return affine, Grid(shape, pose.T @ affine[:3, :3], pose.T @ (affine[:3, 3] - middle))


def _paint(head: Head, grid: Grid, signal: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Signal, tissue, and the fractions of ventricle and of lesion in each voxel: four arrays (X, Y, Z)."""
    edge = float(np.linalg.norm(grid.matrix, axis=0).mean())  # width of a border, mm
    image, tissue = np.zeros(grid.shape, np.float32), np.zeros(grid.shape, np.uint8)

    def cover(distance: np.ndarray) -> np.ndarray:
        return np.clip(distance * np.float32(1 / edge) + np.float32(0.5), 0, 1)

    def paint(name: str, distance: np.ndarray, strength: np.ndarray | float = 1.0) -> np.ndarray:
        amount = cover(distance)
        which = TISSUES.index(name)
        image[...] += amount * strength * (np.float32(signal[which]) - image)
        tissue[amount * strength > 0.5] = which
        return amount

    body = head.distances(grid)
    patchy = Waves(rng, 0.2 * head.half, 0.5 * head.half).on(grid)
    bone = np.float32(0.03 * 2 * head.half)
    paint("skin", body["skin"])
    paint("fat", body["skin"] - np.float32(0.4 * head.fine), 0.9)
    paint("muscle", body["face"] - np.float32(1.5 * head.fine), np.clip(0.6 + 0.5 * patchy, 0, 1))
    paint("eye", body["eye"])
    paint("skull", body["cavity"] + bone)
    paint("marrow", np.float32(0.4) * bone - np.abs(body["cavity"] + bone / 2), np.clip(0.4 + 0.5 * patchy, 0, 1))
    paint("fluid", body["cavity"])
    # Pulsation leaves parts of the sulcal fluid brighter than the rest.
    image += cover(body["cavity"]) * np.clip(patchy - 1.2, 0, 0.5) * np.float32(0.3)
    paint("grey", body["grey"])
    paint("white", body["white"])
    paint("deep", np.minimum(body["deep"], body["cerebral white"] + np.float32(0.5 * head.ribbon)))
    bright = np.clip(0.35 + 0.4 * patchy, 0, 1) * (body["brain"] > 0)
    paint("rim", body["ventricle"] + np.float32(0.9 * head.fine), bright)
    ventricle = paint("ventricle", body["ventricle"])
    paint("choroid", body["choroid"])

    lesion = np.zeros(grid.shape, np.float32)
    for one in head.lesions:
        around, distance = head.lesion_distance(one, grid)
        amount = cover(np.minimum(distance, body["cerebral white"][around]))
        amount *= (ventricle[around] < 0.5) & (body["deep"][around] < 0)
        image[around] += amount * one.brightness * (np.float32(signal[-1]) - image[around])
        np.maximum(lesion[around], amount, out=lesion[around])
    return image, tissue, ventricle, lesion


# Files ----------------------------------------------------------------------------------------------------------------


def write_phantoms(
    folder: Path,
    subjects: int,
    seed: int = 0,
    *,
    sequences: Sequence[str] = tuple(SIGNAL),
    labels: bool = False,
    fov: float = 64.0,
    first: int = 1,
) -> Path:
    """Write `images/sub-0001_FLAIR.nii.gz`, ..., with `labels` the same names in `labels/`, and a dataset.json.

    Subjects go through SCANNERS by turns. The folder appears complete or not at all.

    Args:
        folder: new or empty, or written before by the same call, which is then left as it is.
        subjects: number of heads.
        seed: of the set, >= 0.
        sequences: scans of each head, keys of SIGNAL.
        labels: also write label maps, values as in LABELS.
        fov: field of view, mm.
        first: number of the first subject; sets that must not share a head take different ones.

    Raises:
        ValueError: the folder holds something else.
    """
    wanted = {"subjects": subjects, "seed": seed, "sequences": list(sequences), "labels": labels, "fov": float(fov)}
    wanted["first"] = first
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        record = folder / "dataset.json"
        if record.is_file() and json.loads(record.read_text()).get("phantoms") == wanted:
            return folder
        raise ValueError(f"{folder}: not empty, and not this set of phantoms; take another folder or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        new.chmod(0o755)  # mkdtemp hides it from everyone else
        for path, content in _files(wanted):
            (new / path).parent.mkdir(exist_ok=True)
            (new / path).write_bytes(content)
        names = {str(value): name for value, name in LABELS.items()} if labels else {}
        content = {"name": "synthetic heads", "labels": names, "phantoms": wanted}
        (new / "dataset.json").write_text(json.dumps(content, indent=1) + "\n")
        new.rename(folder)
    except OSError:
        if not (folder / "dataset.json").is_file():  # else another process was faster
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def _files(wanted: dict) -> Iterator[tuple[str, bytes]]:
    subjects = range(wanted["first"], wanted["first"] + wanted["subjects"])
    for subject, (turn, sequence) in product(subjects, enumerate(wanted["sequences"])):
        scanner = SCANNERS[(subject + turn) % len(SCANNERS)]
        drawn = phantom(wanted["seed"], subject, sequence, scanner, fov=wanted["fov"])
        name = f"sub-{subject:04d}_{sequence}.nii.gz"
        yield f"images/{name}", _nifti(drawn.image, drawn.affine, scanner)
        if wanted["labels"]:
            yield f"labels/{name}", _nifti(drawn.label, drawn.affine, replace(scanner, dtype="uint8", slope=1.0))


def _nifti(values: np.ndarray, affine: np.ndarray, scanner: Scanner) -> bytes:
    """A gzipped NIfTI file; the same bytes for the same arguments (no time stamp)."""
    whole = np.issubdtype(scanner.dtype, np.integer)
    if whole:
        limits = np.iinfo(scanner.dtype)
        values = np.rint(values / scanner.slope).clip(limits.min, limits.max)
    image = nib.Nifti1Image(values.astype(scanner.dtype), affine)
    image.set_qform(affine, code=int(scanner.form != "sform"))
    image.set_sform(affine, code=int(scanner.form != "qform"))
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"synthetic head"
    if whole:
        image.header.set_slope_inter(scanner.slope, 0)
    return gzip.compress(image.to_bytes(), compresslevel=4, mtime=0)


def make_demo_data(folder: Path, labels: bool = False) -> Path:
    """The store that training on `demo` data uses, three scans of each of 12 heads, in `folder`; made on first use."""
    kind = "labelled-" if labels else ""
    heads = write_phantoms(folder / f"{kind}phantoms", labels=labels, **DEMO)
    found = collect(heads / "images", heads / "labels" if labels else None)
    result = write_store(found, folder / f"{kind}store", Config())
    assert result.status() == 0, result.summary()
    return result.store


def main() -> int:
    parser = Parser(prog="python -m amaes.phantom", description="Write synthetic heads as NIfTI files.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--subjects", type=positive_int, default=8, help="number of heads")
    parser.add_argument("--sequences", nargs="+", choices=list(SIGNAL), default=list(SIGNAL), help="scans of each head")
    parser.add_argument("--labels", action="store_true", help="also write label maps: 1 lesion, 2 ventricle")
    parser.add_argument("--fov", type=positive_float, default=64.0, help="field of view, mm; 200 holds an adult head")
    parser.add_argument("--first", type=non_negative_int, default=1, help="number of the first subject")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the whole set")
    args = vars(parser.parse_args())
    folder = write_phantoms(args.pop("out"), **args)
    sys.stdout.write(f"{len(args['sequences']) * args['subjects']} scans of {args['subjects']} heads in {folder}\n")
    return 0


if __name__ == "__main__":
    run(main)
