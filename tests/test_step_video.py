"""The fused step on clips."""

import dataclasses

import pytest
import torch
from torch import Tensor

from fasthpm.data import DatasetInfo
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe
from fasthpm.step import Step
from tests.helpers.videos import tiny

INFO = DatasetInfo(8, 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), ())


def test_the_step_cuts_clips_as_the_model_does() -> None:
    step = Step(model_of(tiny()), tiny(), INFO)
    clips = torch.randint(0, 256, (2, 8, 16, 16, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values).reshape(3, 1, 1, 1) * 255 for values in (INFO.mean, INFO.std))
    pixels = (clips.permute(0, 4, 1, 2, 3).float() - mean) / std
    torch.testing.assert_close(step.normalized_patches(clips), step.student.patchify(pixels))


@pytest.mark.parametrize("policy", ["hpm", "hpm_tube", "tube", "random", "block"])
def test_the_step_masks_alike_whatever_the_batch(policy: str) -> None:
    """Masks are functions of (seed, update, sample): the same alone as in a batch, others for other seeds."""
    clips, ids = torch.randint(0, 256, (2, 8, 16, 16, 3), dtype=torch.uint8), torch.tensor([5, 9])
    update, alpha = torch.tensor(3), torch.tensor(0.5, dtype=torch.float64)
    recipe = tiny(mask_policy=policy)

    def run(recipe: Recipe, rows: slice) -> Tensor:
        step = Step(model_of(recipe), recipe, INFO)
        step.attach_teacher(model_of(tiny(seed=1)))
        return step(clips[rows], ids[rows], update, alpha).mask

    both = run(recipe, slice(0, 2))
    assert torch.equal(both[1:], run(recipe, slice(1, 2)))
    assert not torch.equal(both, run(dataclasses.replace(recipe, seed=7), slice(0, 2)))
    assert both.sum(1).tolist() == [recipe.num_masked] * 2


def test_a_head_reads_all_patches_of_a_clip() -> None:
    """No cls token stands before them."""
    recipe = tiny(difficulty="in_place")
    step = Step(model_of(recipe), recipe, INFO)
    step.attach_teacher(model_of(dataclasses.replace(recipe, seed=1)).eval())
    clips = torch.randint(0, 256, (2, 8, 16, 16, 3), dtype=torch.uint8)
    answer = step.ask_teachers(clips, step.normalized_patches(clips), torch.tensor([5, 9]), torch.tensor(3))
    tokens = step._teacher[0].encode(step.normalized_patches(clips))
    assert tokens.shape[1] == recipe.num_patches
    assert answer.tokens is not None
    assert answer.difficulty is not None
    assert torch.equal(answer.tokens, tokens)
    assert torch.equal(answer.difficulty, step._teacher[0].difficulty_head(tokens))
