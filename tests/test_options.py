"""Fields that are options: types, choices and ranges are checked in one place, and messages say what fits."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest

from fasthpm.errors import UserError
from fasthpm.options import OURS, PAPER, RELEASED, REQUIRED, Range, option, validate
from fasthpm.probes.finetune.settings import FineTune
from fasthpm.recipe import Recipe


@dataclass(frozen=True)
class Cake:
    eggs: int = option(REQUIRED, "eggs", low=0)
    sugar: float = option(0.5, "share of sugar", above=0, high=1)
    salt: float = option(0.0, "share of salt", low=0, below=1)
    form: str = option("", "its form; empty = any", choices=("", "round", "square"))
    glazed: bool = option(False, "with icing")
    tin: tuple[int, int] = option((1, 2), "sides")
    hours: float | None = option(None, "in the oven; None = until done", above=0)
    warmth: float = option(1.0, "any")

    def __post_init__(self) -> None:
        validate(self)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"eggs": -1}, "eggs is -1, expected 0 or more"),
        ({"eggs": 1.0}, "eggs is 1.0, expected int"),
        ({"eggs": True}, "eggs is True, expected int"),
        ({"sugar": 0.0}, "sugar is 0.0, expected more than 0, at most 1"),
        ({"sugar": float("nan")}, "sugar is nan, expected more than 0, at most 1"),
        ({"salt": 1}, "salt is 1.0, expected 0 or more, less than 1"),
        ({"form": "squre"}, "form is 'squre', expected one of round, square; did you mean 'square'?"),
        ({"form": None}, "form is None, expected str"),
        ({"glazed": 1}, "glazed is 1, expected bool"),
        ({"tin": [1, 2]}, "tin is [1, 2], expected tuple"),
        ({"hours": 0}, "hours is 0.0, expected more than 0"),
        ({"hours": "1"}, "hours is '1', expected float or None"),
        ({"hours": float("inf")}, "hours is inf, expected a finite number, more than 0"),
        ({"warmth": float("nan")}, "warmth is nan, expected a finite number"),
        ({"warmth": -float("inf")}, "warmth is -inf, expected a finite number"),
    ],
)
def test_what_does_not_fit_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Cake(**{"eggs": 1} | given)
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [Recipe, FineTune])
def test_every_number_of_a_run_is_finite(kind: Any, value: float) -> None:
    names = [field.name for field in dataclasses.fields(kind) if field.type is float]
    assert len(names) > 10
    for name in names:
        with pytest.raises(UserError, match=rf"^{name} is {value}, expected "):
            kind(**{name: value})


def test_whole_numbers_become_floats_where_these_are_meant() -> None:
    cake = Cake(3, sugar=1, hours=2)
    assert [type(value) for value in (cake.eggs, cake.sugar, cake.hours)] == [int, float, float]
    assert Cake(0).hours is None


def test_a_field_without_default_must_be_given() -> None:
    with pytest.raises(TypeError, match="eggs"):
        Cake()


@pytest.mark.parametrize(
    ("limits", "text"), [(Range(0, 1), "0 to 1"), (Range(1), "1 or more"), (Range(above=0), "more than 0")]
)
def test_ranges_say_what_they_hold(limits: Range, text: str) -> None:
    assert str(limits) == text
    assert 1 in limits
    assert -1 not in limits


def test_origins_of_a_recipes_fields_begin_with_a_source() -> None:
    origins = [field.metadata["origin"] for field in dataclasses.fields(Recipe) if field.metadata["origin"]]
    assert len(origins) > 30
    assert {origin.partition(",")[0] for origin in origins} == {PAPER, RELEASED, OURS}
