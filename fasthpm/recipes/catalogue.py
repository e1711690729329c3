"""Recipes by name: a function with `@recipe` is one, wherever it stands."""

from collections.abc import Callable
from pathlib import Path

from fasthpm.errors import UserError, nearest
from fasthpm.recipe import Recipe, load_recipe

RECIPES: dict[str, Callable[[], Recipe]] = {}


def recipe(function: Callable[[], Recipe]) -> Callable[[], Recipe]:
    """Decorator: the function's recipe can be had by the function's name.

    **Raises:** `ValueError` for a name that is taken.
    """
    if function.__name__ in RECIPES:
        raise ValueError(f"there is a recipe {function.__name__} already; give the new one another name")
    RECIPES[function.__name__] = function
    return function


def from_name(name: str) -> Recipe:
    """A published recipe, or the recipe.json of an earlier run (a path that ends in .json).

    **Raises:** `UserError` naming the nearest recipe.
    """
    if name.endswith(".json"):
        return load_recipe(Path(name))
    if name not in RECIPES and Path(name).is_dir():
        found = [Path(name) / "recipe.json", *sorted(Path(name).glob("checkpoints/step-*/recipe.json"), reverse=True)]
        lies = next((str(path) for path in found if path.is_file()), "")
        raise UserError(
            f"{name} is a folder{f'; give {lies}' if lies else ' without a recipe.json; give the name of a recipe'}"
        )
    if name not in RECIPES:
        raise UserError(
            f"unknown recipe {name!r}{nearest(name, RECIPES)}; expected one of {', '.join(RECIPES)}, or "
            f"the recipe.json of a run"
        )
    return RECIPES[name]()
