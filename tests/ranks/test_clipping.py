"""Clipping per parameter, weight decay that moves and a frozen last layer, under every ZeRO stage."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasthpm.ranks import deepspeed_json, engine
from fasthpm.ranks import launch as ranks_launch
from fasthpm.ranks.zero import MasterLayout, full_state
from fasthpm.recipe import Recipe
from tests.helpers.clipping import STAGES, Toy
from tests.helpers.launch import run_ranks

IBOT: dict[str, Any] = {
    "model": "ibot_vit_nano_patch4_28",
    "input_size": "28",
    "patch_size": 4,
    "target": "distributions",
    "predict_loss": "none",
    "mask_policy": "random",
    "global_crops": 2,
}


def recipe_of(preset: str, **options: Any) -> Recipe:
    values = {"batch_size": 4, "lr": 1e-2, "deepspeed_config": preset} | options
    return Recipe(**values).resolve(8, 1)


def built(recipe: Recipe, launch: ranks_launch.Launch) -> tuple[Toy, Any]:
    toy = Toy()
    config = deepspeed_json.merge_config(recipe.deepspeed_config, recipe, 1)
    return toy, engine.build_engine(toy, recipe, config, launch)


def gradients(toy: nn.Module, scale: float) -> dict[str, Tensor]:
    copy = Toy()
    copy.load_state_dict({name: value.float() for name, value in toy.state_dict().items()})
    copy(scale).backward()
    return {name: weight.grad for name, weight in copy.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("preset", STAGES)
def test_each_gradient_is_clipped_by_its_own_norm(preset: str) -> None:
    """After one update AdamW's first moment is a tenth of the gradient that it was given."""
    with ranks_launch.session() as launch:
        _, made = built(recipe_of(preset, clip_grad=1.2, clip_per_tensor=True), launch)
        start = full_state(MasterLayout(made), "master")
        made.backward(made(2.0))
        made.step()
        moments = full_state(MasterLayout(made), "exp_avg")
    fresh = Toy()
    fresh.load_state_dict(start or {})
    wanted = gradients(fresh, 2.0)
    assert moments is not None
    norms = {name: float(value.norm()) for name, value in wanted.items()}
    assert min(norms.values()) < 1.2 < max(norms.values()), norms
    for name, gradient in wanted.items():
        clipped = gradient * min(1.0, 1.2 / (norms[name] + 1e-6))
        loose = 0.02 if "bf16" in preset else 1e-5
        assert torch.allclose(moments[name], 0.1 * clipped, rtol=loose, atol=loose * 0.05), name


def test_two_ranks_clip_by_whole_norms(tmp_path: Path) -> None:
    """Sharded by ZeRO 1, 2 and 3, against one rank."""
    finished = run_ranks("tests.helpers.clipping", tmp_path, launcher="forked")
    assert finished.status == 0, finished.output
    found = torch.load(tmp_path / "moments.pt")
    for preset, moments in found.items():
        for name, wanted in found["zero0_fp32"].items():
            loose = 0.02 if "bf16" in preset else 1e-5
            assert torch.allclose(moments[name], wanted, rtol=loose, atol=loose * 0.05), (preset, name)


@pytest.mark.parametrize("preset", STAGES)
def test_weight_decay_moves_and_the_last_layer_waits(preset: str) -> None:
    with ranks_launch.session() as launch:
        _, made = built(recipe_of(preset, weight_decay=0.5, freeze_last_layer_epochs=1, **IBOT), launch)
        for group in made.basic_optimizer.param_groups:
            assert group["name"] in ("no_decay", "decay", "last_layer")
        states = [full_state(MasterLayout(made), "master")]
        for frozen, decay in ((True, 0.5), (False, 0.0), (False, 20.0)):
            engine.freeze_last_layer(made, frozen)
            engine.set_lr(made, 1e-2)
            engine.set_weight_decay(made, decay)
            made.backward(made(0.0))  # no gradient: what moves is the decay
            made.step()
            states.append(full_state(MasterLayout(made), "master"))
    first, last = "student.first.weight", "student.last_layer.weight"
    before, frozen_after, still, decayed = states
    assert torch.equal(before[last], frozen_after[last])
    assert torch.allclose(frozen_after[first], before[first] * (1 - 1e-2 * 0.5), rtol=1e-5)
    assert torch.equal(still[first], frozen_after[first])
    for name in (first, last):
        assert torch.allclose(decayed[name], still[name] * (1 - 1e-2 * 20.0), rtol=1e-5)
    assert torch.equal(decayed["student.first.bias"], before["student.first.bias"])
    assert math.isfinite(float(engine.grad_norm(made)))
