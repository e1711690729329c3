"""`Raster`: the pictures of a file in their own numbers, not yet read; and what makes one of an array with axes."""

import importlib
import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from fasthpm.data.sampling import Array
from fasthpm.data.values import DTYPES, MAX_CHANNELS
from fasthpm.errors import UserError

MAX_PIXELS = 100_000_000
MAX_BYTES = 1 << 30  # of one picture, or of a file that can only be read as a whole
PAGES = ("channels", "samples", "first")
CHANNEL, HEIGHT, WIDTH = "C", "Y", "X"
STORED_AS = {  # types that are kept as another one, which holds all of their values or is said to round
    **dict.fromkeys(DTYPES, ""),
    "int8": "int16",
    "bool": "uint8",
    "float64": "float32",
    **dict.fromkeys(("uint32", "int32", "uint64", "int64"), "float32"),
}
ROUNDED = "float64, stored as float32"
Box = tuple[int, int, int, int]  # top, left, height, width


class AmbiguousPages(ValueError):
    """A file of several pictures, and nobody has said what they are."""


@dataclass(frozen=True)
class Blob:
    """A file by its path or, out of a tar or parquet file, by its bytes. `key`: the array in it that is meant."""

    path: str
    data: bytes | None = None
    key: str = ""

    def start(self, count: int = 512) -> bytes:
        """The first bytes; of a folder none."""
        if self.data is not None:
            return self.data[:count]
        if os.path.isdir(self.path):
            return b""
        with open(self.path, "rb") as file:
            return file.read(count)

    def open(self) -> BinaryIO:
        """For reading."""
        return open(self.path, "rb") if self.data is None else io.BytesIO(self.data)

    def all(self) -> bytes:
        """Every byte."""
        if self.data is not None:
            return self.data
        with open(self.path, "rb") as file:
            return file.read()


@dataclass(frozen=True)
class Reading:
    """How files are to be read."""

    pages: str = ""  # what the third axis of a stack or volume is, one of `PAGES`; "": what the file itself says
    level: int = 0  # of a pyramid, 0 = the largest
    axes: str = ""  # of arrays whose files do not say, such as CYX; "": by their sizes
    key: str = ""  # which array of a file that holds several
    numbered: bool = False  # whether the first axis of an array counts samples
    max_pixels: int = MAX_PIXELS


@dataclass
class Raster:
    """`slices` pictures of [height, width, channels], not yet read."""

    height: int
    width: int
    channels: int
    dtype: str  # one of `DTYPES`
    read: Callable[[int, Box], Array]  # (slice, box) -> [h, w, channels] of `dtype`, native byte order
    slices: int = 1
    windowed: bool = False  # whether a box is read without the rest
    bands: tuple[str, ...] = ()  # a name per channel, or none
    nodata: float | None = None  # what the file itself says
    alpha: int | None = None  # which channel is opacity
    premultiplied: bool = False  # whether the others are multiplied by it
    notes: tuple[str, ...] = ()
    close: Callable[[], Any] = field(default=lambda: None)

    def whole(self) -> Box:
        """The box of all pixels."""
        return 0, 0, self.height, self.width


