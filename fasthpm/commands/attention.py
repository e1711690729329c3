"""The attention kernels of a run: found out by a step without values, timed, pinned and named."""

from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode

from fasthpm import ranks
from fasthpm.commands import dry_run
from fasthpm.errors import note_once
from fasthpm.files import read_json
from fasthpm.layers import Attended
from fasthpm.recipe import Recipe
from fasthpm.run.versions import VERSIONS, versions
from fasthpm.speed import attention


def settle(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Choose, by the first rank's timing, what all ranks use for the recipe's shapes (collective).

    A run that goes on keeps what it had, on the same GPU with the same torch: its updates are the same to the last bit.

    - `dtype`: of the forward pass

    **Returns:** the kernel of every shape by name; {} on a CPU, which has one kernel.
    """
    if device.type != "cuda":
        if recipe.attention_backend != "auto":
            note_once(f"attention_backend {recipe.attention_backend} is of GPUs, and this is a CPU; it changes nothing")
        return {}
    asked = recipe.attention_backend
    choice = ranks.by_first(lambda: attention.choose(asked, shapes_of(recipe, dtype), device, known(recipe, device)))
    attention.pin(choice, device)
    return attention.named(choice)


def known(recipe: Recipe, device: torch.device) -> dict[str, str]:
    """What the run in output_dir uses, by the shapes' names; {} if there is none, or if it ran on something else."""
    past, here = read_json(Path(recipe.output_dir) / VERSIONS), versions(device, 1)
    same = all(past.get(name) == here[name] for name in ("device", "torch"))
    return (past.get("attention") or {}) if same else {}


def shapes_of(recipe: Recipe, dtype: torch.dtype) -> list[Attended]:
    """What `layers.attend` is asked for in a micro-step of the recipe, before and after its first maps."""
    with FakeTensorMode(allow_non_fake_inputs=True), attention.nothing_pinned(), attention.Recorder() as recorder:
        step, _ = dry_run.step_without_values(recipe, dtype)
        for maps in {False, recipe.uses_maps}:
            dry_run.loss_of(step, maps=maps)
    return list(recorder.found)
