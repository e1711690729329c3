"""RankMe of a run's features (Garrido et al. 2023): how many directions the cls tokens of a batch really use.

A collapse shows here, and in the teacher's entropies, long before a probe sees it.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fasthpm.data import Batch
from fasthpm.run.state import Run
from fasthpm.step import Step

SAMPLES = 256  # of a batch, on each rank: the figure is at most this, and at most the features' width


class FeatureRank:
    """Measures `rankme` of the teacher's cls tokens whenever the metrics are read, on the batch seen last. Collective:
    the mean over the ranks."""

    def __init__(self, run: Run[Step]) -> None:
        self.run = run
        self._images: Tensor | None = None

    def after_update(self, done: int, batch: Batch) -> None:
        """Keep the first view of some samples."""
        self._images = batch.images[:: self.run.recipe.global_crops][:SAMPLES]

    def due(self, done: int) -> bool:
        """Never by itself."""
        return False

    def read(self, done: int) -> dict[str, float]:
        """{"rankme"}; {} before the first update. Collective."""
        run = self.run
        if self._images is None or run.teacher is None:
            return {}
        with torch.no_grad():
            tokens = run.teacher.module.encode(run.step.normalized_patches(self._images))
            found = rank_me(tokens[:, 0].float()).reshape(1)
        dist.all_reduce(found)
        return {"rankme": float(found) / run.launch.world_size}

    def save(self, folder: Path, done: int) -> None:
        """Nothing: it has no state."""

    def load(self, folder: Path, done: int) -> None:
        """Nothing: it has no state."""


def rank_me(features: Tensor) -> Tensor:
    """exp of the entropy of the singular values' shares, of features [N, D]: a scalar, 1 to min(N, D)."""
    values = torch.linalg.svdvals(features)
    shares = values / values.sum().clamp_min(1e-12)
    return torch.special.entr(shares).sum().exp()
