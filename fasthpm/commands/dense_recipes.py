"""The recipes of segmentation and detection, for `fasthpm recipes`: listed, shown, compared."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from fasthpm.dense.detection import settings as detection
from fasthpm.dense.segmentation import settings as segmentation
from fasthpm.dense.settings import Dense
from fasthpm.errors import UserError
from fasthpm.options import OURS


class DenseRecipe(NamedTuple):
    """A set of numbers, and the command that it is for."""

    command: str
    make: Callable[[], Dense]

    @property
    def text(self) -> str:
        """Its docstring."""
        return inspect.getdoc(self.make) or ""


DENSE: dict[str, DenseRecipe] = {
    name: DenseRecipe(command, make)
    for command, kind in (("segment", segmentation), ("detect", detection))
    for name, make in kind.RECIPES.items()
}


def show(name: str, tag: Callable[[str, str], str]) -> tuple[str, str, list[tuple[str, str, str]]]:
    """(description, command, rows of field, value and where that is from) of a recipe.

    - `tag`: what a description says of a field's origin, empty if it does not mention it
    """
    recipe = DENSE[name]
    made = recipe.make()
    rows = [
        (field.name, text(getattr(made, field.name)), origin(made, field, tag(recipe.text, field.name)))
        for field in dataclasses.fields(made)
    ]
    return recipe.text, f"fasthpm {recipe.command} RUN --recipe {name} --data_path DATA", rows


def origin(made: Dense, field: dataclasses.Field[Any], said: str) -> str:
    """Where the value of a field comes from; `said`: what the recipe's description says."""
    if getattr(made, field.name) != field.default:
        return said or "set by this recipe"
    if field.metadata["run_only"]:
        return "how it is run, not what"
    return field.metadata["origin"] or OURS


def difference(name: str, other: str) -> list[tuple[str, str, str]]:
    """(field, value, the other's) where two recipes of one command differ. **Raises:** `UserError` for two commands."""
    commands = [DENSE[one].command if one in DENSE else "pretrain" for one in (name, other)]
    if commands[0] != commands[1]:
        raise UserError(f"{name} is of fasthpm {commands[0]} and {other} of fasthpm {commands[1]}; compare two of one")
    made = [DENSE[one].make() for one in (name, other)]
    values = [(field.name, *(getattr(one, field.name) for one in made)) for field in dataclasses.fields(made[0])]
    return [(field, text(a), text(b)) for field, a, b in values if a != b]


def changed(name: str) -> str:
    """What a recipe sets, in one sentence."""
    made = DENSE[name].make()
    values = [(field.name, getattr(made, field.name), field.default) for field in dataclasses.fields(made)]
    sets = [f"`{field} {text(value)}`" for field, value, usual in values if value != usual]
    return f"Sets {', '.join(sets)}." if sets else "Sets nothing: it is the base."


def text(value: object) -> str:
    """A value as the lists have it."""
    return "-" if value == "" else f"{value:g}" if isinstance(value, float) else str(value)
