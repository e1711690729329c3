"""The run's folder and its opening words."""

import sys
from pathlib import Path
from typing import Any

import torch

from fasthpm import checkpoint, files, ranks, schedule
from fasthpm.machine import cpu_has_bf16
from fasthpm.recipe import Recipe, save_recipe
from fasthpm.run.state import Run
from fasthpm.run.versions import VERSIONS, versions
from fasthpm.speed import flops

LONG_MEMORY, GOOD_MEMORY = 1 / 2, 1 / 6  # of a teacher, as shares of the run: too long; what small runs did well with
SHORT_TRIAL = 100  # updates, below which nobody expects anything


def prepare_output(run: Run[Any]) -> None:
    """Create output_dir and write what the run is: recipe, merged DeepSpeed JSON, versions (rank 0).

    **Raises:** `UserError` if the folder cannot be written or has no space for a checkpoint.
    """
    output_dir = Path(run.recipe.output_dir)
    config = ranks.merge_config(run.recipe.deepspeed_config, run.recipe, run.launch.world_size)
    made_with = versions(run.launch.device, run.launch.world_size)
    if run.attention:
        made_with["attention"] = run.attention
    with files.writing(output_dir, "choose another --output_dir"):
        output_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.require_space(output_dir, run.num_parameters)
        save_recipe(run.recipe, output_dir / checkpoint.RECIPE)
        files.write_json(output_dir / "deepspeed.json", config)
        files.write_json(output_dir / VERSIONS, made_with)


def announce(run: Run[Any]) -> None:
    """Say what is about to be trained (rank 0)."""
    recipe = run.recipe
    effective = f"{recipe.global_batch_size} = {recipe.batch_size} x {run.launch.world_size} x {recipe.accum_iter}"
    asked = f"difficulty {recipe.question.name}; " if recipe.masks_by_difficulty else ""
    fast = f"fast modes: {', '.join(recipe.fast_modes)}; " if recipe.fast_modes else ""
    if asked or fast:
        print(f"{asked}{fast}{flops.cost_over_mae(recipe):.2f} x MAE's FLOPs", file=sys.stderr)
    if run.attention:
        print(f"attention: {', '.join(f'{shape} {name}' for shape, name in run.attention.items())}", file=sys.stderr)
    print(
        f"{recipe.recipe}: lr {recipe.lr:.3e}, global batch {effective}, {recipe.total_steps} updates, "
        f"{run.launch.device.type}",
        file=sys.stderr,
    )
    dtype = next(run.step.student.parameters()).dtype
    for words in (lag_of_teacher(recipe), emulation(run.launch.device, dtype)):
        if words:
            print(words, file=sys.stderr)


def lag_of_teacher(recipe: Recipe) -> str:
    """What to say of a teacher that remembers most of the run at its end: it averages over about 1 / (1 - m) updates,
    and knows what was hard for an earlier student. An empty string for one that doesn't, and for short trials."""
    forgets, updates = 1 - schedule.ema_momentum_at(recipe, recipe.total_steps - 1), recipe.total_steps
    if not recipe.uses_teacher or updates < SHORT_TRIAL or forgets * updates > 1 / LONG_MEMORY:
        return ""
    over = f"about {1 / forgets:,.0f} updates" if forgets else "all updates"
    return (
        f"the teacher averages over {over} of {updates:,} and will lag behind the student; "
        f"--ema_momentum_end {1 - float(f'{1 / (GOOD_MEMORY * updates):.1g}'):g} suits so short a run"
    )


def emulation(device: torch.device, dtype: torch.dtype) -> str:
    """What to say of weights in a dtype that the processor has no instructions for; an empty string where it has."""
    if device.type != "cpu" or dtype != torch.bfloat16 or cpu_has_bf16():
        return ""
    slow = "this CPU has no bf16 instructions and emulates them, many times slower"
    return f"{slow}; --deepspeed_config zero1_fp32 is fast here"
