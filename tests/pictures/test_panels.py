"""Panels: the right pixels in the right column."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fasthpm import recipes
from fasthpm.data import DatasetInfo
from fasthpm.errors import UserError
from fasthpm.mask import random_mask
from fasthpm.model import HPMViT
from fasthpm.patches import model_of
from fasthpm.pictures import drawing, panels, visualize
from fasthpm.recipe import Recipe
from fasthpm.step import Step
from tests.helpers.videos import tiny, video_run

INFO = DatasetInfo(100, 1, (0.3,), (0.2,), ("a",))


class Oracle(HPMViT):
    """A model whose reconstruction is the target itself."""

    def forward(self, images: torch.Tensor, mask: torch.Tensor, **options: Any) -> Any:
        output = super().forward(images, mask, **options)
        patches = images[mask].reshape(output.reconstruction.shape)
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
            patches = (patches - mean) * (variance + 1e-6).rsqrt()
        return output._replace(reconstruction=patches)


def oracle(recipe: Recipe) -> HPMViT:
    """The recipe's model as an `Oracle`."""
    model = model_of(recipe).eval()
    model.__class__ = Oracle
    return model


@pytest.mark.parametrize("norm_pix", [False, True])
def test_a_perfect_reconstruction_is_the_image(norm_pix: bool) -> None:
    """Patches land where they belong, visible ones are pasted back, and normalised targets are undone."""
    recipe = dataclasses.replace(recipes.debug(), norm_pix_loss=norm_pix)
    model = oracle(recipe)
    images = torch.randint(0, 256, (3, 28, 28, 1), dtype=torch.uint8)
    patches = Step(model, recipe, INFO).normalized_patches(images)
    with torch.no_grad():
        rebuilt = panels.reconstruct(model, patches, random_mask(torch.rand(3, 49), 0.75))
    torch.testing.assert_close(rebuilt, patches, atol=1e-4, rtol=1e-4)


def test_visible_patches_stay_and_masked_ones_are_the_models() -> None:
    recipe = recipes.debug()
    model = model_of(recipe).eval()
    patches = torch.randn(2, 49, 16)
    mask = random_mask(torch.rand(2, 49), 0.75)
    with torch.no_grad():
        rebuilt, output = panels.reconstruct(model, patches, mask), model(patches, mask)
    assert torch.equal(rebuilt[~mask], patches[~mask])
    torch.testing.assert_close(rebuilt[mask].reshape(output.reconstruction.shape), output.reconstruction)


