"""Images of any numbers in dense tasks: resized as they are stored, filled up, and shown to people.

Photographs go the ways of the papers' libraries, in 8 bits (`segmentation.augment`, `detection.augment`, `patchwise`).
"""

from typing import Any

import numpy as np
from PIL import Image

from fasthpm.data.sampling import Array
from fasthpm.data.shown import Shown, shown_of
from fasthpm.data.statistics import PixelStatistics
from fasthpm.data.values import are_photographs
from fasthpm.errors import UserError

LEAST = 1e-6  # weight with which nodata has a part in a pixel
Box = tuple[float, float, float, float]  # left, top, right, bottom


def lacking(image: Array, nodata: float | None) -> Array | None:
    """Where an image has no data: bool of the same shape; None where it has all."""
    if nodata is None:
        return None
    out = np.isnan(image) if nodata != nodata else image == np.asarray(nodata).astype(image.dtype)
    return out if out.any() else None


def stored(values: Array, like: Array, nodata: float | None, out: Array | None) -> Array:
    """Numbers as `like` has them, rounded and within its type's range; nodata where `out` says so, and only there."""
    kind = like.dtype
    if kind.kind in "ui":
        limits = np.iinfo(kind)
        values = np.floor(values + 0.5).clip(limits.min, limits.max)
    made = values.astype(kind)
    if nodata is None:
        return made
    mark = np.asarray(nodata).astype(kind)
    chance = made == mark
    if chance.any():
        made[chance] = (
            kind.type(int(mark) + (-1 if mark > 0 else 1)) if kind.kind in "ui" else np.nextafter(mark, kind.type(1))
        )
    if out is not None:
        made[out] = mark
    return made


def resized(
    image: Array, size: tuple[int, int], how: Image.Resampling, nodata: float | None, box: Box | None = None
) -> Array:
    """The part `box` of an image [h, w, C] at (height, width) `size`, by Pillow in float32, channel by channel.

    A pixel in which nodata has any part is nodata.
    """
    out = lacking(image, nodata)
    wide = (image if out is None else np.where(out, 0, image)).astype(np.float32)
    marks = None
    if out is not None:  # the lobes of a cubic that are below 0 lie outside those of the other one
        ways = (how, Image.Resampling.BILINEAR)
        marks = np.any([np.abs(_each(out.astype(np.float32), size, way, box)) > LEAST for way in ways], axis=0)
    return stored(_each(wide, size, how, box), image, nodata, marks)


def _each(values: Array, size: tuple[int, int], how: Image.Resampling, box: Box | None) -> Array:
    planes = (Image.fromarray(np.ascontiguousarray(values[..., k])) for k in range(values.shape[2]))
    return np.stack([np.asarray(plane.resize(size[::-1], how, box)) for plane in planes], axis=2)


def ground(pixels: PixelStatistics, photograph: Any) -> Any:
    """What lies outside of an image: of photographs what is said, else nodata or each channel's mean."""
    values, channels = pixels.values, len(pixels.mean)
    if are_photographs(values.dtype, channels):
        return photograph
    if values.nodata is not None:
        return tuple([values.nodata] * channels)
    means = np.array(pixels.mean) * values.unit
    return tuple((np.rint(means) if values.dtype[0] in "ui" else means).tolist())


def shown_once(pixels: PixelStatistics, show: str) -> Shown:
    """How images are shown: one picture of each. **Raises:** `UserError` for `show` that names several, or none."""
    found = shown_of(pixels.values, len(pixels.mean), show)
    if len(found.groups) > 1:
        raise UserError(f"show {show!r} asks for {len(found.groups)} pictures of an image, expected one, as 3,2,1")
    return found
