"""Run folders without a run."""

import dataclasses
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fasthpm import recipes
from fasthpm.checkpoint import folder as checkpoint_folder
from fasthpm.checkpoint.folder import RunState
from fasthpm.checkpoint.foreign import ENCODER_PREFIXES, IMPORT_NOTE
from fasthpm.files import file_hash
from fasthpm.model import HPMViT
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


def away(recipe: Recipe, seed: int = 5) -> HPMViT:
    """The recipe's model, whose weights, biases and norms are all away from their initial values."""
    model = model_of(recipe).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def run_of(
    folder: Path, recipe: Recipe, teacher: HPMViT | None = None, buffers: dict[str, Tensor] | None = None
) -> tuple[Path, HPMViT]:
    """A run of update 3 with the weights of `away`, and its model; with the weights of `teacher` and `buffers`, too."""
    model = away(recipe)
    aside = checkpoint_folder.begin(folder, 3)
    for name, each in {"student": model, "teacher": teacher}.items():
        if each is not None:
            save_file(
                {key: value.contiguous() for key, value in each.state_dict().items()}, aside / f"{name}.safetensors"
            )
    if buffers:
        save_file(buffers, aside / checkpoint_folder.BUFFERS)
    checkpoint_folder.commit(aside, recipe, checkpoint_folder.RunState(3, {}, 1, 1))
    return folder, model


def lone_encoder(output: Path, recipe: Recipe, decoder: int) -> Path:
    """An import of an encoder alone; `decoder`: seed of all other weights, which are random."""
    model, generator = away(recipe), torch.Generator().manual_seed(decoder)
    weights = {
        name: value.contiguous() if name.startswith(ENCODER_PREFIXES) else torch.randn(value.shape, generator=generator)
        for name, value in model.state_dict().items()
    }
    aside = checkpoint_folder.begin(output, 0)
    save_file(weights, aside / "student.safetensors")
    (aside / IMPORT_NOTE).write_text(json.dumps({"encoder_only": True}))
    checkpoint_folder.commit(aside, recipe, RunState(0, {}, 1, 1))
    return output


def recipe_in(folder: Path, **changes: object) -> Recipe:
    """The debug recipe with its output in `folder`."""
    return dataclasses.replace(recipes.debug(), output_dir=str(folder), **changes)  # type: ignore[arg-type]


def write(folder: Path, step: int) -> Path:
    """A small but complete checkpoint."""
    recipe = recipe_in(folder)
    aside = checkpoint_folder.begin(folder, step)
    save_file(checkpoint_folder.cpu_state(model_of(recipe)), aside / "student.safetensors")
    (aside / "shards").mkdir()
    (aside / "shards" / "part").write_bytes(os.urandom(1000))
    return checkpoint_folder.commit(aside, recipe, RunState(step, {"epoch": 1, "batch": 2}, 2, 1))


def signed(folder: Path) -> None:
    """Let a checkpoint's manifest be that of the files that it has now, as if they had been written so."""
    manifest = folder / checkpoint_folder.MANIFEST
    manifest.unlink()
    there = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(folder)): [path.stat().st_size, file_hash(path)] for path in there}
    manifest.write_text(json.dumps(sizes))
