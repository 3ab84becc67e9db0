"""Every transform against outputs of the published code (yucca 1.1.7) for stored inputs, parameters and noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from amaes.augment import PretrainAugment, pipeline, spatial
from amaes.augment import intensity as fn
from amaes.augment.kspace import ghosting_weights, gibbs_weights
from amaes.augment.options import INTENSITY
from amaes.data.patches import read_window
from tests.augment.lines import ghosting, gibbs_ringing

with np.load(Path(__file__).parent.parent / "fixtures" / "augment_fixture.npz", allow_pickle=False) as _file:
    REFERENCE = dict(_file)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
PATCH = (20, 20, 20)


def get(name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    tensor = torch.from_numpy(np.array(REFERENCE[name]))
    return tensor if dtype is None else tensor.to(dtype)


def row(name: str) -> torch.Tensor:
    return get(name).reshape(1)


def source(case: str, dtype: torch.dtype) -> torch.Tensor:
    return get(str(REFERENCE[f"{case}_src"]), dtype)[None]


def clip_of(case: str) -> bool:
    return bool(REFERENCE.get(f"{case}_clip", True))


def assert_same(result: torch.Tensor, name: str) -> None:
    """1e-6 in float64, 1e-5 in float32, for shape and every voxel."""
    expected = get(name, result.dtype)
    tolerance = 1e-6 if result.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(result.reshape(expected.shape), expected, rtol=0, atol=tolerance)


def tables(shape: tuple[int, ...]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    pairs = [fn.low_resolution_tables(side, max(side // 2, 1)) for side in shape]
    return [torch.from_numpy(pair[0]) for pair in pairs], [torch.from_numpy(pair[1]) for pair in pairs]


@DTYPES
@pytest.mark.parametrize("case", ["ghost_a", "ghost_b", "ghost_c", "ghost_d", "ghost_e"])
def test_ghosting(case, dtype):
    axis = int(REFERENCE[f"{case}_axis"])
    out = ghosting(source(case, dtype), row(f"{case}_alpha"), row(f"{case}_reps"), axis, clip_of(case))
    assert_same(out, f"{case}_out")


@DTYPES
@pytest.mark.parametrize("case", ["gibbs_a", "gibbs_b", "gibbs_c", "gibbs_d"])
def test_gibbs_ringing(case, dtype):
    axis = int(REFERENCE[f"{case}_array_axis"])
    assert_same(gibbs_ringing(source(case, dtype), row(f"{case}_num_sample"), axis, clip_of(case)), f"{case}_out")


@DTYPES
@pytest.mark.parametrize("case", ["bias_a", "bias_b", "bias_c"])
def test_bias_field(case, dtype):
    assert_same(fn.bias_field(source(case, dtype), get(f"{case}_centre")[None], clip=clip_of(case)), f"{case}_out")


@DTYPES
@pytest.mark.parametrize("case", ["gamma_a", "gamma_b", "gamma_c", "gamma_d", "gamma_e"])
def test_gamma(case, dtype):
    assert_same(fn.gamma(source(case, dtype), row(f"{case}_gamma"), row(f"{case}_invert")), f"{case}_out")


@DTYPES
@pytest.mark.parametrize("case", ["blur_a", "blur_b", "blur_c"])
def test_blur(case, dtype):
    assert_same(fn.blur(source(case, dtype), row(f"{case}_sigma")), f"{case}_out")


@DTYPES
@pytest.mark.parametrize("case", ["add_a", "add_b", "mult_a", "mult_b"])
def test_noise(case, dtype):
    transform = fn.additive_noise if case.startswith("add") else fn.multiplicative_noise
    noise = get(f"noise_{REFERENCE[f'{case}_src']}")[None]
    assert_same(transform(source(case, dtype), row(f"{case}_sigma"), noise, clip_of(case)), f"{case}_out")


@DTYPES
@pytest.mark.parametrize("case", ["lowres_a", "lowres_b", "lowres_c"])
def test_low_resolution(case, dtype):
    x = source(case, dtype)
    assert_same(fn.low_resolution(x, get(f"{case}_target_shape")[None], *tables(x.shape[1:])), f"{case}_out")


def test_blur_taps():
    torch.testing.assert_close(fn.blur_taps(get("blur_kernel_sigma"), 4), get("blur_kernel_taps"), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("side", "length"), [(32, 16), (32, 23), (21, 15)])
def test_low_resolution_operator(side, length):
    expected = REFERENCE[f"lowres_matrix_{side}_{length}"]
    (operator,), (lost,) = (table[:1] for table in fn.low_resolution_tables(side, length))
    np.testing.assert_allclose(operator, expected, rtol=0, atol=1e-6)
    assert (~lost).sum() == length


def test_kept_lines_at_128():
    for lines, first, last in REFERENCE["gibbs128_kept"]:
        shifted = np.fft.fftshift(gibbs_weights(np.array([lines]), 128)[0])
        assert np.array_equal(np.flatnonzero(shifted), np.arange(first, last)), lines


def test_attenuated_lines_at_128():
    weights = ghosting_weights(np.full(9, 0.5), np.arange(2, 11), 128)
    assert np.array_equal(weights == 0.5, REFERENCE["ghost128_lines"])


@pytest.mark.parametrize("case", ["elastic_a", "elastic_b"])
def test_elastic_displacement(case):
    noise, sigma = get(f"{case}_noise", torch.float64), row(f"{case}_sigma").double()
    filters = spatial.smoothing_matrix(sigma, 16, 80)
    unmoved = torch.eye(3, dtype=torch.float64)[None]
    offsets = spatial.elastic_offsets(unmoved, noise[None] * row(f"{case}_alpha"), [filters] * 3, torch.float64)
    assert_same(offsets - spatial.sampling_offsets(unmoved, (16, 16, 16), torch.float64), f"{case}_disp")


def offsets_of(case: str, dtype: torch.dtype, patch=PATCH) -> torch.Tensor:
    degrees = REFERENCE.get(f"{case}_rot_deg", np.zeros(3))[None]
    matrix = torch.from_numpy(spatial.coordinate_matrices(degrees, np.array([REFERENCE.get(f"{case}_scale", 1.0)])))
    offsets = spatial.sampling_offsets(matrix, patch, dtype)
    if case in ("sp_elastic", "sp_full"):
        offsets = offsets + spatial.transform_displacement(matrix.to(dtype), get("sp_disp", dtype)[None])
    return offsets


def window_of(case: str, dtype: torch.dtype) -> torch.Tensor:
    x = get("y" if case == "sp_margin0" else "x", dtype)
    return (x[:31, :31, :31] if case == "sp_half" else x)[None, None]


def filters(window: torch.Tensor) -> list[torch.Tensor]:
    return [torch.from_numpy(spatial.spline_filter(side)) for side in window.shape[2:]]


@DTYPES
@pytest.mark.parametrize(
    "case", ["rotx", "roty", "rotz", "rotxyz", "scale09", "scale11", "elastic", "full", "half", "margin0"]
)
def test_trilinear(case, dtype):
    case = f"sp_{case}"
    window = window_of(case, dtype)
    patch = window.shape[2:] if case == "sp_margin0" else PATCH
    assert_same(spatial.resample(window, offsets_of(case, dtype, patch)), f"{case}_order1")


@DTYPES
@pytest.mark.parametrize("case", ["sp_id", "sp_rotxyz", "sp_full", "sp_half", "sp_margin0"])
def test_cubic(case, dtype):
    window, free = window_of(case, dtype), case == "sp_margin0"
    offsets = offsets_of(case, dtype, window.shape[2:] if free else PATCH)
    out = spatial.resample(window, offsets, clip=not free, filters=filters(window))
    assert_same(out, f"{case}_order3_noclip" if free else f"{case}_order3")


@DTYPES
@pytest.mark.parametrize("case", ["sp_full", "sp_half", "sp_margin0"])
def test_labels_exactly(case, dtype):
    label = get("label_y" if case == "sp_margin0" else "label")
    label = label[:31, :31, :31] if case == "sp_half" else label
    patch = label.shape if case == "sp_margin0" else PATCH
    out = spatial.sample_label(label[None].contiguous(), offsets_of(case, dtype, patch))
    assert out.dtype == torch.uint8
    assert torch.equal(out[0], get(f"{case}_label"))


def test_crop_and_pad():
    """Axes shorter than the window get floor(gap / 2) of the volume's minimum before them."""
    y, size, start = REFERENCE["y"], REFERENCE["croppad_patch"], REFERENCE["croppad_start"]
    place = [-((w - s) // 2) if s < w else int(first) for s, w, first in zip(y.shape, size, start, strict=True)]
    assert np.array_equal(read_window(y[None], place, size, y.min())[0], REFERENCE["croppad_out"])


@DTYPES
def test_chain_of_the_functions(dtype):
    x = spatial.resample(get("x", dtype)[None, None], offsets_of("chain", dtype))[0]
    assert_same(x, "chain_target")
    one = lambda *values: torch.tensor([values[0]] if len(values) == 1 else [list(values)])  # noqa: E731
    x = fn.additive_noise(x, one(5e-3), get("chain_noise_add")[None])
    x = fn.blur(x, one(0.7))
    x = fn.multiplicative_noise(x, one(1e-2), get("chain_noise_mult")[None])
    x = ghosting(x, one(0.9), one(5), axis=1)
    assert_same(x, "chain_after_ghost")
    x = gibbs_ringing(x, one(15), axis=1)
    x = fn.low_resolution(x, one(12, 20, 17), *tables(PATCH))
    x = fn.bias_field(x, one(3, 10, 19))
    assert_same(fn.gamma(x, one(0.8), one(False)), "chain_out")


@DTYPES
def test_chain_of_the_pipeline(dtype, monkeypatch):
    """Draws with the chain's parameters, through the whole augmentation; the window is the central part of x."""
    augment = PretrainAugment(PATCH, elastic=0.0)
    fields = {
        "rotation": [True],
        "rotation_degrees": REFERENCE["chain_rot_deg"][None],
        "scale": [True],
        "scale_factor": [REFERENCE["chain_scale"]],
        "additive_noise_sigma": [[5e-3]],
        "blur_sigma": [[0.7]],
        "multiplicative_noise_sigma": [[1e-2]],
        "ghosting_alpha": [[0.9]],
        "ghosting_repetitions": [[5]],
        "ghosting_axis": [[1]],
        "gibbs_ringing_lines": [[15]],
        "gibbs_ringing_axis": [[1]],
        "low_resolution_lengths": [[[12, 20, 17]]],
        "bias_field_centre": [[[3, 10, 19]]],
        "gamma_value": [[0.8]],
        "gamma_inversion": [[False]],
    } | {name: [[True]] for name in INTENSITY}
    draws = replace(augment.draw([0], [0]), **{name: np.array(value) for name, value in fields.items()})
    noise = torch.stack([get("chain_noise_add"), get("chain_noise_mult")])
    monkeypatch.setattr(pipeline, "voxel_noise", lambda keys, shape: noise)
    window = spatial.centre_crop(get("x", dtype)[None, None], augment.window_size)
    out, target = augment(window, draws)
    assert_same(target, "chain_target")
    assert_same(out, "chain_out")
