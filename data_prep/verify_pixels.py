"""Whether a stored JPEG decodes, at the size that the table says."""

import io

from PIL import Image

from data_prep import jpeg


def decode_jpeg(data: bytes, size: tuple[int, int]) -> None:
    """**Raises:** whatever the decoder raises, `ValueError` for another size (width, height)."""
    image = Image.open(io.BytesIO(data))
    if image.size != size:
        raise ValueError("another size")
    if jpeg.decode is None:
        image.load()
    else:
        jpeg.decode(data, *size)
