"""What segmentation and detection fill in: data, network and test. The rest, from flags to results, is one for both."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fasthpm import ranks
from fasthpm.data.statistics import PixelStatistics
from fasthpm.data.values import Values
from fasthpm.dense.loader import Collate, DenseLoader, DenseSet, Transform
from fasthpm.dense.settings import Dense
from fasthpm.model import HPMViT
from fasthpm.tuning.past import Kind


@dataclass(frozen=True)
class Tested:
    """What a test gave, the same on every rank."""

    figures: dict[str, float]  # in percent
    table: list[dict[str, Any]] = field(
        default_factory=list
    )  # a row per class: "class" and figures, None where undefined


class Task(ABC):
    """One dense task: a record with functions.

    - `name`: the command, and the folder of its results in the run's; `what`: in words; `best`: the figure that counts
    - `summary`: the head of `--help`
    - `shown`: figures that stand in result.md's row, the best first
    - `settings`: its options; `recipes`: sets of them by name, each a function whose docstring says where they are from
    """

    name: str
    what: str
    best: str
    summary: str
    shown: tuple[str, ...]
    settings: type[Dense]
    recipes: Mapping[str, Callable[[], Any]]

    @property
    def kind(self) -> Kind:
        """How its output folders are told from others."""
        return Kind(f"{self.name}.json", self.what, "network", "data_path")

    @abstractmethod
    def recipe_for(self, model: HPMViT, given: Mapping[str, Any]) -> str:
        """The recipe that `--recipe auto` means for this model and the flags that were given."""

    @abstractmethod
    def open(self, settings: Any, split: str, channels: int, values: Values) -> DenseSet:
        """The set of a split, "train" or "val", checked as far as that is quick. **Raises:** `UserError`.

        - `channels`, `values`: of the images that the model takes
        """

    @abstractmethod
    def files(self, settings: Any, data: DenseSet) -> Sequence[str]:
        """The files that make a set what it is: of images and truth."""

    @abstractmethod
    def transform(self, settings: Any, split: str, pixels: PixelStatistics) -> Transform:
        """What makes a sample of what was read, one that pickles; `pixels`: what those of the model are."""

    @abstractmethod
    def collate(self, settings: Any) -> Collate:
        """What makes images and targets of a batch."""

    @abstractmethod
    def network(self, model: HPMViT, settings: Any, data: DenseSet) -> nn.Module:
        """The encoder of `model` with a fresh head, seeded; `data`: the training set.

        `forward(images, targets)` gives the losses by name, scalars whose sum is trained; `forward(images)` gives
        predictions. `images` are as `collate` made them, float32 and normalised. `encoder_name(name)` is timm's name of
        a parameter of the encoder, or empty. **Raises:** `UserError` for a model that cannot be taken.
        """

    def refuse_idle(self, given: Mapping[str, Any]) -> None:  # noqa: B027
        """Refuse flags without effect beside the others that were `given`. **Raises:** `UserError`."""

    def settle(self, network: Any, settings: Any) -> None:  # noqa: B027
        """Tell a network that came from a file how tests ask it; nothing where they ask all alike."""

    @abstractmethod
    def test(self, forward: Any, loader: DenseLoader, pixels: PixelStatistics, launch: ranks.Launch) -> Tested:
        """Figures over all ranks' shares of `loader`, whose `data` is the set. Collective.

        - `forward`: the network, or the engine that wraps it, at rest
        """

    @abstractmethod
    def draw(
        self, forward: Any, loader: DenseLoader, pixels: PixelStatistics, launch: ranks.Launch, path: Path, show: str
    ) -> None:
        """A picture of the first `settings.pictures` images with truth and prediction at `path` (rank 0). Collective.

        - `loader`: of these images alone, on every rank; `show`: which channels
        """
