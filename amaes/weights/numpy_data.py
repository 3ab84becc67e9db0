"""NumPy's numbers and arrays in a pickle, built here and not by NumPy's own functions, which believe what a file says.

`numpy.ndarray` makes objects of any bytes, and `numpy.dtype.__setstate__` a type of any fields: whoever wrote the file
would choose addresses in memory. Older published files keep such numbers beside their tensors.
"""

from __future__ import annotations

import math
import re

import numpy as np

_PLAIN = re.compile(r"\?|[bBhHiIlLqQefd]|b1|[iu][1248]|f[248]|[SU]\d{1,5}")


class _Type:
    """In the place of `numpy.dtype`: of truth values, whole and real numbers, and text; its byte order."""

    def __init__(self, code: str = "", *flags: object) -> None:
        if not isinstance(code, str) or not _PLAIN.fullmatch(code):
            raise ValueError(f"NumPy's type {code!r:.40} is no plain number or text")
        self.plain = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):  # what else is in it follows from the code
            self.plain = self.plain.newbyteorder(state[1])


class _Array(np.ndarray):
    """In the place of `numpy.ndarray`: empty, until its state is set."""

    def __new__(cls, *arguments: object) -> _Array:
        return super().__new__(cls, (0,), np.uint8)

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, by_columns, data = state
        data, size = _bytes(data), math.prod(shape) * _plain(kind).itemsize
        if min(shape, default=1) < 0 or len(data) != size:
            raise ValueError(f"an array of shape {shape!r:.80} has {len(data)} bytes, expected {size}")
        super().__setstate__((1, tuple(shape), _plain(kind), bool(by_columns), data))


_Array.__module__, _Array.__name__, _Array.__qualname__ = "numpy", "ndarray", "ndarray"  # for messages


def _scalar(kind: object, data: object = b"") -> np.generic:
    return np.frombuffer(_bytes(data), _plain(kind))[0]


def _reconstruct(*arguments: object) -> _Array:
    return _Array()


def _plain(kind: object) -> np.dtype:
    if not isinstance(kind, _Type):
        raise ValueError(f"{type(kind).__name__} is no type of NumPy")
    return kind.plain


def _bytes(data: object) -> bytes:
    if not isinstance(data, (bytes, str)):
        raise ValueError(f"expected the bytes of NumPy's numbers, found {type(data).__name__}")
    return data.encode("latin1") if isinstance(data, str) else data  # Python 2 wrote text


# For `torch.serialization.safe_globals`: what the unpickler calls where the file has this name.
NUMPY = [
    (_Array, "numpy.ndarray"),
    (_Type, "numpy.dtype"),
    *(
        (function, f"{package}.multiarray.{name}")
        for function, name in ((_scalar, "scalar"), (_reconstruct, "_reconstruct"))
        for package in ("numpy.core", "numpy._core")
    ),
]
