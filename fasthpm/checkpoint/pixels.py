"""By what a run's pixels are normalised: kept in each of its checkpoints, or found out of what an older run left."""

import dataclasses
import json
import os
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fasthpm.data import DatasetInfo, read_info
from fasthpm.data.statistics import PixelStatistics, statistics_from, statistics_of
from fasthpm.errors import UserError
from fasthpm.files import read_json
from fasthpm.recipe import Recipe
from fasthpm.recipes import RECIPES

PIXELS = "pixels.json"  # in a checkpoint
EXPORTED = ("encoder.safetensors", "model.safetensors")  # what a finished run holds: of images, of videos


def pixels_note(statistics: PixelStatistics) -> dict[str, str]:
    """The file of a checkpoint that says it: {name: text}."""
    return {PIXELS: json.dumps(statistics.as_json(), indent=2) + "\n"}


def pixels_of(folder: Path, recipe: Recipe) -> PixelStatistics | None:
    """Mean and deviation by which a checkpoint's model was trained; None if nothing tells them.

    Older checkpoints don't say it. Then the encoder that a finished run wrote does; else it is the run's own data, if
    that is still what it was, as far as sizes tell.
    """
    found = statistics_from(read_json(folder / PIXELS))
    place = Path(os.path.abspath(folder))  # a checkpoint may be named from within
    if found is None and place.parent.name == "checkpoints":
        found = _of_export(place.parent.parent)
    if found is None and recipe.data_path:
        found = _of_data(recipe)
    return found if found is None else found.in_channels(recipe.channels)


def metadata_statistics(metadata: dict[str, str]) -> PixelStatistics | None:
    """What the metadata of an exported file says; None for nothing."""
    with suppress(ValueError):
        names = [name for name in ("mean", "std", "dtype", "nodata", "bands", "log", "taken") if name in metadata]
        return statistics_from({name: json.loads(metadata[name]) for name in names})
    return None


def _of_export(run: Path) -> PixelStatistics | None:
    for path in (run / name for name in EXPORTED):
        with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
            if (found := metadata_statistics(file.metadata() or {})) is not None:
                return found
    return None


def _of_data(recipe: Recipe) -> PixelStatistics | None:
    drawn = recipe.data_path.startswith("synthetic:")
    try:
        info = read_info(recipe.data_path, recipe.channels if drawn else 0)
    except UserError:
        return None
    if not (drawn or _still_the_same(recipe, info)):
        return None
    remark = f"the run does not say by what its pixels were normalised: by mean and std of its data, {recipe.data_path}"
    return dataclasses.replace(statistics_of(info), remark=remark)


def _still_the_same(recipe: Recipe, info: DatasetInfo) -> bool:
    """Whether a set may be the one that a resolved recipe was trained on, by its channels and its size."""
    batches = info.num_samples // max(recipe.global_batch_size, 1)
    usual = RECIPES[recipe.recipe]().steps_per_epoch if recipe.recipe in RECIPES else 0
    asked = bool(usual) and recipe.steps_per_epoch == usual and batches >= usual  # then an epoch is a part of the set
    return info.channels == recipe.channels and (asked or batches == recipe.steps_per_epoch)
