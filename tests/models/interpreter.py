"""Triton in tests: on the GPU where there is one, elsewhere in Triton's interpreter, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from amaes.models.ops import dispatch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDING = 1.2 if DEVICE.type == "cuda" else 2.2  # the interpreter cuts digits off where a GPU rounds: twice the error


def need_triton() -> None:
    """Import Triton; skip the module that calls this where it is not installed, or does not run."""
    with interpreted():
        triton = pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[dev]'")
        from amaes.models.ops.kernels import depthwise, norm_act, norm_mlp, phases, self_test  # noqa: F401
        from tests.models.counting import count

        if DEVICE.type == "cpu":  # its checks of every sum of integers take a third of the time
            builder = triton.runtime.interpreter.interpreter_builder
            builder.options = replace(builder.options, sanitize_overflow=False)
            patch_the_language_once(triton)
        try:
            count[(1,)](torch.zeros(3, dtype=torch.int32, device=DEVICE), 3)
        except Exception as error:
            versions = f"Triton {triton.__version__} does not run with numpy {np.__version__}"
            pytest.skip(f"{versions}: {error}; pip install -e '.[dev]'", allow_module_level=True)


def patch_the_language_once(triton) -> None:
    """The interpreter puts its functions into Triton's modules anew in every function of a kernel: a third of the time.

    Here it does so where they are not there yet.
    """
    language, interpreter = triton.language, triton.runtime.interpreter
    patch = interpreter._patch_lang

    def patch_once(function):
        modules = [m for m in (language, language.core) if any(m is value for value in function.__globals__.values())]
        return patch(function) if any(language.core.is_builtin(module.load) for module in modules) else None

    interpreter._patch_lang = patch_once


@contextmanager
def interpreted() -> Iterator[None]:
    """A context in which Triton's own environment variable chooses its interpreter, where there is no GPU.

    Triton reads it when it is imported, when a kernel is defined, and when it is launched.
    """
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield


def takes_kernels(x: torch.Tensor) -> bool:
    """In place of `dispatch.use_triton`: wherever the number type allows."""
    return dispatch.compute_dtype(x) in dispatch.KERNEL_DTYPES


@pytest.fixture(autouse=True)
def kernels_are_chosen(monkeypatch):
    monkeypatch.setattr(dispatch, "use_triton", takes_kernels)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # on a GPU: with it convolutions have 3 digits
    with interpreted():
        yield


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def with_gradients(function, tensors, *options):
    """Output, and the gradients of a sum with fixed weights by every tensor."""
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    y = function(*inputs, *options)
    weights = randn(*y.shape, seed=9).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)]


def assert_equal_to_plain(kernel, plain, tensors, *options, tolerance=1e-5):
    ours = with_gradients(kernel, tensors, *options)
    exact = with_gradients(plain, [tensor.double() for tensor in tensors], *options)
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape
        assert a.dtype == torch.float32
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max())


def assert_no_worse_than_plain(kernel, plain, tensors, *options, dtype=torch.bfloat16):
    """In a short type: as near to the exact numbers as the plain form."""
    low = [tensor.to(dtype) for tensor in tensors]
    exact = with_gradients(plain, [tensor.double() for tensor in low], *options)
    for a, b, true in zip(
        with_gradients(kernel, low, *options), with_gradients(plain, low, *options), exact, strict=True
    ):
        assert a.dtype == dtype
        assert (a - true).norm() <= ROUNDING * (b - true).norm() + 1e-3 * true.norm()
