"""A step on toy images, and what fails when one waits for the device."""

import dataclasses
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fasthpm import recipes
from fasthpm.data import DatasetInfo
from fasthpm.frozen import FrozenTeacher, create_vit
from fasthpm.patches import model_of
from fasthpm.step import Step
from fasthpm.targets import TARGETS
from tests.helpers.tokens import Brightness

INFO = DatasetInfo(100, 1, (0.3,), (0.2,), ("a",))


ALPHA = torch.tensor(0.5, dtype=torch.float64)


def step_of(**changes: Any) -> Step:
    """The debug recipe's step, with a teacher unlike the student where the recipe has one."""
    recipe = dataclasses.replace(recipes.debug(), **changes)
    step = Step(model_of(recipe), recipe, INFO)
    attach_frozen(step)
    if recipe.uses_teacher:
        step.attach_teacher(model_of(dataclasses.replace(recipe, seed=1)).eval().requires_grad_(False))
    return step


def batch(count: int = 6, seed: int = 0, side: int = 28) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images [count, side, side, 1] and their ids."""
    images = torch.randint(0, 256, (count, side, side, 1), generator=torch.Generator().manual_seed(seed))
    return images.to(torch.uint8), torch.arange(count) * 7


class NoSynchronisation(TorchDispatchMode):
    """Fails on operations that wait for a GPU: reading a number, and shapes that depend on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "repeat_interleave", "equal")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[1]
        assert name not in self.WAITING, f"{name} waits for the device"
        if name in ("index", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "boolean indexing waits for the device"
        return function(*args, **(kwargs or {}))


def attach_frozen(step: Step) -> None:
    """A small teacher with random weights, if the recipe's target has one, or a tokenizer."""
    if step.recipe.target == "tokens":
        step.attach_frozen(Brightness(step.recipe.patch_size, step.recipe.frozen_dim))
    if family := TARGETS[step.recipe.target].family:
        vit = create_vit(step.recipe, step.recipe.target_model, family)
        frozen = FrozenTeacher(vit, family)
        step.attach_frozen(frozen.to(next(step.student.parameters()).device, torch.bfloat16))
