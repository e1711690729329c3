"""Pixels of any type in the step, and patches of nodata: in no loss, no hard choice."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fasthpm import recipes
from fasthpm.data import DatasetInfo
from fasthpm.data.values import Values
from fasthpm.errors import UserError
from fasthpm.mask import draw_mask, draw_sets, sample_noise, spread_units
from fasthpm.patches import NormalizedPatches, model_of, normalised, statistics_for
from fasthpm.step import Step
from fasthpm.tuning.run import normalised as normalised_images
from tests.helpers import reference
from tests.helpers.steps import ALPHA, NoSynchronisation

NODATA = 7.0
MEANS, STDS = (100.0, 4000.0, 30.0), (20.0, 900.0, 0.0)


def step_of(nodata: float | None = NODATA, dtype: str = "uint16", **changes: Any) -> Step:
    """The debug recipe's step on three channels of stored values."""
    info = DatasetInfo(100, 3, MEANS, STDS, ("a",), values=Values(dtype, nodata))
    recipe = dataclasses.replace(recipes.debug(), channels=3, **changes)
    step = Step(model_of(recipe), recipe, info)
    step.attach_teacher(model_of(dataclasses.replace(recipe, seed=1)).eval().requires_grad_(False))
    return step


def batch(count: int = 4, holes: float = 0.01, nodata: float = NODATA, dtype: str = "uint16") -> tuple[Tensor, Tensor]:
    """Images [count, 28, 28, 3] of which a share of the pixels is nodata, and their ids."""
    generator = torch.Generator().manual_seed(3)
    values = torch.rand(count, 28, 28, 3, generator=generator) * 100 + torch.tensor(MEANS)
    values = values.round().masked_fill(torch.rand(values.shape, generator=generator) < holes, nodata)
    return values.to(getattr(torch, dtype)), torch.arange(count) * 7


@pytest.mark.parametrize(("dtype", "nodata"), [("uint16", 7), ("int16", 7), ("float16", 7), ("float32", float("nan"))])
def test_pixels_of_any_type_are_normalised_and_nodata_becomes_the_mean(dtype: str, nodata: float) -> None:
    step = step_of(nodata, dtype)
    images, _ = batch(2, 0.02, nodata, dtype)
    found, valid = step.normalized_patches(images), step.normalized_patches.valid(images)
    for image, patches, good in zip(images.double(), found, valid, strict=True):
        missing = image.isnan() | (image == nodata)
        scaled = (image - torch.tensor(MEANS)) / torch.tensor([20.0, 900.0, 1.0])  # a constant channel has no scale
        cut = reference.patches_of(torch.where(missing, 0, scaled).permute(2, 0, 1), 4)
        torch.testing.assert_close(patches, cut.float(), rtol=1e-5, atol=1e-5)
        assert good.tolist() == [not bool(p.any()) for p in reference.patches_of(missing.permute(2, 0, 1), 4)]
    statistics = step.normalized_patches
    whole = normalised(images, DatasetInfo(1, 3, MEANS, STDS, (), values=Values(dtype, nodata)))
    torch.testing.assert_close(NormalizedPatches(step.recipe, DatasetInfo(1, 3, MEANS, STDS, ()))(images[:0]).shape,
                               statistics(images[:0]).shape)  # fmt: skip
    torch.testing.assert_close(step.student.patchify(whole.permute(0, 3, 1, 2)), found)


def test_bytes_are_scaled_as_before() -> None:
    images, info = (
        torch.arange(48, dtype=torch.uint8).reshape(1, 4, 4, 3),
        DatasetInfo(1, 3, (0.3,) * 3, (0.2,) * 3, ()),
    )
    torch.testing.assert_close(normalised(images, info), (images.float() / 255 - 0.3) / 0.2)
    assert torch.equal(normalised_images(images, info), normalised(images, info).movedim(-1, 1))
    assert NormalizedPatches(recipes.debug(), info).valid(images) is None


