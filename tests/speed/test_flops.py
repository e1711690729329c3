"""The formulas of floating-point operations against what runs."""

import dataclasses
from typing import Any

import pytest
import torch

from fasthpm import frozen, recipes
from fasthpm.frozen import FrozenTeacher
from fasthpm.layers import attend_plain
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe
from fasthpm.speed import flops
from fasthpm.step import Step
from tests.helpers.fast_modes import MODES
from tests.helpers.features import FAMILIES, images, small
from tests.helpers.steps import ALPHA, INFO
from tests.helpers.tokens import Brightness
from tests.helpers.videos import tiny

BATCH = 4
ALONE: dict[str, Any] = {"predict_loss": "none"}  # no loss predictor
SEEN_WHOLE: dict[str, Any] = {"teacher_maps": True, "map_refresh_epochs": 3}
CROSS: dict[str, Any] = {"decoder_attention": "cross"}
TOKENS: dict[str, Any] = {"target": "tokens", "target_dim": 64}
UNITS: dict[str, Any] = {"input_size": "32", "mask_unit": 8}


def counted(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> float:
    """FLOPs per sample of one whole step, with its share of the pass that renews kept maps, by torch's own counter."""
    monkeypatch.setattr("fasthpm.layers.attend", attend_plain)  # torch does not count its fused CPU kernel
    from torch.utils.flop_counter import FlopCounterMode

    step = Step(model_of(recipe), recipe, INFO)
    if recipe.target == "tokens":
        step.attach_frozen(Brightness(recipe.patch_size, 64))  # costs nothing that is counted
    if recipe.uses_teacher:
        step.attach_teacher(model_of(recipe).requires_grad_(False))
    shape = (BATCH, *([recipe.num_frames] if recipe.num_frames > 1 else []), *recipe.image_size, 1)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    scores = torch.rand(BATCH, recipe.num_patches) if recipe.uses_maps else None
    with FlopCounterMode(display=False) as counter:
        step(pixels, torch.arange(BATCH), torch.tensor(3), ALPHA, scores).loss.backward()
    total = counter.get_total_flops()
    if recipe.teacher_maps:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            step.difficulty(pixels)
        total += counter.get_total_flops() / recipe.map_refresh_epochs
    return total / BATCH


def toy(method: str, **changes: Any) -> Recipe:
    """A nano recipe of images."""
    sizes = {"patch_size": 4, "channels": 1, "decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 4}
    usual = {"input_size": "28", "batch_size": BATCH, **sizes}
    return Recipe(model=f"{method}_vit_nano_patch4_28", **{**usual, **changes})


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("hpm", {}),
        ("hpm", {"predictor_dim": 32, "predictor_depth": 3}),
        ("hpm", {"predictor": "shared"}),
        ("hpm", CROSS),
        ("hpm", {**CROSS, "predictor_dim": 32, "predictor_depth": 3}),
        ("hpm", {**CROSS, "predictor": "shared"}),
        ("hpm", {**CROSS, **SEEN_WHOLE, "predictor": "shared"}),
        ("hpm", {"input_size": "32", "teacher_scale": 2}),
        ("mae", {"mask_policy": "random", **ALONE}),
        ("simmim", {"mask_policy": "random", **ALONE}),
        ("simmim", {"predictor_depth": 1}),
        ("hpm", {"mask_policy": "attention", "mask_ratio": 0.45, "throw_ratio": 0.4}),
        ("hpm", {"target": "ema"}),
        ("mae", {"mask_policy": "random", **ALONE, "target": "ema"}),
        ("beit", {"mask_policy": "random", **ALONE, **TOKENS}),
        ("beit", {"mask_policy": "random", **ALONE, **TOKENS, "positions": "relative"}),
    ],
)
def test_flop_formula_counts_what_runs(method: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula against torch's own counter over one whole step, within 1 %."""
    recipe = toy(method, **changes)
    assert counted(recipe, monkeypatch) == pytest.approx(flops.step_flops(model_of(recipe), recipe)["total"], rel=0.01)


@pytest.mark.parametrize(
    ("difficulty", "method", "changes"),
    [
        ("masked_query", "hpm", {}),
        ("masked_query", "hpm", {"mask_ratio": 0.4, "predictor_dim": 32, "predictor_depth": 3}),
        ("masked_query", "hpm", {"predictor": "shared"}),
        ("masked_query", "hpm", CROSS),
        ("masked_query", "hpm", {**CROSS, "predictor": "shared"}),
        ("masked_query", "hpm", {"input_size": "32", "teacher_scale": 2}),
        ("masked_query", "hpm", {"target": "ema"}),
        ("masked_query", "hpm", SEEN_WHOLE),
        ("in_place", "hpm", {}),
        ("in_place", "hpm", {**CROSS, "predictor": "shared"}),
        ("in_place", "mae", ALONE),
        ("in_place", "mae", {**ALONE, "target": "ema"}),
        ("in_place", "mae", {**ALONE, **SEEN_WHOLE}),
        ("in_place", "simmim", {**ALONE, **UNITS}),
        ("measured", "hpm", {}),
        ("measured", "hpm", {**CROSS, "predictor": "shared"}),
        ("measured", "mae", ALONE),
        ("measured", "mae", {**ALONE, **CROSS, **SEEN_WHOLE}),
        ("measured", "mae", {**ALONE, "mask_ratio": 0.4}),
        ("measured", "mae", {**ALONE, "mask_ratio": 0.2}),
        ("measured", "simmim", {**ALONE, **UNITS}),
        ("measured", "simmim", {**ALONE, **UNITS, "mask_ratio": 0.3}),
        ("measured", "simmim", {"predictor_depth": 1}),
        ("measured", "hpm", {"target": "ema"}),
        ("measured", "beit", {**ALONE, **TOKENS, "positions": "learned"}),
    ],
)
def test_flop_formula_counts_every_question(
    difficulty: str, method: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same of every way to ask what is hard."""
    recipe = toy(method, difficulty=difficulty, **changes)
    assert counted(recipe, monkeypatch) == pytest.approx(flops.step_flops(model_of(recipe), recipe)["total"], rel=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": "videomae_vit_nano_patch8_32", "mask_policy": "tube", **ALONE},
        {"difficulty": "masked_query"},
        {"difficulty": "in_place", **ALONE},
        {"difficulty": "measured", **ALONE},
        {"difficulty": "measured", **CROSS, "mask_policy": "hpm_tube"},
    ],
)
def test_flop_formula_counts_what_runs_of_a_video(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of clips."""
    recipe = tiny(input_size="32", channels=1, mask_ratio=0.9, **changes)
    assert counted(recipe, monkeypatch) == pytest.approx(flops.step_flops(model_of(recipe), recipe)["total"], rel=0.01)


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
