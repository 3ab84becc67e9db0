"""One scan of a head: the grid of a scanner, tissues painted one after the other, and what scanners add."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from amaes.phantom.head import Grid, Head, Waves
from amaes.phantom.tables import FOV, SCANNERS, SIGNAL, TISSUES, Scanner
from amaes.rng import stream


@dataclass(frozen=True)
class Phantom:
    """One scan: image (X, Y, Z) float32 >= 0; label (X, Y, Z) uint8, see LABELS; tissue (X, Y, Z) uint8, index into
    TISSUES, without lesions; affine (4, 4), stored voxel to RAS+ mm."""

    image: np.ndarray
    label: np.ndarray
    tissue: np.ndarray
    affine: np.ndarray


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
        raise ValueError(f"`sequence` {sequence!r} is unknown; accepted: {', '.join(SIGNAL)}")
    if not FOV[0] <= fov <= FOV[1]:
        raise ValueError(f"`fov` is {fov:g} mm; accepted: {FOV[0]:g} to {FOV[1]:g}")
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
        index = TISSUES.index(name)
        image[...] += amount * strength * (np.float32(signal[index]) - image)
        tissue[amount * strength > 0.5] = index
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

    lesions = np.zeros(grid.shape, np.float32)
    for lesion in head.lesions:
        around, distance = head.lesion_distance(lesion, grid)
        amount = cover(np.minimum(distance, body["cerebral white"][around]))
        amount *= (ventricle[around] < 0.5) & (body["deep"][around] < 0)
        image[around] += amount * lesion.brightness * (np.float32(signal[-1]) - image[around])
        np.maximum(lesions[around], amount, out=lesions[around])
    return image, tissue, ventricle, lesions
