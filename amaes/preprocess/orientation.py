"""Along which RAS axes a volume is stored: decided here, in one place, so that rounding never decides it."""

from __future__ import annotations

from itertools import permutations

import numpy as np

TIE = 1e-3  # sums of cosines that differ by less are equal: 0.02 degrees around a scan turned by 45 degrees
RAS = np.eye(4)


def axis_assignment(affine: np.ndarray, axes: np.ndarray = RAS) -> np.ndarray:
    """Which axis each stored axis becomes, and whether it is reversed.

    Of the six assignments, the one whose axes point best along the new ones: largest sum of cosines, after shear is
    taken out. Where two are equal, as of a scan turned by 45 degrees, the new directions themselves decide, so that
    neither rounding nor the order of the stored axes does.

    Args:
        affine: (4, 4), stored voxel to mm, of rank 3.
        axes: (4, 4), whose columns are the new axes. For a file that belongs to an image, the grid of that image in
            RAS: the two then lie alike in their arrays, however they are stored.

    Returns:
        (3, 2) int: stored axis i becomes axis [i, 0], reversed where [i, 1] is -1.
    """
    cosines = _directions(axes).T @ _directions(affine)  # (new axis, stored axis)
    candidates = []
    for order in permutations(range(3)):  # new axis k is stored axis order[k]
        turned = cosines[:, order]
        signs = np.where(np.diag(turned) < 0, -1, 1)
        turned = turned * signs
        candidates.append((order, signs, [np.trace(turned), *turned.ravel()]))
    for k in range(10):
        best = max(score[k] for _, _, score in candidates)
        candidates = [candidate for candidate in candidates if candidate[2][k] > best - TIE]
    order, signs, _ = candidates[0]
    ornt = np.zeros((3, 2), dtype=int)
    ornt[list(order)] = np.column_stack([range(3), signs])
    return ornt


def is_same_way(ornt: np.ndarray) -> bool:
    """No axis is exchanged or reversed."""
    return bool((ornt == [[0, 1], [1, 1], [2, 1]]).all())


def stored_axes(ornt: np.ndarray) -> tuple[int, ...]:
    """For each new axis, the stored axis it comes from."""
    return tuple(int(axis) for axis in np.argsort(ornt[:, 0]))


def letters(ornt: np.ndarray) -> str:
    """Where the stored axes point, such as "LPS"."""
    return "".join(("RAS" if sign > 0 else "LPI")[axis] for axis, sign in ornt)


def _directions(affine: np.ndarray) -> np.ndarray:
    """(3, 3): the orthogonal matrix nearest to the directions of the columns."""
    columns = np.asarray(affine, dtype=np.float64)[:3, :3]
    u, _, vt = np.linalg.svd(columns / np.linalg.norm(columns, axis=0))
    return u @ vt