def test_true_loss_is_averaged_over_the_masks_that_hide_a_patch() -> None:
    recipe = dataclasses.replace(recipes.debug(), seed=3)
    model, patches = model_of(recipe).eval(), torch.randn(2, 49, 16)
    with torch.no_grad():
        got = panels.average_loss(model, patches, panels.random_masks(recipe, 2))
        generator = torch.Generator().manual_seed(3)
        kept: list[list[list[float]]] = [[[] for _ in range(49)] for _ in range(2)]
        for _ in range(panels.TRUE_LOSS_MASKS):
            mask = random_mask(torch.rand(2, 49, generator=generator), 0.75)
            losses = model(patches, mask).per_patch_loss
            for row in range(2):
                for position, value in zip(mask[row].nonzero().flatten().tolist(), losses[row].tolist(), strict=True):
                    kept[row][position].append(value)
    want = torch.tensor([[sum(v) / len(v) if v else 0.0 for v in row] for row in kept])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": "mae_vit_nano_patch4_28", "mask_policy": "random", "predict_loss": "none"},
        {"channels": 3, "input_size": "24x40"},
        {"target": "ema"},
    ],
)
def test_panel_has_a_row_per_image_and_a_column_per_name(changes: dict[str, Any]) -> None:
    recipe = dataclasses.replace(recipes.debug(), **changes)
    info = DatasetInfo(9, recipe.channels, (0.3,) * recipe.channels, (0.2,) * recipe.channels, ("a",))
    height, width = recipe.image_size
    images = torch.randint(0, 256, (2, height, width, recipe.channels), dtype=torch.uint8)
    picture = drawing.sheet(panels.pictures(model_of(recipe).eval(), recipe, info, images, 0.5))
    scale = -(-drawing.IMAGE_SIDE // width)
    rows = 2 * (height * scale + drawing.GAP) + drawing.GAP + drawing.HEADER
    columns = 4 if recipe.target == "ema" else 5  # of features there is no picture
    assert len(panels.columns_of(recipe)) == columns
    assert picture.shape == (rows, columns * (width * scale + drawing.GAP) + drawing.GAP, 3)
    top = drawing.HEADER + drawing.GAP
    first = picture[top : top + height * scale : scale, drawing.GAP : drawing.GAP + width * scale : scale]
    assert np.array_equal(first, np.broadcast_to(images[0].numpy(), (height, width, 3)))


@pytest.mark.parametrize(("policy", "moves"), [("attention", False), ("hpm", True)])
def test_the_mask_that_is_drawn_follows_what_the_run_follows(policy: str, moves: bool) -> None:
    """Another loss predictor changes the masks of HPM, and none of AMT."""
    recipe = dataclasses.replace(recipes.debug(), mask_policy=policy)
    model = model_of(recipe).eval()
    images = torch.randint(0, 256, (4, 28, 28, 1), dtype=torch.uint8)

    def drawn() -> Any:
        (picture,) = panels.pictures(model, recipe, INFO, images, 1.0, names=["mask"]).values()
        return picture

    before = drawn()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "loss" in name:
                parameter.add_(torch.randn_like(parameter))
    assert (not np.array_equal(before, drawn())) == moves
    with torch.no_grad():
        model.blocks[-1].attn.qkv.weight.add_(torch.randn_like(model.blocks[-1].attn.qkv.weight))
    assert not np.array_equal(before, drawn())


def test_columns_are_what_was_asked_for() -> None:
    recipe = recipes.debug()
    model = model_of(recipe).eval()
    images = torch.randint(0, 256, (2, 28, 28, 1), dtype=torch.uint8)
    names = ("hardest", "attention", "image")
    picture = drawing.sheet(panels.pictures(model, recipe, INFO, images, 0.5, names=names))
    assert picture.shape[1] == 3 * (112 + drawing.GAP) + drawing.GAP
    top, left = drawing.HEADER + drawing.GAP, drawing.GAP
    hidden = (picture[top : top + 112 : 4, left : left + 112 : 4, 0] == 127).reshape(7, 4, 7, 4).all((1, 3)).flatten()
    with torch.no_grad():
        predicted = model.predict_loss(Step(model, recipe, INFO).normalized_patches(images))[0]
    assert set(hidden.nonzero()[0].tolist()) == set(predicted.argsort(descending=True)[:37].tolist())


@pytest.mark.parametrize(
    ("changes", "spearman", "name"),
    [
        ({}, None, "predicted loss"),
        ({}, -0.071, "predicted loss (paper, -0.07)"),
        ({"difficulty": "measured"}, None, "predicted loss (measured)"),
        ({"difficulty": "masked_query"}, 0.777, "predicted loss (masked_query, 0.78)"),
        ({"mask_policy": "random", "predict_loss": "none"}, None, "predicted loss"),
        (
            {"mask_policy": "random", "predict_loss": "none", "difficulty": "measured"},
            0.5,
            "predicted loss (measured, 0.50)",
        ),
    ],
)
def test_the_predicted_loss_says_by_which_way(changes: dict[str, Any], spearman: float | None, name: str) -> None:
    """And draws what that way answers; a name wider than its column takes two lines."""
    recipe = dataclasses.replace(recipes.debug(), **changes)
    model, images = model_of(recipe).eval(), torch.randint(0, 256, (1, 28, 28, 1), dtype=torch.uint8)
    drawn = panels.pictures(model, recipe, INFO, images, 0.5, names=["predicted_loss", "mask"], spearman=spearman)
    assert list(drawn) == [name, "mask"]
    if recipe.answers_difficulty:
        with torch.no_grad():
            values = model.predict_loss(Step(model, recipe, INFO).normalized_patches(images))
        want = drawing.heat(panels.per_pixel(model, values))
    else:
        want = drawing.heat(np.zeros((1, 1, 28, 28)))
    assert np.array_equal(drawn[name], want)
    lines = 1 if "(" in name else 0
    assert drawing.sheet(drawn).shape[0] == 112 + 2 * drawing.GAP + drawing.HEADER + lines * drawing.LINE


def test_hardest_of_a_policy_with_numbers_of_its_own() -> None:
    """Blocks take more random numbers than there are patches; the hardest patches are the same."""
    images = torch.randint(0, 256, (2, 28, 28, 1), dtype=torch.uint8)
    model, drawn = model_of(recipes.debug()).eval(), []
    for policy in ("hpm", "block"):
        recipe = dataclasses.replace(recipes.debug(), mask_policy=policy)
        drawn.append(panels.pictures(model, recipe, INFO, images, 0.5, names=["hardest"])["hardest"])
    assert np.array_equal(*drawn)


def test_hardest_patches_of_a_clip_slot_by_slot(tmp_path: Path) -> None:
    recipe = tiny(channels=1)
    clips = torch.randint(128, 256, (2, 8, 16, 16, 1), dtype=torch.uint8)
    drawn = panels.pictures(model_of(recipe).eval(), recipe, INFO, clips, 0.5, names=["hardest"])["hardest"]
    hidden = (drawn == 127).all(-1).reshape(2, 4, 2, 2, 8, 2, 8).all((2, 4, 6))
    assert (hidden.sum((2, 3)) == 2).all()
    with pytest.raises(UserError, match="attention is that of the cls token"):
        visualize.main([str(video_run(tmp_path)[0]), "--attention", "-o", str(tmp_path / "x.png")])
