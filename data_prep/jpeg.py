"""What JPEG files may be stored as they are; how they are read stands in `fasthpm.data.jpegs`."""

from fasthpm.data.jpegs import BASELINE, frame_type, has_own_tables


def fits(data: bytes) -> bool:
    """Whether any decoder, today's loader among them, reads these very bytes.

    Sequential Huffman coding, and with all its tables: without them it takes a decoder that knows the standard ones,
    or one that has just read the image that it was cut from.
    """
    return frame_type(data) in BASELINE and has_own_tables(data)
