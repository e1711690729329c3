"""What the model of `fasthpm plan` expects of a step that was measured on the GPU that is here."""

import dataclasses
from typing import Any

import torch

from fasthpm.commands.plan import plan
from fasthpm.recipe import Recipe
from fasthpm.speed import gpus
from fasthpm.speed.gpus import GIB
from fasthpm.speed.memory import CONTEXT


def predict(recipe: Recipe, measured: dict[str, Any]) -> str:
    """A line about what the model of `fasthpm plan` expects of the step that was measured, beside that."""
    if "memory_gib" not in measured:
        return f"  predicted  of GPUs only: fasthpm plan {recipe.recipe} --gpu h100 says what one would do"
    gpu, known = gpus.installed(torch.device("cuda", 0))
    changes = {"batch_size": measured["batch_size"], "global_batch_size": 0, "accum_iter": 1, "steps_per_epoch": 0}
    try:
        found = plan(dataclasses.replace(recipe, **changes), gpu, 1, 10**6, per_machine=1, network=1e9)
    except Exception as error:  # a model that fails takes nothing from what was measured
        return f"  predicted  nothing: the model of this step failed ({error!r})"
    memory = (found.memory - CONTEXT) / GIB
    share = f"{memory:.1f} GiB of GPU memory; measured is {measured['memory_gib'] / memory:.0%} of it"
    if not known:
        return f"  predicted  {share}; speed is not predicted: there is no data sheet of {gpu.name} here"
    rate = f"{found.samples_per_second:.4g} images/s (a model of {gpu.name}, bound by {found.bound_by})"
    reached = f"measured is {measured['images_per_second'] / found.samples_per_second:.0%} of it"
    return f"  predicted  {rate}; {reached}; {share}"
