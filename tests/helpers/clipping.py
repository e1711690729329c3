"""Ranks whose gradients are clipped per parameter: the first moments after one update, of every ZeRO stage."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fasthpm.ranks import deepspeed_json, engine
from fasthpm.ranks import launch as ranks_launch
from fasthpm.ranks.zero import MasterLayout, full_state
from fasthpm.recipe import Recipe

STAGES = ("zero0_fp32", "zero1_fp32", "zero2_bf16", "zero3_bf16", "zero1_bf16")


class Toy(nn.Module):
    """Two layers whose gradients have very different norms; the second is called a last layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.ModuleDict({"first": nn.Linear(5, 7), "last_layer": nn.Linear(7, 3)})

    def forward(self, scale: float) -> Tensor:
        x = torch.linspace(-1, 1, 20).view(4, 5).to(self.student["last_layer"].weight.dtype)
        return (self.student["last_layer"](self.student["first"](x) * 3).float() ** 2).mean() * scale


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
