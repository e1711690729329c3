"""What JPEG files may be stored as they are. How they are read, preparation shares with training from folders."""

from fasthpm.data.jpegs import (
    BASELINE,
    DamagedJpeg,
    OddJpeg,
    decode,
    decode_sound,
    frame_type,
    has_own_tables,
    reduction,
)

__all__ = ["DamagedJpeg", "OddJpeg", "decode", "decode_sound", "fits", "frame_type", "has_own_tables", "reduction"]


def fits(data: bytes) -> bool:
    """Whether any decoder, today's loader among them, reads these very bytes.

    Sequential Huffman coding, and with all its tables: without them it takes a decoder that knows the standard ones,
    or one that has just read the image that it was cut from.
    """
    return frame_type(data) in BASELINE and has_own_tables(data)
