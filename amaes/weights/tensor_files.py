"""Files of tensors and plain data: torch's (.pt, .pth, ...) and .safetensors. Nothing in a file is executed."""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import torch

from amaes.files import first_line, written_whole
from amaes.weights.numpy_data import NUMPY

SAFETENSORS = ".safetensors"
MAX_REPEATED_BYTES = 2**31  # that a tensor may claim by repeating what is stored once, and a file beyond its size
# What other people's programs put around a state dict: entries of the file, and prefixes of its names (DDP, Lightning,
# torch.compile, and networks within networks).
HOLDERS = ("state_dict", "network_weights", "model", "model_state_dict")
_WRAPPERS = re.compile(r"\b(module|model|base_model|network|net|_orig_mod)\.")
_OURS = "amaes"  # entry of the metadata of a .safetensors file: JSON of what else the content held
MAX_DEPTH, MAX_ENTRIES = 64, 10**7  # of what a file holds; what contains itself has more


# Reading --------------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict:
    """The content of a file as a dictionary, tensors on the CPU.

    A .safetensors file that `write` made has the entries that were written; any other is a plain state dict.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or not a file of tensors and plain data; a .safetensors file, and that package is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    content = _read_safetensors(path) if path.suffix == SAFETENSORS else _read_torch(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, a checkpoint is a dictionary")
    try:
        check_nesting(content)
    except ValueError as error:
        raise ValueError(f"{path}: not a checkpoint ({error})") from None
    check_tensors(path, content)
    return content


def check_nesting(content: object) -> None:
    """Refuse dictionaries and lists that whatever goes through them would take for endless.

    Raises:
        ValueError: nested too deep, as what contains itself is, or too many entries, each counted wherever it stands.
    """
    entries, parts = 0, [(content, 0)]
    while parts:
        part, depth = parts.pop()
        values = part.values() if isinstance(part, Mapping) else part
        entries += len(values)
        if depth > MAX_DEPTH or entries > MAX_ENTRIES:
            raise ValueError(f"nested more than {MAX_DEPTH} deep" if depth > MAX_DEPTH else "too many entries")
        inner = (Mapping, list, tuple, set, frozenset)
        parts += [(value, depth + 1) for value in values if isinstance(value, inner) and value]


def check_tensors(path: Path, content: Mapping) -> None:
    """Refuse tensors that are not plain numbers on the CPU, claim more of them than the file holds, or have odd names.

    Raises:
        ValueError: names the tensor.
    """
    left, counted = max(path.stat().st_size, MAX_REPEATED_BYTES), set()
    for name, tensor in _tensors(content):
        if not name.isprintable():
            raise ValueError(f"{path}: the name of its tensor {name!a:.80} cannot be printed")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            kind = "quantised" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
            raise ValueError(f"{path}: its tensor {name} is {kind}, expected plain numbers")
        stored = tensor.untyped_storage()
        if stored.data_ptr() not in counted:
            counted.add(stored.data_ptr())
            left -= stored.nbytes()
        if left < 0 or tensor.numel() * tensor.element_size() > max(stored.nbytes(), MAX_REPEATED_BYTES):
            raise ValueError(f"{path}: its tensor {name} claims {tuple(tensor.shape)}, the file holds less than that")


def _read_torch(path: Path) -> object:
    check_archive(path)
    try:
        with torch.serialization.safe_globals(NUMPY), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # it is read, or refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file can raise anything
        foreign = "weights_only" in str(error)
        reason = "it holds other objects" if foreign else first_line(error)
        advice = "; `amaes convert-weights` may write one that holds no others" if foreign else ""
        raise ValueError(f"{path}: not a checkpoint ({reason}); only tensors and plain data fit{advice}") from error


def check_archive(path: Path) -> None:
    """Refuse a zip archive, which torch's files are, that is compressed or damaged.

    Raises:
        ValueError: see above.
    """
    if zipfile.is_zipfile(path):  # torch never compresses; a small file that unpacks to a huge one was made on purpose
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError(f"{path}: not a checkpoint (its entries are compressed)")
            if (entry := _damaged_entry(archive)) is not None:
                raise ValueError(f"{path}: damaged, the checksum of {entry} is wrong; copy it again or take another")


def _damaged_entry(archive: zipfile.ZipFile) -> str | None:
    """The first entry whose content does not have its checksum, which torch.load does not compare."""
    try:
        return archive.testzip()
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError) as error:
        return f"an entry ({error})"


def _read_safetensors(path: Path) -> dict:
    safetensors = _import_safetensors(path)
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
            ours = (file.metadata() or {}).get(_OURS)
    except Exception as error:  # a damaged or foreign file can raise anything
        raise ValueError(f"{path}: not a whole .safetensors file ({first_line(error)})") from error
    if ours is None:
        return weights
    try:
        ours = json.loads(ours)
        entries, holder = ours["entries"], ours["holder"]
        return {**entries, **(weights if holder is None else {holder: weights})}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{path}: the metadata of this .safetensors file are damaged") from None


def _import_safetensors(path: Path) -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ValueError(f"{path}: needs the package safetensors ({error}): pip install 'amaes[safetensors]'") from None
    return safetensors


def find_state_dict(content: Mapping) -> tuple[str | None, Mapping]:
    """The state dict in what a file holds, and the name of its entry; None: the content itself is taken as one."""
    holder = None
    for name in HOLDERS:
        if isinstance(content.get(name), Mapping):
            holder, content = name, content[name]
    return holder, content


def without_wrappers(name: str) -> str:
    """The name of a tensor without the prefixes of wrappers, wherever they stand."""
    return _WRAPPERS.sub("", name)


def _tensors(content: Mapping, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of nested dictionaries, with their names."""
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            yield f"{name}{key}", value
        elif isinstance(value, Mapping):
            yield from _tensors(value, f"{name}{key}.")


