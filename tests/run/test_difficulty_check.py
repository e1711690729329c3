"""The true difficulty and how it is measured: against plain loops, the same for every rank and at every time."""

import dataclasses

import numpy as np
import pytest
import torch

from fasthpm import loss, recipes
from fasthpm.difficulty import DIFFICULTIES
from fasthpm.errors import UserError
from fasthpm.mask import draw_mask, sample_noise
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe
from fasthpm.run.difficulty_check import MASKS, NOISE_SEED, SAMPLES, held_out, mean_losses, random_plan


def debug(**changes: object) -> Recipe:
    return dataclasses.replace(recipes.debug(), **changes)  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("policy", ["hpm", "block", "random"])
def test_the_true_difficulty_is_the_mean_loss_of_the_masks_that_hide_a_patch(policy: str) -> None:
    recipe = debug(mask_policy=policy)
    model, ids = model_of(recipe).double(), torch.tensor([4, 11])
    patches = torch.randn(2, 49, 16, dtype=torch.float64)
    plan = random_plan(recipe)
    found = mean_losses(model, patches, ids, plan)
    sums, counts = np.zeros((2, 49)), np.zeros((2, 49))
    for number in range(MASKS):
        noise = sample_noise(NOISE_SEED, torch.tensor(number), ids, plan.noise_size)
        masks = draw_mask(plan, noise, torch.zeros(2, 49), 0.0)
        for row in range(2):
            out = model(patches[row : row + 1], masks[row : row + 1])
            for place, value in zip(np.flatnonzero(masks[row].numpy()), out.per_patch_loss[0].tolist(), strict=True):
                sums[row, place] += value
                counts[row, place] += 1
    assert counts.sum() == 2 * MASKS * recipe.num_masked
    np.testing.assert_allclose(found.numpy(), sums / np.maximum(counts, 1), rtol=1e-6)


def test_masks_of_the_true_difficulty_are_random_whatever_the_recipe_masks() -> None:
    for policy, fields, expected in (
        ("hpm", {}, "hpm"),  # random, as long as nothing is chosen by difficulty
        ("blockwise", {}, "random"),
        ("attention", {"throw_ratio": 0.2, "mask_ratio": 0.5}, "random"),
    ):
        plan = random_plan(debug(mask_policy=policy, **fields))
        assert plan.policy == expected
        assert plan.throw_ratio == 0
    video = debug(
        model="hpm_vit_nano_patch8_32_video",
        input_size="16",
        num_frames=4,
        tubelet_size=2,
        mask_policy="tube",
        predict_loss="relative",
    )
    assert random_plan(video).policy == "tube"  # what is hidden together changes what is hard


def test_the_hardest_quarter_is_found_or_not() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randint(0, 6, (5, 20), generator=generator).float()  # with ties
    actual = torch.rand(5, 20, generator=generator)
    areas = []
    for guess, truth in zip(predicted.tolist(), actual.tolist(), strict=True):
        order = sorted(range(20), key=lambda place: -truth[place])
        hard, others = order[:5], order[5:]
        wins = [(guess[h] > guess[o]) + 0.5 * (guess[h] == guess[o]) for h in hard for o in others]
        areas.append(sum(wins) / len(wins))
    assert float(loss.hardest_auc(predicted, actual)) == pytest.approx(sum(areas) / 5, rel=1e-6)
    assert float(loss.hardest_auc(actual, actual)) == 1
    assert float(loss.hardest_auc(-actual, actual)) == 0
    assert float(loss.hardest_auc(torch.zeros(5, 20), actual)) == 0.5


def test_ranks_share_the_held_out_samples() -> None:
    recipe = debug(data_path="synthetic:1000", val_path="synthetic:300")
    alone = held_out(recipe, 0, 1)
    together = [held_out(recipe, rank, 2) for rank in range(2)]
    assert len(alone.ids) == SAMPLES
    assert [len(batch.ids) for batch in together] == [SAMPLES // 2] * 2
    assert sorted(alone.ids.tolist()) == sorted(together[0].ids.tolist() + together[1].ids.tolist())
    assert int(alone.ids.min()) == 0
    assert int(alone.ids.max()) == 299  # of val_path, from its first to its last
    again = held_out(recipe, 0, 1)
    assert torch.equal(alone.images, again.images)


def test_a_held_out_set_that_is_missing_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere\.beton"):
        held_out(debug(val_path="nowhere.beton"), 0, 1)


def test_recipes_know_whether_they_can_answer() -> None:
    assert debug().answers_difficulty
    assert not debug(mask_policy="random", predict_loss="none").answers_difficulty
    assert debug(mask_policy="random", predict_loss="none", difficulty="measured").answers_difficulty
    assert {name for name, way in DIFFICULTIES.items() if way.predictor} == {"paper", "masked_query"}
