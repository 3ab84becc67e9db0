"""Sliding windows against plain sums, and the way back to the grid of the file."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from amaes import inference
from amaes.inference import (
    predict_case,
    restore_labels,
    sliding_window,
    undo_label_map,
    window_boxes,
    window_starts,
    window_weight,
)

PATCH = (8, 12, 10)
IMAGE = torch.rand(2, 21, 17, 26, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Volumes are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Ramp(nn.Module):
    """Logits that depend on the voxel and on where it lies in its window, so that windows disagree."""

    def __init__(self, classes=3):
        super().__init__()
        self.scale = nn.Parameter(torch.arange(1.0, classes + 1).view(1, -1, 1, 1, 1))
        self.calls, self.batches = 0, []

    def forward(self, x):
        self.calls += 1
        self.batches.append(len(x))
        ramp = torch.linspace(0, 1, x.shape[2]).view(1, 1, -1, 1, 1) + torch.linspace(0, 2, x.shape[4])
        return x.sum(1, keepdim=True) * self.scale + ramp * self.scale**2


class Pointwise(nn.Module):
    """No context: the result cannot depend on windows, blending or mirroring."""

    def __init__(self, channels=2, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias = nn.Parameter(torch.randn(classes, channels)), nn.Parameter(torch.randn(classes))

    def forward(self, x):
        return torch.einsum("kc,bcxyz->bkxyz", self.weight, x) + self.bias.view(1, -1, 1, 1, 1)


def plain(model, image, boxes, weight):
    """The definition: sum of weight * logits over sum of weights."""
    total, weights = 0.0, torch.zeros(image.shape[1:], dtype=torch.float64)
    with torch.inference_mode():
        for box in boxes:
            logits = model(image[(None, slice(None), *box)])[0].double()
            whole = torch.zeros(logits.shape[0], *image.shape[1:], dtype=torch.float64)
            whole[(slice(None), *box)] = logits * weight.double()
            total = total + whole
            weights[box] += weight
    return (total / weights).float()


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("placement", inference.PLACEMENTS)
@pytest.mark.parametrize("length", [8, 9, 15, 16, 17, 40])
def test_starts_cover_the_axis_and_overlap_enough(length, placement, overlap):
    starts = window_starts(length, 8, overlap, placement)
    assert starts[0] == 0
    assert starts[-1] == length - 8
    steps = np.diff(starts)
    assert (steps > 0).all()
    assert (steps <= max(1, int(8 * (1 - overlap)))).all()


@pytest.mark.parametrize(
    ("length", "patch", "placement", "expected"),
    [
        (182, 128, "even", [0, 54]),
        (182, 128, "flush", [0, 54]),
        (218, 128, "even", [0, 45, 90]),
        (218, 128, "flush", [0, 64, 90]),
        (128, 128, "even", [0]),
        (129, 128, "even", [0, 1]),
    ],
)
def test_starts_by_hand(length, patch, placement, expected):
    assert window_starts(length, patch, 0.5, placement) == expected


def test_gaussian_weight_by_hand():
    weight = window_weight((16, 8, 12))
    assert weight.max() == 1
    assert weight.min() == pytest.approx(1e-3)  # the corner of exp(-0.5 (3.75^2 + 3.5^2 + ...)) would be 1e-9
    at = weight[11, 4, 6] / weight[8, 4, 6]  # 3.5 and 0.5 voxels from the centre, sigma = 2
    assert at == pytest.approx(math.exp(-0.5 * (1.75**2 - 0.25**2)))
    assert torch.equal(weight, weight.flip((0, 1, 2)))
    assert (window_weight((16, 8, 12), "uniform") == 1).all()


@pytest.mark.parametrize("blend", inference.BLENDS)
@pytest.mark.parametrize("placement", inference.PLACEMENTS)
def test_windows_are_averaged_with_their_weights(blend, placement):
    model = Ramp()
    found = sliding_window(model, IMAGE, PATCH, overlap=0.4, blend=blend, placement=placement)
    boxes = window_boxes(IMAGE.shape[1:], PATCH, 0.4, placement)
    torch.testing.assert_close(found, plain(model, IMAGE, boxes, window_weight(PATCH, blend)), rtol=1e-5, atol=1e-5)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("batch_size", [2, 5, 1000])
def test_result_does_not_depend_on_the_batch_size(batch_size):
    model = Ramp()
    one = sliding_window(model, IMAGE, PATCH, batch_size=1)
    windows = model.calls
    model.calls = 0
    torch.testing.assert_close(sliding_window(model, IMAGE, PATCH, batch_size=batch_size), one)
    assert model.calls == math.ceil(windows / batch_size)


@pytest.mark.parametrize(
    ("patch", "device", "expected"),
    [
        ((128,) * 3, "cpu", 1),
        ((128,) * 3, "cuda", 4),
        ((96,) * 3, "cpu", 2),
        ((32,) * 3, "cpu", 8),
        ((224,) * 3, "cuda", 1),
    ],
)
def test_default_batch_size(patch, device, expected):
    assert inference.default_batch_size(patch, torch.device(device)) == expected


def test_background_windows_go_through_the_network_too():
    image = torch.zeros(2, 21, 17, 26)
    logits = sliding_window(Pointwise(), image, PATCH)
    torch.testing.assert_close(logits[:, 0, 0, 0], Pointwise().bias.detach())


@pytest.mark.parametrize("shape", [(5, 17, 26), (5, 7, 3), (8, 12, 10), (1, 1, 1)])
def test_small_volume_is_padded_on_both_sides_with_zero(shape):
    seen = []

    class Seeing(Pointwise):
        def forward(self, x):
            seen.append(x.clone())
            return super().forward(x)

    image = IMAGE[:, : shape[0], : shape[1], : shape[2]]
    model = Seeing()
    logits = sliding_window(model, image, PATCH)
    torch.testing.assert_close(logits, Pointwise()(image[None])[0].detach())
    before = [max(0, p - n) // 2 for p, n in zip(PATCH, shape, strict=True)]
    assert seen[0][0, 0, before[0], before[1], before[2]] == image[0, 0, 0, 0]
    assert (seen[0][0, :, : before[0]] == 0).all()


def test_mirroring_averages_over_all_flips():
    model = Ramp()
    small = IMAGE[:, :8, :12, :10]
    found = sliding_window(model, small, PATCH, tta_axes=(0, 2))
    expected = sum(model(small[None].flip(dims)).flip(dims) for dims in ([], [2], [4], [2, 4]))[0] / 4
    torch.testing.assert_close(found, expected.detach())
    assert model.calls == 8
    eight = sliding_window(Pointwise(), IMAGE, PATCH, tta_axes=(0, 1, 2))
    torch.testing.assert_close(eight, sliding_window(Pointwise(), IMAGE, PATCH))


def test_first_of_several_outputs_is_taken():
    class Deep(Pointwise):
        def forward(self, x):
            return [super().forward(x), x[..., ::2]]

    torch.testing.assert_close(sliding_window(Deep(), IMAGE, PATCH), sliding_window(Pointwise(), IMAGE, PATCH))


def test_a_read_only_half_precision_map_is_taken(tmp_path):
    np.save(tmp_path / "x.npy", IMAGE.numpy().astype(np.float16))
    image = np.load(tmp_path / "x.npy", mmap_mode="r")
    torch.testing.assert_close(
        sliding_window(Pointwise(), image, PATCH), sliding_window(Pointwise(), IMAGE, PATCH), atol=1e-3, rtol=0
    )


def test_sums_are_float32_under_bf16():
    low = sliding_window(Pointwise(), IMAGE, PATCH, precision="bf16")
    full = sliding_window(Pointwise(), IMAGE, PATCH, precision="fp32")
    assert low.dtype == torch.float32
    assert 0 < (low - full).abs().max() < 0.03


class OutOfMemory(Ramp):
    """Refuses batches above a size."""

    def __init__(self, largest):
        super().__init__()
        self.largest = largest

    def forward(self, x):
        if len(x) > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


def test_batch_is_halved_when_memory_runs_out():
    model = OutOfMemory(2)
    torch.testing.assert_close(sliding_window(model, IMAGE, PATCH, batch_size=8), sliding_window(Ramp(), IMAGE, PATCH))
    assert set(model.batches) <= {1, 2}


def test_window_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="one window of 8 x 12 x 10 voxels does not fit"):
        sliding_window(OutOfMemory(0), IMAGE, PATCH, batch_size=4)


def test_sums_go_to_the_cpu_where_they_do_not_fit(monkeypatch):
    """On the meta device, which like a GPU is not the CPU; its tensors have no values."""
    sums = inference._Sums((8, 8, 8), torch.ones(4, 4, 4), None)
    asked = []
    monkeypatch.setattr(inference, "memory_of", lambda device: asked.append(device.type) or (0, 4 * 4 * 512 - 1))

    class Logits:
        device, shape = torch.device("cuda"), (1, 3, 4, 4, 4)

    sums._allocate(Logits())  # 3 classes and the weights: 4 x 512 values of 4 bytes
    assert asked == ["cuda"]
    assert sums._logits.device.type == "cpu"
    assert not sums.on_gpu


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overlap": 1.0}, "`overlap` 1.0"),
        ({"blend": "cosine"}, "gaussian, uniform"),
        ({"placement": "random"}, "even, flush"),
        ({"batch_size": 0}, "batch_size"),
        ({"tta_axes": (0, 3)}, "tta_axes"),
        ({"patch_size": (8, 8)}, "three positive sides"),
        ({"image": IMAGE[0]}, "three positive sides"),
        ({"precision": "fp8"}, "fp8"),
        ({"model": lambda x: x[..., 1:]}, "expected the same sides"),
        ({"model": lambda x: x * math.nan}, "not finite"),
    ],
)
def test_bad_arguments_are_named(change, message):
    if callable(change.get("model")):
        stub = nn.Module()
        stub.forward = change["model"]
        change = {"model": stub}
    with pytest.raises(ValueError, match=message):
        sliding_window(**({"model": Pointwise(), "image": IMAGE, "patch_size": PATCH} | change))


# Back to the file -----------------------------------------------------------------------------------------------------


def properties(cropped, margin=(2, 1, 3), ornt=((0, 1), (1, 1), (2, 1))):
    shape = [n + 2 * m for n, m in zip(cropped, margin, strict=True)]
    return {
        "cropped_shape": list(cropped),
        "crop_box": [[m, m + n] for n, m in zip(cropped, margin, strict=True)],
        "ras_shape": shape,
        "ras_ornt": [list(row) for row in ornt],
    }


@pytest.mark.parametrize("shape", [(9, 11, 13), (18, 22, 26), (5, 6, 7), (9, 40, 3), (1, 11, 1)])
def test_labels_are_those_of_trilinear_logits(shape, monkeypatch):
    monkeypatch.setattr(inference, "_SLAB", 2 * shape[1] * shape[2] + 1)  # several slabs
    logits = torch.randn(4, 9, 11, 13, generator=torch.Generator().manual_seed(1))
    resized = nn.functional.interpolate(logits[None], shape, mode="trilinear", align_corners=False)[0]
    at = properties(shape)
    found = restore_labels(logits, at)
    inside = found[tuple(slice(a, b) for a, b in at["crop_box"])]
    assert (inside == resized.argmax(0).numpy()).mean() > 0.999  # rounding may decide between equal logits
    assert found.dtype == np.uint8
    assert found.shape == tuple(at["ras_shape"])
    outside = np.ones(found.shape, bool)
    outside[tuple(slice(a, b) for a, b in at["crop_box"])] = False
    assert (found[outside] == 0).all()


def test_equal_logits_give_the_first_class():
    assert (inference.argmax_labels(torch.zeros(5, 3, 4, 5)) == 0).all()


def test_axes_are_turned_back():
    logits = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(2))
    at = properties((4, 5, 6), (0, 0, 0), ornt=((2, -1), (0, 1), (1, -1)))  # file axes: reversed z, x, reversed y
    expected = np.transpose(logits.argmax(0).numpy(), (2, 0, 1))[::-1, :, ::-1]
    found = restore_labels(logits, at)
    assert np.array_equal(found, expected)
    assert found.flags["C_CONTIGUOUS"]


def test_many_classes_need_sixteen_bits():
    logits = torch.zeros(300, 2, 3, 4)
    logits[299] = 1
    labels = restore_labels(logits, properties((2, 3, 4), (0, 0, 0)))
    assert labels.dtype == np.uint16
    assert (labels == 299).all()


@pytest.mark.parametrize(
    ("label_map", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({4: 3}, [0, 1, 2, 4]),  # BraTS
        ({2: 0}, [0, 1, 2, 3]),  # WMH: the other pathology became background
        ({10: 1, 20: 2, 300: 3}, [0, 10, 20, 300]),
        ({2: 1, 3: 1}, [0, 1, 2, 3]),  # several old values: no way back
        ({1: 2, 2: 1}, [0, 2, 1, 3]),
        ({2: 1, 1: 1}, [0, 1, 2, 3]),  # as the store of merged values says
        ({2: 1, 3: 1, 1: 3}, [0, 2, 2, 1]),  # 1 would mean class 3
    ],
)
def test_values_of_the_label_files_come_back(label_map, expected):
    labels = np.arange(4, dtype=np.uint8).reshape(1, 2, 2)
    back = undo_label_map(labels, label_map)
    assert back.ravel().tolist() == expected
    assert back.dtype == (np.uint16 if max(expected) > 255 else np.uint8)


def test_sphere_survives_the_way_there_and_back():
    """0.9 x 0.9 x 5 mm, radius 20 mm: nearest neighbour to 1 mm, one-hot logits, trilinear, argmax."""
    from amaes.metrics import dice
    from amaes.preprocess.resample import resample_labels

    at = np.moveaxis(np.indices((60, 58, 14)), 0, -1) * (0.9, 0.9, 5.0)  # mm
    native = np.linalg.norm(at - (27, 26, 35), axis=-1) < 20
    stored = resample_labels(native.astype(np.uint8), (54, 52, 70), "nearest")
    logits = torch.from_numpy(np.stack([stored == 0, stored == 1]).astype(np.float32))
    assert dice(restore_labels(logits, properties(native.shape, (0, 0, 0))) == 1, native) >= 0.98


def test_case_is_predicted_in_one_call():
    at = properties((10, 34, 13))
    labels = predict_case(Pointwise(), IMAGE, at, PATCH, overlap=0.25)
    assert np.array_equal(labels, restore_labels(sliding_window(Pointwise(), IMAGE, PATCH, overlap=0.25), at))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process in kilobytes")
def test_memory_does_not_grow_with_the_classes():
    """30 classes at 200^3: 960 MB in float32 at the file's size, 120 MB at the store's; 100 MB of work and 2 x 8 MB."""
    code = (
        "import resource, torch; from amaes.inference import restore_labels; torch.set_num_threads(1)\n"
        "n = 200; ornt = [[0, 1], [1, 1], [2, 1]]; box = [[0, n]] * 3\n"
        "at = {'cropped_shape': [n] * 3, 'crop_box': box, 'ras_shape': [n] * 3, 'ras_ornt': ornt}\n"
        "logits = torch.randn(30, 100, 100, 100)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "restore_labels(logits, at)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 130  # MiB


def test_what_does_not_fit_on_the_device_is_computed_on_the_cpu():
    tried = []

    def adds(first, second):
        tried.append((first.device.type, second.device.type))
        if len(tried) == 1:
            raise torch.OutOfMemoryError("full")
        return first + second

    one = torch.ones(2, 3)
    assert torch.equal(inference._where_it_fits(adds, one, one), 2 * one)
    assert tried == [("cpu", "cpu")] * 2