# Writing --------------------------------------------------------------------------------------------------------------


def write(path: Path, content: Mapping) -> None:
    """Write tensors and plain data, whole or not at all: as .safetensors where `path` ends so, else as torch's format.

    A .safetensors file holds one set of weights: one entry of `content` that is a state dict, or the content itself.
    All else goes into its metadata, and must be plain data that JSON keeps. `read` returns the same entries; a second
    name of a tensor is left out.

    Args:
        path: the file; its folder is made.
        content: such as a checkpoint without its optimizer.

    Raises:
        OSError: it could not be written.
        ValueError: .safetensors, and the content is not as above, or that package is missing.
    """
    data = _as_safetensors(path, content) if path.suffix == SAFETENSORS else None
    with written_whole(path) as file:
        if data is None:
            torch.save(dict(content), file)
        else:
            file.write(data)


def weights_entry(content: Mapping) -> str | None:
    """The name of the entry that is a state dict; None: the content itself is one, its tensors are the weights.

    Raises:
        ValueError: it holds no weights, or more than one set.
    """
    holders = [name for name, value in content.items() if _is_state_dict(value)]
    if any(isinstance(value, torch.Tensor) for value in content.values()):
        holders.append(None)
    if len(holders) != 1:
        found = " and ".join("loose tensors" if name is None else repr(name) for name in holders) or "none"
        raise ValueError(f"expected one set of weights, found {found}")
    return holders[0]


def _is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(v, torch.Tensor) for v in value.values())


def _as_safetensors(path: Path, content: Mapping) -> bytes:
    safetensors = _import_safetensors(path)
    try:
        holder = weights_entry(content)
        weights = {k: v for k, v in (content if holder is None else content[holder]).items() if _is_tensor(v)}
        entries = {k: v for k, v in content.items() if k != holder and not _is_tensor(v)}
        ours = json.dumps({"holder": holder, "entries": entries})
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: this content cannot be written as {SAFETENSORS} ({error})") from None
    kept: dict[tuple, str] = {}  # one name of each tensor
    for name, tensor in weights.items():
        kept.setdefault((tensor.data_ptr() or name, tensor.shape, tensor.stride(), tensor.dtype), name)
    copies = {name: weights[name].detach().to("cpu", copy=True).contiguous() for name in kept.values()}
    return safetensors.torch.save(copies, {"format": "pt", _OURS: ours})


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)
