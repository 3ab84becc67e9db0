"""Triton is imported here, before parts of PyTorch import it: only then can its interpreter be chosen."""

from contextlib import suppress

from tests.models.interpreter import interpreted

with interpreted(), suppress(ImportError):
    import triton  # noqa: F401
