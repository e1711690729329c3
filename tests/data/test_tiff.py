"""TIFF files: which of several pictures is the full one, and damage in their strips."""

import numpy as np
import pytest

from fasthpm.data import tiff
from fasthpm.data.damage import DamagedImage
from fasthpm.data.decoding import FIRST, LARGEST, read
from tests.helpers.odd_files import Tiff, hole, saved, texture

FULL = np.asarray(texture(40, 56))
SMALL = np.ascontiguousarray(FULL[::8, ::8])
THUMBNAIL, MASK = {254: 1}, {254: 4}
# Pillow reads no BigTIFF of this order.
FORMS = [("<", False), (">", False), ("<", True)]


@pytest.mark.parametrize(("order", "big"), FORMS)
def test_the_largest_full_picture_is_taken(order: str, big: bool) -> None:
    def new() -> Tiff:
        return Tiff(order, big=big)

    below = new()
    place = below.hang(FULL)
    files = {
        "thumbnail first": new().add(SMALL, tags=THUMBNAIL).add(FULL),
        "old thumbnail first": new().add(SMALL, tags={255: 2}).add(FULL),
        "thumbnail last": new().add(FULL).add(SMALL, tags=THUMBNAIL),
        "several": new().add(SMALL, tags=THUMBNAIL).add(SMALL[:3]).add(FULL).add(SMALL),
        "no marks": new().add(SMALL).add(FULL),
        "a larger mask": new().add(np.repeat(FULL, 3, 0), tags=MASK).add(FULL),
        "a larger copy": new().add(np.repeat(FULL, 3, 0), tags=THUMBNAIL).add(FULL),
        "below": below.add(SMALL, tags=THUMBNAIL, below=[place]),
    }
    for name, file in files.items():
        decoded = read(file.bytes())
        assert np.array_equal(decoded.pixels, FULL), name
        assert decoded.notes == (LARGEST,), name


def test_of_equal_pages_the_first_is_taken_and_of_one_nothing_is_said() -> None:
    decoded = read(Tiff().add(FULL).add(FULL[::-1]).add(FULL[:, ::-1]).bytes())
    assert np.array_equal(decoded.pixels, FULL)
    assert decoded.notes == (FIRST,)
    assert read(Tiff().add(FULL).bytes()).notes == ()


def test_only_thumbnails_give_the_largest() -> None:
    decoded = read(Tiff().add(SMALL, tags=THUMBNAIL).add(FULL, tags=THUMBNAIL).bytes())
    assert np.array_equal(decoded.pixels, FULL)


def test_a_full_picture_that_cannot_be_read_is_a_reason_and_no_thumbnail() -> None:
    """As in raw files of cameras."""
    file = Tiff()
    place = file.hang(FULL[..., 0].astype(np.uint16), tags={262: 32803})
    with pytest.raises(ValueError, match="its full picture of 56 x 40 cannot be read: Pillow cannot read this TIFF"):
        read(file.add(SMALL, tags=THUMBNAIL, below=[place]).bytes())


def test_the_size_that_is_limited_is_that_of_the_picture_taken() -> None:
    data = Tiff().add(SMALL, tags=THUMBNAIL).add(FULL).bytes()
    with pytest.raises(ValueError, match="56 x 40 pixels, more than --max_pixels 1000"):
        read(data, max_pixels=1000)


def test_pages_that_lead_back_end() -> None:
    file = Tiff().add(SMALL).add(FULL)
    first, second = (page.offset for page in tiff.list_pages(file.bytes()))
    file.data[file._last : file._last + 4] = first.to_bytes(4, "little")
    assert [page.offset for page in tiff.list_pages(file.bytes())] == [first, second]
    assert tiff.list_pages(b"II*\0\xff\xff\xff\xff") == []


@pytest.mark.parametrize("compression", ["tiff_adobe_deflate", "tiff_deflate", "jpeg", "tiff_lzw", "group4"])
def test_damage_in_strips_is_found(compression: str) -> None:
    """Of all these Pillow passes over some."""
    image = texture(160, 240)
    data = saved(image.convert("1") if compression == "group4" else image, "TIFF", compression=compression)
    truth = read(data).pixels
    assert truth.any()
    value = 0x55 if compression == "group4" else 0
    for n in range(8):
        at = int(len(data) * (0.1 + 0.1 * n))
        with pytest.raises((DamagedImage, OSError)):
            read(hole(data, at, max(len(data) // 20, 64), value))


@pytest.mark.parametrize("compression", [None, "tiff_adobe_deflate", "jpeg", "tiff_lzw", "packbits", "group4"])
def test_cut_files_are_refused(compression: str | None) -> None:
    image = texture(160, 240)
    data = saved(image.convert("1") if compression == "group4" else image, "TIFF", compression=compression)
    for left in (0.2, 0.5, 0.95):
        with pytest.raises((DamagedImage, OSError, ValueError)):
            read(data[: int(len(data) * left)])


def test_a_strip_that_is_too_short_is_found_by_libtiffs_words(capfd: pytest.CaptureFixture[str]) -> None:
    """Pillow goes on without them; libtiff would write them to stderr."""
    data = saved(texture(160, 240), "TIFF", compression="packbits")
    short = next(
        changed
        for at in range(8, len(data) - 64, 7)
        if (changed := hole(data, at, 32, 0x80)) and _packbits_fail(changed)
    )
    with pytest.raises(DamagedImage, match="PackBitsDecode: Not enough data"):
        read(short)
    assert capfd.readouterr().err == ""


def _packbits_fail(data: bytes) -> bool:
    try:
        read(data)
    except DamagedImage:
        return True
    except Exception:  # the tables, not the pixels
        return False
    return False
