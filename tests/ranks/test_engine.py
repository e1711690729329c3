"""The optimizer's parameter groups, and how long DeepSpeed takes to start."""

import gc

import pytest
import torch
from torch import nn

from fasthpm.ranks import deepspeed_json, engine
from fasthpm.ranks import launch as ranks_launch
from fasthpm.recipe import Recipe


def test_norms_biases_and_tokens_do_not_decay() -> None:
    model = nn.Module()
    model.cls_token, model.mask_token = nn.Parameter(torch.zeros(1, 1, 4)), nn.Parameter(torch.zeros(1, 1, 4))
    model.linear, model.norm = nn.Linear(4, 2), nn.LayerNorm(4)
    model.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        group["name"]: (group["weight_decay"], [names[id(parameter)] for parameter in group["params"]])
        for group in engine.parameter_groups(model, 0.05)
    }
    assert groups == {
        "no_decay": (0.0, ["cls_token", "linear.bias", "mask_token", "norm.bias", "norm.weight"]),
        "decay": (0.05, ["linear.weight"]),
    }


def test_empty_groups_are_left_out() -> None:
    assert [group["name"] for group in engine.parameter_groups(nn.LayerNorm(3), 0.1)] == ["no_decay"]


def test_what_exists_is_not_collected_while_deepspeed_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It collects garbage with every line about memory that it prints: two seconds in a process like this."""
    left_out: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda *_: left_out.append(gc.get_freeze_count()))
    recipe = Recipe(batch_size=4, deepspeed_config="zero1_bf16").resolve(4, world_size=1)
    with ranks_launch.session() as launch:
        config = deepspeed_json.merge_config(recipe.deepspeed_config, recipe, 1)
        engine.build_engine(nn.Linear(3, 2), recipe, config, launch)
    assert min(left_out) > 10_000
    assert gc.get_freeze_count() == 0
