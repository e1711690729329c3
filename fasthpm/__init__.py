"""FastHPM: Hard Patches Mining for masked image and video pretraining."""

from fasthpm.model import HPMViT, create_model
from fasthpm.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["HPMViT", "Recipe", "__version__", "create_model"]
