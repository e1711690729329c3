"""Renewing a run's maps."""

from pathlib import Path

import torch

from fasthpm import checkpoint, ranks
from fasthpm.data import build_loader
from fasthpm.maps.attention import attention_weights, cls_attention, standardized
from fasthpm.ranks.watchdog import Watchdog
from fasthpm.run.state import Run, endless
from fasthpm.step import Step


def refresh_maps(run: Run[Step], watchdog: Watchdog) -> None:
    """Compute the maps of all samples, with the model as it is: the student's attention, or the teacher's difficulty,
    standardised per image because float16 is to hold it. Collective."""
    recipe, launch, step = run.recipe, run.launch, run.step
    assert run.maps is not None
    epoch = run.done // recipe.steps_per_epoch

    def compute(images: torch.Tensor) -> torch.Tensor:
        if recipe.teacher_maps:
            return standardized(step.difficulty(images))
        attention = cls_attention(step.student, step.normalized_patches(images))
        return attention_weights(attention, per_head=recipe.map_per_head)

    with ranks.in_agreement():
        options = recipe.loader_options(
            rank=launch.rank,
            world_size=launch.world_size,
            num_frames=1,
            sampling_rate=1,
            train=False,
            whole=True,
            interpolation=recipe.interpolation,
            max_bad_samples=1.0,
        )
        loader = build_loader(recipe.data_path, options)
    with watchdog.doing("making maps"):
        run.maps.refresh(epoch, loader, compute, launch, lambda: watchdog.progressed(run.done))
    # Batches that were asked for ahead hold the maps before, or none.
    run.loader.load_state_dict(run.loader.state_dict())
    run.batches = endless(run.loader)
    if launch.rank == 0:
        run.maps.prune(checkpoint.oldest_step(Path(recipe.output_dir)) // recipe.steps_per_epoch)
