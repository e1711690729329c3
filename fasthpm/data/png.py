"""PNG files: their checksums, which Pillow reads in part, and chunks that say nothing about the pixels."""

import zlib
from collections.abc import Iterator

from fasthpm.data.damage import DamagedImage, check_zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
BESIDE = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # Pillow refuses a file in which one of them is large
TURNING = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # texts that may tell which side is up
LARGEST_TEXT = 1 << 20  # that Pillow unpacks
CHANNELS = 4


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, first byte, last + 1) of every whole chunk."""
    at = len(SIGNATURE)
    while (end := at + 12 + int.from_bytes(data[at : at + 4], "big")) <= len(data):
        yield data[at + 4 : at + 8], at, end
        at = end


def without_texts(data: bytes) -> bytes:
    """The file without texts and colour profiles, which may be too large for Pillow; to check is the original."""
    parts, at = [], 0
    for kind, start, end in _chunks(data):
        if kind in BESIDE and not _turns(kind, data[start + 8 : end - 4]):
            parts.append(data[at:start])
            at = end
    return b"".join([*parts, data[at:]]) if parts else data


def _turns(kind: bytes, body: bytes) -> bool:
    keyword, _, rest = body.partition(b"\0")
    packed = kind == b"zTXt" or rest[:1] == b"\1"
    return keyword in TURNING and len(body) <= LARGEST_TEXT and not (packed and _unpacks_too_large(kind, rest))


def _unpacks_too_large(kind: bytes, rest: bytes) -> bool:
    text = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
    stream = zlib.decompressobj()
    try:
        stream.decompress(text, LARGEST_TEXT)
    except zlib.error:
        return True
    return bool(stream.unconsumed_tail)


def check_png(data: bytes) -> None:
    """Check every checksum up to the last of the pixels, and that all of those unpack.

    **Raises:** `DamagedImage`.
    """
    chunks = list(_chunks(data))
    last = max((k for k, (kind, _, _) in enumerate(chunks) if kind == b"IDAT"), default=-1)
    for kind, start, end in chunks[: last + 1]:
        if zlib.crc32(data[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise DamagedImage(f"PNG: the checksum of the chunk {kind.decode('latin-1')} at byte {start} is wrong")
    width, height, depth = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"), data[24:25]
    most = 2 * height * (CHANNELS * width * max(depth, default=8) // 8 + 8)
    check_zlib((data[start + 8 : end - 4] for kind, start, end in chunks if kind == b"IDAT"), most)
