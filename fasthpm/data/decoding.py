"""The bytes of an image file as 8-bit RGB, for preparation and for training from folders alike.

The one place that decides which picture of a file is taken, what counts as damage, and what is worth a word.
"""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fasthpm.data import jpegs, png, tiff
from fasthpm.data.pixels import BITS_PER_SAMPLE, to_rgb
from fasthpm.data.quiet import quietly
from fasthpm.data.sampling import Array

ORIENTATION = 0x0112  # the EXIF tag
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
BEGINNING = 9  # bytes that a reason quotes of an unknown file
MPF, ENTRIES, DATA_OFFSET = b"MPF\0", 0xB002, "DataOffset"  # of the index of a JPEG with others behind it
SEVERAL = ("TIFF", "MPO")
SHARES = (256, 64, 16, 4)  # of a 16-bit range: what 8, 10, 12 and 14 bits fill
DEEP, PNG_DEPTH = 16, 24  # bits of a channel, and where a PNG says how many it has
ALPHA = "Aa"
ANIMATED = ("GIF", "PNG", "WEBP", "AVIF", "FLI", "DCX")

LARGEST = "several pictures in one file, of which the largest was taken"
FIRST = "several pictures of one size in one file, of which the first was taken"
DARK = (
    "{depth}, but no pixel above 1/{share} of the range: taken as dark as that; if they should be brighter, scale the "
    "files to their whole range or to 8 bits"
)


class UnknownImage(ValueError):
    """No decoder is known for the file."""


@dataclass(frozen=True)
class Decoded:
    """What a file shows."""

    pixels: Array  # uint8 RGB [h, w, 3], upright
    notes: tuple[str, ...] = ()  # what its owner should know
    plain_jpeg: bool = False  # whether any JPEG decoder makes the very same of the file


@dataclass(frozen=True)
class Opened:
    """A picture of a file, not yet decoded."""

    data: bytes  # with the picture in the first place
    image: Image.Image
    notes: tuple[str, ...]


@quietly()
def read(data: bytes, *, max_pixels: int = 0, target: int = 0) -> Decoded:
    """Decode an image file.

    **Args:** `max_pixels`: refuse larger ones by their headers; 0 = none. `target`: longest side that is needed, 0 =
    all; large JPEGs are halved while decoding as long as twice that is left.

    **Raises:** `ValueError`, or whatever the decoder raises, for a file that is damaged, unknown or too large.
    """
    opened = open_picture(data)
    image = opened.image
    if max_pixels and image.width * image.height > max_pixels:
        raise ValueError(f"{image.width} x {image.height} pixels, more than --max_pixels {max_pixels}")
    if image.format in ("JPEG", "MPO"):
        pixels, plain = _read_jpeg(opened.data, image, target)
        return Decoded(pixels, opened.notes, plain and opened.data is data)
    if image.format == "PNG":
        png.check_png(data)
    if image.format == "TIFF":
        with tiff.strictly():
            image.load()
        tiff.check_tiff(opened.data, image)
    pixels = np.asarray(to_rgb(image))
    return Decoded(pixels, (*opened.notes, *_dark(image, data)))


# ------------------------------------------------------------------------------------------------------- opening
@quietly()
def open_picture(data: bytes) -> Opened:
    """The largest full picture of a file, the first of equal ones.

    **Raises:** `UnknownImage` if Pillow has no decoder for it, and what its decoders raise.
    """
    if not data:
        raise ValueError("the file is empty")
    image = _open(png.without_texts(data) if data.startswith(png.SIGNATURE) else data)
    if image.format == "TIFF":
        return _open_page(data, image)
    if image.format == "MPO":
        return _open_part(data, image)
    several = len(image.info.get("sizes", ())) > 1  # of an icon Pillow takes the largest
    return Opened(data, image, (LARGEST,) if several else (FIRST,) if _is_animated(data, image) else ())


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:  # its words are an address
        raise UnknownImage(_why_unknown(data)) from None


def _why_unknown(data: bytes) -> str:
    for name in Image.ID:
        factory, accept = Image.OPEN[name]
        if accept is None or not _accepts(accept, data):
            continue
        try:
            factory(io.BytesIO(data), "")
        except Exception as error:
            return f"Pillow cannot read this {name} ({' '.join(str(error).split()) or type(error).__name__})"
    return f"is no image that Pillow knows (begins with {repr(data[:BEGINNING])[1:]})"


def _accepts(accept: Callable[[bytes], bool | str], data: bytes) -> bool:
    try:
        return accept(data[:16]) is True
    except Exception:  # too short for it
        return False


