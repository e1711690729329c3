"""Whether a stored JPEG or array decodes, at the size that the table says."""

import io
from typing import Any

from PIL import Image

from fasthpm.data import jpegs
from fasthpm.data.ffcv.codec import decompress


def decode_jpeg(data: bytes, size: tuple[int, int]) -> None:
    """**Raises:** whatever the decoder raises, `ValueError` for another size (width, height)."""
    image = Image.open(io.BytesIO(data))
    if image.size != size:
        raise ValueError("another size")
    if jpegs.decode is None:
        image.load()
    else:
        jpegs.decode(data, *size)


def decode_array(data: bytes, sidecar: dict[str, Any], size: tuple[int, int]) -> None:
    """**Raises:** `ValueError` for an array of another size (width, height), and for damage."""
    decompress(data, sidecar["codec"], (size[1], size[0], sidecar["channels"]), sidecar["dtype"])
