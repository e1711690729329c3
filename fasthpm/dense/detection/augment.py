"""Large-scale jitter: an image shrunk or enlarged at random, a square cut out, perhaps mirrored, objects with it.

ViTDet's (detectron2's `ResizeScale` .1 to 2, `FixedSizeCrop`, `RandomFlip`) [released code]. Boxes are the tight boxes
of what the crop leaves of the masks. [ours] the crop's place is drawn for both axes, detectron2 draws one number for
both; masks are cut by the nearest pixel, which detectron2 does with polygons.

S is the square's side.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fasthpm.data.sampling import Array
from fasthpm.dense.detection.coco import Seen
from fasthpm.dense.detection.masks import tight_boxes
from fasthpm.dense.values import resized

FILL = 128  # grey of what lies outside the image, as in detectron2's crop
Ground = tuple[float, ...] | None  # a value per channel, None: `FILL`


@dataclass(frozen=True)
class Window:
    """What of an image is shown: the output's pixel (x, y) lies at (left + (x + .5) / scale, …) of the image.

    - `left`, `top`: in the image's pixels; `scale`: output pixels per image pixel, across and down
    - `width`, `height`: of the part of the output that shows the image
    """

    left: float
    top: float
    scale: tuple[float, float]
    width: int
    height: int

    def box(self) -> tuple[float, float, float, float]:
        """The part of the image that is shown: left, top, right, bottom."""
        across, down = self.scale
        return self.left, self.top, self.left + self.width / across, self.top + self.height / down

    def places(self, shape: tuple[int, int]) -> tuple[Array, Array]:
        """The image's (rows, columns) nearest to the output's, for an image of `shape` (H, W)."""
        found = (
            np.floor(start + (np.arange(length) + 0.5) / scale).astype(int)
            for start, length, scale in ((self.top, self.height, self.scale[1]), (self.left, self.width, self.scale[0]))
        )
        rows, columns = (each.clip(0, limit - 1) for each, limit in zip(found, shape, strict=True))
        return rows, columns


def draw_window(
    shape: tuple[int, int], side: int, scales: tuple[float, float], generator: np.random.Generator
) -> Window:
    """A window of S x S at a random scale and place; `scales`: 1 fits the whole image of `shape` (H, W) into it."""
    height, width = shape
    asked = side * generator.uniform(*scales)
    factor = min(asked / height, asked / width)
    tall, wide = max(round(height * factor), 1), max(round(width * factor), 1)
    across, down = wide / width, tall / height
    left, top = (float(np.floor(generator.uniform() * (max(length - side, 0) + 1))) for length in (wide, tall))
    return Window(left / across, top / down, (across, down), min(wide, side), min(tall, side))


def whole_window(shape: tuple[int, int], side: int) -> Window:
    """The whole image, its longer side S."""
    height, width = shape
    factor = side / max(shape)
    tall, wide = max(round(height * factor), 1), max(round(width * factor), 1)
    return Window(0.0, 0.0, (wide / width, tall / height), wide, tall)


def show(pixels: Array, window: Window, side: int, ground: Ground = None, nodata: float | None = None) -> Array:
    """[H, W, C] -> [S, S, C]: the window (bilinear, averaging where it shrinks), the rest grey.

    - `ground`: of other pixels than photographs', what the rest is; `nodata`: what is not mixed with other values
    """
    channels = pixels.shape[2]
    if ground is not None:
        left, top, right, bottom = window.box()
        box = (left, top, min(right, pixels.shape[1]), min(bottom, pixels.shape[0]))
        whole = np.empty((side, side, channels), pixels.dtype)
        whole[...] = ground
        size = (window.height, window.width)
        whole[: window.height, : window.width] = resized(pixels, size, Image.Resampling.BILINEAR, nodata, box)
        return whole
    image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    left, top, right, bottom = window.box()
    box = (left, top, min(right, image.width), min(bottom, image.height))
    canvas = np.full((side, side, channels), FILL, np.uint8)
    part = image.resize((window.width, window.height), Image.Resampling.BILINEAR, box)
    canvas[: window.height, : window.width] = np.asarray(part).reshape(window.height, window.width, channels)
    return canvas


def show_masks(masks: Array, window: Window, side: int) -> Array:
    """uint8 [N, H, W] -> uint8 [N, S, S], nothing outside the image."""
    rows, columns = window.places(masks.shape[1:])
    canvas = np.zeros((len(masks), side, side), np.uint8)
    canvas[:, : window.height, : window.width] = masks[:, rows[:, None], columns[None, :]]
    return canvas


@dataclass(frozen=True)
class Jitter:
    """`Transform` of training: a sample becomes (image, target).

    - `side`: S; `scales`: least and largest, see `draw_window`; `flip`: mirror every second sample
    - `least_side`: objects of which a side is shorter in the crop, in pixels, are left out
    - `ground`, `nodata`: of pixels that are no photographs'; see `show`

    The image is [C, S, S], as stored; the target holds `boxes` float32 [N, 4], `labels` int64 [N], `masks` uint8
    [N, S, S].
    """

    side: int
    scales: tuple[float, float] = (0.1, 2.0)
    flip: bool = True
    least_side: float = 1.0
    ground: Ground = None
    nodata: float | None = None

    def __call__(self, seen: Seen, generator: np.random.Generator) -> tuple[Tensor, dict[str, Any]]:
        """The same for the same numbers of `generator`."""
        window = draw_window(seen.pixels.shape[:2], self.side, self.scales, generator)
        pixels = show(seen.pixels, window, self.side, self.ground, self.nodata)
        masks = show_masks(seen.masks, window, self.side)
        if generator.uniform() < 0.5 and self.flip:
            pixels, masks = pixels[:, ::-1], masks[:, :, ::-1]
        boxes = tight_boxes(masks)
        kept = ((boxes[:, 2:] - boxes[:, :2]) >= max(self.least_side, 1.0)).all(1)
        target = {"boxes": boxes[kept], "labels": seen.labels[kept], "masks": np.ascontiguousarray(masks[kept])}
        return _channels_first(pixels), {name: torch.from_numpy(value) for name, value in target.items()}


@dataclass(frozen=True)
class Fit:
    """`Transform` of tests: the whole image, its longer side S, and where it lies.

    The target holds `sample`, its number, and as int64 [2] (height, width) `shown`, of the part of the input that shows
    the image, and `original`, of the file.
    """

    side: int
    ground: Ground = None
    nodata: float | None = None

    def __call__(self, seen: Seen, generator: np.random.Generator) -> tuple[Tensor, dict[str, Any]]:
        """Nothing is random here."""
        shape = seen.pixels.shape[:2]
        window = whole_window(shape, self.side)
        target = {
            "sample": torch.tensor(seen.sample),
            "shown": torch.tensor([window.height, window.width]),
            "original": torch.tensor(shape),
        }
        return _channels_first(show(seen.pixels, window, self.side, self.ground, self.nodata)), target


def _channels_first(pixels: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def collate(samples: list[tuple[Tensor, dict[str, Any]]]) -> tuple[Tensor, list[dict[str, Any]]]:
    """Samples as a batch: [B, C, S, S], as stored, and the targets as a list; [0, 3, 0, 0] of none."""
    if not samples:
        return torch.zeros(0, 3, 0, 0, dtype=torch.uint8), []
    return torch.stack([image for image, _ in samples]), [target for _, target in samples]
