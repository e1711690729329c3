"""Ranks whose gradients are clipped per parameter: the first moments after one update, of every ZeRO stage."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fasthpm.ranks import deepspeed_json, engine
from fasthpm.ranks import launch as ranks_launch
from fasthpm.ranks.zero import MasterLayout, full_state
from fasthpm.recipe import Recipe
from tests.ranks.test_clipping import STAGES, Toy


def main(folder: Path) -> None:
    """Write `moments.pt`: preset -> name -> first moment."""
    found = {}
    with ranks_launch.session() as launch:
        for preset in STAGES:
            recipe = Recipe(batch_size=4, lr=1e-2, deepspeed_config=preset, clip_grad=1.2, clip_per_tensor=True)
            recipe = recipe.resolve(8, launch.world_size)
            config = deepspeed_json.merge_config(preset, recipe, launch.world_size)
            made = engine.build_engine(Toy(), recipe, config, launch)
            made.backward(made(2.0))
            made.step()
            found[preset] = full_state(MasterLayout(made), "exp_avg")
        if dist.get_rank() == 0:
            torch.save(found, folder / "moments.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
