"""Scores of a predicted label map against a reference, in mm and ml; every empty state has one stated value.

Each metric is written for a `Pair` (one class of both maps) and called with two masks: `dice(prediction, reference)`,
`hd95(prediction, reference, spacing=(1, 1, 3))`. `METRICS` names them all, `measure_case` scores all classes of a case.

    masks                overlap, surface Dice, lesion F1    distances
    both empty           NaN (empty="one": 1)                NaN
    only one is empty    0                                   diagonal of the image

So a missed structure always costs: it never becomes a NaN that a mean would leave out. Ratios to the reference are NaN
where the reference is empty: the recall of no lesions, a volume difference in % of nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import scipy  # loads scipy.ndimage and scipy.spatial when they are used: --help needs neither

from amaes.choices import EMPTY

NAN = float("nan")
DEFAULT_METRICS = ("dice", "hd95", "surface_dice", "volume_difference")
METRICS: dict[str, Callable[[Pair], float]] = {}  # filled by `metric`
OVERLAP_METRICS = ("dice",)  # they need the counts of voxels alone
_ALL_NEIGHBOURS = np.ones((3, 3, 3), bool)  # lesions are 26-connected
_SPARSE = 20  # voxels of the box per surface voxel, above which a k-d tree beats a distance transform
_ROUNDING = 1e-5  # mm, of distances: affines are stored in float32, which makes 1 mm 1.00000002 mm
_SLAB = 1 << 22  # voxels counted at once: the index array of the confusion matrix stays at 32 MB


class Counts:
    """Voxels of one class: true positives, false positives, false negatives; `empty` as in `Pair`."""

    def __init__(self, tp: int, fp: int, fn: int, empty: str = "nan") -> None:
        if empty not in EMPTY:
            raise ValueError(f"`empty` {empty!r} is unknown; accepted: {', '.join(EMPTY)}")
        self.tp, self.fp, self.fn = int(tp), int(fp), int(fn)
        self.n_reference, self.n_prediction = self.tp + self.fn, self.tp + self.fp
        self.both_empty = 1.0 if empty == "one" else NAN

    @property
    def status(self) -> str:
        """ok, missed (only the reference has voxels), false_positive (only the prediction has) or both_empty."""
        if self.n_reference == 0:
            return "false_positive" if self.n_prediction else "both_empty"
        return "ok" if self.n_prediction else "missed"


class Pair(Counts):
    """One class of a prediction beside its reference.

    Both masks are cropped to their joint bounding box. Nothing lies outside it, so surfaces, distances and components
    are the same there as in the whole image. Distances and components are computed when a metric asks, once.

    Args:
        prediction, reference: masks, (X, Y, Z).
        spacing: of the voxels, mm.
        empty: "nan" or "one": what an overlap metric gives for two empty masks.
        tau: tolerance of the surface Dice, mm.
        shape: of the whole image, where the masks come cropped; it sets the diagonal.

    Raises:
        ValueError: the shapes differ or are not 3D, the spacing is not three positive numbers.
    """

    def __init__(self, prediction, reference, spacing=(1.0, 1.0, 1.0), empty="nan", tau=1.0, shape=None) -> None:
        prediction, reference = np.asarray(prediction, bool), np.asarray(reference, bool)
        self.spacing = _checked_spacing(prediction, reference, spacing)
        self.diagonal = float(np.linalg.norm(self.spacing * (shape or prediction.shape)))  # mm
        self.tau = tau
        box = bounding_box(prediction | reference)
        self.prediction, self.reference = prediction[box], reference[box]
        tp = np.count_nonzero(self.prediction & self.reference)
        fp, fn = np.count_nonzero(self.prediction) - tp, np.count_nonzero(self.reference) - tp
        super().__init__(tp, fp, fn, empty)

    @functools.cached_property
    def distances(self) -> tuple[np.ndarray, np.ndarray]:
        """From each surface voxel of the prediction to the reference's surface, and back, mm; both masks non-empty."""
        prediction, reference = _surface(self.prediction), _surface(self.reference)
        if prediction.size > _SPARSE * (np.count_nonzero(prediction) + np.count_nonzero(reference)):
            a, b = np.argwhere(prediction) * self.spacing, np.argwhere(reference) * self.spacing
            return _nearest(a, b), _nearest(b, a)
        to_reference = scipy.ndimage.distance_transform_edt(~reference, sampling=self.spacing)[prediction]
        to_prediction = scipy.ndimage.distance_transform_edt(~prediction, sampling=self.spacing)[reference]
        return to_reference, to_prediction

    @functools.cached_property
    def lesions(self) -> tuple[int, int, int]:
        """Numbers of reference lesions that the prediction touches, of those it misses, and of predicted lesions that
        touch no reference."""
        references, n_references = scipy.ndimage.label(self.reference, _ALL_NEIGHBOURS)
        predictions, n_predictions = scipy.ndimage.label(self.prediction, _ALL_NEIGHBOURS)
        n_touched = np.count_nonzero(np.unique(references[self.prediction]))
        n_correct = np.count_nonzero(np.unique(predictions[self.reference]))
        return n_touched, n_references - n_touched, n_predictions - n_correct

    @functools.cached_property
    def n_lesions(self) -> tuple[int, int]:
        """Numbers of lesions of the prediction and of the reference."""
        return tuple(scipy.ndimage.label(mask, _ALL_NEIGHBOURS)[1] for mask in (self.prediction, self.reference))

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel, ml."""
        return float(np.prod(self.spacing)) / 1000


def metric(function: Callable[[Pair], float]) -> Callable[..., float]:
    """Enter a function of a `Pair` in METRICS and return it as a function of two masks."""
    METRICS[function.__name__] = function

    def of_masks(prediction, reference, spacing=(1.0, 1.0, 1.0), *, empty="nan", tau=1.0) -> float:
        return function(Pair(prediction, reference, spacing, empty, tau))

    of_masks.__name__ = of_masks.__qualname__ = function.__name__
    of_masks.__doc__ = f"{function.__doc__}\n\n    Arguments as those of `Pair`: masks (X, Y, Z), spacing, tau in mm."
    return of_masks


@metric
def dice(pair: Counts) -> float:
    """2 TP / (2 TP + FP + FN) on voxel counts."""
    return _ratio(2 * pair.tp, 2 * pair.tp + pair.fp + pair.fn, pair.both_empty)


@metric
def volume_difference(pair: Pair) -> float:
    """|volume of the prediction - volume of the reference|, ml."""
    return abs(pair.n_prediction - pair.n_reference) * pair.voxel_ml


@metric
def relative_volume_difference(pair: Pair) -> float:
    """|volume of the prediction - volume of the reference| in % of the reference; NaN when that is empty."""
    return 100 * _ratio(abs(pair.n_prediction - pair.n_reference), pair.n_reference)


@metric
def hd95(pair: Pair) -> float:
    """Larger of the two directed 95th percentiles of the distances between surfaces, mm (the form of MONAI).

    A surface is a mask minus its erosion by the 6 neighbours. One empty mask gives the diagonal of the image.
    """
    if pair.status != "ok":
        return _distance_when_empty(pair)
    return float(max(np.percentile(distances, 95) for distances in pair.distances))


@metric
def surface_dice(pair: Pair) -> float:
    """Share of both surfaces within tau mm of the other one (normalised surface Dice, Nikolov et al. 2018)."""
    if pair.status != "ok":
        return pair.both_empty if pair.status == "both_empty" else 0.0
    distances = np.concatenate(pair.distances)
    return float(np.mean(distances <= pair.tau + _ROUNDING))


@metric
def lesion_f1(pair: Pair) -> float:
    """F1 over lesions (26-connected components): TP / (TP + (FP + FN) / 2).

    TP: lesions of the reference that the prediction touches by at least one voxel; FN: the others;
    FP: predicted lesions that touch no reference.
    """
    n_touched, n_missed, n_false = pair.lesions
    return _ratio(2 * n_touched, 2 * n_touched + n_missed + n_false, pair.both_empty)


@metric
def lesion_recall(pair: Pair) -> float:
    """TP / (TP + FN) over lesions as in `lesion_f1`; NaN when the reference has none."""
    n_touched, n_missed, _ = pair.lesions
    return _ratio(n_touched, n_touched + n_missed)


@metric
def lesion_count_difference(pair: Pair) -> float:
    """|lesions of the prediction - lesions of the reference|."""
    n_prediction, n_reference = pair.n_lesions
    return float(abs(n_prediction - n_reference))


def measure_case(
    prediction: np.ndarray,
    reference: np.ndarray,
    num_classes: int,
    spacing: Sequence[float],
    metrics: Iterable[str] = DEFAULT_METRICS,
    empty: str = "nan",
    regions: Mapping[str, Sequence[int]] | None = None,
    tau: float = 1.0,
) -> dict[str, dict]:
    """Score every foreground class (or region) of one case.

    Args:
        prediction, reference: class numbers, integers in [0, num_classes), (X, Y, Z) on the same grid.
        num_classes: background included.
        spacing: of the voxels, mm.
        metrics: names from METRICS.
        empty: "nan" or "one", what overlap metrics give where both maps have no voxel.
        regions: name -> foreground classes scored as one mask (BraTS: {"WT": (1, 2, 3), ...}), instead of the classes.
        tau: tolerance of the surface Dice, mm.

    Returns:
        {"1": {"n_ref", "n_pred", "status", metric: value, ...}, ..., "all": {...}}; "all" is the micro average, the
        overlap metrics among `metrics` on voxel counts summed over the classes (or regions).

    Raises:
        ValueError: shapes differ, a class number is out of range, a metric is unknown.
    """
    metrics = tuple(metrics)
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"`metrics` {', '.join(unknown)}: unknown; accepted: {', '.join(METRICS)}")
    spacing = _checked_spacing(prediction, reference, spacing)
    confusion = confusion_matrix(prediction, reference, num_classes)
    groups = {str(k): (k,) for k in range(1, num_classes)} if regions is None else dict(regions)
    for name, classes in groups.items():
        if not all(0 < k < num_classes for k in classes):
            raise ValueError(f"region {name}: classes {list(classes)}; accepted: 1 to {num_classes - 1}")
    needs_masks = any(name not in OVERLAP_METRICS for name in metrics)
    boxes = _boxes(prediction, reference, num_classes) if needs_masks else []

    scores, total = {}, np.zeros(3, np.int64)
    for name, classes in groups.items():
        member = np.isin(np.arange(num_classes), classes)
        tp = confusion[np.ix_(member, member)].sum()
        fp, fn = confusion[~member][:, member].sum(), confusion[member][:, ~member].sum()
        pair = Counts(tp, fp, fn, empty)
        total += tp, fp, fn
        if needs_masks:
            box = _joint_box([boxes[k] for k in classes])
            masks = member[prediction[box]], member[reference[box]]
            pair = Pair(*masks, spacing, empty, tau, shape=prediction.shape)
        scores[name] = _row(pair, metrics)
    scores["all"] = _row(Counts(*total, empty), [name for name in metrics if name in OVERLAP_METRICS])
    return scores


def confusion_matrix(prediction: np.ndarray, reference: np.ndarray, num_classes: int) -> np.ndarray:
    """Voxels per (reference class, predicted class): (K, K) int64. One pass, a slab of planes at a time."""
    counts = np.zeros(num_classes * num_classes, np.int64)
    planes = max(1, _SLAB // max(1, int(np.prod(prediction.shape[1:]))))
    for start in range(0, len(prediction), planes):
        pair = [np.asarray(labels[start : start + planes]) for labels in (prediction, reference)]
        for name, labels in zip(("prediction", "reference"), pair, strict=True):
            if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
                unknown = sorted(set(np.unique(labels).tolist()) - set(range(num_classes)))
                raise ValueError(f"the {name} has labels {unknown}; accepted: 0 to {num_classes - 1}")
        index = pair[1].astype(np.intp)
        index *= num_classes
        index += pair[0]
        counts += np.bincount(index.ravel(), minlength=counts.size)
    return counts.reshape(num_classes, num_classes)


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Smallest box around the True voxels; empty slices when there is none."""
    box = []
    for axis in range(mask.ndim):
        planes = np.flatnonzero(mask.any(tuple(i for i in range(mask.ndim) if i != axis)))  # that hold a True voxel
        box.append(slice(int(planes[0]), int(planes[-1]) + 1) if planes.size else slice(0, 0))
    return tuple(box)


