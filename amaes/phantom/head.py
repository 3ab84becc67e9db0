"""The anatomy of one head: signed distances of its bodies at any point, drawn from seeded parameters.

A distance is in mm and positive inside. Bodies are ellipsoids, smooth random waves bend them, and the cortex is a
folded surface: scalp, skull, a cavity with fluid, a grey ribbon over white matter, ventricles, deep nuclei,
cerebellum, lesions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation


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
        self.size = rng.normal(1.0, 0.035, 3).clip(0.92, 1.06)  # relative, along right, anterior, superior
        self.taper = rng.uniform(0.05, 0.16)  # the back of the head is wider than the front
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
        half, size = self.half, self.size * self.half
        bump = self.bumps.on(grid) * np.float32(0.012 * half)
        x = x * (1 + np.float32(self.taper / half) * y) + np.float32(0.4) * bump

        def body(centre: Sequence[float], axes: Sequence[float], mirrored: bool = False) -> np.ndarray:
            at = (np.abs(x) if mirrored else x, y, z)
            return ellipsoid(at, np.multiply(centre, half), np.multiply(axes, size))

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
        edge, side = 1.1 * self.half, 48  # of the coarse grid that the field is computed on: mm, points
        step = 2 * edge / (side - 1)
        coarse = self.folds.on(Grid((side,) * 3, np.eye(3) * step, np.full(3, -edge)))
        fold = map_coordinates(coarse, (points + edge) / step, order=1, mode="nearest")
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
        lesions = []
        for index in range(count):
            kind = kinds[index % 3]
            cells = np.argwhere(kind if kind.any() else white == white.max())
            centre = (cells[rng.integers(len(cells))] + rng.uniform(-0.5, 0.5, 3) - 23.5) * step
            radius = self.fine * rng.choice((2.0, 2.6, 3.3, 4.4), p=(0.2, 0.35, 0.3, 0.15)) * rng.uniform(0.9, 1.2)
            axes = radius * rng.uniform(0.75, 1.3, 3)
            rotation = Rotation.from_rotvec(rng.uniform(-1.5, 1.5, 3)).as_matrix()
            lesions.append(Lesion(centre, axes, rotation, float(rng.uniform(0.65, 1.0))))
        return lesions

    def lesion_distance(self, lesion: Lesion, grid: Grid) -> tuple[tuple[slice, ...], np.ndarray]:
        """The part of the grid around a lesion, and the signed distance there, mm; white matter bounds it elsewhere."""
        middle = np.linalg.solve(grid.matrix, lesion.centre - grid.offset)
        extent = (1.5 * lesion.axes.max() + 1) / np.linalg.norm(grid.matrix, axis=0)  # voxels
        start = np.floor(middle - extent).clip(0, grid.shape).astype(int)
        stop = np.ceil(middle + extent + 1).clip(0, grid.shape).astype(int)
        part = Grid(tuple(stop - start), grid.matrix, grid.offset + grid.matrix @ start)
        around = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        turned = Grid(part.shape, lesion.rotation @ part.matrix, lesion.rotation @ (part.offset - lesion.centre))
        distance = ellipsoid(turned.positions(), (0, 0, 0), lesion.axes)
        return around, distance + self.ripple.on(part) * np.float32(0.22 * lesion.axes.mean())
