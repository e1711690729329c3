"""JPEG files decoded strictly: what libjpeg merely warns of (bad codes, missing data) counts as damage here.

Done by the TurboJPEG library that FFCV is built on, and that training decodes with. PIL and OpenCV pass over the
warnings. Where FFCV was built without the shared library, `decode` is None and PIL takes over.

libjpeg names only the first thing that it stumbles over, and a harmless one hides what follows. So `decode_sound` takes
the harmless ones out of the file and decodes once more: what is named then is damage.
"""

import contextlib
import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fasthpm.data.damage import DamagedImage
from fasthpm.data.sampling import Array

BASELINE = frozenset((0xC0, 0xC1))  # sequential Huffman coding; the other kinds decode slowly, or not everywhere
PROGRESSIVE = 0xC2
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
DHT, SOI, EOI, SOS, DQT, APP0, APP14 = 0xC4, 0xD8, 0xD9, 0xDA, 0xDB, 0xE0, 0xEE
BARE = frozenset((0x00, 0x01, *range(0xD0, 0xD9)))  # no length follows
RGB_ORDER, CMYK_ORDER, MAX_REDUCTION = 0, 11, 3
IN_SCAN = frozenset((0x00, *range(0xD0, 0xD8)))  # behind 0xFF: a stuffed byte, restart markers
MOST_KEPT = 2  # of the padding behind a scan: its first bytes may be the scan's last
# Warnings that may not touch the pixels (libjpeg's texts).
HARMLESS = ("extraneous bytes before marker", "unknown JFIF revision", "Unknown Adobe color transform")
# What a library of this age and build cannot do, which says nothing about the file.
PROCESS = ("Unsupported JPEG process", "arithmetic")
UNKNOWN = (*PROCESS, "Unsupported JPEG data precision", "Unsupported color conversion", "not supported")


class DamagedJpeg(DamagedImage):
    """libjpeg could not make sense of all the data."""


class OddJpeg(ValueError):
    """Readable, but not without a warning that may be harmless."""


class UnknownJpeg(ValueError):
    """Of a kind that this library does not decode."""


# ------------------------------------------------------------------------------------------------------- the file
def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, first byte, last + 1) of every segment, as libjpeg finds them; a scan's coded data belong to its SOS.

    Stray bytes between them are passed over.
    """
    at = 2
    while 0 <= (at := data.find(b"\xff", at)) < len(data) - 1:
        marker = data[at + 1]
        if marker == EOI:
            yield marker, at, at + 2
            return
        if marker == 0xFF or marker in BARE:
            at += 1 if marker == 0xFF else 2
            continue
        end = at + 2 + max(int.from_bytes(data[at + 2 : at + 4], "big"), 2)
        if marker == SOS:
            end = _scan_end(data, end)
        yield marker, at, min(end, len(data))
        at = end


def _scan_end(data: bytes, at: int) -> int:
    """Where the marker behind coded data stands, with the fill bytes in front of it."""
    while 0 <= (at := data.find(b"\xff", at)) < len(data) - 1:
        if data[at + 1] == 0xFF:
            at += 1
        elif data[at + 1] in IN_SCAN:
            at += 2
        else:
            while data[at - 1] == 0xFF:
                at -= 1
            return at
    return len(data)


def frame_type(data: bytes) -> int:
    """The marker code of the frame header, 0xC0 for baseline; 0 if there is none."""
    return next((marker for marker, _, _ in segments(data) if marker in FRAMES), 0)


def whole_header(data: bytes) -> tuple[int, int]:
    """Height and width that a JPEG's header says, if every segment of it is there, one behind the other, up to the scan
    that follows; (0, 0) if not."""
    at, size = 2, (0, 0)
    while data[:2] == b"\xff\xd8" and at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in FRAMES:
            size = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
        at += 2 + length
        if marker == SOS:
            return size if at < len(data) else (0, 0)
        if marker == EOI or length < 2:
            break
    return 0, 0


def has_own_tables(data: bytes) -> bool:
    """Whether every table that a scan of a baseline JPEG needs stands before it in the file itself."""
    tables: set[tuple[int, int]] = set()  # (marker, number); of Huffman's the class is in the number
    quantised: dict[int, int] = {}  # table by component
    for marker, start, end in segments(data):
        body = data[start + 4 : end]
        if marker == DQT:
            at = 0
            while at < len(body):
                tables.add((DQT, body[at] & 15))
                at += 129 if body[at] >> 4 else 65
        elif marker == DHT:
            at = 0
            while at + 17 <= len(body):
                tables.add((DHT, body[at]))
                at += 17 + sum(body[at + 1 : at + 17])
        elif marker in FRAMES:
            quantised = {body[k]: body[k + 2] for k in range(6, min(len(body) - 2, 6 + 3 * body[5]), 3)}
        elif marker == SOS:
            for component, pair in zip(body[1 : 2 * body[0] : 2], body[2 : 1 + 2 * body[0] : 2], strict=True):
                needed = {(DHT, pair >> 4), (DHT, 16 | pair & 15), (DQT, quantised.get(component, -1))}
                if not needed <= tables:
                    return False
    return bool(tables)


def mend(data: bytes, kept: int) -> bytes:
    """`data` without what is harmless: stray bytes in front of segments, numbers unknown to libjpeg, padding.

    Padding is a run of one value behind a scan, of which `kept` bytes are left.
    """
    parts = [data[:2]]
    components = next((data[start + 9] for marker, start, end in segments(data) if marker in FRAMES), 0)
    for marker, start, end in segments(data):
        part = data[start:end]
        if marker == APP0 and part[4:9] == b"JFIF\0" and len(part) > 10:
            part = part[:9] + b"\1\1" + part[11:]
        elif marker == APP14 and part[4:9] == b"Adobe" and len(part) > 15 and part[15] > 2:
            part = part[:15] + bytes([2 if components == 4 else 1]) + part[16:]  # what libjpeg takes it for
        elif marker == SOS:
            bare = len(part.rstrip(part[-1:]))
            part = part[: bare + kept] if len(part) - bare > 1 else part
        parts.append(part)
    return b"".join(parts)


def reduction(side: int, target: int) -> int:
    """How often a JPEG's sides can be halved while decoding so that twice `target` is left to average over."""
    halvings = 0
    while target and halvings < MAX_REDUCTION and side >> (halvings + 1) >= 2 * target:
        halvings += 1
    return halvings


