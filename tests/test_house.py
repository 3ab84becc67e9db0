"""The order of the folders, and the sizes of modules, functions and scripts."""

from __future__ import annotations

import ast
import io
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train_pretrain.py": 250, "train_finetune.py": 230, "evaluate.py": 200}  # code lines at most
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}

# What a module may import: its own station, and those of earlier lines. Modules that stand alone are stations, too.
STATIONS = [
    {"", "choices", "cli", "distributed", "files", "hardware", "lazy", "losses", "mask", "metrics", "pictures", "rng"},
    {"preprocess", "models"},
    {"data"},
    {"augment"},
    {"objectives"},
    {"weights"},
    {"published"},
    {"checkpoint"},
    {"inference"},
    {"training"},
    {"evaluation"},
    {"paper"},
    {"predict", "export", "phantom", "__main__"},
    {"demo"},
    {"worth_it"},
]
LEVEL = {station: level for level, stations in enumerate(STATIONS) for station in stations}
COMMANDS = len(STATIONS)  # the level of the command line of a folder, its __main__.py


@cache
def modules() -> dict[str, Path]:
    """{dotted name: file} of the package."""
    files = (path.relative_to(ROOT) for path in sorted((ROOT / "amaes").rglob("*.py")))
    return {".".join(file.with_suffix("").parts).removesuffix(".__init__"): ROOT / file for file in files}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def is_for_type_hints(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported_names(node: ast.AST, package: str, everywhere: bool) -> list[str]:
    """Modules that `node` imports and what is in them; those within functions too where `everywhere`."""
    if is_for_type_hints(node) or (not everywhere and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
        return []
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*parents, *([node.module] if node.module else [])])
        return [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base for alias in node.names]
    return [name for child in ast.iter_child_nodes(node) for name in imported_names(child, package, everywhere)]


def imports_of(module: str, everywhere: bool) -> set[str]:
    """Modules of the package that a module imports; a folder's __init__ may import from its own folder."""
    path = modules()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = imported_names(parsed(path), package, everywhere)
    return {name for name in names if name in modules() and name != module and not module.startswith(f"{name}.")}


def level_of(module: str) -> int:
    parts = module.split(".")[1:] or [""]
    return COMMANDS if len(parts) > 1 and parts[-1] == "__main__" else LEVEL[parts[0]]


def station_of(module: str) -> str:
    station = (module.split(".")[1:] or [""])[0]
    return "base" if LEVEL[station] == 0 else station


def test_every_module_has_its_place_among_the_stations():
    assert {(module.split(".")[1:] or [""])[0] for module in modules()} <= set(LEVEL)


@pytest.mark.parametrize("everywhere", [False, True], ids=["at the top", "in functions too"])
def test_a_station_imports_only_what_comes_before_it(everywhere):
    upwards = [
        f"{module} imports {name}"
        for module in modules()
        for name in imports_of(module, everywhere)
        if level_of(name) >= level_of(module) and station_of(name) != station_of(module)
    ]
    assert not upwards, "\n".join(upwards)


def test_imports_have_no_circle():
    waiting = {module: imports_of(module, everywhere=False) for module in modules()}
    while leaves := [module for module, names in waiting.items() if not names & waiting.keys()]:
        for module in leaves:
            del waiting[module]
    assert not waiting, f"in a circle, or above one: {', '.join(waiting)}"


def test_modules_and_functions_are_short():
    long = []
    for path in [*modules().values(), *(ROOT / script for script in SCRIPTS)]:
        if (lines := path.read_text().count("\n")) > 450:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines, at most 450")
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > 60:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines} lines, at most 60")
    assert not long, "\n".join(long)


def test_few_modules_lie_outside_of_the_folders():
    assert len(list((ROOT / "amaes").glob("*.py"))) <= 20


def code_lines(path: Path) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    docstrings = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type not in NOT_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


@pytest.mark.parametrize("script", list(SCRIPTS))
def test_the_scripts_are_short(script):
    assert code_lines(ROOT / script) <= SCRIPTS[script]


def test_the_wheel_has_every_folder():
    tomllib = pytest.importorskip("tomllib")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {module for module, path in modules().items() if path.name == "__init__.py"}
    assert set(listed) == folders | {"amaes.scripts"}
