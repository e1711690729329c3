"""Our own form: everything, under our names."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fasthpm.checkpoint.foreign import EMBEDDED_RECIPE
from fasthpm.difficulty import HEAD
from fasthpm.exchange.forms.base import Form, blank_target, metadata_of, quoted
from fasthpm.files import save_tensors
from fasthpm.model import HPMViT
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe, build_recipe, recipe_text


class Plain(Form):
    """All tensors under our names, which are the published ones; `fasthpm import` takes the file."""

    name = "safetensors"
    library, summary, default, whole = "fasthpm", "everything, under our names", "model.safetensors", True
    takes, relative = ("image", "video"), True

    def write(self, model: HPMViT, recipe: Recipe, metadata: dict[str, str], path: Path) -> None:
        tensors = {key: value.clone() for key, value in model.state_dict().items()}
        save_tensors(tensors, path, {EMBEDDED_RECIPE: recipe_text(recipe), **metadata})

    def theirs(self, path: Path, images: Tensor, mask: Tensor) -> Tensor:
        model = model_of(build_recipe(metadata_of(path, EMBEDDED_RECIPE), source=str(path)))
        model.load_state_dict(load_file(path))
        return self.ours(model.double().eval(), images, mask)

    def ours(self, model: HPMViT, images: Tensor, mask: Tensor) -> Tensor:
        target = blank_target(model, len(images))
        out = model(images, mask, target=target)
        parts = [model.encode(images), out.reconstruction, out.predicted_difficulty, out.loss]
        if hasattr(model, HEAD):
            parts.append(model.predict_loss(images, target=target))
        return torch.cat([part.flatten() for part in parts])

    def usage(self, path: Path) -> str:
        loaded = f"import safetensors.torch; model = safetensors.torch.load_file({quoted(path)})"
        return f"{loaded}  # or: fasthpm import {path} -o OUT_DIR"
