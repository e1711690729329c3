"""TIFF files: which of several pictures is the full one, and damage of which Pillow lets libtiff speak in vain."""

import contextlib
import ctypes
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image, TiffImagePlugin, _imaging

from fasthpm.data import jpegs
from fasthpm.data.damage import PIECE, DamagedImage, check_zlib

REDUCED, MASK = 1, 4  # bits of NewSubfileType
OLD_REDUCED = 2  # of SubfileType
WIDTH, HEIGHT, COMPRESSION, NEW_TYPE, OLD_TYPE, SUBFILES, TABLES = 256, 257, 259, 254, 255, 330, 347
PIECES = ((273, 279), (324, 325))  # offsets and lengths of strips, and of tiles
JPEG, DEFLATE = 7, (8, 32946)
BIG = 43  # the version of files whose offsets have 8 bytes
MOST_DIRECTORIES = 100_000
MOST_BYTES = 32  # of a pixel
WORDS = 300
PILLOWS_NAME = b"tempfile.tif"  # of every file


# ------------------------------------------------------------------------------------------------------- the pictures
@dataclass(frozen=True)
class Page:
    """One picture of a file."""

    offset: int
    width: int
    height: int
    full: bool  # neither a smaller copy of another nor a mask

    @property
    def rank(self) -> tuple[bool, int]:
        """By which the largest full one is found."""
        return self.full, self.width * self.height


def list_pages(data: bytes) -> list[Page]:
    """The pictures of a file, with those that hang below others, as far as its tables can be read."""
    pages: list[Page] = []
    ahead, seen = [_first(data)], {0}
    while ahead and len(pages) < MOST_DIRECTORIES:
        offset = ahead.pop(0)
        if offset in seen or offset >= len(data):
            continue
        seen.add(offset)
        try:
            table = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if _is_big(data) else 8])
            file = io.BytesIO(data)
            file.seek(offset)
            table.load(file)
            page, others = _page(offset, table), table.get(SUBFILES, ())
        except Exception:  # what cannot be read is no picture; if it is the one to take, Pillow will say so
            continue
        pages.append(page)
        below = others if isinstance(others, tuple) else (others,)
        ahead = [int(table.next or 0), *map(int, below), *ahead] if table.next else [*map(int, below), *ahead]
    return pages


def _page(offset: int, table: Any) -> Page:
    smaller = int(table.get(NEW_TYPE, 0)) & (REDUCED | MASK) or table.get(OLD_TYPE) == OLD_REDUCED
    return Page(offset, int(table[WIDTH]), int(table[HEIGHT]), not smaller)


def _is_big(data: bytes) -> bool:
    return BIG in (data[2], data[3])


def _place(data: bytes) -> tuple[slice, Any]:
    """Where the offset of the first directory stands, and its byte order."""
    return slice(8, 16) if _is_big(data) else slice(4, 8), "little" if data[:2] == b"II" else "big"


def _first(data: bytes) -> int:
    place, order = _place(data)
    return int.from_bytes(data[place], order)


def starting_at(data: bytes, offset: int) -> bytes:
    """The file with another first picture."""
    place, order = _place(data)
    number = offset.to_bytes(place.stop - place.start, order)
    return data[: place.start] + number + data[place.stop :]


# ------------------------------------------------------------------------------------------------------- damage
_heard = threading.local()
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)


@_Handler
def _hear(module: bytes | None, form: bytes | None, values: Any) -> None:
    words = getattr(_heard, "words", None)
    if words is None or form is None:
        return
    text = ctypes.create_string_buffer(WORDS)
    _vsnprintf(text, WORDS, form, values)
    name = "libtiff" if module in (None, b"", PILLOWS_NAME) else module.decode("ascii", "replace")
    words.append(f"{name}: {text.value.decode('utf-8', 'replace')}")


def _install() -> Any:
    """Hear libtiff's errors instead of seeing them on stderr; None where Pillow's libtiff is out of reach."""
    try:
        vsnprintf = ctypes.CDLL(None).vsnprintf
        vsnprintf.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_void_p]
        set_handler = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler  # found among what that one is linked with
        set_handler.argtypes, set_handler.restype = [_Handler], ctypes.c_void_p
        set_handler(_hear)
    except (OSError, AttributeError):
        return None
    return vsnprintf


_vsnprintf = _install()


@contextlib.contextmanager
def strictly() -> Iterator[None]:
    """Around the decoding of a TIFF.

    **Raises:** `DamagedImage` with libtiff's first words if it reports an error, also one that Pillow passes over.
    """
    words: list[str] = []
    _heard.words = words
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if words:
            raise DamagedImage(words[0]) from error
        raise
    finally:
        _heard.words = None
    if words:
        raise DamagedImage(words[0])


def check_tiff(data: bytes, image: Image.Image) -> None:
    """Decode the strips or tiles of `image`, of the file `data`, whose decoders' warnings libtiff does not hand on.

    **Raises:** `DamagedImage`.
    """
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    compression = tags.get(COMPRESSION)
    if compression != JPEG and compression not in DEFLATE:
        return
    for offsets, lengths in PIECES:
        for offset, length in zip(tags.get(offsets, ()), tags.get(lengths, ()), strict=False):
            piece = data[offset : offset + length]
            if len(piece) < length:
                raise DamagedImage(f"TIFF: a strip at byte {offset} has {len(piece)} bytes of {length}")
            if length and compression == JPEG:
                _check_jpeg(tags.get(TABLES, b""), piece)
            elif length:
                check_zlib([piece], MOST_BYTES * image.width * image.height + PIECE)  # a tile may stand out


def _check_jpeg(tables: bytes, piece: bytes) -> None:
    whole = tables[:-2] + piece[2:] if tables else piece
    frame = next((start for marker, start, _ in jpegs.segments(whole) if marker in jpegs.FRAMES), None)
    if jpegs.decode is None or frame is None or frame + 10 > len(whole):
        return
    height, width = (int.from_bytes(whole[frame + k : frame + k + 2], "big") for k in (5, 7))
    with contextlib.suppress(jpegs.UnknownJpeg):
        jpegs.decode_sound(whole, width, height, cmyk=whole[frame + 9] == 4)
