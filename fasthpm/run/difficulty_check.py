"""Is the difficulty true? An observer that compares it with the mean loss over random masks of held-out samples.

`teacher_spearman` compares the difficulty with the losses of the patches that it had masked, on which much depends;
this does not: the masks here are random, and the samples and masks are the same at every measurement.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fasthpm import loss as losses
from fasthpm import ranks
from fasthpm.data import Batch, build_loader
from fasthpm.mask import MaskPlan, draw_mask, sample_noise, split_ids
from fasthpm.model import HPMViT
from fasthpm.ranks import zero
from fasthpm.recipe import Recipe
from fasthpm.run.state import Run
from fasthpm.step import Step

SAMPLES = 64  # over all ranks
MASKS = 12  # of each sample, whose mean loss is the true difficulty
CHUNK = 16  # samples of one forward
NOISE_SEED = 0xD1FF


class DifficultyCheck:
    """Measures `difficulty_spearman` and `difficulty_auc` at every `recipe.difficulty_every` updates. Collective."""

    def __init__(self, run: Run[Step]) -> None:
        self.run = run
        with ranks.in_agreement():
            self._batch = held_out(run.recipe, run.launch.rank, run.launch.world_size)

    def after_update(self, done: int, batch: Batch) -> None:
        """Nothing: it looks when it is due."""

    def due(self, done: int) -> bool:
        """At every so many updates, and at the last."""
        recipe = self.run.recipe
        return done % recipe.difficulty_every == 0 or done == recipe.total_steps

    def read(self, done: int) -> dict[str, float]:
        """{"difficulty_spearman", "difficulty_auc"} if they are due; {} else. Collective."""
        if not self.due(done):
            return {}
        run, step = self.run, self.run.step
        model = run.teacher.module if run.teacher else step.student
        sums = torch.zeros(3, dtype=torch.float64, device=run.launch.device)
        with torch.no_grad():
            for images, ids in zip(self._batch.images.split(CHUNK), self._batch.ids.split(CHUNK), strict=True):
                images, ids = images.to(run.launch.device), ids.to(run.launch.device)
                patches = step.normalized_patches(images)
                target = step.target_of(images, patches)
                true = mean_losses(step.student, patches, ids, random_plan(run.recipe), target)
                with zero.own_parameters(model):
                    answers = model.predict_loss(patches, target=target)
                valid = step.normalized_patches.valid(images)
                auc = losses.hardest_auc(answers, true, valid=valid)
                figures = torch.stack([losses.spearman(answers, true, valid), auc])
                sums += torch.cat([figures.double() * len(ids), sums.new_tensor([len(ids)])])
        dist.all_reduce(sums)
        spearman, auc, count = sums.tolist()
        return {"difficulty_spearman": spearman / count, "difficulty_auc": auc / count}

    def save(self, folder: Path, done: int) -> None:
        """Nothing: it has no state."""

    def load(self, folder: Path, done: int) -> None:
        """Nothing: it has no state."""


def random_plan(recipe: Recipe) -> MaskPlan:
    """How the masks of the true difficulty are drawn: the recipe's count, at random. Those of a video hide together
    what the recipe's hide, since that changes what is hard."""
    plan = recipe.mask_plan
    if plan.record.follows == "difficulty" or plan.slots > 1:  # random, as long as nothing is chosen by difficulty
        return plan
    return dataclasses.replace(plan, policy="random", throw_ratio=0.0)


def mean_losses(
    model: HPMViT, patches: Tensor, ids: Tensor, plan: MaskPlan, target: Tensor | None = None, masks: int = MASKS
) -> Tensor:
    """Loss of every patch, averaged over those of `masks` random masks that hide it: float32 [B, L].

    - `patches`: [B, L, t*P*P*C]; `ids`: int64 [B], which the masks are a function of
    - `target`: [B, L, D'] or ids [B, L], what is reconstructed, if it is not pixels
    """
    total = torch.zeros(patches.shape[:2], device=patches.device)
    count, even = torch.zeros_like(total), torch.zeros_like(total)
    for number in range(masks):
        step = torch.full((), number, dtype=torch.int64, device=patches.device)
        mask = draw_mask(plan, sample_noise(NOISE_SEED, step, ids, plan.noise_size), even, 0.0)
        found = model(patches, mask, num_masked=plan.num_masked, target=target).per_patch_loss
        total.scatter_add_(1, split_ids(mask, plan.num_masked)[1], found.float())
        count += mask
    return total / count.clamp_min(1)


def held_out(recipe: Recipe, rank: int, world_size: int) -> Batch:
    """This rank's share of the samples, evenly spread over the set, as in evaluation; the same number on every rank."""
    source = recipe.val_path or recipe.data_path
    share = max(1, SAMPLES // world_size)
    options = recipe.loader_options(
        batch_size=share, rank=rank, world_size=world_size, train=False, num_workers=1, max_bad_samples=1.0
    )
    loader: Any = build_loader(source, options)
    try:
        if not hasattr(loader, "take"):
            return next(iter(loader))
        places = np.linspace(0, loader.info.num_samples - 1, share * world_size).astype(np.int64)
        return loader.take(0, places[rank::world_size])
    finally:
        loader.close()
