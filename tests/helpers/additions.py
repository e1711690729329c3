"""One mask, one target, one export form and one recipe from outside the package, each one entry.

python additions.py COMMAND …      # as `fasthpm COMMAND …`, with them
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthpm import mask, targets
from fasthpm.__main__ import main
from fasthpm.exchange import forms
from fasthpm.mask import MaskPlan
from fasthpm.model import HPMViT
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe, build_recipe, recipe_text
from fasthpm.recipes import debug, recipe


def count_rows(plan: MaskPlan) -> tuple[int, int]:
    rows, columns = plan.grid_size
    return mask.num_masked(rows, plan.mask_ratio) * columns * plan.slots, 0


def draw_rows(plan: MaskPlan, noise: Tensor, scores: Tensor, alpha: float | Tensor) -> mask.Sets:
    """Whole rows of patches, a share alpha of them the hardest on the average."""
    rows, columns = plan.grid_size
    difficulty = scores.reshape(len(scores), plan.slots, rows, columns).mean(dim=(1, 3))
    chosen = mask.easy_to_hard_mask(difficulty, plan.mask_ratio, alpha, noise=noise[:, :, :rows])
    return chosen.repeat_interleave(columns, dim=1).repeat(1, plan.slots), None


class Statistics(nn.Module):
    """Mean and standard deviation of every patch's pixels, in units of 255."""

    def __init__(self, recipe: Recipe, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.side, self.dtype = recipe.patch_size, dtype

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, C] -> [B, L, 2]."""
        cut = images.unfold(1, self.side, self.side).unfold(2, self.side, self.side)
        std, mean = torch.std_mean(cut.float().flatten(3) / 255, dim=3)
        return torch.stack([mean, std], dim=3).flatten(1, 2).to(self.dtype)


def smooth_l1(prediction: Tensor, features: Tensor) -> Tensor:
    return F.smooth_l1_loss(prediction.float(), features.float(), reduction="none").mean(dim=-1)


class Numpy(forms.Form):
    """The encoder as arrays of numpy."""

    name, library, summary, default = "numpy", "numpy", "encoder as arrays (.npz)", "encoder.npz"

    def write(self, model: HPMViT, recipe: Recipe, metadata: dict[str, str], path: Path) -> None:
        arrays = {key: value.numpy() for key, value in forms.encoder_of(model).items()}
        np.savez(path, recipe=np.array(recipe_text(recipe)), **arrays)  # type: ignore[arg-type]

    def theirs(self, path: Path, images: Tensor, mask: Tensor) -> Tensor:
        with np.load(path) as file:
            arrays: dict[str, Any] = dict(file)
        model = model_of(build_recipe(json.loads(str(arrays.pop("recipe"))), source=str(path)))
        model.load_state_dict({key: torch.from_numpy(value) for key, value in arrays.items()}, strict=False)
        return model.double().eval().encode(images)

    def usage(self, path: Path) -> str:
        return f'numpy.load("{path}")'


def hpm_rows() -> Recipe:
    """Rows instead of patches, and their statistics instead of their pixels."""
    return dataclasses.replace(debug(), recipe="hpm_rows", mask_policy="rows", target="statistics")


def add() -> None:
    """All four, an entry each."""
    mask.register("rows", "hardest rows", counts=count_rows, follows="difficulty")(draw_rows)
    targets.register(
        targets.Target("statistics", "mean and deviation of the pixels", width=2, loss=smooth_l1, build=Statistics)
    )
    forms.register(Numpy())
    recipe(hpm_rows)


if __name__ == "__main__":
    add()
    main()
