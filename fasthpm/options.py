"""A field that is a flag: its default, help and choices stand together; argparse is made from them."""

import argparse
import dataclasses
import typing
from collections.abc import Collection
from typing import Any


def option(default: Any, help: str, *, choices: Collection[str] | None = None, run_only: bool = False) -> Any:
    """A recipe field. `run_only` fields say where and how a run happens and may change when it is resumed.

    `choices` may be a registry: it is read when it is needed, so that it may grow.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "run_only": run_only})


def add_recipe_arguments(parser: argparse.ArgumentParser, kind: Any) -> None:
    """One flag per field of the dataclass `kind`, without defaults: what is not given comes from the recipe."""
    for field in dataclasses.fields(kind):
        if field.name == "recipe":
            continue
        choices = field.metadata["choices"]
        help_text = field.metadata["help"] + (f": {', '.join(choices)}" if choices else "")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": f"{help_text} (base: {field.default})"}
        if field.type is bool:
            parser.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, **options)
        else:
            of = typing.cast(type, field.type)
            parser.add_argument(f"--{field.name}", type=of, metavar=of.__name__.upper(), **options)
