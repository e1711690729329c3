"""The commands of README and CONTRIBUTING: every one parses, the quick ones run."""

import importlib
import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from fasthpm.__main__ import dispatch
from fasthpm.cli import Parser
from fasthpm.recipes.catalogue import RECIPES
from tests.helpers.launch import ROOT, check_ranks

TEXT = "\n".join((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))


def commands() -> list[list[str]]:
    """Indented command lines, continued lines joined, comments and the path to .venv left out."""
    joined = TEXT.replace("\\\n", " ")
    lines = [line.strip() for line in joined.splitlines() if line.startswith("    ")]
    split = [shlex.split(line, comments=True) for line in lines]
    return [[words[0].removeprefix(".venv/bin/"), *words[1:]] for words in split]


class Parsed(Exception):
    """Raised in place of doing what the arguments ask for."""


def entry_point(words: Sequence[str]) -> tuple[Any, list[str]]:
    """The main function that a command line reaches, and the arguments that it gets."""
    if words[0] == "fasthpm":
        return dispatch, list(words[1:])
    flag = "--module" if words[0] == "deepspeed" else "-m"
    place = words.index(flag) + 1
    return importlib.import_module(words[place]).main, list(words[place + 1 :])


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_documented_commands_parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_documented_files_and_recipes_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link
    for folder in re.findall(r"^\| `(\w+/)`", readme, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
    named = re.findall(r"^\| `((?:amt|hpm|mae|simmim|videomae|debug)\w*)`(?:, `…(\w+)`)?", readme, flags=re.MULTILINE)
    documented = {name for name, _ in named} | {name.rsplit("_", 1)[0] + tail for name, tail in named if tail}
    assert documented == set(RECIPES)


def test_the_debug_command_runs_and_its_output_is_usable(tmp_path: Path) -> None:
    """README's quick commands, end to end on one run: pretrain, visualize, report, export, knn."""
    run = tmp_path / "debug"
    check_ranks("fasthpm", "pretrain", "--recipe", "debug", "--output_dir", run, launcher="python")
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
