"""A step without values against torch's own allocator and against the formulas."""

import dataclasses
from typing import Any

import pytest
import torch

from fasthpm import recipes
from fasthpm.commands.dry_run import dry_run
from fasthpm.patches import model_of
from fasthpm.speed.flops import step_flops
from fasthpm.speed.gpus import GIB, GPUS
from fasthpm.speed.memory import state_bytes
from tests.helpers.budgets import BUDGETS

BASE = "hpm_vit_base_in1k_200e"
FAST: dict[str, Any] = {
    "teacher_maps": True,
    "map_refresh_epochs": 10,
    "predictor": "shared",
    "decoder_attention": "cross",
    "difficulty": "masked_query",
}


@pytest.mark.parametrize("name", BUDGETS)
def test_the_peak_is_that_of_torchs_allocator(name: str) -> None:
    """`gib`: what an update allocates on the null GPU (tests/test_step_on_null_gpu.py)."""
    recipe = recipes.from_name(name)
    found = dry_run(recipe, GPUS["h200"])
    kept = state_bytes(found.parameters, found.teacher_parameters, stage=1, world_size=1, ema=recipe.uses_teacher)
    assert (found.activations + kept) / GIB == pytest.approx(BUDGETS[name].gib, rel=0.03)


@pytest.mark.parametrize("target", ["dino", "clip"])
def test_a_frozen_teacher_costs_a_pass(target: str) -> None:
    plain, features = (
        dry_run(dataclasses.replace(recipes.from_name(name), batch_size=2), GPUS["h100"])
        for name in (BASE, f"hpm_{target}_vit_base_in1k_200e")
    )
    assert plain.frozen_parameters == 0
    assert features.frozen_parameters == pytest.approx(86e6, rel=0.01)
    assert features.flop - plain.flop == pytest.approx(
        2 * 35e9, rel=0.05
    )  # 2 FLOPs for each of ViT-B's 17.6 G products


@pytest.mark.parametrize("fields", [{}, FAST], ids=["hpm", "fast"])
def test_products_are_those_of_the_formulas(fields: dict[str, Any]) -> None:
    """Which know nothing of how torch does it; kept maps are not in a step."""
    recipe = dataclasses.replace(recipes.from_name(BASE), batch_size=2, **fields)
    with torch.device("meta"):
        model = model_of(recipe)
        wanted = step_flops(model, recipe)
    found = dry_run(recipe, GPUS["h100"])
    total = wanted["student" if recipe.teacher_maps else "total"]
    # Attention's backward pass computes the scores anew, which the formulas leave out.
    assert 1.0 <= found.flop / recipe.batch_size / total < 1.06
    assert found.parameters == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def test_memory_grows_with_the_batch_and_time_shrinks_with_the_gpu() -> None:
    recipe = recipes.debug()
    small, large = (dry_run(dataclasses.replace(recipe, batch_size=size), GPUS["a100"]) for size in (64, 256))
    assert large.activations == pytest.approx(4 * small.activations, rel=0.05)
    assert large.flop == pytest.approx(4 * small.flop)
    assert large.kernels >= small.kernels
    full = dry_run(dataclasses.replace(recipe, batch_size=64), GPUS["a100"], bf16=False)
    assert 1.3 < full.activations / small.activations < 2
    assert full.moved > small.moved


def test_nothing_is_left_behind() -> None:
    before = torch.get_default_dtype()
    dry_run(recipes.debug(), GPUS["h100"])
    assert torch.get_default_dtype() == before
    assert torch.zeros(1).add(1).item() == 1


@pytest.mark.parametrize(("stage", "expected"), [(0, 2 + 4 + 12 + 4), (1, 2 + 4 + 4), (2, 2 + 1 + 4), (3, 0.5 + 1 + 4)])
def test_zero_shares_out_what_its_stage_says(stage: int, expected: float) -> None:
    assert state_bytes(1000, 500, stage=stage, world_size=4) == 1000 * expected + 500 * 2
