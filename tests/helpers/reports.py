"""What a run wrote, without a run."""

import dataclasses
import json
from pathlib import Path

from fasthpm import recipes
from fasthpm.pictures.report import TABLE
from fasthpm.recipe import save_recipe


def written_run(folder: Path) -> Path:
    """What a run leaves: recipe, versions, and metrics with a repeated and an unfinished line."""
    save_recipe(dataclasses.replace(recipes.debug(), steps_per_epoch=2), folder / "recipe.json")
    versions = {"torch": "1", "deepspeed": "2", "fasthpm": "3", "commit": "abc", "world_size": 2, "device": "CPU"}
    (folder / "versions.json").write_text(json.dumps(versions))
    more = ("lr", "alpha", "ema_momentum")
    lines = [
        json.dumps({"step": s, "epoch": s / 2, **dict.fromkeys((*TABLE, *more), v)})
        for s, v in ((1, 9.0), (2, 8.0), (2, 7.5), (3, 7.0))
    ]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "los']))
    return folder
