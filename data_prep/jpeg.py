"""JPEG files decoded strictly: what libjpeg merely warns of (bad codes, missing data) counts as damage here.

Done by the TurboJPEG library that FFCV is built on, and that training decodes with. PIL and OpenCV pass over the
warnings. Where FFCV was built without the shared library, `decode` is None and PIL takes over.
"""

import ctypes
import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fasthpm.data.sampling import Array

BASELINE = frozenset((0xC0, 0xC1))  # sequential Huffman coding; the other kinds decode slowly, or not everywhere
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
RGB_ORDER, MAX_REDUCTION = 0, 3
# Warnings that do not touch the pixels (libjpeg's texts).
HARMLESS = ("extraneous bytes before marker", "unknown JFIF revision", "Unknown Adobe color transform")


class DamagedJpeg(ValueError):
    """libjpeg could not make sense of all the data."""


class OddJpeg(ValueError):
    """Readable, but not without a (harmless) warning."""


def frame_type(data: bytes) -> int:
    """The marker code of the frame header, 0xC0 for baseline; 0 if there is none."""
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return 0
        marker = data[at + 1]
        if marker in FRAMES:
            return marker
        if marker == 0xFF:  # fill byte
            at += 1
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0


def reduction(side: int, target: int) -> int:
    """How often a JPEG's sides can be halved while decoding so that twice `target` is left to average over."""
    halvings = 0
    while target and halvings < MAX_REDUCTION and side >> (halvings + 1) >= 2 * target:
        halvings += 1
    return halvings


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
_local = threading.local()


def _handle() -> Any:
    if not hasattr(_local, "handle"):
        _local.handle = _library.tjInitDecompress()
    return _local.handle


def _decode(data: bytes, width: int, height: int, halvings: int = 0) -> Array:
    """Pixels of a JPEG whose header says `width` x `height`, sides divided by 2 ** halvings: uint8 RGB [h, w, 3].

    **Raises:** `DamagedJpeg` or `OddJpeg`, with libjpeg's words.
    """
    width, height = -(-width >> halvings), -(-height >> halvings)
    pixels = np.empty((height, width, 3), np.uint8)
    handle = _handle()
    if _library.tjDecompress2(handle, data, len(data), pixels.ctypes.data, width, 0, height, RGB_ORDER, 0):
        words = _library.tjGetErrorStr2(handle).decode("ascii", "replace")
        raise (OddJpeg if any(harmless in words for harmless in HARMLESS) else DamagedJpeg)(words)
    return pixels


decode: Callable[..., Array] | None = _decode if _library else None
