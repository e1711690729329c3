"""How good a segmentation is: mIoU, mAcc and aAcc from one table of counts, by windows or by whole images.

mmseg's protocol: images are tested at a size of their own, by windows that overlap and whose logits are averaged; the
average is resized to the size of the mask, and its largest class counts.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fasthpm.data.statistics import PixelStatistics
from fasthpm.dense.pairs import IGNORED
from fasthpm.dense.tuning import normalised
from fasthpm.ranks import Launch, share

Forward = Callable[[Tensor], Tensor]  # float [B, C, h, w], normalised -> logits, float [B, K, h, w]


# -------------------------------------------------------------------------------------------------- figures
def confusion(truth: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """How many pixels of each class (row) were taken for each (column): int64 [K, K]; ignored ones are left out.

    - `truth`, `predicted`: labels of the same shape, of any whole type
    """
    known = truth != IGNORED
    pairs = truth[known].long() * num_classes + predicted[known].long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_figures(counts: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and accuracy of each class in percent from a table [K, K]: float64 [K] each, NaN where there is none.

    A class that neither occurs nor is predicted has no IoU; one that does not occur but is predicted has 0, and no
    accuracy (mmseg's).
    """
    exact = counts.double()
    hits, truth, predicted = exact.diagonal(), exact.sum(1), exact.sum(0)
    return 100 * hits / (truth + predicted - hits), 100 * hits / truth


def figures(counts: Tensor) -> dict[str, float]:
    """{"miou", "macc", "aacc"} in percent from a table [K, K]: means over the classes that have one, and the share of
    all pixels that are right. 0 where no pixel counts."""
    iou, accuracy = class_figures(counts)
    right = 100 * counts.diagonal().sum().double() / counts.sum()
    found = {"miou": iou.nanmean(), "macc": accuracy.nanmean(), "aacc": right}
    return {name: float(value.nan_to_num(0.0)) for name, value in found.items()}


def class_table(counts: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """A row per class: its name, IoU and accuracy in percent (None where it has none), and the pixels that it has."""
    iou, accuracy = (_rounded(values) for values in class_figures(counts))
    rows = zip(classes, iou, accuracy, counts.sum(1).tolist(), strict=True)
    return [dict(zip(("class", "iou", "accuracy", "pixels"), row, strict=True)) for row in rows]


def _rounded(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else round(value, 4) for value in values.tolist()]


# -------------------------------------------------------------------------------------------------- windows
@dataclass(frozen=True)
class Windows:
    """How images become logits.

    - `forward`: the network, on `device`; `num_classes`: K
    - `crop`: (height, width) of what the network sees at a time; `stride`: from one window to the next; None = whole
      images at a time, with interpolated positions
    - `channels`: of the images; `multiple`: whole images are filled up to multiples of this, the side of a patch
    - `batch_size`: windows at a time
    """

    forward: Forward
    device: torch.device
    num_classes: int
    crop: tuple[int, int]
    stride: tuple[int, int] | None
    channels: int = 3
    multiple: int = 16
    batch_size: int = 8

    def __call__(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Images, float [C, h, w] each, normalised -> float32 [K, h, w] each. Collective.

        All ranks call the network equally often, those with less to do with zeros: ZeRO 3 gathers the weights in it.
        """
        return self._whole(images) if self.stride is None else self._sliding(images, self.stride)

    def _sliding(self, images: Sequence[Tensor], stride: tuple[int, int]) -> list[Tensor]:
        filled = [fill(image, list(map(max, image.shape[1:], self.crop))) for image in images]
        places = [
            (number, slice(row, row + self.crop[0]), slice(column, column + self.crop[1]))
            for number, image in enumerate(filled)
            for row in starts(image.shape[1], self.crop[0], stride[0])
            for column in starts(image.shape[2], self.crop[1], stride[1])
        ]
        cut = [filled[number][:, rows, columns] for number, rows, columns in places]
        batches = [torch.stack(cut[i : i + self.batch_size]) for i in range(0, len(cut), self.batch_size)]
        sums = [image.new_zeros(self.num_classes + 1, *image.shape[1:], dtype=torch.float32) for image in filled]
        found = (one for logits in self._run(batches) for one in logits)
        for (number, rows, columns), logits in zip(places, found, strict=True):
            sums[number][:-1, rows, columns] += logits
            sums[number][-1, rows, columns] += 1  # how many windows have seen a pixel
        sizes = [image.shape[1:] for image in images]
        return [(one[:-1] / one[-1])[:, :height, :width] for one, (height, width) in zip(sums, sizes, strict=True)]

    def _whole(self, images: Sequence[Tensor]) -> list[Tensor]:
        sides = [[up_to(length, self.multiple) for length in image.shape[1:]] for image in images]
        filled = [fill(image, size)[None] for image, size in zip(images, sides, strict=True)]
        found = zip(images, self._run(filled), strict=True)
        return [logits[0, :, : image.shape[1], : image.shape[2]] for image, logits in found]

    def _run(self, batches: list[Tensor]) -> Iterator[Tensor]:
        for batch in batches:
            yield self.forward(batch).float()
        for _ in range(most(len(batches), self.device) - len(batches)):
            self.forward(torch.zeros(1, self.channels, *self.crop, device=self.device))


def starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows of `crop` begin on a side: every `stride`, the last one pushed back so that it ends inside."""
    count = max(length - crop + stride - 1, 0) // stride + 1
    return [max(min(number * stride, length - crop), 0) for number in range(count)]


def fill(image: Tensor, size: Sequence[int]) -> Tensor:
    """[C, h, w] filled up with zeros, the mean colour, to `size` (height, width), right and below."""
    return F.pad(image, (0, size[1] - image.shape[2], 0, size[0] - image.shape[1]))


def up_to(length: int, multiple: int) -> int:
    """The next multiple, at least two of them."""
    return max(-(-length // multiple), 2) * multiple


def most(count: int, device: torch.device) -> int:
    """The largest `count` of all ranks. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return count
    found = torch.tensor(count, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


# -------------------------------------------------------------------------------------------------- testing
@torch.no_grad()
def count_pixels(windows: Windows, batches: Iterable[Any], pixels: PixelStatistics, launch: Launch) -> Tensor:
    """The table of `confusion` over all batches of all ranks: int64 [K, K] on the CPU, the same on every rank.

    - `batches`: with `images`, uint8 [C, h, w] each, and `targets`, labels [H, W] each, of sizes of their own
    - `pixels`: by which images are normalised
    """
    counts = torch.zeros(windows.num_classes, windows.num_classes, dtype=torch.int64, device=launch.device)
    for batch in batches:
        images = [normalised(image.to(launch.device), pixels) for image in batch.images]
        for logits, truth in zip(windows(images), batch.targets, strict=True):
            counts += confusion(truth.to(launch.device), predicted(logits, truth.shape), windows.num_classes)
    return share(counts, launch.world_size).cpu()


def predicted(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Labels int64 [H, W], `size`, from logits [K, h, w]: the largest after resizing."""
    if logits.shape[1:] != tuple(size):
        logits = F.interpolate(logits[None], size=tuple(size), mode="bilinear", align_corners=False)[0]
    return logits.argmax(0)
