"""Recipes by name."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from fasthpm import recipes
from fasthpm.commands import doctor, listing, plan
from fasthpm.errors import UserError
from fasthpm.recipe import save_recipe


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_are_what_they_say(name: str) -> None:
    recipe = recipes.from_name(name)
    assert recipe.recipe == name
    assert recipes.RECIPES[name].__doc__


@pytest.mark.parametrize("command", [listing.main, plan.main, lambda words: doctor.main(["--recipe", *words])])
def test_the_folder_of_a_run_says_where_its_recipe_lies(tmp_path: Path, command: Callable[[list[str]], None]) -> None:
    """For every command that takes a recipe's name: a run, an import, which has it in its checkpoint, and a folder."""
    run, imported, other = tmp_path / "run", tmp_path / "imported" / "checkpoints" / "step-00000000", tmp_path / "other"
    for folder in (run, imported, other):
        folder.mkdir(parents=True)
    for folder in (run, imported):
        save_recipe(recipes.debug(), folder / "recipe.json")
    told = {run: f"is a folder; give {run}/recipe.json", tmp_path / "imported": f"give {imported}/recipe.json"}
    for folder, message in {**told, other: "is a folder without a recipe.json"}.items():
        with pytest.raises(UserError, match=re.escape(message)):
            command([str(folder)])
