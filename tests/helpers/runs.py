"""Run folders without a run: what probes need of one."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from fasthpm.checkpoint import folder as checkpoint_folder
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe


def run_with_random_weights(output: Path, recipe: Recipe) -> Path:
    """A run folder of update 0, whose encoder differs from the one that the recipe begins with."""
    aside = checkpoint_folder.begin(output, 0)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: value + 0.02 * torch.randn(value.shape, generator=generator)
        for name, value in model_of(recipe).named_parameters()
    }
    save_file(weights, aside / "student.safetensors")
    checkpoint_folder.commit(aside, recipe, checkpoint_folder.RunState(0, {}, 1, 1))
    return output
