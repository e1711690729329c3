"""What a tuning is: an encoder and a head that are trained together, by fine-tuning, segmentation or detection."""

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fasthpm import patches, schedule
from fasthpm.data import Loader
from fasthpm.data.sampling import torch_seed
from fasthpm.data.statistics import PixelStatistics
from fasthpm.run import state


@dataclasses.dataclass
class Tuning(state.Run[state.Wrapped]):
    """A tuning between two updates; saves and resumes as pretraining does. Its classes say what is trained and tested.

    - `settings`: the record of its flags; `origin`: where the encoder comes from (`probes.result.provenance`)
    - `pixels`: by what images are normalised; `best`: the highest `figure` of a test so far, in percent
    """

    settings: Any = dataclasses.field(kw_only=True)
    origin: dict[str, Any] = dataclasses.field(kw_only=True)
    pixels: PixelStatistics = dataclasses.field(kw_only=True)
    best: float = 0.0

    name: ClassVar[str]  # of its progress bar and its curves
    figure: ClassVar[str]  # of a test, the one that counts: percent, the higher the better

    def lr_at(self, update: int) -> float:
        """Learning rate of update `update` (from 0)."""
        return schedule.lr_at(self.recipe, update)

    @abstractmethod
    def inputs(self, batch: Any) -> tuple[Any, ...]:
        """What the engine is called with for a batch; may draw from numpy's and torch's global generators."""

    def losses(self, output: Any) -> dict[str, Tensor]:
        """What the engine gave: "loss", which is trained, and scalars that are shown beside it."""
        return {"loss": output}

    @abstractmethod
    def test(self) -> dict[str, float]:
        """Figures of the test set, the same on every rank. Collective."""

    @abstractmethod
    def testing_due(self) -> bool:
        """Whether there is a test after this update; after the last one there always is."""

    @abstractmethod
    def saving_due(self) -> bool:
        """Whether there is a checkpoint after this update; after the last one there always is."""

    def told(self) -> dict[str, float]:
        """Further figures for the log. Collective."""
        return {}

    def line(self, epoch: float, record: dict[str, float]) -> str:
        """What a test is told by."""
        return f"update {self.done}: {self.figure} {record[self.figure]:.2f} %, loss {record['loss']:.3f}"

    @abstractmethod
    def loaders(self) -> Sequence[Loader]:
        """All that are to be closed at the end."""


def seed_all(*parts: int) -> None:
    """Seed what is drawn from numpy's and torch's global generators (mixing, drop path, sampled boxes)."""
    seed = torch_seed(*parts)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def fitting_batch(batch_size: int, global_batch_size: int, world_size: int) -> int:
    """A preset's `batch_size` on so many devices: the largest up to it that fills `global_batch_size` with whole
    micro-steps; the same where none does, which the plan then says."""
    share, rest = divmod(global_batch_size, world_size)
    if rest or not share:
        return batch_size
    return max(size for size in range(1, min(batch_size, share) + 1) if share % size == 0)


def normalised(images: Tensor, pixels: PixelStatistics) -> Tensor:
    """Pixels [B, (T,) H, W, C] -> float32 [B, C, (T,) H, W], normalised."""
    return patches.normalised(images, pixels).movedim(-1, 1)
