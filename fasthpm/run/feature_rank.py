"""RankMe of a run's features (Garrido et al. 2023): how many directions the samples of a batch really use.

A collapse shows here long before a probe sees it: features that are all alike have 1.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fasthpm.data import Batch
from fasthpm.ranks import zero
from fasthpm.run.state import Run
from fasthpm.step import Step

SAMPLES = 256  # over all ranks: the figure is at most this, and at most the features' width
CHUNK = 16  # samples of one forward


class FeatureRank:
    """Measures `rankme` at every `recipe.rankme_every` updates, on the batch seen last, nothing masked. Collective.

    The features are what probes and users read: the mean of the student's patch tokens; of a run that learns from
    several views the teacher's cls token, of the first view.
    """

    def __init__(self, run: Run[Step]) -> None:
        self.run = run
        self._images: Tensor | None = None

    def after_update(self, done: int, batch: Batch) -> None:
        """Keep some samples, if they are wanted now."""
        if self.due(done):
            share = max(1, SAMPLES // self.run.launch.world_size)
            self._images = batch.images[:: self.run.recipe.global_crops][:share]

    def due(self, done: int) -> bool:
        """At every so many updates, and at the last."""
        recipe = self.run.recipe
        return done % recipe.rankme_every == 0 or done == recipe.total_steps

    def read(self, done: int) -> dict[str, float]:
        """{"rankme"} if it is due; {} else, and where the update that was due has been left out. Collective."""
        images, self._images = self._images, None
        if images is None or not self.due(done):
            return {}
        with zero.own_parameters(self.run.step.student):
            rows = torch.cat([self.features(part) for part in images.split(CHUNK)])
        gathered = [rows]
        if self.run.launch.world_size > 1:
            gathered = [torch.empty_like(rows) for _ in range(self.run.launch.world_size)]
            dist.all_gather(gathered, rows)
        found = torch.cat(gathered).cpu()  # its singular values take milliseconds there
        # Whoever reads the loss says what is not finite, and where it began.
        return {"rankme": float(rank_me(found))} if bool(found.isfinite().all()) else {}

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images as stored, [N, H, W, C], or clips [N, T, H, W, C] -> float32 [N, D]."""
        run, step = self.run, self.run.step
        patches = step.normalized_patches(images.to(run.launch.device))
        if run.recipe.uses_views and run.teacher is not None:
            return run.teacher.module.encode(patches)[:, 0].float()
        return step.student.encode(patches)[:, step.student.num_prefix_tokens :].float().mean(dim=1)

    def save(self, folder: Path, done: int) -> None:
        """Nothing: it has no state."""

    def load(self, folder: Path, done: int) -> None:
        """Nothing: it has no state."""


def rank_me(features: Tensor) -> Tensor:
    """exp of the entropy of the singular values' shares, of features [N, D]: a scalar, 1 to min(N, D)."""
    values = torch.linalg.svdvals(features)
    shares = values / values.sum().clamp_min(1e-12)
    return torch.special.entr(shares).sum().exp()
