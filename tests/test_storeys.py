"""The house in storeys: no room imports one above it, late imports included, no file a circle; tests mirror rooms."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT

# From the ground up; a storey is one word or several that stand side by side.
STOREYS = (
    "entry", "errors machine", "files", "cli", "options", "data", "kernels",
    "mask mask_counts mask_loops loss difficulty colours layers objectives projection architecture model_names model "
    "targets view_fields view_rules rules recipe_fields sizes recipe schedule patches",
    "recipes", "ranks", "speed", "fitting tokenizers frozen views step teacher", "maps", "checkpoint", "exchange",
    "run", "tuning", "probes", "dense", "pictures", "commands", "pretrain",
)  # fmt: skip
HEIGHTS = {f"fasthpm.{room}": height for height, storey in enumerate(STOREYS) for room in storey.split()}
FACES = ("fasthpm", "fasthpm.__main__")  # name everything, are named by nobody
TESTS = ROOT / "tests"
NO_ROOMS = ("golden", "helpers")
WHOLE = {"checkpoint/test_torture.py", "ranks/test_nodes.py"}  # of runs that are killed and lost, not of one module


def files(package: str) -> dict[str, Path]:
    """Every module of a package, by dotted name."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """(module, line) of every import of `known` in a file, at whatever depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [full if (full := f"{node.module}.{alias.name}") in known else node.module for alias in node.names]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name in known)


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def upward(modules: dict[str, Path]) -> list[str]:
    """Imports from a room to one above it."""
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for module, path in modules.items()
        if module not in FACES
        for name, line in imports(path, modules)
        if name in FACES or HEIGHTS[room(name)] > HEIGHTS[room(module)]
    ]


def circle(modules: dict[str, Path]) -> list[str]:
    """The files of one circle of imports, or none. A package's face is of its rooms, and is left out."""
    inner = {name: path for name, path in modules.items() if path.name != "__init__.py"}
    arrows = {name: {to for to, _ in imports(path, modules)} & inner.keys() - {name} for name, path in inner.items()}
    while free := [name for name, targets in arrows.items() if not targets & arrows.keys()]:
        for name in free:
            del arrows[name]
    return sorted(arrows)


def test_every_room_has_a_storey() -> None:
    rooms = {room(module) for module in files("fasthpm")} - {*FACES}
    assert rooms == HEIGHTS.keys()


def test_no_room_imports_one_above_it() -> None:
    assert upward(files("fasthpm")) == []


@pytest.mark.parametrize("package", ["fasthpm", "data_prep", "bench"])
def test_no_circles(package: str) -> None:
    assert circle(files(package)) == []


def test_packages_stand_in_line() -> None:
    """fasthpm knows neither data_prep nor bench, and data_prep no bench."""
    known = files("fasthpm") | files("data_prep") | files("bench")
    above = {"fasthpm": ("data_prep", "bench"), "data_prep": ("bench",), "bench": ()}
    wrong = [
        f"{module} imports {name}"
        for module, path in known.items()
        for name, _ in imports(path, known)
        if name.startswith(above[module.split(".")[0]] or ("\0",))
    ]
    assert wrong == []


def room_of(folder: Path) -> Path:
    """The folder of sources that a folder of tests is of."""
    parts = folder.relative_to(TESTS).parts
    return ROOT.joinpath(*parts) if parts[0] in ("data_prep", "bench") else ROOT.joinpath("fasthpm", *parts)


def test_tests_mirror_the_rooms() -> None:
    """tests/a/test_b.py, or test_b_more.py, is of fasthpm/a/b.py."""
    paths = [path for path in TESTS.glob("*/**/test_*.py") if path.relative_to(TESTS).parts[0] not in NO_ROOMS]
    alone = {
        str(path.relative_to(TESTS))
        for path in paths
        if not any(f"{path.stem}_".startswith(f"test_{module.stem}_") for module in room_of(path.parent).glob("*.py"))
    }
    assert len(paths) > 50
    assert alone == WHOLE


def test_no_test_is_imported() -> None:
    """Nor by a program that a test writes and starts; what tests share is in `helpers` and in conftest.py."""
    wrong = re.compile(r"^\s*(?:from|import)\s+(?:[\w.]+\.)?test_", re.MULTILINE)
    assert [str(path) for path in TESTS.rglob("*.py") if wrong.search(path.read_text())] == []


def test_no_helper_hides_a_module_of_python() -> None:
    """Some of them run as programs, whose folder Python searches first."""
    assert {path.stem for path in (TESTS / "helpers").glob("*.py")} & sys.stdlib_module_names == set()


def test_the_storeys_in_the_documentation_are_these() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text[text.index("| storey |") : text.index("`data_prep/` (before")]
    rows = [line.split("|")[1] for line in table.splitlines()[2:] if line]
    assert [sorted(re.findall(r"`(\w+)`", row)) for row in rows] == [sorted(storey.split()) for storey in STOREYS]
