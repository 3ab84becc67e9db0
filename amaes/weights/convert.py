"""Old pickles, read without running what is in them as far as that goes, and written as tensors and plain data.

A pickle names classes and functions, and reading it calls them. Here every one that is not known to be harmless is
replaced by a stand-in that does nothing. Only `trust` runs the file as it is.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from amaes.weights.numpy_data import NUMPY
from amaes.weights.tensor_files import (
    MAX_DEPTH,
    SAFETENSORS,
    check_archive,
    check_nesting,
    check_tensors,
    find_state_dict,
    read,
    weights_entry,
    write,
)

_CLASS = "class_of_stand_in"  # attribute of a stand-in
WHOLE = "state_dict"  # entry for the weights of a network that was saved whole
MAX_PARTS = 100_000  # networks within a network


@dataclass
class Converted:
    """What `convert_weights` did.

    Attributes:
        how: how the file was read.
        weights: the tensors that were written.
        kept: other entries that were written.
        left_out: what was not, and why.
    """

    how: str
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def convert_weights(path: Path, out: Path, trust: bool = False) -> Converted:
    """Write the weights of a file, and plain data beside them, as a file that `tensor_files.read` accepts.

    Args:
        path: any file of `torch.save`, also of a whole network; or .safetensors.
        out: .safetensors, or a file of torch.
        trust: where all else fails, read the file as it is, which runs whatever code is in it.

    Raises:
        FileNotFoundError: no such file.
        OSError: `out` could not be written.
        ValueError: damaged; no weights in it; or not to be read without `trust`, or not even so.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    how, content = _read(path, trust)
    holder, weights = _find_weights(content)
    done = Converted(how, {key: value for key, value in weights.items() if _is_weight(key, value)})
    if not done.weights:
        raise ValueError(f"{path}: no weights found")
    check_tensors(path, done.weights)
    others = {}
    if weights is not content:
        done.left_out += [f"{key} ({_class_name(value)})" for key, value in weights.items() if key not in done.weights]
    for key, value in content.items():
        if value is weights or (weights is content and key in done.weights):
            continue
        try:
            check_nesting([value])
            others[str(key)] = _plain(value)
        except (TypeError, ValueError) as error:
            done.left_out.append(f"{key} ({error})")
    done.kept = list(others)
    write(out, {**others, holder: done.weights} if holder else {**others, **done.weights})
    return done


def _read(path: Path, trust: bool) -> tuple[str, Mapping]:
    """In words how the file was read, and its content: the safest way that finds weights in it."""
    if path.suffix == SAFETENSORS:  # there is no code in it
        return "as tensors and plain data", read(path)
    check_archive(path)
    ways: dict[str, Callable[[Path], object]] = {
        "as tensors and plain data": read,
        "without running code; objects in it are left out": _read_with_stand_ins,
        **({"as it is, with the code in it": _read_as_it_is} if trust else {}),
    }
    problem = ""
    for how, read_so in ways.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is odd about the file shows in what comes of it
                content = read_so(path)
        except Exception as error:  # a pickle can be odd in any way
            problem = _reason(error)
            continue
        content = content if isinstance(content, Mapping) and not _is_stand_in(content) else {WHOLE: content}
        content = {key: _as_state_dict(value) for key, value in content.items()}
        if any(_is_weight(*item) for item in _find_weights(content)[1].items()):
            return how, content
        problem = "no weights found"
    advice = "" if trust else "; reading it as it is would run the code in it: if you trust its source, `trust`"
    raise ValueError(f"{path}: cannot be read{' even so' if trust else ''} ({problem}){advice}")


def _find_weights(content: Mapping) -> tuple[str | None, Mapping]:
    """As `find_state_dict`; an entry of another name is taken where it is the only state dict."""
    holder, weights = find_state_dict(content)
    if not any(_is_weight(*item) for item in weights.items()):
        with suppress(ValueError):
            return WHOLE, content[weights_entry(content)]
    return holder, weights


def _reason(error: Exception) -> str:
    """The line of a message that says what is wrong; torch puts two of advice around it."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    advised = len(lines) > 1 and lines[0].startswith("Weights only load failed")
    return lines[1 if advised else 0].removeprefix("WeightsUnpickler error: ")[:160]


def _read_as_it_is(path: Path) -> object:
    # The one place where a pickle may run code: the user asked for it by name, for a file whose source he trusts.
    return torch.load(path, map_location="cpu", weights_only=False)


# Stand-ins ------------------------------------------------------------------------------------------------------------


def _read_with_stand_ins(path: Path) -> object:
    """The content of a file, with a stand-in for every object of an unknown class."""
    with torch.serialization.safe_globals(NUMPY):
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        with torch.serialization.safe_globals([(_stand_in(name), name) for name in names]):
            return torch.load(path, map_location="cpu", weights_only=True)


def _stand_in(name: str) -> type:
    """A class in the place of the class or function `name`: whatever it is called with, it makes an OrderedDict.

    That type is the only one in which torch's restricted unpickler sets both items and attributes.
    """

    def make(cls: type, *arguments: object, **options: object) -> OrderedDict:
        made = OrderedDict()
        setattr(made, _CLASS, name)
        return made

    return type("StandIn", (), {"__new__": make})


def _is_stand_in(value: object) -> bool:
    return isinstance(value, OrderedDict) and _CLASS in vars(value)


def _as_state_dict(value: object) -> object:
    """The weights of a network, or of a stand-in for one, as a state dict; anything else as it is."""
    if isinstance(value, nn.Module):
        return value.state_dict()
    if _is_stand_in(value):
        with suppress(ValueError):
            if found := dict(_weights_of(value)):
                return found
    return value


def _weights_of(stand_in: OrderedDict) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a network that was saved whole, of which only the attributes are there; ValueError: no end to it."""
    left, parts = [("", stand_in, 0)], 0
    while left:
        prefix, part, depth = left.pop()
        parts += 1
        if depth > MAX_DEPTH or parts > MAX_PARTS:
            raise ValueError("a network of networks without end")
        attributes = vars(part)
        passing = attributes.get("_non_persistent_buffers_set")
        passing = passing if isinstance(passing, set) else ()
        for group in ("_parameters", "_buffers"):
            for name, value in _items(attributes.get(group)):
                if isinstance(value, torch.Tensor) and name not in passing:
                    yield f"{prefix}{name}", value
        children = [(f"{prefix}{name}.", child, depth + 1) for name, child in _items(attributes.get("_modules"))]
        left += [child for child in reversed(children) if isinstance(child[1], OrderedDict)]


def _items(value: object) -> Iterator[tuple[object, object]]:
    return iter(value.items() if isinstance(value, Mapping) else ())


# Plain data -----------------------------------------------------------------------------------------------------------


def _is_weight(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, torch.Tensor)


def _plain(value: object) -> object:
    """Numbers, text, lists and dictionaries that JSON keeps; TypeError names the class of anything else."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item())
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if _is_stand_in(value):
        raise TypeError(_class_name(value))
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (Sequence, set, frozenset)):
        return [_plain(item) for item in value]
    raise TypeError(_class_name(value))


def _class_name(value: object) -> str:
    """Of an object, or of the one that a stand-in stands for."""
    return getattr(value, _CLASS) if _is_stand_in(value) else f"{type(value).__module__}.{type(value).__qualname__}"
