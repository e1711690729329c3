"""Damage that decoders pass over: what they have in common."""

import zlib
from collections.abc import Iterable

PIECE = 1 << 20  # bytes that are unpacked at a time, and forgotten


class DamagedImage(ValueError):
    """A decoder could not make sense of all the data."""


def check_zlib(pieces: Iterable[bytes], most: int) -> None:
    """Unpack a zlib stream to its end, where its checksum stands, or up to `most` bytes: no image is larger.

    **Raises:** `DamagedImage` with zlib's words.
    """
    stream, size = zlib.decompressobj(), 0
    try:
        for piece in pieces:
            while piece and not stream.eof:
                size += len(stream.decompress(piece, PIECE))
                piece = stream.unconsumed_tail
                if size > most:
                    return
        stream.flush()
    except zlib.error as error:
        raise DamagedImage(f"zlib: {error}") from error
    if not stream.eof:
        raise DamagedImage("zlib: the compressed pixels end early")
