"""The flags of every command are frozen in golden/flags.json: a flag that is renamed, or means something else when it
is not given, breaks other people's scripts, so it must be a decision.

After such a decision write the file anew, and tell users of it in CHANGELOG.md:

    python -m tests.test_flags
"""

import argparse
import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from fasthpm.__main__ import COMMANDS
from fasthpm.cli import Parser
from fasthpm.data import LoaderOptions
from fasthpm.options import REQUIRED
from fasthpm.probes.finetune.settings import FineTune
from fasthpm.recipe import Recipe

GOLDEN = Path(__file__).parent / "golden" / "flags.json"
PREPARATION = ("copy", "fashion_mnist", "images", "moving_fashion", "scenes", "torchvision_sets", "verify", "videos")
MODULES = {f"fasthpm {name}": module for name, (module, _) in COMMANDS.items()}
KINDS = (Recipe, FineTune, LoaderOptions)
HOW = (
    "if this is a decision, write tests/golden/flags.json anew: python -m tests.test_flags, and say so in CHANGELOG.md"
)
MODULES |= {f"python -m data_prep.{name}": f"data_prep.{name}" for name in PREPARATION}


class Parsing(Exception):
    """Stops a command where it parses, with its parser."""


def parser_of(module: str) -> Parser:
    """The parser that a command makes."""

    def stop(parser: Parser, *_: Any) -> None:
        raise Parsing(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_args", stop)
        try:
            importlib.import_module(module).main([])
        except Parsing as caught:
            return caught.args[0]  # type: ignore[no-any-return]
    raise AssertionError(f"{module} parsed nothing")


def described(action: argparse.Action) -> dict[str, Any]:
    """What users rely on in one flag. The default `==SUPPRESS==` means: that of the recipe, or of the preset."""
    kept = isinstance(action.default, bool | int | float | list | None)
    return {
        "type": getattr(action.type, "__name__", "") or type(action).__name__.strip("_"),
        "default": action.default if kept else str(action.default),
        "choices": [str(choice) for choice in action.choices or ()],
        "nargs": action.nargs,
        "required": action.required,
    }


def flags_of(module: str) -> dict[str, Any]:
    """All flags of a command, each by its spellings, or by its name if it has a place instead."""
    actions = [action for action in parser_of(module)._actions if action.dest != "help"]
    return {" ".join(action.option_strings) or action.dest: described(action) for action in actions}


def fields_of(kind: Any) -> dict[str, Any]:
    """The same of the fields of a dataclass of options."""
    return {
        field.name: {
            "type": getattr(field.type, "__name__", str(field.type)),
            "default": "REQUIRED" if field.default is REQUIRED else json.loads(json.dumps(field.default)),
            "choices": list(field.metadata["choices"] or ()),
        }
        for field in dataclasses.fields(kind)
    }


def as_text(golden: dict[str, dict[str, Any]]) -> str:
    """JSON with a line per flag, so that a difference is easy to read."""
    parts = []
    for title, flags in golden.items():
        lines = [f"    {json.dumps(name)}: {json.dumps(flag, ensure_ascii=False)}" for name, flag in flags.items()]
        parts.append(f"  {json.dumps(title)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


@pytest.mark.parametrize("command", MODULES)
def test_flags_are_frozen(command: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert flags_of(MODULES[command]) == golden[command], HOW


@pytest.mark.parametrize("kind", KINDS)
def test_fields_are_frozen(kind: Any) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert fields_of(kind) == golden[kind.__name__], HOW


def test_nothing_frozen_is_gone() -> None:
    assert set(json.loads(GOLDEN.read_text())) == {*MODULES, *(kind.__name__ for kind in KINDS)}


if __name__ == "__main__":
    flags = {command: flags_of(module) for command, module in MODULES.items()}
    GOLDEN.write_text(as_text(flags | {kind.__name__: fields_of(kind) for kind in KINDS}))
