"""The weights of a run: loaded, and those that a run begins with."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fasthpm import recipes
from fasthpm.checkpoint import folder as checkpoint_folder
from fasthpm.checkpoint import weights
from fasthpm.checkpoint.weights import load_weights
from fasthpm.errors import UserError
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe
from tests.helpers.published import imported_debug
from tests.helpers.runs import write


def test_initial_weights(tmp_path: Path) -> None:
    start = imported_debug(tmp_path)
    recipe = Recipe(**{**vars(recipes.debug()), "init_from": str(start)})
    assert torch.equal(weights.initial_model(recipe).cls_token, load_weights(start)[0].cls_token)
    fresh = model_of(recipe).cls_token
    assert torch.equal(weights.initial_model(recipes.debug()).cls_token, fresh)
    with pytest.raises(
        UserError, match=r"imported: hpm weights do not fit the model: missing \['blocks.4.norm1.weight'"
    ):
        weights.initial_model(Recipe(**{**vars(recipe), "model": "hpm_vit_tiny_patch4_28"}))
    with pytest.raises(UserError, match="holds no valid checkpoint"):
        weights.initial_model(Recipe(**{**vars(recipe), "init_from": str(tmp_path / "nowhere")}))
    with pytest.raises(UserError, match=r"holds imported weights and no optimizer state to resume; .* --init_from"):
        checkpoint_folder.find_resume(Recipe(**{**vars(recipe), "output_dir": str(start)}), pytest.fail)


def test_learned_positions_are_no_start(tmp_path: Path) -> None:
    start = imported_debug(tmp_path, lambda state: state["pos_embed"].add_(0.1))
    with pytest.raises(UserError, match="has a learned pos_embed, and pretraining keeps the fixed"):
        weights.initial_model(Recipe(**{**vars(recipes.debug()), "init_from": str(start)}))


def test_load_weights(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    model, recipe = weights.load_weights(tmp_path)
    assert not model.training
    assert recipe.recipe == "debug"
    assert torch.equal(model.cls_token, load_file(folder / "student.safetensors")["cls_token"])
    untrained, _ = weights.load_weights(folder, "untrained")
    assert torch.equal(untrained.blocks[0].attn.qkv.weight, model_of(recipe).blocks[0].attn.qkv.weight)
    shutil.rmtree(folder / "shards")
    with pytest.raises(UserError, match="has no teacher weights; use --weights student"):
        weights.load_weights(folder, "teacher")
    with pytest.raises(UserError, match="holds no valid checkpoint"):
        weights.load_weights(tmp_path / "empty")
