"""What a step's parts cost, and how often they run."""

import dataclasses

import pytest
import torch

from fasthpm import recipes
from fasthpm.patches import model_of
from fasthpm.speed import cost
from fasthpm.speed.cost import Price

ENCODER_ONLY = Price(
    lambda model, patches, queries, outputs: float(patches), lambda *_: 0.0, lambda tokens, inputs, outputs: 0.0
)
HEAD_ONLY = Price(lambda *_: 0.0, lambda *_: 0.0, lambda tokens, inputs, outputs: tokens * (outputs == 1))


@pytest.mark.parametrize(("batch", "share"), [(1, 1), (16, 1 / 16), (17, 2 / 17), (64, 1 / 16)])
def test_with_kept_maps_the_head_learns_on_a_few_samples_of_a_batch(batch: int, share: float) -> None:
    """One of sixteen, and one of what remains; its teacher runs for them, and once for all when maps are renewed."""
    changes = {"difficulty": "in_place", "predict_loss": "none", "teacher_maps": True, "map_refresh_epochs": 4}
    recipe = dataclasses.replace(recipes.debug(), batch_size=batch, **changes)
    with torch.device("meta"):
        model = model_of(recipe)
    assert cost.head_share(recipe) == share
    assert cost.step_cost(model, recipe, ENCODER_ONLY)["teacher"] == pytest.approx(49 / 4 + 49 * share)
    found = cost.step_cost(model, recipe, HEAD_ONLY)
    assert found["student"] == pytest.approx(3 * 49 * share)
    assert found["total"] == pytest.approx(49 / 4 + 3 * 49 * share)


def test_a_measured_loss_has_looks_like_the_students() -> None:
    """ViT-B/16 at the papers' ratio: two looks of 49 patches, each asked for half; three where a third is masked."""
    base = dataclasses.replace(recipes.from_name("hpm_vit_base_in1k_200e"), difficulty="measured")
    with torch.device("meta"):
        assert cost.look_sizes(model_of(base), 196) == [(49, 98), (49, 98)]
        third = dataclasses.replace(base, mask_ratio=1 / 3)
        assert cost.look_sizes(model_of(third), 196) == [(130, 65), (130, 65), (130, 66)]
