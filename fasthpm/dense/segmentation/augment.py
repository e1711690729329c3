"""What happens to an image and its mask before they train or test a segmentation: mmseg's protocol.

All random numbers come from the generator that is given, in a fixed order. An image is resized bilinearly without
antialiasing, as OpenCV does it for mmseg; only the part that is kept is computed. Hues and saturations are changed in
Pillow's 8-bit HSV, mmseg's in OpenCV's.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fasthpm.dense.pairs import IGNORED
from fasthpm.dense.values import lacking, stored

Array = NDArray[Any]
Sample = tuple[Array, Array]
LONG_BY_SHORT = 4  # [released code] (2048, 512): the longer side is at most this many times what the shorter one may be
TRIES = 10  # [released code] crops that may be drawn again because one class has too much of them
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32.0, (0.5, 1.5), (0.5, 1.5), 18  # [released code] hue in 180ths of the circle
FILL = (124, 116, 104)  # [released code] the mean colour of ImageNet
HUES = 256 / 180  # Pillow's steps in one of these


@dataclass(frozen=True)
class Augmentation:
    """Callable: an image [H, W, C], its mask [H, W] and random numbers -> a crop: [C, h, w], as stored, and [h, w].

    In this order: resize by a random factor with the aspect kept, crop at random (again while one class has more than
    `cat_max_ratio` of the labelled pixels, up to 10 times), pad, mirror, distort the colours.

    - `crop`: (h, w); `short_side`: of a resize by the factor 1; `factors`: lowest and highest
    - `distort`: whether colours are distorted, those of photographs
    - `fill`: of what lies outside the image, whose mask is `IGNORED`; `nodata`: what is not mixed with other values
    """

    crop: tuple[int, int]
    short_side: int
    factors: tuple[float, float] = (0.5, 2.0)
    cat_max_ratio: float = 0.75
    flip: bool = True
    distort: bool = True
    fill: tuple[float, ...] = FILL
    nodata: float | None = None

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """See the class."""
        image, mask = sample
        factor = random.uniform(*self.factors)
        size = fitted(mask.shape, int(self.short_side * LONG_BY_SHORT * factor), int(self.short_side * factor))
        corner = self._corner(mask, size, random)
        kept = (min(size[0] - corner[0], self.crop[0]), min(size[1] - corner[1], self.crop[1]))
        image = resized_image(image, size, corner, kept, self.nodata)
        mask = resized_mask(mask, size, corner, kept)
        if self.flip and random.random() < 0.5:
            image, mask = image[:, ::-1], mask[:, ::-1]
        if self.distort:
            image = distorted(image, random)
        image = padded(image, self.crop, self.fill if image.shape[2] == len(self.fill) else round(np.mean(self.fill)))
        return np.ascontiguousarray(image.transpose(2, 0, 1)), padded(mask, self.crop, IGNORED)

    def _corner(self, mask: Array, size: tuple[int, int], random: np.random.Generator) -> tuple[int, int]:
        """Row and column of the crop in the image of `size`."""
        for tried in range(TRIES + 1):
            free = (max(size[0] - self.crop[0], 0), max(size[1] - self.crop[1], 0))
            row, column = (int(random.integers(0, length + 1)) for length in free)
            if self.cat_max_ratio >= 1 or tried == TRIES:
                break
            kept = (min(size[0] - row, self.crop[0]), min(size[1] - column, self.crop[1]))
            counts = np.bincount(resized_mask(mask, size, (row, column), kept).reshape(-1), minlength=IGNORED + 1)
            counts[IGNORED] = 0
            if np.count_nonzero(counts) > 1 and counts.max() < self.cat_max_ratio * counts.sum():
                break
        return row, column


def for_test(sample: Sample, short_side: int, nodata: float | None = None) -> Sample:
    """An image resized as for training by the factor 1, [C, h, w], and its mask as it is, [H, W]."""
    image, mask = sample
    size = fitted(mask.shape, short_side * LONG_BY_SHORT, short_side)
    return np.ascontiguousarray(resized_image(image, size, (0, 0), size, nodata).transpose(2, 0, 1)), mask


# -------------------------------------------------------------------------------------------------- sizes
def fitted(size: tuple[int, ...], long_side: int, short_side: int) -> tuple[int, int]:
    """(height, width) of the largest image of the same aspect whose sides are at most these."""
    factor = min(long_side / max(size), short_side / min(size))
    height, width = (max(int(length * factor + 0.5), 1) for length in size)
    return height, width


def resized_image(
    image: Array, size: tuple[int, int], corner: tuple[int, int], kept: tuple[int, int], nodata: float | None = None
) -> Array:
    """Bilinear, without antialiasing: the part of the image [H, W, C] in `size` that begins at `corner`.

    - `size`, `kept`: (height, width) of the whole resized image, and of the part that is computed
    - `nodata`: in what has any part of it the result is nodata
    """
    if size == image.shape[:2]:
        return image[corner[0] : corner[0] + kept[0], corner[1] : corner[1] + kept[1]]
    if image.dtype == np.uint8 and nodata is None:  # photographs: nothing is out of range
        found = _bilinear(image, size, corner, kept)
        found += 0.5
        return found.astype(np.uint8)
    out = lacking(image, nodata)
    if out is None:
        return stored(_bilinear(image, size, corner, kept), image, nodata, None)
    found = _bilinear(np.where(out, image.dtype.type(0), image), size, corner, kept)
    return stored(found, image, nodata, _bilinear(out, size, corner, kept) > 0)


def _bilinear(
    image: Array, size: tuple[int, int], corner: tuple[int, int], kept: tuple[int, int]
) -> NDArray[np.float32]:
    upper, lower, down = _neighbours(image.shape[0], size[0], corner[0], kept[0])
    left, right, across = _neighbours(image.shape[1], size[1], corner[1], kept[1])
    first = left[0]
    part = image[:, first : right[-1] + 1]
    rows = _between(part.take(upper, 0), part.take(lower, 0), down[:, None, None])
    return _between(rows.take(left - first, 1), rows.take(right - first, 1), across[:, None])


def resized_mask(mask: Array, size: tuple[int, int], corner: tuple[int, int], kept: tuple[int, int]) -> Array:
    """As `resized_image`, each pixel of the mask [H, W] with the label that lies there."""
    rows, columns = (
        np.minimum((np.arange(corner[i], corner[i] + kept[i]) + 0.5) * mask.shape[i] / size[i], mask.shape[i] - 1)
        for i in (0, 1)
    )
    return mask.take(rows.astype(np.intp), 0).take(columns.astype(np.intp), 1)


def _neighbours(
    length: int, new: int, begin: int, count: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """Of `count` pixels from `begin` on of a side resized from `length` to `new`: those before and after, and how far
    between them they lie."""
    places = np.clip((np.arange(begin, begin + count) + 0.5) * (length / new) - 0.5, 0, length - 1)
    before = places.astype(np.intp)
    return before, np.minimum(before + 1, length - 1), (places - before).astype(np.float32)


def _between(before: NDArray[Any], after: NDArray[Any], share: NDArray[np.float32]) -> NDArray[np.float32]:
    first, last = before.astype(np.float32), after.astype(np.float32)
    last -= first
    last *= share
    first += last
    return first


def padded(pixels: Array, size: tuple[int, int], value: float | tuple[float, ...]) -> Array:
    """[h, w] or [h, w, C] filled up with `value` to `size` (height, width), right and below."""
    if pixels.shape[:2] == size:
        return np.ascontiguousarray(pixels)
    whole = np.empty((*size, *pixels.shape[2:]), pixels.dtype)
    whole[...] = value
    whole[: pixels.shape[0], : pixels.shape[1]] = pixels
    return whole


# -------------------------------------------------------------------------------------------------- colours
def distorted(image: Array, random: np.random.Generator) -> Array:
    """Brightness, contrast (before or after the colours), saturation and hue, each changed in half of all images."""
    if random.random() < 0.5:
        image = _scaled(image, 1.0, random.uniform(-BRIGHTNESS, BRIGHTNESS))
    contrast_first = random.random() < 0.5
    if contrast_first:
        image = _contrast(image, random)
    image = recoloured(image, random)
    return image if contrast_first else _contrast(image, random)


def recoloured(image: Array, random: np.random.Generator) -> Array:
    """Saturation and hue of RGB, each changed in half of all images; grey images stay as they are."""
    saturation = random.uniform(*SATURATION) if random.random() < 0.5 else 1.0
    hue = int(random.integers(-HUE, HUE)) if random.random() < 0.5 else 0
    if image.shape[2] != 3 or (saturation == 1.0 and hue == 0):
        return image
    hsv = np.array(Image.fromarray(np.ascontiguousarray(image)).convert("HSV"))
    hsv[..., 0] += np.uint8(round(hue * HUES) % 256)  # wraps around
    hsv[..., 1] = _scaled(hsv[..., 1], saturation, 0.0)
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))


def _contrast(image: Array, random: np.random.Generator) -> Array:
    return _scaled(image, random.uniform(*CONTRAST), 0.0) if random.random() < 0.5 else image


def _scaled(values: Array, factor: float, plus: float) -> Array:
    """uint8 values times `factor` plus `plus`, cut off at 0 and 255, by a table."""
    table = np.clip(np.arange(256, dtype=np.float32) * factor + plus, 0, 255).astype(np.uint8)
    return table[values]
