"""README, CONTRIBUTING and docs: every command parses, every flag, file and name exists, the quick ones run."""

import ast
import configparser
import dataclasses
import functools
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from fasthpm.__main__ import COMMANDS
from fasthpm.cli import Parser
from fasthpm.commands import listing
from fasthpm.errors import UserError
from fasthpm.recipe import Recipe
from tests.helpers.launch import ROOT, check_ranks
from tests.helpers.pages import entry_point

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "bench/README.md", "ds_configs/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
SHELL = ("#", "FLAGS=", "export ", "pid=", "trap ", "wait ", "[ ", "exit ", "bash ", "source ")  # of scripts
OTHERS = {  # flags of programs that are not ours
    "--global_batch_size", "--no_ssh", "--node_rank", "--master_addr", "--master_port", "--hostfile", "--num_gpus",
    "--module",
}  # fmt: skip


def prose(page: Path) -> str:
    """A page without its fenced blocks, which are output, code or drawings."""
    return FENCE.sub("", page.read_text())


def commands(page: Path) -> list[str]:
    """Indented lines, continued lines joined, $FLAGS filled in, the path to .venv left out."""
    lines = [line[4:].strip() for line in prose(page).replace("\\\n", " ").splitlines() if line.startswith("    ")]
    flags = next((line.removeprefix("FLAGS=").strip('"') for line in lines if line.startswith("FLAGS=")), "")
    own = [line for line in lines if line and not line.startswith((*SHELL, "members:", "options:"))]
    return [line.removeprefix(".venv/bin/").replace("$FLAGS", flags).removesuffix("&") for line in own]


COMMAND_LINES = [(page.relative_to(ROOT), line) for page in PAGES for line in commands(page)]


class Parsed(Exception):
    """Raised in place of doing what the arguments ask for."""


