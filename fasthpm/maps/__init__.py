"""Maps: one small picture per sample, kept in a file, cropped with the image, renewed every so many epochs."""

from fasthpm import entry
from fasthpm.maps.run import for_recipe, with_maps
from fasthpm.maps.store import KINDS

__all__ = ["KINDS", "for_recipe", "with_maps"]

entry.make_callable(__name__)  # `fasthpm.maps(…)` is the command, this room is what keeps the maps of a run
