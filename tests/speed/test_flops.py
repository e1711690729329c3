"""The formulas of floating-point operations against what runs."""

import dataclasses
from typing import Any

import pytest
import torch

from fasthpm import frozen, recipes
from fasthpm import mask as masks
from fasthpm.frozen import FrozenTeacher
from fasthpm.layers import attend_plain
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe
from fasthpm.speed import flops
from tests.helpers.fast_modes import MODES
from tests.helpers.features import FAMILIES, images, small
from tests.helpers.videos import tiny


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("hpm", {}),
        ("hpm", {"predictor_dim": 32, "predictor_depth": 3}),
        ("hpm", {"predictor": "shared"}),
        ("hpm", {"decoder_attention": "cross"}),
        ("hpm", {"decoder_attention": "cross", "predictor_dim": 32, "predictor_depth": 3}),
        ("hpm", {"decoder_attention": "cross", "predictor": "shared"}),
        ("hpm", {"input_size": "32", "teacher_scale": 2}),
        ("mae", {"mask_policy": "random", "predict_loss": "none"}),
        ("simmim", {"mask_policy": "random", "predict_loss": "none"}),
        ("simmim", {"predictor_depth": 1}),
        ("hpm", {"mask_policy": "attention", "mask_ratio": 0.45, "throw_ratio": 0.4}),
        ("hpm", {"target": "ema"}),
        ("mae", {"mask_policy": "random", "predict_loss": "none", "target": "ema"}),
    ],
)
def test_flop_formula_counts_what_runs(method: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula against torch's own counter over one whole step, within 1 %."""
    monkeypatch.setattr("fasthpm.layers.attend", attend_plain)  # torch does not count its fused CPU kernel
    from torch.utils.flop_counter import FlopCounterMode

    sizes = {"patch_size": 4, "channels": 1, "decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 4}
    recipe = Recipe(model=f"{method}_vit_nano_patch4_28", **{"input_size": "28", **sizes, **changes})
    model = model_of(recipe)
    images, plan = torch.randn(4, 1, *recipe.image_size), recipe.mask_plan
    length = recipe.num_patches
    mask, thrown = masks.draw_sets(plan, torch.rand(2, 4, length), torch.rand(4, length))
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            if recipe.masks_by_difficulty:
                model.predict_loss(images, recipe.teacher_scale)
            elif recipe.uses_teacher:
                model.encode(images)
        target = torch.randn(4, length, model.target_dim) if model.target_dim else None
        model(images, mask, thrown=thrown, num_thrown=plan.num_thrown, target=target).loss.backward()
    assert counter.get_total_flops() / 4 == pytest.approx(flops.step_flops(model, recipe)["total"], rel=0.01)


def test_flop_formula_counts_what_runs_of_a_video(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula against torch's own counter over one whole step, within 1 %."""
    monkeypatch.setattr("fasthpm.layers.attend", attend_plain)  # torch does not count its fused CPU kernel
    from torch.utils.flop_counter import FlopCounterMode

    for changes in ({}, {"model": "videomae_vit_nano_patch8_32", "mask_policy": "tube", "predict_loss": "none"}):
        recipe = tiny(input_size="32", channels=1, mask_ratio=0.9, **changes)
        model = model_of(recipe)
        clips, mask = torch.randn(2, 1, 8, 32, 32), torch.arange(64).repeat(2, 1) < recipe.num_masked
        with FlopCounterMode(display=False) as counter:
            if recipe.uses_teacher:
                with torch.no_grad():
                    model.predict_loss(clips)
            model(clips, mask).loss.backward()
        assert counter.get_total_flops() / 2 == pytest.approx(flops.step_flops(model, recipe)["total"], rel=0.01)


def test_the_cost_is_logged_beside_mae() -> None:
    """The arithmetic of ViT-B/16: exact HPM and the shared trunk with cross attention, its teacher in every step."""
    base = recipes.from_name("hpm_vit_base_in1k_200e")
    assert flops.cost_over_mae(base) == pytest.approx(2.34, abs=0.01)
    fast = dataclasses.replace(base, **MODES["both"])
    assert flops.cost_over_mae(fast) == pytest.approx(1.61, abs=0.02)
    assert fast.fast_modes == ["predictor shared", "decoder_attention cross"]
    assert not base.fast_modes
    assert flops.cost_over_mae(recipes.from_name("hpm_vit_base_in1k_200e_fast")) == pytest.approx(0.89, abs=0.01)
    large = dataclasses.replace(recipes.from_name("hpm_vit_base_in1k_200e_fast"), model="hpm_vit_large_patch16_224")
    assert flops.cost_over_mae(large) == pytest.approx(1.02, abs=0.01)


@pytest.mark.parametrize("target", ["dino", "clip"])
def test_flop_formula_counts_the_frozen_teacher(target: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    recipe = small(target)
    teacher = FrozenTeacher(frozen.create_vit(recipe, recipe.target_model, FAMILIES[recipe.target]), FAMILIES[target])
    for block in teacher.vit.blocks:
        block.attn.fused_attn = False  # torch does not count its fused CPU kernel
    with FlopCounterMode(display=False) as counter:
        teacher(images(2))
    assert counter.get_total_flops() / 2 == pytest.approx(flops.frozen_flops(teacher, 16), rel=0.01)
