"""The house's measures: functions and files that can be read at one go, and a formatter that has its way."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.launch import ROOT

PACKAGES = ("fasthpm", "data_prep", "bench")
LONGEST_FUNCTION, MOST_PARAMETERS, MOST_SKIPS = 60, 10, 20
LONGEST_FILE = {**dict.fromkeys(PACKAGES, 500), "tests": 600}
Function = ast.FunctionDef | ast.AsyncFunctionDef

LONG_FUNCTIONS: set[str] = set()
LONG_PARAMETER_LISTS: set[str] = set()
LONG_FILES = {  # with the reason
    f"fasthpm/data/ffcv/{name}.py": "numba's cache is per file: what calls each other is compiled together"
    for name in ("kernel", "array_kernel")
}


def sources(*packages: str) -> list[Path]:
    """Every Python file of some folders."""
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def functions(node: ast.AST, owner: str = "") -> Iterator[tuple[str, Function]]:
    """(name with its classes and functions, node) of all functions, inner ones too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef):
            if isinstance(child, Function):
                yield f"{owner}{child.name}", child
            yield from functions(child, f"{owner}{child.name}.")
        else:
            yield from functions(child, owner)


def named(path: Path) -> Iterator[tuple[str, Function]]:
    """("path: name", node) of all functions of a file."""
    for name, node in functions(ast.parse(path.read_text())):
        yield f"{path.relative_to(ROOT)}: {name}", node


def length(node: Function) -> int:
    """Lines from `def` to the last one."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def parameters(node: Function) -> int:
    """Parameters that a caller can give."""
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def test_functions_can_be_read_at_one_go() -> None:
    found = {
        name
        for path in sources(*PACKAGES, "tests")
        for name, node in named(path)
        if length(node) > LONGEST_FUNCTION and node.name != "main"
    }
    assert found == LONG_FUNCTIONS


def test_parameter_lists_are_short() -> None:
    found = {
        name for path in sources(*PACKAGES, "tests") for name, node in named(path) if parameters(node) > MOST_PARAMETERS
    }
    assert found == LONG_PARAMETER_LISTS


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(ROOT))
        for package, longest in LONGEST_FILE.items()
        for path in sources(package)
        if len(path.read_text().splitlines()) > longest
    }
    assert long == LONG_FILES.keys()


def test_the_formatter_has_its_way() -> None:
    mark = "# fmt:" + " skip"
    assert sum(path.read_text().count(mark) for path in sources(*PACKAGES, "tests")) <= MOST_SKIPS


def test_the_measures_measure() -> None:
    """A long function inside a method, and a parameter list of twelve, are seen."""
    arguments = ", ".join(f"a{k}" for k in range(11))
    code = f"class A:\n    def f(self, {arguments}, *, b):\n        def g():\n" + "            pass\n" * 70
    measured = {name: (length(node), parameters(node)) for name, node in functions(ast.parse(code))}
    assert measured == {"A.f": (72, 12), "A.f.g": (71, 0)}
