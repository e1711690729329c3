"""What every way to ask what is hard costs."""

import dataclasses
from typing import Any

import pytest

from fasthpm import recipes
from fasthpm.commands import costs
from fasthpm.recipe import Recipe
from fasthpm.speed import flops


def cells(recipe: Recipe) -> dict[str, dict[str, str]]:
    """The table by row and column."""
    (_, *head), *rows = costs.table(recipe)
    return {name: dict(zip(head, row, strict=True)) for name, *row in rows}


def test_the_table_has_the_figures_of_the_recipes_that_have_the_flags() -> None:
    """A cell against the cost that a run with these flags logs."""
    debug, maps = recipes.debug(), {"teacher_maps": True, "map_refresh_epochs": recipes.FAST_REFRESH_EPOCHS}
    found = cells(debug)
    asked: list[tuple[str, str, dict[str, Any]]] = [
        ("paper", "in every step", {}),
        ("in_place, no loss predictor", "kept maps", {"difficulty": "in_place", "predict_loss": "none", **maps}),
        ("measured", "both", {"difficulty": "measured", "decoder_attention": "cross", **maps}),
        ("masked_query", "cross decoders", {"difficulty": "masked_query", "decoder_attention": "cross"}),
    ]
    for row, column, changes in asked:
        ratio = flops.cost_over_mae(dataclasses.replace(debug, **changes))
        assert found[row][column].split(" ")[0] == f"{ratio:.2f}", (row, column)
    assert found["paper"]["both"] == found["masked_query"]["both"]  # cross decoders know one question


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"model": "simmim_vit_nano_patch4_28"}, {("masked_query", None), ("paper", "cross decoders")}),
        ({"target": "ema"}, {("measured", "kept maps"), ("in_place", "kept maps")}),
        ({"decoder_attention": "cross", "predictor": "shared"}, {("paper", None)}),
        ({"teacher_maps": True, "map_refresh_epochs": 2}, set()),
    ],
)
def test_what_a_recipe_cannot_have_is_left_out(changes: dict[str, Any], missing: set[tuple[str, str | None]]) -> None:
    """A row without any figure, or a dash in a cell."""
    found = cells(dataclasses.replace(recipes.debug(), **changes))
    for row, column in missing:
        assert row not in found if column is None else found[row][column] == "-"
    assert "in_place, no loss predictor" in found
    if changes.get("teacher_maps"):  # renewed as often as the recipe says
        usual = cells(recipes.debug())["paper"]
        assert found["paper"]["in every step"] == usual["in every step"]
        assert usual["kept maps"] < found["paper"]["kept maps"] < usual["in every step"]
