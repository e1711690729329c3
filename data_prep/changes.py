"""What is done to the values of a sample before they are stored: nodata, clipping, logarithm, shrinking.

In this order. All of it is asked for, written into the sidecar as `preparation`, and done once.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fasthpm.data.changing import absent, clipped, logarithm, only_finite
from fasthpm.data.sampling import Array
from fasthpm.data.values import DTYPES, MAX_CHANNELS
from fasthpm.errors import UserError

CODECS = ("raw", "lz4")
LOGS = ("float32", "float16")
MAX_SIDE = 65535


@dataclass(frozen=True)
class ArrayOptions:
    """How arrays are stored: what `encode.WriteOptions` is for photographs."""

    dtype: str  # of the files, one of `DTYPES`
    channels: int
    codec: str = "raw"
    nodata: float | str | None = None  # "nan" for NaN, as in JSON
    window: tuple[float, float] | None = None
    clip_percentiles: tuple[float, float] | None = None
    log: str = ""  # store log(1 + x) as this type
    bands: tuple[str, ...] = ()  # names of the channels
    max_resolution: int = 0
    seed: int = 0
    chunk: int = 8  # samples that a process makes at a time
    preparation: dict[str, Any] = field(default_factory=dict)  # for the sidecar: what was asked of values

    def __post_init__(self) -> None:
        self._check("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        self._check("channels", 1 <= self.channels <= MAX_CHANNELS, f"1 to {MAX_CHANNELS}")
        self._check("codec", self.codec in CODECS, f"one of {', '.join(CODECS)}")
        self._check("log", self.log in ("", *LOGS), f"one of {', '.join(LOGS)}")
        self._check("max_resolution", 0 <= self.max_resolution <= MAX_SIDE, f"0 (off) to {MAX_SIDE}")
        self._check("seed", self.seed >= 0, "0 or more")
        both = self.window is not None and self.clip_percentiles is not None
        self._check("window", not both, "none beside --clip_percentiles, which clips too; choose one")
        low, high = self.window or (0.0, 1.0)
        self._check("window", math.isfinite(low) and math.isfinite(high) and low < high, "LOW below HIGH")
        low, high = self.clip_percentiles or (0, 100)
        self._check("clip_percentiles", 0 <= low < high <= 100, "LOW below HIGH, from 0 to 100")
        self._check_nodata()

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise UserError(f"{name} is {getattr(self, name)}, expected {expected}")

    def _check_nodata(self) -> None:
        number = self.marker
        if number is None:
            return
        if self.dtype.startswith("float"):
            with np.errstate(over="ignore"):
                kept = math.isnan(number) or math.isfinite(float(np.dtype(self.dtype).type(number)))
        else:
            limits = np.iinfo(self.dtype)
            kept = number == number // 1 and limits.min <= number <= limits.max
        if not kept:
            raise UserError(f"--nodata {self.nodata} is no value of {self.dtype}; name one that marks such pixels")
        if self.window and number in self.window:
            raise UserError(
                f"--window {self.window[0]:g} {self.window[1]:g} would turn values into nodata {number:g}; "
                f"choose another window"
            )

    @property
    def marker(self) -> float | None:
        """`nodata` as a number, in the files."""
        return math.nan if self.nodata == "nan" else None if self.nodata is None else float(self.nodata)

    @property
    def stored_dtype(self) -> str:
        """What is written."""
        return self.log or self.dtype

    @property
    def stored_nodata(self) -> float | str | None:
        """What marks nodata in what is written: logarithms have NaN there, which no value becomes."""
        if self.log and self.nodata is not None:
            return "nan"
        if self.nodata in (None, "nan"):
            return self.nodata
        number = float(np.dtype(self.dtype).type(self.nodata))
        return int(number) if number == number // 1 and abs(number) < 2**53 else number

    @property
    def stored_marker(self) -> float | None:
        """The same as a number."""
        stored = self.stored_nodata
        return math.nan if stored == "nan" else None if stored is None else float(stored)


def changed(values: Array, options: ArrayOptions, limits: Array | None = None) -> Array:
    """A sample [h, w, C] as it is stored.

    **Args:** `limits`: float64 [C, 2], between which each channel is clipped; None: by `options.window`, if at all.

    **Raises:** `ValueError` for values that may not be, with their count.
    """
    values = only_finite(values, options.marker)
    if limits is None and options.window:
        limits = np.tile(options.window, (options.channels, 1))
    out = absent(values, options.marker) if limits is not None or options.log else None
    if limits is not None:
        values = clipped(values, out, limits)
    if options.log:
        values = logarithm(values, out, options.log)
    return shrunk(values, options.stored_marker, options.max_resolution)


def shrunk(values: Array, nodata: float | None, max_resolution: int) -> Array:
    """Area averages, the longer side `max_resolution` at most; nodata where a pixel averages any."""
    height, width = values.shape[:2]
    ratio = max_resolution / max(height, width)
    if not 0 < ratio < 1:
        return np.ascontiguousarray(values)
    rows, columns = (overlaps(side, max(int(ratio * side), 1)) for side in (height, width))
    out = absent(values, nodata)
    wide = values.astype(np.float64)
    if out is not None:
        wide[out] = 0
    mean = _averaged(rows, columns, wide)
    if values.dtype.kind in "ui":
        mean = np.rint(mean)
    small = mean.astype(values.dtype)
    if out is not None and nodata is not None:
        small[_averaged(rows, columns, out.astype(np.float64)) > 0] = values.dtype.type(nodata)
    return small


def _averaged(rows: Array, columns: Array, values: Array) -> Array:
    return np.einsum("ij,jkc,lk->ilc", rows, values, columns, optimize=True)


def overlaps(side: int, smaller: int) -> Array:
    """Which share of each of `smaller` equal pieces of a side lies on each of its pixels: float64 [smaller, side]."""
    edges = np.arange(smaller + 1) * (side / smaller)
    pixels = np.arange(side)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = np.where(overlap > 1e-9, overlap, 0.0)
    return weights / weights.sum(1, keepdims=True)


def content_of(values: Array, nodata: float | None) -> float:
    """The share of pixels that show something: measured in any channel, and not as both neighbours, right and below.

    Background of one value has none of them; noise has.
    """
    out = absent(values, nodata)
    if out is not None:
        values = np.where(out, values.dtype.type(0), values)
    differs = np.zeros(values.shape[:2], bool)
    for axis in (0, 1):
        step = (np.diff(values, axis=axis) != 0).any(2)  # of whole numbers too: it wraps, but not to 0
        last = np.take(step, [-1], axis) if step.shape[axis] else np.zeros_like(differs.take([0], axis))
        differs |= np.concatenate([step, last], axis)
    return float((differs if out is None else differs & ~out.all(2)).mean())


def eight_bits(values: Array, window: tuple[float, float] | None) -> Array:
    """Values [h, w, 1 or 3] in 8 bits, uint8 [h, w] or [h, w, 3]: black and white are the ends of `window`, else of the
    type's range, of floats 0 and 1.

    **Raises:** `ValueError` for a range that nobody knows, and for other channels.
    """
    if values.shape[2] not in (1, 3):
        raise ValueError(f"{values.shape[2]} channels, expected 1 or 3; --bands chooses, --values keep takes all")
    wide = values.astype(np.float64)
    if window:
        out = ((wide - window[0]) * 255 / (window[1] - window[0])).clip(0, 255)
    elif values.dtype.kind == "u":
        out = wide * (255 / np.iinfo(values.dtype).max)
    elif values.dtype.kind == "f" and wide.min() >= 0 and wide.max() <= 1:
        out = wide * 255
    else:
        raise ValueError(
            f"{values.dtype.name} from {wide.min():g} to {wide.max():g}, whose range is unknown; --window LOW HIGH "
            f"says what is black and white"
        )
    pixels = np.rint(out).astype(np.uint8)
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels
