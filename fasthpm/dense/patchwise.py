"""Images with masks, patch by patch: what class a patch is of, and what a frozen encoder says of it."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fasthpm.data.options import count_workers
from fasthpm.data.sampling import Array
from fasthpm.data.statistics import PixelStatistics, measured
from fasthpm.data.values import Values
from fasthpm.dense.loader import Unreadable
from fasthpm.dense.pairs import IGNORED, PairSet
from fasthpm.dense.values import resized
from fasthpm.errors import UserError
from fasthpm.model import HPMViT
from fasthpm.patches import NormalizedPatches, statistics_for
from fasthpm.probes.features import half
from fasthpm.recipe import Recipe

CHUNK = 64  # images that are read and encoded at a time
MEASURED = 256  # images whose mean and std count where nobody knows the model's


class Patches(NamedTuple):
    """The patches of some images, in order: N = images x L."""

    rows: Tensor  # float32 [N, D], features
    labels: Tensor  # int64 [N], class of most pixels, or IGNORED
    counts: Tensor  # int64 [N, K + 1], pixels of every class, and ignored ones


class Resized(NamedTuple):
    """Images and labels, all of one size."""

    images: Array  # [B, H, W, C], of photographs uint8
    labels: Array  # uint8 [B, H, W]


# -------------------------------------------------------------------------------------------------- reading
def read_resized(pairs: PairSet, samples: Sequence[int], size: tuple[int, int], workers: int = 0) -> Resized:
    """Images (bicubic) and labels (nearest) resized to (height, width) `size`, whatever their proportions (CAPI).

    **Raises:** `UserError` for one that cannot be read: figures are of a whole set, or none.
    """

    def read(sample: int) -> tuple[Array, Array]:
        try:
            image, labels = pairs.read(sample)
        except Unreadable as error:
            raise UserError(f"{pairs.name(sample)} {error}; repair or remove it") from error
        if pairs.reader is not None and image.shape[:2] != size:
            image = resized(image, size, Image.Resampling.BICUBIC, pairs.reader.values.nodata)
        return resize(image, size, Image.Resampling.BICUBIC), resize(labels, size, Image.Resampling.NEAREST)

    with ThreadPoolExecutor(count_workers(workers)) as pool:
        images, labels = zip(*pool.map(read, samples), strict=True)
    return Resized(np.stack(images), np.stack(labels))


def resize(pixels: Array, size: tuple[int, int], how: Image.Resampling) -> Array:
    """uint8 [h, w] or [h, w, C] at (height, width) `size`."""
    if pixels.shape[:2] == size:
        return pixels
    flat = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    return np.asarray(Image.fromarray(flat).resize(size[::-1], how)).reshape(*size, *pixels.shape[2:])


# -------------------------------------------------------------------------------------------------- labels
def count_pixels(labels: Tensor, side: int, num_classes: int) -> Tensor:
    """Pixels of every class in every patch, and ignored ones at the end: uint8 [B, H, W] -> int64 [B * L, K + 1]."""
    batch, height, width = labels.shape
    cut = labels.reshape(batch, height // side, side, width // side, side).permute(0, 1, 3, 2, 4)
    flat = cut.reshape(-1, side * side).long()
    flat = torch.where(flat == IGNORED, num_classes, flat)
    return torch.zeros(len(flat), num_classes + 1, dtype=torch.int64).scatter_add_(1, flat, torch.ones_like(flat))


def majority(counts: Tensor) -> Tensor:
    """The class of most pixels, of several the first; IGNORED where more are ignored: [N, K + 1] -> int64 [N]."""
    label = counts.argmax(1)
    return torch.where(label == counts.shape[1] - 1, IGNORED, label)


# -------------------------------------------------------------------------------------------------- features
class PatchEncoder:
    """A frozen encoder: images as stored in, features of their patches out, after its final norm.

    - `train`: by whose mean and std pixels are normalised where nothing tells those of the model
    """

    def __init__(self, model: HPMViT, recipe: Recipe, train: PairSet, device: torch.device) -> None:
        self.model, self.device = model.to(device).eval().requires_grad_(False), device
        self.size, self.side = model.img_size, model.patch_size
        statistics = statistics_for(model, _Measured(train, model.img_size), train.source)
        self.patches_of = NormalizedPatches(recipe, statistics)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """[B, H, W, C], as stored -> float32 [B * L, D]."""
        with half(self.device):
            tokens = self.model.encode(self.patches_of(images.to(self.device)))
        return tokens[:, self.model.num_prefix_tokens :].float().flatten(0, 1)

    def whole(self, pairs: PairSet, workers: int = 0) -> Patches:
        """All patches of a set. **Raises:** `UserError` for a sample that cannot be read."""
        parts = []
        for start in tqdm(range(0, len(pairs), CHUNK), desc="patch features", unit="batch", leave=False):
            samples = range(start, min(start + CHUNK, len(pairs)))
            images, labels = map(torch.from_numpy, read_resized(pairs, samples, self.size, workers))
            counts = count_pixels(labels, self.side, len(pairs.classes)).to(self.device)
            parts.append(Patches(self(images), majority(counts), counts))
        return Patches(*(torch.cat(column) for column in zip(*parts, strict=True)))


class _Measured:
    """Mean and std of the images themselves, once someone asks."""

    def __init__(self, pairs: PairSet, size: tuple[int, int]) -> None:
        self._pairs, self._size = pairs, size
        self._found: PixelStatistics | None = None

    def _measure(self) -> PixelStatistics:
        if self._found is None:
            samples = range(min(MEASURED, len(self._pairs)))
            self._found = measured(read_resized(self._pairs, samples, self._size).images)
        return self._found

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, of 0..1."""
        return self._measure().mean

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, of 0..1."""
        return self._measure().std

    @property
    def values(self) -> Values:
        """What they are: those of the model, where it says so, else of 8 bits."""
        return self._pairs.reader.values if self._pairs.reader else Values()
