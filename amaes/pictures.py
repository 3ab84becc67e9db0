"""Pictures of volumes: middle slices in true proportions, and sheets of captioned panels as PNG files.

Volumes are (X, Y, Z), RAS+. A slice is an image (rows, columns), first row at the top: anterior is up in axial slices,
superior in the others; the left of the subject is on the left, and in sagittal slices the face is.

    row = Row("case 1", [Panel(hstack(middle_slices(volume)), "image"), ...])
    write_sheet(path, "heading", [row, ...])

Only `write_sheet` needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from amaes.files import written_whole

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

DPI = 100
# Pixels: heading of a sheet, title of a row, line of a caption, space between panels.
HEADING, TITLE, LINE, GAP = 24, 17, 12, 4
# Of the classes 1, 2, ... of a label, then again from the first; the colour-blind tell them apart (Okabe and Ito).
COLOURS = np.array([(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167)]) / 255

COLOUR_NAMES = ("orange", "light blue", "green", "yellow", "red", "pink")


@dataclass(frozen=True)
class Panel:
    """A picture on a sheet.

    Attributes:
        image: (rows, columns), 0 black and 1 white; values outside are shown as black or white, NaN as black.
        caption: below the title of the row; may have several lines.
        label: (rows, columns), integer; the borders of its classes are drawn over the image in colour, 0 is none.
        marked: caption in orange.
    """

    image: np.ndarray
    caption: str = ""
    label: np.ndarray | None = None
    marked: bool = False


@dataclass(frozen=True)
class Row:
    """Panels side by side under a title; without one they move up."""

    title: str
    panels: Sequence[Panel]


def check_matplotlib(parameter: str) -> None:
    """Refuse a parameter that asks for pictures where matplotlib is not installed.

    Raises:
        ValueError: names the parameter and the remedy.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:  # of matplotlib itself, or of what it needs
        raise ValueError(f"`{parameter}`: needs matplotlib ({error}): pip install 'amaes[plots]'") from None


def middle_slices(
    volume: np.ndarray,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    pixel: float | None = None,
    at: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """The axial, coronal and sagittal slice through the middle voxel, or another, in true proportions.

    Args:
        volume: (X, Y, Z), RAS+; image or label, never interpolated: each pixel takes the voxel it lies in.
        spacing: of the voxels, mm.
        pixel: side of a pixel, mm; the smallest spacing by default.
        at: (x, y, z), the voxel that the slices go through; the middle one by default.

    Returns:
        (Y, X), (Z, X) and (Z, Y) in voxels, where all spacings equal `pixel`.
    """
    x, y, z = at or (side // 2 for side in volume.shape)
    across, along, up = (mm / (pixel or min(spacing)) for mm in spacing)  # pixels per voxel
    return [
        _enlarge(volume[:, ::-1, z].T, along, across),
        _enlarge(volume[:, y, ::-1].T, up, across),
        _enlarge(volume[x, ::-1, ::-1].T, up, along),
    ]


def _enlarge(image: np.ndarray, rows: float, columns: float) -> np.ndarray:
    """An image with so many pixels per row and column, rounded to whole images."""
    index = []
    for side, factor in zip(image.shape, (rows, columns), strict=True):
        pixels = max(1, round(side * factor))
        index.append(((np.arange(pixels) + 0.5) * side / pixels).astype(int))
    return image[np.ix_(*index)]


def centred(array: np.ndarray, sides: Sequence[int], fill: float = 0.0) -> np.ndarray:
    """The middle of an array, surrounded by `fill` where it is smaller: any shape -> `sides`."""
    result = np.full(sides, fill, array.dtype)
    target, source = [], []
    for size, side in zip(array.shape, sides, strict=True):
        length, gap = min(size, side), (side - size) // 2
        target.append(slice(max(gap, 0), max(gap, 0) + length))
        source.append(slice(max(-gap, 0), max(-gap, 0) + length))
    result[tuple(target)] = array[tuple(source)]
    return result


def hstack(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images side by side, with a little space between them, centred in height."""
    height = max(len(image) for image in images)
    parts = [centred(image, (height, image.shape[1] + (GAP if k else 0))) for k, image in enumerate(images)]
    return np.concatenate(parts, axis=1)


def outlined(image: np.ndarray, label: np.ndarray | None) -> np.ndarray:
    """Grey as red, green and blue, the outermost pixels of every class of the label in its colour.

    Args:
        image: (rows, columns).
        label: (rows, columns), integer, 0 background; None: no outlines.

    Returns:
        (rows, columns, 3), in [0, 1].
    """
    grey = np.clip(np.nan_to_num(np.asarray(image, np.float32)), 0, 1)
    colours = np.repeat(grey[:, :, None], 3, axis=2)
    if label is not None:
        around = np.pad(label, 1, mode="edge")
        neighbours = (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:])
        border = (label > 0) & np.any([label != other for other in neighbours], axis=0)
        colours[border] = COLOURS[(label[border].astype(int) - 1) % len(COLOURS)]
    return colours


def write_patches(path: Path, images: Mapping[str, torch.Tensor], names: Sequence[str], heading: str) -> None:
    """Write the three middle slices of every image of every patch, a row per patch.

    Args:
        path: of the PNG file.
        images: (B, 1, X, Y, Z) by caption, intensities in [0, 1], cubic voxels.
        names: of the patches, (B,).
        heading: of the page.
    """
    volumes = {caption: image[:, 0].float().cpu().numpy() for caption, image in images.items()}
    rows = [
        Row(name, [Panel(hstack(middle_slices(volume[k])), caption) for caption, volume in volumes.items()])
        for k, name in enumerate(names)
    ]
    widest = max(max(volume.shape[1:]) for volume in volumes.values())
    write_sheet(path, heading, rows, zoom=max(1, round(160 / widest)))


def write_sheet(path: Path, heading: str, rows: Sequence[Row], zoom: int = 1) -> None:
    """Write rows of panels on black.

    Args:
        path: of the PNG file.
        heading: of the page.
        rows: their panels stand in columns.
        zoom: side of a pixel of a panel in pixels of the file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    columns = max(len(row.panels) for row in rows)
    widths = [
        zoom * max(row.panels[k].image.shape[1] for row in rows if k < len(row.panels)) + GAP for k in range(columns)
    ]
    heights = [_height(row, zoom) for row in rows]
    page = np.zeros((HEADING + sum(heights), max(sum(widths), 300), 3), np.float32)
    figure = Figure(figsize=(page.shape[1] / DPI, page.shape[0] / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    _write(axes, heading, 2, 4, page.shape[1], size=9)
    top = HEADING
    for row, height in zip(rows, heights, strict=True):
        if row.title:
            _write(axes, row.title, 2, top + 2, page.shape[1], size=8, weight="bold")
        below = top + (TITLE if row.title else 0)
        left = 0
        for panel, width in zip(row.panels, widths, strict=False):
            _write(axes, panel.caption, left + 2, below, width, size=7, color="orange" if panel.marked else "white")
            label = None if panel.label is None else _repeat(panel.label, zoom)
            image = outlined(_repeat(panel.image, zoom), label)
            start = top + height - GAP - len(image)
            page[start : start + len(image), left : left + image.shape[1]] = image
            left += width
        top += height
    axes.imshow(page, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    with written_whole(path) as file:
        figure.savefig(file, format="png")


def _height(row: Row, zoom: int) -> int:
    """Pixels of a row: title, captions, panels and the space below them."""
    lines = max(len(panel.caption.splitlines()) for panel in row.panels)
    tallest = max(len(panel.image) for panel in row.panels)
    return (TITLE if row.title else 0) + lines * LINE + 3 + zoom * tallest + GAP


def _repeat(image: np.ndarray, zoom: int) -> np.ndarray:
    return image.repeat(zoom, axis=0).repeat(zoom, axis=1)


def _write(
    axes: Axes, text: str, left: int, top: int, width: int, *, size: int, color: str = "white", weight: str = "normal"
) -> None:
    """Write lines of text that begin at a pixel; what is wider than `width` pixels is cut."""
    letters = int(width / (0.78 * size))  # a letter is about 0.78 pixels wide per point
    for k, line in enumerate(text.splitlines()):
        shown = line if len(line) <= letters else f"{line[: letters - 1]}…"
        axes.text(left, top + k * LINE, shown, color=color, fontsize=size, weight=weight, va="top", parse_math=False)
