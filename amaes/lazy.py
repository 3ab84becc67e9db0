"""Names of a package that are imported when they are first used, so that the package itself is imported at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module


def exports(package: str, names: Mapping[str, Sequence[str]]) -> tuple[Callable, Callable, list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package (PEP 562).

    Args:
        package: its `__name__`.
        names: module of the package -> names that the package exports from it.
    """
    module_of = {name: module for module, group in names.items() for name in group}

    def get(name: str) -> object:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{module_of[name]}"), name)

    return get, lambda: sorted(module_of), sorted(module_of)