@pytest.mark.parametrize(("page", "line"), COMMAND_LINES, ids=[f"{page}: {line}" for page, line in COMMAND_LINES])
def test_documented_commands_parse(page: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        subprocess.run(["make", "-n", words[1]], cwd=ROOT, check=True, capture_output=True)
        return
    original = Parser.parse_args

    def parse_and_stop(self: Parser, args: Sequence[str] | None = None, namespace: Any = None) -> NoReturn:
        original(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(Parser, "parse_args", parse_and_stop)
    main, arguments = entry_point(words)
    with pytest.raises(Parsed):
        main(arguments)


@functools.cache
def flags_of(module: str) -> dict[str, Any]:
    """The flags that the command in a module takes, and what they take."""
    found: dict[str, Any] = {}

    def note(self: Parser, args: Any = None, namespace: Any = None) -> NoReturn:
        found.update({flag: action.choices for flag, action in self._option_string_actions.items()})
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_args", note)
        with pytest.raises(Parsed):
            importlib.import_module(module).main([])
    return found


def modules() -> Iterator[str]:
    """Every module with a command line."""
    yield from (module for module, _ in COMMANDS.values())
    for path in sorted([*(ROOT / "data_prep").glob("*.py"), *(ROOT / "bench").glob("*.py")]):
        if "def main(argv" in path.read_text():
            yield f"{path.parent.name}.{path.stem}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_flags_exist(page: Path) -> None:
    known = {*OTHERS, *(flag for module in modules() for flag in flags_of(module))}
    named = re.findall(r"(?<![\w-])--[a-z]\w*(?:-\w+)*", " ".join(re.findall(r"`([^`]+)`", prose(page))))
    assert {flag.split("=")[0] for flag in named} <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_inline_commands_exist(page: Path) -> None:
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        words = code.split()
        if words[:2] == ["python", "-m"]:
            assert hasattr(importlib.import_module(words[2]), "main"), code
        elif words[0] == "fasthpm" and len(words) > 1 and words[1].islower():
            assert words[1] in COMMANDS, code
        elif words[0] == "make" and len(words) > 1:
            subprocess.run(["make", "-n", words[1]], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_files_exist(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose(page)):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link
    for name in re.findall(
        r"`((?:\w+/)+[\w.]+\.(?:py|md|sh|json)|(?:tests|scripts|bench|docs|ds_configs)/)`", prose(page)
    ):
        assert (ROOT / name).exists() or (ROOT / "fasthpm" / name).exists(), name


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 120


def test_the_tree_in_readme_is_the_tree() -> None:
    """Every file and folder that it names is where it says, and no room is missing."""
    drawing = FENCE.findall((ROOT / "README.md").read_text())[-1][1]
    parents = [ROOT]
    for line in drawing.splitlines():
        if line.split()[0].endswith("/"):
            parents = parents[: (len(line) - len(line.lstrip())) // 2 + 1]
        folder = parents[-1]
        for name in re.findall(r"[\w/-]+\.py\b|\b\w+/(?=\s)", line):
            assert (folder / name).exists() or (parents[-1] / name).exists(), f"{name} in {line!r}"
            folder = parents[-1] / name if name.endswith("/") else folder
        if line.split()[0].endswith("/"):
            parents = [*parents, parents[-1] / line.split()[0]]
    rooms = {path.parent.name for path in (ROOT / "fasthpm").glob("*/__init__.py")}
    assert {room for room in rooms if f"{room}/" not in drawing} == set()


def test_the_page_of_recipes_is_fresh() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert page == listing.markdown(), "write it again: fasthpm recipes --markdown > docs/recipes.md"


def test_the_command_prints_the_page_of_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    listing.main(["--markdown"])
    assert capsys.readouterr().out == listing.markdown()
    with pytest.raises(UserError, match="--markdown writes all recipes; leave NAME and --diff out"):
        listing.main(["debug", "--markdown"])


@pytest.mark.parametrize("name", ["mask_policy", "target"])
def test_masks_and_targets_are_documented(name: str) -> None:
    rows = re.findall(rf"^\| `--{name} (\w+)", (ROOT / "docs" / "method.md").read_text(), flags=re.MULTILINE)
    (field,) = (field for field in dataclasses.fields(Recipe) if field.name == name)
    assert set(rows) == set(field.metadata["choices"])


def test_export_forms_are_documented() -> None:
    rows = re.findall(r"^\| `--format (\w+)`", (ROOT / "docs" / "own_images.md").read_text(), flags=re.MULTILINE)
    assert set(rows) == set(flags_of("fasthpm.exchange.exporting")["--format"])


def test_documented_extras_exist() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = re.findall(r"(?:\.|fasthpm)\[([\w,]+)\]", "\n".join(page.read_text() for page in PAGES))
    assert {extra for group in named for extra in group.split(",")} <= set(setup["options.extras_require"])


def python_blocks() -> list[tuple[str, str]]:
    """(page, code) of every fenced block of Python."""
    return [(page.name, code) for page in PAGES for kind, code in FENCE.findall(page.read_text()) if kind == "python"]


def test_documented_python_runs() -> None:
    """All that needs no data, in a process of its own, because it registers masks and recipes."""
    runnable = [code for _, code in python_blocks() if "data_path" not in code]
    checks = """
from fasthpm.recipes import from_name

recipe = replace(from_name("hpm_demo_larger_masks"), mask_policy="stretch")
plan = recipe.mask_plan
drawn = mask.draw_mask(plan, torch.rand(2, 3, plan.noise_size))
assert drawn.sum(dim=1).tolist() == [plan.num_masked] * 3 == [42] * 3
teacher = targets.TARGETS["average_colour"].build(recipe, torch.device("cpu"), torch.float32)
white = torch.full((2, 28, 28, 3), 255, dtype=torch.uint8)
assert torch.equal(teacher(white), torch.ones(2, 49, 3))
"""
    subprocess.run([sys.executable, "-c", "\n".join([*runnable, checks])], cwd=ROOT, check=True)


def test_documented_python_calls_have_our_keywords() -> None:
    """Calls of the Python entry name flags of the commands."""
    for page, code in python_blocks():
        for call in (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func).removeprefix("fasthpm.")
            if name in COMMANDS:
                unknown = {f"--{keyword.arg}" for keyword in call.keywords} - set(flags_of(COMMANDS[name][0]))
                assert not unknown, f"{page}: {name} has no {unknown}"


def test_the_debug_command_runs_and_its_output_is_usable(tmp_path: Path) -> None:
    """The quick commands, end to end on one run: pretrain, visualize, report, export, knn. In float32, as
    `scripts/try_install.sh` has it: a CPU that emulates bf16 takes minutes."""
    run, fp32 = tmp_path / "debug", ("--deepspeed_config", "zero1_fp32")
    check_ranks("fasthpm", "pretrain", "--recipe", "debug", "--output_dir", run, *fp32, launcher="python")
    check_ranks("fasthpm", "visualize", run, "-o", tmp_path / "panel.png", launcher="forked", ranks=1)
    assert (tmp_path / "panel.png").read_bytes()[:4] == b"\x89PNG"
    exported = check_ranks("fasthpm", "export", run, "-o", tmp_path / "encoder.safetensors", launcher="forked", ranks=1)
    assert "timm agrees within" in exported
    paths = ("--train_path", "synthetic:150", "--val_path", "synthetic:45", "--batch_size", 16, "--bank_size", 101)
    two = check_ranks("fasthpm", "knn", run, *paths, "-o", tmp_path / "two.json", launcher="forked")
    assert "Pretraining" not in check_ranks("fasthpm", "report", run, launcher="forked", ranks=1)
    one = check_ranks("fasthpm", "knn", run, *paths, "--weights", "untrained", "student", launcher="forked", ranks=1)
    untrained, student = (line for line in one.splitlines() if "k-NN top-1" in line)
    assert "k-NN top-1 (student, cls, 101 voters)" in student
    assert student in two  # any number of ranks gives the same accuracy
    assert "(untrained, " in untrained
    found = [json.loads((run / f"knn_{name}_cls_101.json").read_text()) for name in ("untrained", "student")]
    assert [result["weights"] for result in found] == ["untrained", "student"]
    assert found[0]["accuracy"] != found[1]["accuracy"]
