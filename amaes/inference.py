"""From a preprocessed volume to a label map on the grid of the file it came from.

image (C, X, Y, Z) -> overlapping windows -> network -> weighted mean of logits -> resize to the cropped scan
-> class of the largest logit -> paste into the whole scan -> axes of the file -> values of the label files
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from amaes.hardware import memory_of, use_bf16
from amaes.preprocess.nifti import to_stored_axes

BLENDS = ("gaussian", "uniform")
PLACEMENTS = ("even", "flush")
MIRROR_AXES = (0, 1, 2)  # `tta_axes` of all 8 mirrorings
_FLOOR = 1e-3  # smallest weight as a fraction of the peak
_SLAB = 1 << 22  # voxels resized at once: 16 MB in float32

Box = tuple[slice, ...]


@torch.inference_mode()
def sliding_window(
    model: nn.Module,
    image: np.ndarray | torch.Tensor,
    patch_size: Sequence[int],
    *,
    overlap: float = 0.5,
    blend: str = "gaussian",
    placement: str = "even",
    batch_size: int | None = None,
    tta_axes: Sequence[int] = (),
    accumulate_device: torch.device | str | None = None,
    precision: str = "auto",
) -> torch.Tensor:
    """Logits of a whole volume: the weighted mean over windows that overlap.

    Every window goes through the network, even one that shows background only. A volume smaller than the patch is
    padded with 0 on both sides. Memory: the image, (K + 1) x 4 bytes per voxel for the sums, and the network's memory
    for one batch. The sums are on the network's device where the memory left after the first batch holds them, else on
    the CPU. If CUDA still runs out of memory, the batch is halved, then the sums move to the CPU.

    Args:
        model: in evaluation mode, (B, C, *patch) -> (B, K, *patch); of a list the first is taken.
        image: (C, X, Y, Z), [0, 1].
        patch_size: of a window, voxels.
        overlap: smallest fraction of a window that neighbours share, in [0, 1).
        blend: "gaussian" (sigma = patch / 8, at least 1e-3 of the peak) or "uniform".
        placement: "even" spreads the windows, "flush" steps by int(patch * (1 - overlap)) and moves the last one back.
        batch_size: windows per call of the network; None = `default_batch_size`.
        tta_axes: spatial axes (0, 1, 2) to mirror; logits are averaged over all 2^n combinations.
        accumulate_device: device of the sums; None decides by the free memory.
        precision: "auto" (bf16 on CUDA, fp32 on the CPU), "bf16" or "fp32"; sums are always float32.

    Returns:
        (K, X, Y, Z), float32.

    Raises:
        ValueError: an option is out of range, the network's output has another shape or is not finite, or one
            window does not fit into the memory of the GPU.
    """
    patch = _checked(image, patch_size, batch_size, tta_axes)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    padded, inside = _pad(_float_tensor(image, device), patch)  # (C, X', Y', Z')
    boxes = window_boxes(padded.shape[1:], patch, overlap, placement)
    sums = _Sums(padded.shape[1:], window_weight(patch, blend), accumulate_device)
    batch_size = batch_size or default_batch_size(patch, device)
    _add_windows(sums, model, padded, boxes, batch_size, tta_axes=tuple(tta_axes), precision=precision)
    return sums.mean()[(slice(None), *inside)]


def _add_windows(
    sums: _Sums,
    model: nn.Module,
    image: torch.Tensor,
    boxes: Sequence[Box],
    batch_size: int,
    tta_axes: tuple[int, ...],
    precision: str,
) -> None:
    """Add the logits of every window of `image` (C, X, Y, Z) to the sums; where CUDA runs out of memory, use less."""
    device, done = image.device, 0
    while done < len(boxes):
        batch = boxes[done : done + batch_size]
        try:
            windows = torch.stack([image[(slice(None), *box)] for box in batch])  # (B, C, *patch)
            with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(device, precision)):
                logits = _mirrored_mean(model, windows, tta_axes)  # (B, K, *patch)
            sums.add(logits, batch)
            done += len(batch)
        except torch.OutOfMemoryError as error:
            if batch_size > 1:
                batch_size //= 2
            elif sums.on_gpu:
                sums.move("cpu")
            else:
                size = " x ".join(str(side.stop - side.start) for side in boxes[0])
                raise ValueError(
                    f"one window of {size} voxels does not fit into the memory of {device}; take `precision` bf16, or "
                    "the CPU as `device`"
                ) from error


def ensemble_logits(
    models: Sequence[nn.Module], image: np.ndarray | torch.Tensor, patch_size: Sequence[int], **options
) -> torch.Tensor:
    """Logits of a whole volume from one network; from several, the logarithm of the mean of their probabilities.

    Memory: that of `sliding_window`, and for several networks once more its result.

    Args:
        models: one after the other sees the volume; at least one.
        image, patch_size, options: of `sliding_window`.

    Returns:
        (K, X, Y, Z), float32.
    """
    total = sliding_window(models[0], image, patch_size, **options)
    if len(models) == 1:
        return total
    total = _where_it_fits(torch.log_softmax, total, dim=0)
    for model in models[1:]:
        logits = sliding_window(model, image, patch_size, **options)
        total = _where_it_fits(torch.logaddexp, total, _where_it_fits(torch.log_softmax, logits, dim=0))
    return total - math.log(len(models))


def _where_it_fits(function: Callable[..., torch.Tensor], *tensors: torch.Tensor, **options) -> torch.Tensor:
    """A function of tensors; on the CPU where one of them is there, or the GPU has no room for the result."""
    if len({tensor.device for tensor in tensors}) == 1:
        try:
            return function(*tensors, **options)
        except torch.OutOfMemoryError:
            pass
    return function(*(tensor.cpu() for tensor in tensors), **options)


def predict_case(
    model: nn.Module, image: np.ndarray | torch.Tensor, properties: dict, patch_size: Sequence[int], **options
) -> np.ndarray:
    """Class numbers of one preprocessed case on the grid of its own file.

    Args:
        model, image, patch_size, options: of `sliding_window`.
        properties: what preprocessing recorded of the case.

    Returns:
        (X, Y, Z) of the file, uint8 (uint16 above 256 classes).
    """
    return restore_labels(sliding_window(model, image, patch_size, **options), properties)


# Windows --------------------------------------------------------------------------------------------------------------


def window_starts(length: int, patch: int, overlap: float, placement: str = "even") -> list[int]:
    """First voxels of the windows along one axis of at least `patch` voxels; the windows cover it, none leaves it."""
    if not 0 <= overlap < 1:
        raise ValueError(f"`overlap` {overlap}: expected a fraction in [0, 1)")
    if placement not in PLACEMENTS:
        raise ValueError(f"`placement` {placement!r} is unknown; accepted: {', '.join(PLACEMENTS)}")
    last = length - patch
    step = max(1, int(patch * (1 - overlap)))
    steps = -(-last // step)  # ceil
    if placement == "flush":
        return [min(i * step, last) for i in range(steps + 1)]
    return [round(i * last / max(1, steps)) for i in range(steps + 1)]


def window_boxes(shape: Sequence[int], patch: Sequence[int], overlap: float, placement: str = "even") -> list[Box]:
    """All windows of a volume as slices (x, y, z)."""
    starts = [window_starts(n, p, overlap, placement) for n, p in zip(shape, patch, strict=True)]
    return [tuple(slice(s, s + p) for s, p in zip(at, patch, strict=True)) for at in itertools.product(*starts)]


def window_weight(patch: Sequence[int], blend: str = "gaussian") -> torch.Tensor:
    """Weight of each voxel of a window: (X, Y, Z), float32, peak 1.

    "gaussian" (Isensee et al. 2021): sigma = side / 8. The tail, which underflows in a corner, is raised to 1e-3.
    """
    if blend not in BLENDS:
        raise ValueError(f"`blend` {blend!r} is unknown; accepted: {', '.join(BLENDS)}")
    weight = torch.ones(tuple(patch), dtype=torch.float64)
    if blend == "gaussian":
        for axis, side in enumerate(patch):
            offset = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2) / (side / 8)
            weight *= torch.exp(-0.5 * offset**2).view([-1 if i == axis else 1 for i in range(3)])
        weight = (weight / weight.max()).clamp_(min=_FLOOR)
    return weight.float()


def default_batch_size(patch: Sequence[int], device: torch.device) -> int:
    """Windows per call: 1 to 8, as many as together have 128^3 voxels on the CPU, 4 x 128^3 on CUDA.

    Single small windows would be slow: PyTorch uses its fast CPU convolution only for a batch of 2, or large windows.
    """
    voxels = 128**3 * (4 if device.type == "cuda" else 1)
    return min(8, max(1, voxels // math.prod(patch)))


class _Sums:
    """Weighted sums of logits, and sums of weights, over windows; allocated once the number of classes is known."""

    def __init__(self, shape: Sequence[int], weight: torch.Tensor, device: torch.device | str | None) -> None:
        self._shape, self._weight, self._device = tuple(shape), weight, device
        self._logits = self._weights = None

    @property
    def on_gpu(self) -> bool:
        return self._logits is not None and self._logits.device.type != "cpu"

    def add(self, logits: torch.Tensor, boxes: Sequence[Box]) -> None:
        """Add (B, K, *patch) at `boxes`: the whole batch, or nothing when memory runs out."""
        if self._logits is None:
            self._allocate(logits)
        logits = logits.to(self._logits.device, torch.float32)
        for window, box in zip(logits, boxes, strict=True):  # in place: nothing is allocated from here on
            self._logits[(slice(None), *box)].addcmul_(window, self._weight)
            self._weights[box].add_(self._weight)

    def move(self, device: torch.device | str) -> None:
        self._logits, self._weights, self._weight = (t.to(device) for t in (self._logits, self._weights, self._weight))

    def mean(self) -> torch.Tensor:
        """(K, X, Y, Z), in the memory of the sums."""
        mean = self._logits.div_(self._weights)
        if not torch.isfinite(mean.sum()):
            raise ValueError("the network's logits are not finite; did its training diverge?")
        return mean

    def _allocate(self, logits: torch.Tensor) -> None:
        shape = (logits.shape[1], *self._shape)
        device = self._device
        if device is None:
            device = logits.device
            needed = 4 * (shape[0] + 1) * int(np.prod(self._shape))  # bytes
            if device.type == "cuda" and needed > memory_of(device)[1]:
                device = "cpu"
        try:
            sums = torch.zeros(shape, device=device), torch.zeros(self._shape, device=device)
        except torch.OutOfMemoryError:  # another process took the memory in the meantime
            device = "cpu"
            sums = torch.zeros(shape), torch.zeros(self._shape)
        self._logits, self._weights = sums
        self._weight = self._weight.to(device)


def _mirrored_mean(model: nn.Module, windows: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """Mean of the logits over all mirrorings of `axes`: (B, C, X, Y, Z) -> (B, K, X, Y, Z)."""
    mean = _logits(model, windows)
    flips = [flip for n in range(1, len(axes) + 1) for flip in itertools.combinations(axes, n)]
    for flip in flips:
        dims = [axis + 2 for axis in flip]
        mean = mean + _logits(model, windows.flip(dims)).float().flip(dims)
    return mean / (1 + len(flips)) if flips else mean


def _logits(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    logits = model(windows)
    if isinstance(logits, (list, tuple)):
        logits = logits[0]
    if logits.ndim != 5 or logits.shape[0] != len(windows) or logits.shape[2:] != windows.shape[2:]:
        raise ValueError(f"the network made {tuple(logits.shape)} from {tuple(windows.shape)}; expected the same sides")
    return logits


def _pad(image: torch.Tensor, patch: Sequence[int]) -> tuple[torch.Tensor, Box]:
    """The image padded with 0 on both sides to at least the patch, and the box of the image in the result."""
    missing = [max(0, p - n) for n, p in zip(image.shape[1:], patch, strict=True)]
    before = [m // 2 for m in missing]
    inside = tuple(slice(b, b + n) for b, n in zip(before, image.shape[1:], strict=True))
    if not any(missing):
        return image, inside
    padded = image.new_zeros(image.shape[0], *(n + m for n, m in zip(image.shape[1:], missing, strict=True)))
    padded[(slice(None), *inside)] = image
    return padded, inside


def _float_tensor(image: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.array(image, np.float32, order="C"))  # a copy: the store's maps are read-only
    return image.to(device, torch.float32)


def _checked(image, patch_size: Sequence[int], batch_size: int | None, tta_axes: Sequence[int]) -> tuple[int, ...]:
    patch = tuple(int(side) for side in patch_size)
    if image.ndim != 4 or len(patch) != 3 or min(patch) < 1 or 0 in image.shape:
        raise ValueError(
            f"image {tuple(image.shape)}, `patch_size` {patch}: expected (C, X, Y, Z) and three positive sides"
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"`batch_size` {batch_size}: expected at least 1")
    if len(set(tta_axes)) != len(tta_axes) or not set(tta_axes) <= {0, 1, 2}:
        raise ValueError(f"`tta_axes` {tuple(tta_axes)}: expected different axes among 0, 1, 2")
    return patch


# Back to the file -----------------------------------------------------------------------------------------------------


def restore_labels(logits: torch.Tensor, properties: dict) -> np.ndarray:
    """Class numbers on the grid of the file: the inverse of preprocessing.

    Logits are resized trilinearly on the half-pixel grid (align_corners=False), then the largest one is taken, one
    class and a few planes at a time. Memory beside the logits: two label maps of the file's size (1 byte per voxel,
    2 above 256 classes) and about 100 MB, whatever the number of classes.

    Args:
        logits: (K, x, y, z) on the grid of the preprocessed volume, any device.
        properties: of the case; reads cropped_shape, crop_box, ras_shape, ras_ornt.

    Returns:
        (X, Y, Z) on the file's axes, uint8 (uint16 above 256 classes), 0 outside the crop.
    """
    whole = np.zeros(properties["ras_shape"], np.uint8 if len(logits) <= 256 else np.uint16)
    inside = whole[tuple(slice(start, stop) for start, stop in properties["crop_box"])]
    for planes, labels in _argmax_slabs(logits, properties["cropped_shape"]):
        inside[planes] = labels
    return np.ascontiguousarray(to_stored_axes(whole, np.asarray(properties["ras_ornt"], int)))


@torch.inference_mode()
def restore_probabilities(logits: torch.Tensor, properties: dict) -> np.ndarray:
    """Probability of every class on the grid of the file; `restore_labels` gives the class of the largest.

    Args:
        logits, properties: of `restore_labels`.

    Returns:
        (X, Y, Z, K) on the file's axes, float32, sums to 1 over K; background has 1 outside the crop.
    """
    whole = np.zeros((*properties["ras_shape"], len(logits)), np.float32)
    whole[..., 0] = 1
    inside = whole[tuple(slice(start, stop) for start, stop in properties["crop_box"])]
    resize = _Resize(logits, properties["cropped_shape"])
    for rows in resize.slabs(len(logits)):
        resized = torch.stack([resize(k, rows) for k in range(len(logits))])  # (K, planes, Y, Z)
        inside[rows] = resized.softmax(0).movedim(0, 3).cpu().numpy()
    return np.ascontiguousarray(to_stored_axes(whole, np.asarray(properties["ras_ornt"], int)))


def undo_label_map(labels: np.ndarray, label_map: Mapping[int, int]) -> np.ndarray:
    """Class numbers to the values that the label files hold: the inverse of the label map of preprocessing.

    The map of a store names every old value of a class that others were mapped to ({2: 1, 1: 1}), so a class with one
    old value has no other. A class of several old values, and the background, keep their number; where that number
    means another class in the label files, a class of several old values takes the smallest of them.

    Args:
        labels: class numbers, any shape.
        label_map: old value -> class.

    Returns:
        The values, uint8 (uint16 above 255); `labels` itself where no value changes.
    """
    classes = list(label_map.values())
    value_of = {}
    for old, new in sorted(label_map.items(), reverse=True):
        if old >= 0 and new != 0 and (classes.count(new) == 1 or label_map.get(new, new) != new):
            value_of[new] = old
    if not value_of:
        return labels
    table = np.arange(max(int(labels.max(initial=0)), *value_of) + 1)
    table[list(value_of)] = list(value_of.values())
    return table.astype(np.uint8 if table.max() <= 255 else np.uint16)[labels]


def argmax_labels(logits: torch.Tensor) -> np.ndarray:
    """Class numbers on the grid of the logits: (K, X, Y, Z) -> (X, Y, Z), uint8 (uint16 above 256 classes)."""
    return np.concatenate([labels for _, labels in _argmax_slabs(logits, logits.shape[1:])])


@torch.inference_mode()
def _argmax_slabs(logits: torch.Tensor, shape: Sequence[int]) -> Iterator[tuple[slice, np.ndarray]]:
    """Resize logits (K, x, y, z) to `shape` and take the largest: planes [a, b) of the first axis and their labels."""
    resize = _Resize(logits, shape)
    for rows in resize.slabs():
        best = torch.full((rows.stop - rows.start, *shape[1:]), -torch.inf, device=logits.device)
        labels = torch.zeros_like(best, dtype=torch.uint8 if len(logits) <= 256 else torch.int32)
        for k in range(len(logits)):
            value = resize(k, rows)
            labels.masked_fill_(value > best, k)  # the first of equal logits stays, as with argmax
            torch.maximum(best, value, out=best)
        yield rows, labels.cpu().numpy()


class _Resize:
    """Logits (K, x, y, z) resized to `shape` trilinearly, one class and a few planes of the first axis at a time."""

    def __init__(self, logits: torch.Tensor, shape: Sequence[int]) -> None:
        self._logits, self._shape, self._given = logits, tuple(shape), tuple(logits.shape[1:])
        self._low, self._high, self._share = _linear(self._given[0], self._shape[0], logits.device)

    def slabs(self, classes: int = 1) -> Iterator[slice]:
        """Planes [a, b) that together have few voxels, `classes` at a time."""
        voxels = max(math.prod(self._shape[1:]), math.prod(self._given[1:])) * classes
        planes = max(1, _SLAB // voxels)
        for start in range(0, self._shape[0], planes):
            yield slice(start, min(start + planes, self._shape[0]))

    def __call__(self, k: int, rows: slice) -> torch.Tensor:
        """Class k in some planes: (planes, Y, Z)."""
        channel = self._logits[k]
        # trilinear = linear along the first axis, which needs two planes of the input, then bilinear in the plane
        if self._given[0] == self._shape[0]:
            value = channel[rows].float()
        else:
            low, high = channel[self._low[rows]].float(), channel[self._high[rows]].float()
            value = torch.lerp(low, high, self._share[rows, None, None])
        if self._given[1:] != self._shape[1:]:
            bilinear = {"mode": "bilinear", "align_corners": False}
            value = nn.functional.interpolate(value[:, None], self._shape[1:], **bilinear)[:, 0]
        return value


def _linear(size: int, wanted: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Neighbours and the share of the upper one, for resizing an axis on the half-pixel grid: (wanted,) each."""
    at = ((torch.arange(wanted, dtype=torch.float64) + 0.5) * (size / wanted) - 0.5).clamp_(0, size - 1)
    low = at.floor().long()
    share = (at - low).float()
    return low.to(device), (low + 1).clamp_(max=size - 1).to(device), share.to(device)
