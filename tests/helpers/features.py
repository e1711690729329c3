"""Toy recipes and images for teachers of features."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fasthpm import recipes
from fasthpm.recipe import Recipe
from fasthpm.targets import TARGETS as RECORDS
from fasthpm.targets import Family
from tests.helpers.small_teachers import TARGETS

FAMILIES: dict[str, Family] = {name: target.family for name, target in RECORDS.items() if target.family}


def small(target: str, **changes: Any) -> Recipe:
    """A toy recipe of 16 patches with a small teacher."""
    options = {"input_size": "16", "channels": 3, **TARGETS.get(target, {"target": target}), **changes}
    return dataclasses.replace(recipes.debug(), **options)


def images(count: int = 3, channels: int = 3, side: int = 16) -> Tensor:
    """uint8 [count, side, side, channels]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, side, side, channels), generator=generator, dtype=torch.uint8)
