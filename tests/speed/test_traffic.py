"""The model of a step's memory traffic."""

import dataclasses
from typing import Any

import pytest
import torch

from fasthpm import recipes
from fasthpm.patches import model_of
from fasthpm.speed import traffic


@pytest.mark.parametrize(
    ("changes", "encoder", "decoder"),
    [  # tokens that pass through the blocks of the teacher: 1 + 49 is all, 12 are visible
        ({}, 50, 50),
        ({"decoder_attention": "cross"}, 50, 49),
        ({"difficulty": "masked_query"}, 50, 1 + 12 + 49),
        ({"difficulty": "in_place"}, 50, 0),
        ({"difficulty": "measured"}, 2 * 13, 2 * 13 + 49),
        ({"difficulty": "measured", "decoder_attention": "cross"}, 2 * 13, 49),
        ({"teacher_maps": True, "map_refresh_epochs": 5}, 50 / 5, 50 / 5),
    ],
)
def test_the_teachers_traffic_is_that_of_its_tokens(changes: dict[str, Any], encoder: float, decoder: float) -> None:
    """38 bytes per token, channel and block; the student's three passes see 13 tokens, and decode all or the masked."""
    recipe = dataclasses.replace(recipes.debug(), **changes)
    with torch.device("meta"):
        model = model_of(recipe)
    assert (recipe.num_patches, recipe.num_masked) == (49, 37)
    depth, width = len(model.decoder_blocks), recipe.decoder_dim
    found = traffic.step_bytes(model, recipe)
    assert found["teacher"] == pytest.approx(38 * (4 * 128 * encoder + depth * width * decoder))
    decoded = 37 if recipe.decoder_attention == "cross" else 50
    assert found["student"] == pytest.approx(3 * 38 * (4 * 128 * 13 + 2 * depth * width * decoded))
    assert found["total"] == found["teacher"] + found["student"]
