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


def need_triton() -> None:
    """Import Triton; skip the module that calls this where it is not installed, or does not run."""
    with interpreted():
        triton = pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[dev]'")
        from amaes.models.ops.kernels import depthwise, norm_act, norm_mlp, self_test  # noqa: F401
        from tests.models.counting import count

        if DEVICE.type == "cpu":  # its checks of every sum of integers take a third of the time
            builder = triton.runtime.interpreter.interpreter_builder
            builder.options = replace(builder.options, sanitize_overflow=False)
        try:
            count[(1,)](torch.zeros(3, dtype=torch.int32, device=DEVICE), 3)
        except Exception as error:
            versions = f"Triton {triton.__version__} does not run with numpy {np.__version__}"
            pytest.skip(f"{versions}: {error}; pip install -e '.[dev]'", allow_module_level=True)


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
    with interpreted():
        yield


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)
