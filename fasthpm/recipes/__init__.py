"""Recipes: one short function per published run."""

from fasthpm.recipes import beit, images, video, views  # noqa: F401  (they register their recipes)
from fasthpm.recipes.catalogue import RECIPES, from_name, recipe
from fasthpm.recipes.images import FAST_REFRESH_EPOCHS, debug, hpm_demo

__all__ = ["FAST_REFRESH_EPOCHS", "RECIPES", "debug", "from_name", "hpm_demo", "recipe"]
