"""Image files that no writer makes: without tables, with holes, with several pictures, with odd numbers in them."""

import base64
import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

# 8 x 12 pixels: red 20 x, green 30 y, blue 77.
LOSSLESS_JPEG = base64.b64decode(
    b"/9j/7gAOQWRvYmUAZAAAAAAA/8MAEQgACAAMA1IRAEcRAEIRAP/EABcAAQEBAQAAAAAAAAAAAAAAAAAFCAb/2gAMA1IARwBCAAEAAM/5/wCMqF"
    b"QqFQqFQqFQqFQqC8qFQqFQqFQqFQqFQqC8qFQqFQqFQqFQqFQqC8qFQqFQqFQqFQqFQqC8qFQqFQqFQqFQqFQqC8qFQqFQqFQqFQqFQqC8qFQq"
    b"FQqFQqFQqFQqC8qFQqFQqFQqFQqFQqH/2Q=="
)
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    """`image` as a file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def texture(height: int = 96, width: int = 144, seed: int = 0) -> Image.Image:
    """Much detail: every part of a file of it matters."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def hole(data: bytes, start: int, length: int, value: int = 0) -> bytes:
    """`data` with `length` bytes of one value."""
    return data[:start] + bytes([value]) * length + data[start + length :]


def without_segments(data: bytes, *markers: int) -> bytes:
    """A JPEG without its segments of these kinds."""
    out, at = bytearray(data[:2]), 2
    while data[at + 1] != 0xDA:
        size = 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] not in markers:
            out += data[at : at + size]
        at += size
    return bytes(out + data[at:])


def chunk(kind: bytes, body: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(pixels: np.ndarray, *extra: bytes, stream: bytes | None = None) -> bytes:
    """[h, w, C] of 8 or 16 bits as a PNG, `extra` chunks before the pixels; `stream`: other compressed pixels."""
    depth, kind = 8 * pixels.itemsize, {1: 0, 2: 4, 3: 2, 4: 6}[pixels.shape[2]]
    rows = b"".join(b"\0" + row.astype(pixels.dtype.newbyteorder(">")).tobytes() for row in pixels)
    size = (pixels.shape[1], pixels.shape[0])
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0))
    idat = chunk(b"IDAT", zlib.compress(rows) if stream is None else stream)
    return SIGNATURE + head + b"".join(extra) + idat + chunk(b"IEND", b"")


class Tiff:
    """A TIFF of uncompressed pages, written by hand: any byte order, size of offsets, tags, pages below pages."""

    def __init__(self, order: str = "<", *, big: bool = False) -> None:
        self.order, self.big = order, big
        magic = (43, 8, 0) if big else (42,)
        self.data = bytearray((b"II" if order == "<" else b"MM") + struct.pack(f"{order}{len(magic)}H", *magic))
        self._last = len(self.data)  # where the offset of the next page is to be written
        self.data += self._number(0)

    def _number(self, value: int) -> bytes:
        return struct.pack(self.order + ("Q" if self.big else "I"), value)

    def add(self, pixels: np.ndarray, *, tags: dict[int, int] | None = None, below: Sequence[int] = ()) -> "Tiff":
        """A page of [h, w] or [h, w, 3]; `tags`: more of them, or others; `below`: offsets from `hang`."""
        at = self.hang(pixels, tags=tags, below=below)
        self.data[self._last : self._last + len(self._number(0))] = self._number(at)
        self._last = self._next
        return self

    def hang(self, pixels: np.ndarray, *, tags: dict[int, int] | None = None, below: Sequence[int] = ()) -> int:
        """A page that is in no chain; returns its offset."""
        kinds = {"u": 1, "i": 2, "f": 3}
        channels = pixels.shape[2] if pixels.ndim == 3 else 1
        bits = 8 * pixels.itemsize
        values: dict[int, list[int]] = {
            256: [pixels.shape[1]],
            257: [pixels.shape[0]],
            258: [bits] * channels,
            259: [1],
            262: [2 if channels == 3 else 1],
            273: [len(self.data)],
            277: [channels],
            278: [pixels.shape[0]],
            279: [pixels.nbytes],
            339: [kinds[pixels.dtype.kind]] * channels,
        } | {tag: [value] for tag, value in (tags or {}).items()}
        values |= {330: list(below)} if below else {}
        self.data += pixels.astype(pixels.dtype.newbyteorder(self.order)).tobytes()
        self.data += bytes(-len(self.data) % 8)
        entries = []
        for tag, numbers in sorted(values.items()):
            kind, form = (4, "I") if tag != 258 and tag != 339 else (3, "H")
            body = struct.pack(f"{self.order}{len(numbers)}{form}", *numbers)
            room = len(self._number(0))
            if len(body) > room:
                place, body = len(self.data), body + bytes(-len(body) % 8)
                self.data += body
                body = self._number(place)
            head = struct.pack(self.order + "HH", tag, kind) + self._number(len(numbers))
            entries.append(head + body.ljust(room, b"\0"))
        at = len(self.data)
        self.data += struct.pack(self.order + ("Q" if self.big else "H"), len(entries)) + b"".join(entries)
        self._next = len(self.data)
        self.data += self._number(0) + bytes(8)
        return at

    def bytes(self) -> bytes:
        """The file."""
        return bytes(self.data)
