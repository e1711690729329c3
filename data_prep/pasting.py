"""Cutting grey things off a black ground and laying them over colour images, with soft edges and exact masks."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fasthpm.data.sampling import Array

DARKEST = 10  # grey level from which a pixel belongs to a thing
LARGEST_HOLE = 12  # pixels: darker places inside up to this size are prints and folds, larger ones show the ground
SMALLEST_PIECE = 0.1  # of the largest piece's pixels; smaller ones are specks
MARGIN = 3  # pixels around a cutout, room for its soft edge
SQUARE = np.ones((3, 3), np.uint8)
SOFT_EDGE = 0.5  # opacity above which a pixel is the thing's


@dataclass(frozen=True)
class Cutout:
    """A thing: its grey levels, which go on beyond its edge, and where it is."""

    grey: Array  # uint8 [h, w]
    inside: Array  # bool [h, w], touches all four sides


def silhouette(image: Array) -> Array:
    """Where the thing on a black ground is: bool, like uint8 [h, w]. Small dark places belong to it, specks do not."""
    solid = np.pad((image >= DARKEST).astype(np.uint8), 1)
    solid |= _parts(1 - solid, lambda areas: areas <= LARGEST_HOLE)
    return _parts(solid, lambda areas: areas >= SMALLEST_PIECE * areas.max())[1:-1, 1:-1].astype(bool)


def _parts(binary: Array, wanted: Callable[[Array], Array]) -> Array:
    """The connected parts of 0/1 uint8 [h, w] whose areas are wanted."""
    import cv2

    _, numbers, figures, _ = cv2.connectedComponentsWithStats(binary, connectivity=4)
    areas = figures[1:, cv2.CC_STAT_AREA]
    keep = np.concatenate([[False], wanted(areas)]) if len(areas) else np.zeros(1, bool)
    return keep[numbers].astype(np.uint8)


def cut_out(image: Array) -> Cutout:
    """The thing on the black ground of uint8 [h, w], which must have a pixel of `DARKEST` or more.

    Its outermost pixels are mixed with the black around it: they, and the ground, take the grey of their neighbours.
    """
    import cv2

    inside = silhouette(image)
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    grey, inside = (np.pad(part[box], MARGIN) for part in (image, inside))
    core = cv2.erode(inside.astype(np.uint8), SQUARE).astype(bool)
    known = core | (inside & ~cv2.dilate(core.astype(np.uint8), SQUARE).astype(bool))  # thin straps have no core
    grey = np.where(known, grey, 0)
    for _ in range(MARGIN + 1):
        grey = np.where(known, grey, cv2.dilate(grey, SQUARE))
        known = cv2.dilate(known.astype(np.uint8), SQUARE).astype(bool)
    kept = slice(MARGIN, -MARGIN)
    return Cutout(grey, inside[kept, kept])


def enlarge(cutout: Cutout, longest: int, mirrored: bool) -> tuple[Array, Array]:
    """The thing with its longer side `longest` pixels: grey levels float32 [h, w], opacity float32 [h, w] in 0..1.

    Bicubic, and the edge about two pixels wide at any size. The arrays have room for it on all sides.
    """
    inside = np.pad(cutout.inside, MARGIN)
    scale = longest / max(cutout.inside.shape)
    size = tuple(max(round(side * scale), 1) for side in inside.shape[::-1])
    grey, opacity = (
        np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))
        for values in (cutout.grey, inside)
    )
    opacity = np.clip(SOFT_EDGE + (opacity - SOFT_EDGE) * max(scale, 1.0), 0, 1)
    step = -1 if mirrored else 1
    rows, columns = (np.flatnonzero(opacity.any(axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return np.clip(grey, 0, 255)[box][:, ::step], opacity[box][:, ::step]


def paste(canvas: Array, colours: Array, opacity: Array, place: tuple[int, int], tint: Array) -> Array:
    """Lay a thing over uint8 [H, W, 3] in place, its top left corner at (row, column) `place`; returns bool [H, W].

    - `colours`: 0..255, grey [h, w] or [h, w, 3]; `opacity`: [h, w] in 0..1
    - `tint`: float [3] in 0..1, what the colours are multiplied by

    A pixel is the thing's, True in what is returned, if more than half of it is.
    """
    top, left = place
    height, width = opacity.shape
    window = canvas[top : top + height, left : left + width]
    share = opacity[:, :, None].astype(np.float64)
    colours = colours if colours.ndim == 3 else colours[:, :, None]
    window[:] = np.rint(window * (1 - share) + colours * tint * share).astype(np.uint8)
    mask = np.zeros(canvas.shape[:2], bool)
    mask[top : top + height, left : left + width] = opacity > SOFT_EDGE
    return mask
