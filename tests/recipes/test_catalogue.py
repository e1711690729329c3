"""Recipes by name."""

import pytest

from fasthpm import recipes


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_are_what_they_say(name: str) -> None:
    recipe = recipes.from_name(name)
    assert recipe.recipe == name
    assert recipes.RECIPES[name].__doc__
