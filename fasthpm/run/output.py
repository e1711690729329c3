"""The run's folder and its opening words."""

import sys
from pathlib import Path
from typing import Any

from fasthpm import checkpoint, files, ranks
from fasthpm.recipe import save_recipe
from fasthpm.run.state import Run
from fasthpm.run.versions import VERSIONS, versions
from fasthpm.speed import flops


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
