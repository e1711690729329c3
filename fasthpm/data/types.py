"""`Batch`, `DatasetInfo` and the `Loader` protocol: what a data source gives."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fasthpm.data.bad import BadSample
from fasthpm.data.values import Values


@dataclass(frozen=True)
class Batch:
    """One rank's share of a micro-batch. B samples; every tensor is the batch's own memory, never reused."""

    images: Tensor  # [B, H, W, C] in the dtype that is stored, or clips uint8 [B, T, H, W, C]
    labels: Tensor  # int64 [B]
    ids: Tensor  # int64 [B], index of each sample in the data set
    crops: Tensor  # int64 [B, 5]: top, left, height, width of the crop in the stored image; way up: `sampling.turned`
    sizes: Tensor  # int64 [B, 2]: height, width of the stored image
    replaced: Tensor  # bool [B]: the sample whose turn it was does not decode, this is another one
    maps: Tensor = dataclasses.field(
        default_factory=lambda: torch.zeros(0)
    )  # float16 [B, rows, cols]; see fasthpm.maps
    local: Tensor = dataclasses.field(
        default_factory=lambda: torch.zeros(0)
    )  # uint8 [S * n, h, w, C]: n local crops of each of the S samples, one after the other; of S = B / views samples

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; asynchronous where the source is pinned."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in dataclasses.fields(self)))


@dataclass(frozen=True)
class DatasetInfo:
    """What the sidecar of a prepared set says (`OUT.json` beside `OUT.beton`)."""

    num_samples: int
    channels: int
    mean: tuple[float, ...]  # per channel, of pixels scaled to 0..1 where they have 8 bits, else as stored
    std: tuple[float, ...]
    classes: tuple[str, ...]
    unlabelled: int = 0  # samples of the label -1, which are of none of the classes
    values: Values = dataclasses.field(default=Values())


class Loader(Protocol):
    """What training and probes need of a data source; every implementation passes `tests/data/test_build.py`.

    The order of samples is drawn for the *global* batch and then split, so any number of ranks sees the same batches:
    global batch b of an epoch is order[b*G:(b+1)*G] with G = batch_size * world_size, and rank r takes rows
    [r*batch_size, (r+1)*batch_size) of it. Crops, flips, colours and what replaces a sample that does not decode are
    functions of (seed, epoch, sample id) alone.
    """

    info: DatasetInfo
    source: str  # its path, for messages
    batch_size: int

    def __len__(self) -> int:
        """Batches per epoch of this rank."""

    def __iter__(self) -> Iterator[Batch]:
        """The batches of the current epoch from the current position; afterwards the next epoch is current."""

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`."""

    def state_dict(self) -> dict[str, Any]:
        """{"epoch", "batch"} of the next batch that the consumer has not been given."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position that `state_dict` gave."""

    def bad_samples(self) -> list[BadSample]:
        """The samples that this rank met so far and that do not decode, each once."""

    def close(self) -> None:
        """Stop threads and free buffers; safe to call twice."""