def _row(pair: Counts, metrics: Iterable[str]) -> dict:
    row = {"n_ref": pair.n_reference, "n_pred": pair.n_prediction, "status": pair.status}
    return row | {name: METRICS[name](pair) for name in metrics}


def _ratio(numerator: float, denominator: float, when_zero: float = NAN) -> float:
    return float(numerator / denominator) if denominator else when_zero


def _distance_when_empty(pair: Pair) -> float:
    """The value of a distance where a mask is empty: see the table at the top."""
    return NAN if pair.status == "both_empty" else pair.diagonal


def _surface(mask: np.ndarray) -> np.ndarray:
    return mask & ~scipy.ndimage.binary_erosion(mask)  # outside the box counts as background


def _nearest(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distance from each point to the nearest of the others: (N, 3), (M, 3) -> (N,)."""
    tree = scipy.spatial.cKDTree(others, balanced_tree=False, compact_nodes=False)  # fastest for points of a grid
    return tree.query(points)[0]


def _boxes(prediction: np.ndarray, reference: np.ndarray, num_classes: int) -> list[list[tuple[slice, ...]]]:
    """Per class, background included, the boxes around its voxels in both maps; all classes in one pass over each."""
    maps = np.asarray(prediction), np.asarray(reference)
    of_maps = [scipy.ndimage.find_objects(labels, max_label=num_classes - 1) for labels in maps]  # None: no voxel
    return [[], *([box for box in both if box is not None] for both in zip(*of_maps, strict=True))]


def _joint_box(boxes: list[list[tuple[slice, ...]]]) -> tuple[slice, ...]:
    boxes = [box for both in boxes for box in both]
    if not boxes:
        return (slice(0, 0),) * 3
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes, strict=True))


def _checked_spacing(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    if prediction.ndim != 3 or prediction.shape != reference.shape:
        raise ValueError(f"prediction {prediction.shape} and reference {reference.shape}: expected one shape (X, Y, Z)")
    spacing = np.asarray(spacing, float)
    if spacing.shape != (3,) or not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise ValueError(f"`spacing` {spacing.tolist()}: expected three positive numbers, in mm")
    return spacing
