"""The optimizer's parameter groups."""

import torch
from torch import nn

from fasthpm.ranks import engine


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
