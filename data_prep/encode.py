"""One image as it will be stored: decoded, checked, shrunk, measured and encoded; or, if it may be, its own JPEG bytes.

A JPEG is stored untouched when that is exact and safe to train from: sequential Huffman coding, 8 bits, grey or RGB,
upright, not larger than asked for, at most `KEPT_BYTES_PER_PIXEL`, with tables of its own, and decodable without a word
from libjpeg.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from data_prep.jpeg import fits
from fasthpm.data.decoding import read
from fasthpm.data.ffcv.beton import JPEG, RAW
from fasthpm.data.pixels import is_grey, to_rgb
from fasthpm.data.sampling import Array
from fasthpm.errors import UserError

WRITE_MODES = ("jpg", "raw", "proportion", "smart")
MAX_SIDE = 65535  # FFCV stores sides in 16 bits
MAX_BYTES = 1 << 30  # of one stored sample
MAX_PIXELS = 100_000_000
KEPT_BYTES_PER_PIXEL = 1.0  # a JPEG of more is slow to decode for what it shows
MCU = 16  # side of a 4:2:0 JPEG's smallest unit
STRIDE = 16  # of the quick look whether an image has colours


def check_opencv() -> None:
    """Look for OpenCV without importing it, which starts a thread: the processes that come to use it are forked.

    **Raises:** `UserError` if it is not installed.
    """
    if importlib.util.find_spec("cv2") is None:
        raise UserError(
            "preparing images and videos needs OpenCV, which is not installed; pip install 'fasthpm[ffcv]' (fasthpm "
            "doctor names the system packages that this needs)"
        )


@dataclass(frozen=True)
class WriteOptions:
    """How pixels are stored."""

    max_resolution: int = 0  # longest side in pixels, larger images are shrunk to it; 0 = as they are
    jpeg_quality: int = 90
    write_mode: str = "jpg"
    compress_probability: float = 0.5  # proportion mode: share of JPEGs
    smart_threshold: int = 200_000  # smart mode: images with more bytes of pixels than this become JPEGs
    grey: bool = False
    colour: bool = False  # three channels, grey as the images may be
    seed: int = 0  # of the sample order, of splits and of proportion mode
    keep_jpeg: bool = True  # store JPEGs that fit untouched
    max_pixels: int = MAX_PIXELS  # larger images are rejected before they are decoded

    def __post_init__(self) -> None:
        self._check("max_resolution", 0 <= self.max_resolution <= MAX_SIDE, f"0 (off) to {MAX_SIDE}")
        self._check("jpeg_quality", 1 <= self.jpeg_quality <= 100, "1 to 100")
        self._check("write_mode", self.write_mode in WRITE_MODES, f"one of {', '.join(WRITE_MODES)}")
        self._check("compress_probability", 0 <= self.compress_probability <= 1, "0 to 1")
        self._check("smart_threshold", self.smart_threshold >= 0, "a number of bytes, 0 or more")
        self._check("seed", self.seed >= 0, "0 or more")
        self._check("grey", not (self.grey and self.colour), "False with colour")
        self._check("max_pixels", self.max_pixels >= 1, "a number of pixels, 1 or more")

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise UserError(f"{name} is {getattr(self, name)}, expected {expected}")


@dataclass(frozen=True)
class Stored:
    """A sample ready for the file, and what its pixels add to the set's statistics."""

    blob: bytes
    mode: int  # JPEG or RAW
    height: int
    width: int
    sums: tuple[int, ...]  # per channel, of pixels 0..255, before compression
    squares: tuple[int, ...]
    grey: bool
    kept: bool  # whether the blob is the source's own
    notes: tuple[str, ...] = ()  # what is to be said of the source


