"""Panels of models that predict tokens: a codebook's codes are pictures, other tokens are not."""

import dataclasses
from typing import Any

import pytest
import torch

from fasthpm import recipes
from fasthpm.data.statistics import PixelStatistics
from fasthpm.patches import model_of
from fasthpm.pictures import panels
from fasthpm.tokenizers import Codebook
from tests.helpers.tokens import Brightness

FIELDS: dict[str, Any] = {
    **{"model": "beit_vit_nano_patch4_28", "input_size": "16", "target": "tokens", "target_dim": 4},
    **{"predict_loss": "none", "difficulty": "measured", "mask_ratio": 0.38},
}
STATISTICS = PixelStatistics((0.5,), (0.25,))


@pytest.mark.parametrize("weights", ["kmeans:book", "dvae:folder"])
def test_tokens_are_drawn_where_they_are_patches(weights: str) -> None:
    recipe = dataclasses.replace(recipes.debug(), **FIELDS, target_weights=weights)
    torch.manual_seed(0)
    model = model_of(recipe).eval()
    images = torch.randint(0, 256, (2, 16, 16, 1), dtype=torch.uint8)
    book = Codebook(torch.randn(4, 16), 4, (0.5,), (0.25,))
    frozen = book if weights.startswith("kmeans") else Brightness(4, 4)
    drawn = panels.pictures(model, recipe, STATISTICS, images, 0.5, frozen)
    assert ("reconstruction" in drawn) == weights.startswith("kmeans")
    assert "true loss" in drawn
    assert next(picture for name, picture in drawn.items() if name.startswith("predicted loss")).any()
    assert all(picture.shape == (2, 1, 16, 16, 3) for picture in drawn.values())


def test_a_masked_patch_is_drawn_as_its_likeliest_code() -> None:
    """Visible patches stay; a masked one is the code with its own mean and contrast."""
    recipe = dataclasses.replace(recipes.debug(), **FIELDS, target_weights="kmeans:book")
    model = model_of(recipe).eval()
    book = Codebook(torch.randn(4, 16), 4, (0.5,), (0.25,))
    patches, mask = torch.randn(2, 16, 16), torch.arange(16).expand(2, -1) < 6
    ids = torch.zeros(2, 16, dtype=torch.int64)
    with torch.no_grad():
        model.decoder_pred.weight.zero_()
        model.decoder_pred.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 0.0]))
        again = panels.reconstruct(model, patches, mask, ids, book)
    assert torch.equal(again[:, 6:], patches[:, 6:])
    want = book.pictures(torch.full((2, 6), 2), patches[:, :6])
    torch.testing.assert_close(again[:, :6], want)
