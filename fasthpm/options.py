"""A field that is a flag: its default, help, choices, range and origin stand together.

`validate` checks a dataclass of such fields, and argparse is made from them.
"""

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Collection
from typing import Any

from fasthpm.errors import UserError, nearest

PAPER, RELEASED, OURS = "paper", "released code", "ours"  # how an `origin` begins; a remark may follow, after a comma
REQUIRED: Any = dataclasses.MISSING  # the default of a field that has none
BASE = (
    "(base: …) is the value where neither the recipe or preset nor a flag sets another;\n"
    "fasthpm recipes NAME shows what a recipe sets."
)


@dataclasses.dataclass(frozen=True)
class Range:
    """Which numbers a field takes: `low` or more, or more than `above`; at most `high`, or less than `below`."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        """Whether `value` lies within; nan never does, unless there is no limit."""
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        limits = {"{:g} or more": self.low, "more than {:g}": self.above, "at most {:g}": self.high}
        limits["less than {:g}"] = self.below
        return ", ".join(text.format(limit) for text, limit in limits.items() if limit is not None)


def option(
    default: Any,
    help: str,
    *,
    choices: Collection[str] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    origin: str | None = None,
    run_only: bool = False,
) -> Any:
    """A field of a dataclass.

    - `choices`, or `low`, `high`, `above`, `below` (see `Range`): what `validate` accepts. Choices may be a registry,
      which is read when it is needed, so that it may grow.
    - `origin`: where the default comes from: PAPER, RELEASED or OURS, with a remark after a comma
    - `run_only`: the field says where and how a run happens, and may change when the run is resumed
    """
    limits = Range(low, high, above, below)
    return dataclasses.field(
        default=default,
        metadata={"help": help, "choices": choices, "range": limits, "origin": origin, "run_only": run_only},
    )


def validate(settings: Any, *, show: Callable[[Any], str] = repr) -> None:
    """Check type, choices and range of every field of a dataclass; whole numbers for a float become floats.

    None is accepted where a field's type names it. `show`: how messages write a value.

    **Raises:** `UserError` naming the field, its value and what was expected.
    """
    for field in dataclasses.fields(settings):
        _coerce(settings, field)
        value = getattr(settings, field.name)
        expected = _expected(field, value)
        if expected:
            raise UserError(f"{field.name} is {show(value)}, expected {expected}")


def _coerce(settings: Any, field: dataclasses.Field[Any]) -> None:
    value = getattr(settings, field.name)
    if type(value) is int and float in _types(field):
        object.__setattr__(settings, field.name, float(value))


def _expected(field: dataclasses.Field[Any], value: Any) -> str:
    """What the field takes instead of `value`; empty if it takes it."""
    kinds, choices, limits = _types(field), field.metadata["choices"], field.metadata["range"]
    if type(value) not in kinds:
        return " or ".join(kind.__name__.removesuffix("Type") for kind in kinds)
    if choices and value not in choices:
        return f"one of {', '.join(filter(None, choices))}{nearest(str(value), choices)}"
    if isinstance(value, int | float) and value not in limits:
        return str(limits)
    return "" if all(map(math.isfinite, _floats(value))) else f"a finite number{f', {limits}' if str(limits) else ''}"


def _floats(value: Any) -> list[float]:
    """A float, or those of a tuple: what may be nan or infinite."""
    return [one for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, float)]


def _types(field: dataclasses.Field[Any]) -> tuple[type, ...]:
    """`int` -> int; `float | None` -> float, NoneType; `tuple[int, int]` -> tuple."""
    parts = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
    return tuple(typing.cast(type, typing.get_origin(part) or part) for part in parts)


def add_recipe_arguments(parser: argparse.ArgumentParser, kind: Any) -> None:
    """One flag per field of the dataclass `kind`, without defaults: what is not given comes from the recipe."""
    parser.epilog = BASE
    for field in dataclasses.fields(kind):
        if field.name == "recipe":
            continue
        choices = field.metadata["choices"]
        help_text = field.metadata["help"] + (f": {', '.join(filter(None, choices))}" if choices else "")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": f"{help_text} (base: {field.default})"}
        if field.type is bool:
            parser.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, **options)
        else:
            of = typing.cast(type, field.type)
            parser.add_argument(f"--{field.name}", type=of, metavar=of.__name__.upper(), **options)
