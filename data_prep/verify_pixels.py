"""Whether a stored JPEG decodes, at the size that the table says."""

import io

from PIL import Image

from fasthpm.data import jpegs


def decode_jpeg(data: bytes, size: tuple[int, int]) -> None:
    """**Raises:** whatever the decoder raises, `ValueError` for another size (width, height)."""
    image = Image.open(io.BytesIO(data))
    if image.size != size:
        raise ValueError("another size")
    if jpegs.decode is None:
        image.load()
    else:
        jpegs.decode(data, *size)