def library(name: str, extra: str, what: str) -> Any:
    """A module that an extra installs. **Raises:** `UserError` if it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{what} need {name} ({error}); pip install 'fasthpm[{extra}]'") from error


# ------------------------------------------------------------------------------------------------------- numbers
def stored_dtype(dtype: Any) -> str:
    """The type that pixels of `dtype` are kept in. **Raises:** `ValueError` if there is none."""
    name = np.dtype(dtype).newbyteorder("=").name
    if name not in STORED_AS:
        raise ValueError(f"pixels of {name}, expected {', '.join(DTYPES)}")
    return STORED_AS[name] or name


def narrowed(values: Array) -> Array:
    """`values` in their stored type, in native byte order; int64 and the like must fit float32 exactly.

    **Raises:** `ValueError` for values that would be lost.
    """
    target = stored_dtype(values.dtype)
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255)
    with np.errstate(over="ignore", invalid="ignore"):
        out = np.ascontiguousarray(values, target)
        if values.dtype.kind in "iu" and target == "float32" and not (out.astype(np.float64) == values).all():
            raise ValueError(f"integers of {values.dtype.name} beyond 16777216, which float32 does not hold exactly")
    if values.dtype.kind == "f" and values.dtype.itemsize > 4 and (np.isinf(out) & ~np.isinf(values)).any():
        raise ValueError("values of float64 too large for float32")
    return out


def fitting(values: Array, dtype: str) -> Array:
    """Whole numbers as integers of `dtype`. **Raises:** `ValueError` if one does not fit."""
    limits = np.iinfo(dtype)
    if values.size and (values.min() < limits.min or values.max() > limits.max):
        raise ValueError(f"values {values.min():g} to {values.max():g}, outside {dtype}")
    return values.astype(dtype)


def is_whole(number: float) -> bool:
    """Whether a number is an integer."""
    return math.isfinite(number) and number == int(number)


# ------------------------------------------------------------------------------------------------------- axes
def guess_axes(shape: Sequence[int], *, samples: bool = False) -> str:
    """Axes of an array that has none: the shorter of first and last is channels, if there may be so many.

    With `samples` the first axis numbers samples.
    """
    if samples and len(shape) > 2:
        return "N" + guess_axes(shape[1:])
    if len(shape) <= 2:
        return (HEIGHT + WIDTH)[2 - len(shape) :]
    if len(shape) > 3:
        return "ZTQN"[len(shape) - 4] + guess_axes(shape[1:])
    first, last = shape[0], shape[2]
    if last <= first and last <= MAX_CHANNELS:
        return HEIGHT + WIDTH + CHANNEL
    return (CHANNEL if first <= MAX_CHANNELS else "Z") + HEIGHT + WIDTH


def settle_pages(pages: str, count: int, channels: int) -> str:
    """What `count` pages of `channels` channels each are: one of `PAGES`.

    **Raises:** `ValueError` if it isn't known, or cannot be.
    """
    if count == 1:
        return "first"
    if not pages:
        raise AmbiguousPages(f"{count} pages or slices in one file: --pages channels, samples or first says what")
    if pages == "channels" and channels > 1:
        raise ValueError(f"{count} pages of {channels} channels each cannot be channels; use --pages samples or first")
    return pages


def raster_of(values: Any, axes: str, reading: Reading, **facts: Any) -> Raster:
    """Of what is cut like an array and has `shape` and `dtype`.

    **Args:** `axes`: a letter per axis: Y, X, C for channels, any other for pages. `facts`: more of `Raster`'s fields.

    **Raises:** `ValueError` for axes that do not fit.
    """
    shape = [int(side) for side in values.shape]
    if len(axes) != len(shape) or len(set(axes)) < len(axes) or not {HEIGHT, WIDTH} <= set(axes):
        raise ValueError(f"an array of shape {tuple(shape)} with axes {axes!r}; expected a letter each, Y and X too")
    others = [k for k, name in enumerate(axes) if name not in (HEIGHT, WIDTH, CHANNEL)]
    counts = [shape[k] for k in others]
    own = shape[axes.index(CHANNEL)] if CHANNEL in axes else 1
    pages = settle_pages(reading.pages, math.prod(counts), own)
    channels = own if pages != "channels" else math.prod(counts)
    y, x = axes.index(HEIGHT), axes.index(WIDTH)

    def read(number: int, box: Box) -> Array:
        top, left, height, width = box
        index: list[Any] = [slice(None)] * len(shape)
        index[y], index[x] = slice(top, top + height), slice(left, left + width)
        kept = list(axes)
        if pages != "channels" and others:
            for k, place in zip(others, np.unravel_index(number, counts), strict=True):
                index[k] = int(place)
            kept = [name for k, name in enumerate(axes) if k not in others]
        part = np.asarray(values[tuple(index)])
        order = [kept.index(HEIGHT), kept.index(WIDTH), *(k for k, n in enumerate(kept) if n not in (HEIGHT, WIDTH))]
        return narrowed(part.transpose(order).reshape(*part.shape[:0], height, width, -1))

    notes = (ROUNDED,) if np.dtype(values.dtype) == np.float64 else ()
    made: dict[str, Any] = {"slices": math.prod(counts) if pages == "samples" else 1, "notes": notes}
    return Raster(shape[y], shape[x], channels, stored_dtype(values.dtype), read, **(made | facts))


def check_size(raster: Raster, reading: Reading, box: Box) -> None:
    """**Raises:** `ValueError` for a picture that is empty, has too many channels or would take too much memory."""
    _, _, height, width = box if raster.windowed else raster.whole()
    pixels, size = height * width, height * width * raster.channels * np.dtype(raster.dtype).itemsize
    if pixels < 1 or raster.slices < 1:
        raise ValueError(f"a picture of {height} x {width} pixels")
    if not 1 <= raster.channels <= MAX_CHANNELS:
        raise ValueError(f"{raster.channels} channels, expected 1 to {MAX_CHANNELS}")
    if pixels > reading.max_pixels:
        raise ValueError(f"{width} x {height} pixels, more than --max_pixels {reading.max_pixels}")
    if size > MAX_BYTES:
        raise ValueError(f"{size} bytes of pixels are more than {MAX_BYTES}; cut it up with --tile")
