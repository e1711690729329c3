"""Pictures that Pillow opens, in their own numbers: PNG of 16 bits, PGM, JPEG 2000; and photographs in 8 bits."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from fasthpm.data import png
from fasthpm.data.decoding import Opened, open_picture, orientation_of, read
from fasthpm.data.quiet import quietly
from fasthpm.data.rasters.raster import Blob, Box, Raster, Reading, narrowed
from fasthpm.data.sampling import Array

PNG_DEPTH, PNG_KIND = 24, 25  # bytes of a PNG that say how many bits a channel has, and which channels there are
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
PNG_ALPHA = (4, 6)
WIDE = {"F": "float32", "I": "float32", "I;16": "uint16", "I;16L": "uint16", "I;16B": "uint16", "I;16N": "uint16"}
SCALED = ("PPM",)  # whose wide integers Pillow gives in 0..65535, as mode I


@quietly()
def open_photograph(blob: Blob, reading: Reading, alpha: str = "white") -> Raster:
    """A picture as 8-bit RGB, as `decoding.read` has it, read whole; with `alpha` "keep" as RGBA."""
    data = blob.all()
    opened = open_picture(data)
    height, width = _upright_size(opened)

    def load() -> Array:
        if alpha == "white":
            return read(data, max_pixels=reading.max_pixels).pixels
        return with_alpha(data, reading, alpha)

    return Raster(height, width, 4 if alpha == "keep" else 3, "uint8", _cutting(load), notes=opened.notes)


@quietly()
def with_alpha(data: bytes, reading: Reading, alpha: str) -> Array:
    """8-bit pixels with their opacity as a fourth channel (`alpha` "keep"), or laid over black."""
    checked = read(data, max_pixels=reading.max_pixels)  # finds damage
    image = open_picture(data).image
    if not _has_alpha(image):
        opaque = np.full((*checked.pixels.shape[:2], 1), 255, np.uint8)
        return np.concatenate([checked.pixels, opaque], 2) if alpha == "keep" else checked.pixels
    layer = upright(image).convert("RGBA")
    if alpha == "keep":
        return np.asarray(layer)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", layer.size, "black"), layer).convert("RGB"))


@quietly()
def is_transparent(data: bytes) -> bool:
    """Whether a picture has transparency, as far as it can be opened."""
    try:
        return _has_alpha(open_picture(data).image)
    except Exception:  # reading it says why
        return False


def _has_alpha(image: Image.Image) -> bool:
    return "transparency" in image.info or image.mode in ("LA", "La", "PA", "RGBA", "RGBa")


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF that cannot be parsed says nothing about the pixels
        return image


def open_wide(blob: Blob, reading: Reading) -> Raster:
    """A picture with more than 8 bits, in its own numbers.

    **Raises:** `ValueError` for what Pillow and OpenCV have only 8 bits of.
    """
    data = blob.all()
    if data.startswith(png.SIGNATURE):
        return _open_png(data, reading)
    opened = open_picture(data)
    image = opened.image
    height, width = _upright_size(opened)
    if image.mode in ("L", "RGB"):
        return Raster(
            height, width, len(image.mode), "uint8", _cutting(lambda: _own(upright(image))), notes=opened.notes
        )
    dtype = "uint16" if image.format in SCALED else WIDE.get(image.mode, "")
    if not dtype:
        raise ValueError(f"{image.format} of mode {image.mode}, whose values cannot be kept; use --values 8bit")
    return Raster(height, width, 1, dtype, _cutting(lambda: _own(upright(image)).astype(dtype)), notes=opened.notes)


def mode_of(blob: Blob) -> str:
    """Pillow's mode of a picture; "" for one that it does not open."""
    try:
        with blob.open() as file, Image.open(file) as image:
            return image.mode
    except Exception:
        return ""


def _own(image: Image.Image) -> Array:
    """[h, w, C] in native byte order."""
    values = narrowed(np.asarray(image))
    return values[..., None] if values.ndim == 2 else values


def _open_png(data: bytes, reading: Reading) -> Raster:
    kind, depth = data[PNG_KIND], data[PNG_DEPTH]
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    channels = PNG_CHANNELS.get(kind, 0)
    if not channels or depth not in (8, 16):
        raise ValueError(f"PNG of kind {kind} with {depth} bits, whose values cannot be kept; use --values 8bit")
    if kind == 3:
        raise ValueError("PNG with a palette: its numbers are no values; use --values 8bit")

    def load() -> Array:
        import cv2

        png.check_png(data)
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if decoded is None:
            raise ValueError("OpenCV cannot decode this PNG")
        values = decoded[..., None] if decoded.ndim == 2 else decoded
        if values.shape[2] >= 3:
            values = values[..., [2, 1, 0, 3][: values.shape[2]]]
        if channels == 2 and values.shape[2] == 4:
            values = values[..., [0, 3]]
        if values.shape[2] != channels:
            raise ValueError(f"PNG of {channels} channels, of which OpenCV gives {values.shape[2]}")
        return np.ascontiguousarray(values)

    alpha = channels - 1 if kind in PNG_ALPHA else None
    return Raster(height, width, channels, f"uint{depth}", _cutting(load), alpha=alpha)


def _cutting(load: Callable[[], Array]) -> Callable[[int, Box], Array]:
    """`Raster.read` of what is read whole, once."""

    held: list[Array] = []

    def cut(number: int, box: Box) -> Array:
        if not held:
            held.append(load())
        top, left, height, width = box
        return held[0][top : top + height, left : left + width]

    return cut


def _upright_size(opened: Opened) -> tuple[int, int]:
    turned = orientation_of(opened.image) in (5, 6, 7, 8) and opened.image.format != "TIFF"
    return opened.image.size if turned else opened.image.size[::-1]
