"""NumPy's numbers and arrays in a file: read as written, and never anything that could hold addresses."""

import numpy as np
import pytest
import torch

from amaes.weights.convert import convert_weights
from amaes.weights.tensor_files import read

VALUES = [
    *(np.array([[1, 0, 3], [4, 5, 6]]).astype(kind) for kind in "?bBhHiIlLqQefd"),
    *(np.dtype(kind).type(3.0) for kind in "bBhHiIlLqQefd"),
    np.arange(6, dtype=">f4").reshape(3, 2).T,
    np.array(["one", "three"]),
    np.array([b"a", b"bc"]),
    np.array(2.5),
    np.bool_(True),
    np.str_("text"),
]


class Call:
    """Calls something, and sets a state, when it is unpickled."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


def saved(tmp_path, value, name="x"):
    torch.save({"state_dict": {"w": torch.ones(2)}, name: value}, tmp_path / "old.pt")
    return tmp_path / "old.pt"


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{value.dtype.str}{value.shape}")
def test_numbers_and_arrays_are_read_as_written(tmp_path, value):
    back = read(saved(tmp_path, value))["x"]
    assert isinstance(back, np.ndarray) == isinstance(value, np.ndarray)
    assert back.dtype == value.dtype.newbyteorder("=")
    np.testing.assert_array_equal(back, value)


RECONSTRUCT, SCALAR = np.array(1).__reduce__()[0], np.float64(1).__reduce__()[0]
FIELDS = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
ODD = {
    "objects in an array": np.array([None, "x"]),
    "one object": Call(SCALAR, np.dtype("O"), b"A" * 8),
    "type with fields": np.zeros(2, [("a", "f4")]),
    "fields in the state of a type": Call(np.dtype, "S8", False, True, state=FIELDS),
    "type of no letter": Call(np.dtype, "O,f4"),
    "a state of objects": Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (1,), np.dtype("O"), False, b"A" * 8)),
    "too few bytes": Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (9,), np.dtype("f4"), False, b"A" * 8)),
    "a side below 0": Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (-1, -2), np.dtype("f4"), False, b"A" * 8)),
    "a number without bytes": Call(SCALAR, np.dtype("f8"), b"A" * 3),
}


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
def test_anything_else_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match=r"old\.pt: not a checkpoint"):
        read(saved(tmp_path, value))


@pytest.mark.parametrize("name", ["format", "nnssl_adaptation_plan"])
def test_bytes_never_become_addresses(tmp_path, name):
    call = Call(np.ndarray, (1,), "O", b"A" * 8)  # NumPy itself takes the bytes for the address of an object
    path = saved(tmp_path, call, name)
    assert read(path)[name].size == 0
    assert convert_weights(path, tmp_path / "new.pt").left_out == [f"{name} (numpy.ndarray)"]