@pytest.mark.parametrize("changes", [{}, {"predict_loss": "absolute"}, {"difficulty": "in_place"}])
def test_nothing_comes_of_what_stands_in_patches_of_nodata(changes: dict[str, Any]) -> None:
    """Losses, metrics and gradients are the same whatever the model should have said there."""
    step = step_of(**changes)
    images, ids = batch()
    valid = step.normalized_patches.valid(images)
    assert 0.2 < valid.float().mean() < 0.8
    patches, now = step.normalized_patches(images), torch.tensor(3)
    answer = step.ask_teachers(images, patches, ids, now)
    mask, _ = step._sets(step.mask_plan, ids, now, ALPHA, answer.difficulty, valid)
    target_changed = patches.masked_fill(~valid[:, :, None] & mask[:, :, None], 50)  # masked: the model never sees them

    def learn(pixels: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        found = step.learn(step.mask_plan, pixels, ids, now, ALPHA, answer.difficulty, None, answer.tokens, valid)
        weights = [w for w in step.student.parameters() if w.requires_grad]
        return found.loss, found.metrics, [g for g in torch.autograd.grad(found.loss, weights, allow_unused=True)
                                           if g is not None]  # fmt: skip

    for one, other in zip(learn(patches), learn(target_changed), strict=True):
        torch.testing.assert_close(one, other)


def test_the_losses_are_those_of_the_reference() -> None:
    step = step_of()
    images, ids = batch()
    patches, valid = step.normalized_patches(images), step.normalized_patches.valid(images)
    mask = step(images, ids, torch.tensor(3), ALPHA).mask
    output = step.student(patches, mask, valid=valid)
    counted = valid.gather(1, output.masked)
    plain = step.student(patches, mask)
    assert torch.equal(output.valid, counted)
    assert plain.valid is None
    mean = reference.valid_loss(output.per_patch_loss, counted)
    torch.testing.assert_close(output.reconstruction_loss, mean)
    ranking = reference.valid_ranking_loss(output.predicted_difficulty, output.per_patch_loss, counted)
    torch.testing.assert_close(output.difficulty_loss, ranking)


@pytest.mark.parametrize("policy", ["hpm", "hpm_easiest", "attention"])
@pytest.mark.parametrize("unit", [1, 2])
def test_hard_choices_prefer_patches_without_nodata(policy: str, unit: int) -> None:
    recipe = dataclasses.replace(
        recipes.debug(), input_size="24", mask_policy=policy, mask_ratio=0.3, mask_unit=4 * unit
    )
    plan, ids = recipe.mask_plan, torch.arange(5)
    noise = sample_noise(0, torch.tensor(1), ids, plan.noise_size)
    scores = torch.rand(5, plan.num_patches, generator=torch.Generator().manual_seed(0))
    units = torch.rand(5, plan.num_units, generator=torch.Generator().manual_seed(1)) < 0.6
    assert (units.sum(1) * unit**2 >= plan.num_masked).all()
    valid = spread_units(units, plan.grid_size, unit)
    mask = draw_sets(plan, noise, scores, torch.tensor(1.0, dtype=torch.float64), valid)[0]
    assert (mask.sum(1) == plan.num_masked).all()
    assert not (mask & ~valid).any()
    none = torch.zeros_like(valid)
    assert (draw_sets(plan, noise, scores, 1.0, none)[0].sum(1) == plan.num_masked).all()
    whole = draw_sets(plan, noise, scores, 0.5, torch.ones_like(valid))[0]
    assert torch.equal(whole, draw_mask(plan, noise, scores, 0.5))


def test_a_step_with_nodata_never_waits_and_survives_images_of_nothing_else() -> None:
    step = step_of()
    images, ids = batch()
    images[0] = torch.full(images[0].shape, int(NODATA)).to(torch.uint16)
    with NoSynchronisation():
        output = step(images, ids, torch.tensor(3), ALPHA)
        output.loss.backward()
    assert output.loss.isfinite()
    assert output.metrics.isfinite().all()
    empty = step(images[:1], ids[:1], torch.tensor(3), ALPHA)
    assert empty.loss == 0


def test_pixels_on_another_scale_than_the_models_are_refused() -> None:
    model = step_of().student
    info = DatasetInfo(9, 3, MEANS, STDS, (), values=Values("uint16", 7.0))
    assert statistics_for(model, info, "first").values.nodata == 7
    found = statistics_for(model, dataclasses.replace(info, mean=(0.0,) * 3, values=Values("float32", 1.0)), "second")
    assert (found.mean, found.values.nodata) == (MEANS, 1.0)
    with pytest.raises(UserError, match="third has pixels of uint8, and the model was trained on uint16"):
        statistics_for(model, DatasetInfo(9, 3, (0.5,) * 3, (0.1,) * 3, ()), "third")