# ------------------------------------------------------------------------------------------------------- decoding
def _load() -> Any:
    """FFCV's library, through which TurboJPEG's functions are found; None where they are not.

    Found without importing FFCV, which would compile for seconds.
    """
    spec = importlib.util.find_spec("ffcv")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    try:
        library = ctypes.CDLL(str(next(path for folder in folders for path in Path(folder).glob("_libffcv*.so"))))
        library.tjInitDecompress.restype = ctypes.c_void_p
        library.tjDestroy.argtypes = [ctypes.c_void_p]
        library.tjDecompress2.argtypes = [
            *(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_void_p),
            *[ctypes.c_int] * 5,
        ]
        library.tjGetErrorStr2.restype = ctypes.c_char_p
        library.tjGetErrorStr2.argtypes = [ctypes.c_void_p]
    except (StopIteration, OSError, AttributeError):
        return None
    return library


_library = _load()


@contextlib.contextmanager
def _decoder() -> Iterator[Any]:
    """One for every image: it keeps the tables of the last, and decodes with them what has none of its own."""
    handle = _library.tjInitDecompress()
    if not handle:
        raise MemoryError("TurboJPEG cannot make a decoder")
    try:
        yield handle
    finally:
        _library.tjDestroy(handle)


def _decode(data: bytes, width: int, height: int, halvings: int = 0, *, cmyk: bool = False) -> Array:
    """Pixels of a JPEG whose header says `width` x `height`, sides divided by 2 ** halvings: uint8 RGB [h, w, 3].

    **Args:** `cmyk`: of one that is CMYK or YCCK, its four channels.

    **Raises:** `DamagedJpeg`, `OddJpeg` or `UnknownJpeg`, with libjpeg's words.
    """
    width, height = -(-width >> halvings), -(-height >> halvings)
    pixels = np.empty((height, width, 4 if cmyk else 3), np.uint8)
    order = CMYK_ORDER if cmyk else RGB_ORDER
    with _decoder() as handle:
        if _library.tjDecompress2(handle, data, len(data), pixels.ctypes.data, width, 0, height, order, 0):
            words = _library.tjGetErrorStr2(handle).decode("ascii", "replace")
            raise _judge(data, words)
    return pixels


def _judge(data: bytes, words: str) -> ValueError:
    """What libjpeg's `words` mean."""
    if any(text in words for text in HARMLESS):
        return OddJpeg(words)
    # A known process that it takes for another one is a hole in the file.
    known = frame_type(data) in {*BASELINE, PROGRESSIVE} and any(text in words for text in PROCESS)
    return UnknownJpeg(words) if not known and any(text in words for text in UNKNOWN) else DamagedJpeg(words)


decode: Callable[..., Array] | None = _decode if _library else None


def decode_sound(data: bytes, width: int, height: int, halvings: int = 0, *, cmyk: bool = False) -> tuple[Array, bool]:
    """As `decode`, but what is odd and harmless is read; and whether nothing was odd.

    **Raises:** `DamagedJpeg` or `UnknownJpeg`.
    """
    assert decode is not None
    size = (width, height, halvings)
    try:
        return decode(data, *size, cmyk=cmyk), True
    except OddJpeg as odd:
        first: ValueError = DamagedJpeg(str(odd))
    for kept in range(MOST_KEPT + 1):
        try:
            return decode(mend(data, kept), *size, cmyk=cmyk), False
        except (OddJpeg, DamagedJpeg) as damage:
            first = first if isinstance(damage, OddJpeg) else damage
    raise DamagedJpeg(str(first))
