"""The masked autoencoder's error: its Triton kernels, and the choice between them and the plain form."""

import sys

import pytest
import torch

from amaes.models import ops
from tests.models.interpreter import DEVICE, kernels_are_chosen, need_triton, randn  # noqa: F401 (a fixture)

need_triton()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")  # of Triton's interpreter
ERROR = sys.modules["amaes.models.ops.masked_error"]  # `ops.masked_error` is the function
KERNELS = sys.modules["amaes.models.ops.kernels.masked_error"]


def given(batch, channels, sides, mean=0.0):
    """Prediction, target and mask."""
    target = mean + randn(batch, channels, *sides, seed=1)
    target[0, 0] = mean  # as air: its standard deviation is 0
    return randn(batch, channels, *sides), target, randn(batch, 1, *sides, seed=2) > -0.2


def error_and_gradient(function, prediction, *others):
    prediction = prediction.clone(memory_format=torch.preserve_format).requires_grad_()
    error = function(prediction, *others)
    return error.detach(), torch.autograd.grad(3 * error, prediction)[0]


@pytest.mark.parametrize(
    ("batch", "channels", "sides", "dtype", "over", "standardize"),
    [
        (1, 1, (3, 5, 7), torch.float32, "all", False),
        (3, 2, (1, 4, 3), torch.float32, "masked", True),
        (3, 2, (1, 4, 3), torch.float32, "masked-parity", False),
        (3, 1, (5, 3, 4), torch.bfloat16, "all", True),
        (1, 4, (2, 3, 5), torch.float16, "masked", True),
    ],
)
def test_error_and_gradient(batch, channels, sides, dtype, over, standardize):
    prediction, target, mask = given(batch, channels, sides)
    prediction = prediction.to(dtype).contiguous(memory_format=torch.channels_last_3d)
    error, gradient = error_and_gradient(ops.masked_error, prediction, target, mask, over, standardize)
    exact = error_and_gradient(ERROR._plain, prediction.float(), target, mask, over, standardize)
    assert error.dtype == torch.float32
    assert (error - exact[0]).abs() <= 1e-5 * exact[0]
    assert gradient.dtype == dtype
    assert gradient.stride() == prediction.stride()
    digits = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert ((gradient - exact[1]).abs() <= digits * exact[1].abs() + 1e-7).all()


@pytest.mark.parametrize("over", ["all", "masked"])
def test_sums_over_several_chunks_of_several_tiles(over, monkeypatch):
    monkeypatch.setattr(KERNELS, "PROGRAMS", 6)
    monkeypatch.setattr(KERNELS, "TILE", 64)
    prediction, target, mask = given(2, 1, (5, 7, 6), mean=1e3)
    grid = KERNELS._Lines(prediction, over, True)
    assert (grid.chunks, grid.rows // grid.tile, 210 % grid.rows > 0) == (3, 5, True)
    ours, exact = (
        error_and_gradient(function, prediction, target, mask, over, True)
        for function in (ops.masked_error, lambda x, t, *others: ERROR._plain(x.double(), t.double(), *others))
    )
    assert (ours[0] - exact[0]).abs() <= 1e-5 * exact[0]
    assert (ours[1] - exact[1]).abs().max() <= 1e-4 * exact[1].abs().max()


def test_other_layouts_are_taken():
    prediction, target, mask = given(1, 2, (3, 4, 5))
    expected = ERROR._plain(prediction, target, mask, "masked", True)
    for other in (prediction.transpose(2, 4).contiguous().transpose(2, 4), prediction.repeat(1, 1, 1, 1, 2)[..., :5]):
        error, gradient = error_and_gradient(ops.masked_error, other, target, mask, "masked", True)
        assert (error - expected).abs() < 1e-5
        assert gradient.shape == prediction.shape


def test_nothing_hidden_and_a_prediction_that_is_not_finite_are_not_finite():
    prediction, target, mask = given(1, 1, (2, 3, 4))
    assert ops.masked_error(prediction, target, torch.zeros_like(mask), "masked", True).isnan()
    prediction[0, 0, 1, 1, 1] = torch.inf
    assert ops.masked_error(prediction, target, mask, "all", True).isinf()


def test_an_unknown_mean_is_refused():
    with pytest.raises(ValueError, match="`over` 'some' is unknown; accepted: all"):
        ops.masked_error(*given(1, 1, (2, 2, 2)), "some", True)


def test_it_is_one_operator_for_the_compiler():
    prediction, target, mask = given(1, 2, (1, 3, 2))
    torch.library.opcheck(
        torch.ops.amaes.masked_error.default,
        (prediction.requires_grad_(), target, mask, "masked", 0.1),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_a_head_as_a_matrix_product():
    x = randn(2, 6, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d)
    for layer in (torch.nn.Conv3d(6, 3, 1), torch.nn.ConvTranspose3d(6, 1, 1)):
        layer.to(DEVICE)
        assert (ops.head(x, layer) - layer(x)).abs().max() < 1e-5
