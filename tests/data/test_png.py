"""PNG files: every checksum counts, texts do not."""

import functools
import zlib

import numpy as np
import pytest

from fasthpm.data import png
from fasthpm.data.damage import DamagedImage
from fasthpm.data.decoding import UnknownImage, read
from tests.helpers.odd_files import chunk, saved, texture
from tests.helpers.odd_files import png as png_of

PIXELS = np.asarray(texture(24, 32))
ROWS = b"".join(b"\0" + row.tobytes() for row in PIXELS)
LONG = bytes(3 << 20)


def test_one_byte_anywhere_in_the_pixels_or_their_checksum_is_found() -> None:
    data = png_of(PIXELS)
    start, end = data.index(b"IDAT"), data.index(b"IEND") - 4
    for at in range(start, end):
        with pytest.raises((DamagedImage, OSError, UnknownImage)):
            read(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])


@pytest.mark.parametrize("mode", ["RGB", "P", "L", "LA", "RGBA", "1", "I;16"])
def test_the_checksum_of_the_pixels_counts_whatever_their_kind(mode: str) -> None:
    image = texture(24, 32).convert("L" if mode == "I;16" else mode)
    data = saved(image.convert("I;16") if mode == "I;16" else image, "PNG")
    read(data)
    end = data.index(b"IEND") - 4
    with pytest.raises(DamagedImage, match="the checksum of the chunk IDAT"):
        read(data[: end - 1] + bytes([data[end - 1] ^ 1]) + data[end:])


@pytest.mark.parametrize(
    ("stream", "words"),
    [(zlib.compress(ROWS)[:-4], "end early"), (zlib.compress(ROWS)[:-1] + b"\0", "incorrect data check")],
)
def test_pixels_that_do_not_unpack_to_their_end_are_damage(stream: bytes, words: str) -> None:
    """Pillow has all rows before it comes to that."""
    with pytest.raises(DamagedImage, match=words):
        read(png_of(PIXELS, stream=stream))


@functools.cache
def texts() -> dict[str, bytes]:
    packed = zlib.compress(LONG)
    return {
        "zTXt": chunk(b"zTXt", b"k\0\0" + packed),
        "iTXt": chunk(b"iTXt", b"k\0\1\0\0\0" + packed),
        "tEXt": chunk(b"tEXt", b"k\0" + b"x" * len(LONG)),
        "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed),
        "EXIF": chunk(b"zTXt", b"Raw profile type exif\0\0" + packed),
        "profile": chunk(b"iCCP", b"k\0\0" + packed),
        "many": 66 * chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1000 << 10))),
    }


@pytest.mark.parametrize("name", texts())
@pytest.mark.parametrize("behind", [False, True])
def test_texts_of_any_size_do_not_matter(name: str, behind: bool) -> None:
    data = png_of(PIXELS)
    at = data.index(b"IEND") - 4 if behind else data.index(b"IDAT") - 4
    assert np.array_equal(read(data[:at] + texts()[name] + data[at:]).pixels, PIXELS)


def test_a_text_that_turns_the_image_still_does() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    turned = png_of(PIXELS, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp))
    assert np.array_equal(read(turned).pixels, np.rot90(PIXELS, -1))


def test_a_file_without_texts_is_not_copied() -> None:
    data = png_of(PIXELS)
    assert png.without_texts(data) is data