def encode(image: Any, options: WriteOptions, draw: float) -> Stored:
    """`image` as it will be stored.

    **Args:** `image`: the bytes of an image file, a PIL image, or uint8 [h, w] or [h, w, 3]. `draw`: in [0, 1), decides
    between JPEG and raw in proportion mode.

    **Raises:** `ValueError`, or whatever the decoder raises, for an image that cannot be read or is too large.
    """
    own: bytes | None = None
    notes: tuple[str, ...] = ()
    if isinstance(image, bytes):
        pixels, own, notes = _load(image, options)
    else:
        pixels = _rgb_pixels(image, options.grey)
    height, width = pixels.shape[:2]
    pixels = _shrink(pixels, options.max_resolution)
    if max(pixels.shape) > MAX_SIDE:
        raise ValueError(f"a side of {max(pixels.shape)} pixels, more than {MAX_SIDE}; use --max_resolution")
    mode = _mode(pixels.nbytes, options, draw)
    kept = own is not None and mode == JPEG and pixels.shape[:2] == (height, width)
    blob = own if kept and own is not None else pixels.tobytes() if mode == RAW else _compress(pixels, options)
    if len(blob) > MAX_BYTES:
        raise ValueError(f"{len(blob)} bytes of pixels are more than {MAX_BYTES}; use --max_resolution")
    sums, squares = measure(pixels)
    return Stored(blob, mode, pixels.shape[0], pixels.shape[1], sums, squares, _lacks_colour(pixels), kept, notes)


# ------------------------------------------------------------------------------------------------------- decoding
def _load(data: bytes, options: WriteOptions) -> tuple[Array, bytes | None, tuple[str, ...]]:
    """uint8 RGB pixels of an image file, its bytes if they may be stored as they are, and what is to be said of it."""
    decoded = read(data, max_pixels=options.max_pixels, target=options.max_resolution)
    if options.grey:
        return _rgb_pixels(decoded.pixels, grey=True), None, decoded.notes
    small = len(data) <= KEPT_BYTES_PER_PIXEL * decoded.pixels.shape[0] * decoded.pixels.shape[1]
    keep = options.keep_jpeg and decoded.plain_jpeg and small and fits(data)
    return decoded.pixels, data if keep else None, decoded.notes


def _rgb_pixels(image: Any, grey: bool) -> Array:
    """Any image as uint8 [h, w, 3]."""
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 2:
        return np.repeat(image[..., None], 3, axis=2)  # the way through PIL costs ten times as much
    picture = to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)))
    return np.asarray(picture.convert("L").convert("RGB") if grey else picture)


# ------------------------------------------------------------------------------------------------------- storing
def _shrink(pixels: Array, max_resolution: int) -> Array:
    """FFCV's own downscaling, but never to a side of 0."""
    import cv2

    height, width = pixels.shape[:2]
    ratio = max_resolution / max(height, width)
    if not 0 < ratio < 1:
        return np.ascontiguousarray(pixels)
    size = (max(int(ratio * width), 1), max(int(ratio * height), 1))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def _mode(nbytes: int, options: WriteOptions, draw: float) -> int:
    as_jpeg = {
        "jpg": True,
        "raw": False,
        "proportion": draw < options.compress_probability,
        "smart": nbytes > options.smart_threshold,
    }
    return JPEG if as_jpeg[options.write_mode] else RAW


def _compress(pixels: Array, options: WriteOptions) -> bytes:
    """A baseline JPEG, 4:2:0, as FFCV's own writer makes it, but with restart markers.

    They let the loader decode only the part of an image that a crop shows: 2 % more bytes, 30 % less time.
    """
    import cv2

    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    interval = restart_interval(pixels.shape[1])
    flags = [cv2.IMWRITE_JPEG_QUALITY, options.jpeg_quality, cv2.IMWRITE_JPEG_RST_INTERVAL, interval]
    done, data = cv2.imencode(".jpg", bgr, flags)
    if not done:
        raise ValueError("OpenCV cannot encode it as a JPEG")
    return data.tobytes()


def restart_interval(width: int) -> int:
    """Blocks of 16 pixels between two restart markers: about 2, and a divisor of those in a row of `width` pixels."""
    blocks = -(-width // MCU)
    return min((n for n in range(1, blocks + 1) if blocks % n == 0), key=lambda n: (abs(n - 2), -n))


# ------------------------------------------------------------------------------------------------------- measuring
def measure(pixels: Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sum and sum of squares of each channel, exactly."""
    import cv2

    planes = cv2.split(pixels)
    sums = tuple(int(value) for value in cv2.sumElems(pixels)[: len(planes)])
    return sums, tuple(round(cv2.norm(plane, cv2.NORM_L2SQR)) for plane in planes)  # the norm's root is squared again


def _lacks_colour(pixels: Array) -> bool:
    return is_grey(pixels[::STRIDE, ::STRIDE]) and is_grey(pixels)
