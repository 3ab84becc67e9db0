"""Pictures of patches: middle slices side by side, a row per patch. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from amaes.files import written_whole


def check_matplotlib(option: str) -> None:
    """Refuse `option` where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:  # of matplotlib itself, or of what it needs
        raise ValueError(f"{option}: needs matplotlib ({error}): pip install 'amaes[plots]'") from None


def save_panels(path: Path, images: Mapping[str, torch.Tensor], rows: Sequence[str], heading: str) -> None:
    """Write the middle slices along the three axes of every image of every patch, as a PNG.

    Args:
        path: of the file.
        images: (B, 1, X, Y, Z) by caption, in [0, 1]; values outside are shown as 0 or 1.
        rows: a name per patch.
        heading: of the page.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 * 3 * len(images), 2.4 * len(rows) + 0.6), layout="constrained")
    figure.suptitle(heading, fontsize=10)
    grid = figure.subplots(len(rows), 3 * len(images), squeeze=False)
    for line, name in enumerate(rows):
        for column, (caption, image) in enumerate(images.items()):
            for axis, view in enumerate(middle_slices(image[line, 0].float().cpu().numpy())):
                axes = grid[line, 3 * column + axis]
                axes.imshow(view, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axes.set_axis_off()
                axes.set_title(f"{name}: {caption}" if axis == 0 else "", fontsize=6, loc="left")
    with written_whole(path) as file:
        figure.savefig(file, format="png", dpi=80)


def middle_slices(volume: np.ndarray) -> list[np.ndarray]:
    """(X, Y, Z), RAS+, to the sagittal (Z, Y), coronal (Z, X) and axial (Y, X) middle slices; head and nose up."""
    x, y, z = (side // 2 for side in volume.shape)
    return [view.T[::-1] for view in (volume[x], volume[:, y], volume[:, :, z])]