def _open_page(data: bytes, image: Image.Image) -> Opened:
    pages = tiff.list_pages(data)
    if len(pages) < 2:
        return Opened(data, image, ())
    best = max(pages, key=lambda page: page.rank)  # the first of equal ones
    alike = all(page.full and page.rank == best.rank for page in pages)
    if best.offset != pages[0].offset:
        data = tiff.starting_at(data, best.offset)
        try:
            image = _open(data)
        except Exception as error:
            raise ValueError(f"its full picture of {best.width} x {best.height} cannot be read: {error}") from error
    return Opened(data, image, (FIRST if alike else LARGEST,))


def _open_part(data: bytes, image: Image.Image) -> Opened:
    """Of a JPEG with others behind it."""
    parts = [(data, image)]
    index = next(at + 8 for _, at, _ in jpegs.segments(data) if data[at + 4 : at + 8] == MPF)  # Pillow hides its place
    for entry in image.mpinfo[ENTRIES][1:]:  # type: ignore[attr-defined]
        start = index + int(entry[DATA_OFFSET])
        try:
            parts.append((data[start:], _open(data[start:])))
        except Exception:  # a part that cannot be read is no picture
            continue
    sizes = [part.width * part.height for _, part in parts]
    best, picture = parts[sizes.index(max(sizes))]
    return Opened(best, picture, (FIRST if len({*sizes}) == 1 else LARGEST,))


def _is_animated(data: bytes, image: Image.Image) -> bool:
    if image.format not in ANIMATED:
        return False
    try:  # with another reader: asking moves it
        return bool(getattr(_open(data) if image.format == "GIF" else image, "is_animated", False))
    except Exception:  # the second frame is not what is read
        return False


@quietly()
def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where none can be read."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # EXIF that cannot be parsed says nothing about the pixels
        return 1


@quietly()
def size_of(path: str) -> tuple[int, int]:
    """Height and width of what `read` makes of a file, mostly from its header alone."""
    with contextlib.suppress(Exception), Image.open(path) as image:
        if image.format not in SEVERAL:
            return _upright_size(image)
    return _upright_size(open_picture(Path(path).read_bytes()).image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    turned = orientation_of(image) in SIDEWAYS and image.format != "TIFF"  # there Pillow turns them itself
    return image.size if turned else image.size[::-1]


# ------------------------------------------------------------------------------------------------------- JPEGs
def _read_jpeg(data: bytes, image: Image.Image, target: int) -> tuple[Array, bool]:
    """Upright pixels, and whether any decoder makes the same of the file."""
    cmyk = image.mode == "CMYK"
    if jpegs.decode is None or image.mode not in ("RGB", "L", "CMYK"):
        return np.asarray(to_rgb(image)), False
    halvings = 0 if cmyk else jpegs.reduction(max(image.size), target)
    try:
        pixels, untouched = jpegs.decode_sound(data, *image.size, halvings, cmyk=cmyk)
    except jpegs.UnknownJpeg:  # Pillow's library may be newer
        return np.asarray(to_rgb(image)), False
    if cmyk:
        return np.asarray(to_rgb(image)), False
    orientation = orientation_of(image)
    if orientation != 1:
        return _turned(pixels, orientation), False
    return pixels, untouched and not halvings


def _turned(pixels: Array, orientation: int) -> Array:
    image = Image.fromarray(pixels)
    image.getexif()[ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(image))


# ------------------------------------------------------------------------------------------------------- the range
def _dark(image: Image.Image, data: bytes) -> tuple[str, ...]:
    """A note on a picture of 16 bits or float that fills but a small part of its range, the lowest."""
    depth = _depth(image, data)
    if not depth:
        return ()
    values = np.asarray(image)
    limit = 1.0 if image.mode == "F" else float(np.iinfo(values.dtype).max)  # of colours only the upper 8 bits are left
    bands = [k for k, name in enumerate(image.getbands()) if name not in ALPHA]
    largest = (values[..., bands] if values.ndim == 3 else values).max()
    share = next((share for share in SHARES if largest < (limit + (image.mode != "F")) / share), 0)
    return (DARK.format(depth=depth, share=share),) if share else ()


def _depth(image: Image.Image, data: bytes) -> str:
    """What a picture with more than 8 bits is called, if it may be that they are not all used."""
    if image.mode == "F":
        return "floats"
    bits: Any = ()
    if image.format == "TIFF":
        bits = image.tag_v2.get(BITS_PER_SAMPLE, ())  # type: ignore[attr-defined]
    elif image.format == "PNG":
        bits = data[PNG_DEPTH : PNG_DEPTH + 1]
    elif image.mode.startswith("I;16") and image.format != "JPEG2000":  # which says how many it has
        bits = (DEEP,)
    return "16 bits" if DEEP in bits and image.mode not in ("CMYK", "P", "1") else ""
