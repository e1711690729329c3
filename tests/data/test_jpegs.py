"""JPEGs, each decoded alone and strictly: tables left out, damage of every kind of JPEG, oddities that are none."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fasthpm.data import jpegs
from fasthpm.data.decoding import read
from tests.helpers.odd_files import LOSSLESS_JPEG, hole, saved, texture, without_segments

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "baseline": ("RGB", {}),
    "grey": ("L", {}),
    "restarts": ("RGB", {"restart_marker_blocks": 3}),
    "progressive": ("RGB", {"progressive": True}),
    "grey progressive": ("L", {"progressive": True}),
    "CMYK": ("CMYK", {}),
    "CMYK progressive": ("CMYK", {"progressive": True}),
}
HUFFMAN, QUANTISATION = 0xC4, 0xDB


def made(kind: str, seed: int = 0, **more: Any) -> bytes:
    mode, options = KINDS[kind]
    return saved(texture(320, 480, seed).convert(mode), "JPEG", **{"quality": 90, **options, **more})


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def ycck(data: bytes) -> bytes:
    """A CMYK JPEG that says it were YCCK."""
    at = data.index(b"Adobe") + 11
    return data[:at] + b"\2" + data[at + 1 :]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_frames_without_huffman_tables_are_read_with_the_standard_ones(mode: str) -> None:
    for seed in range(4):
        photo = saved(texture(seed=seed).convert(mode), "JPEG", optimize=True)
        assert np.abs(read(photo).pixels - pixels_of(photo)).max() <= 2  # leaves other tables in whatever remembers
        frame = saved(texture(seed=seed + 9).convert(mode), "JPEG", quality=85)
        bare = without_segments(frame, HUFFMAN)
        assert np.array_equal(read(bare).pixels, read(frame).pixels)
        assert not jpegs.has_own_tables(bare)
        assert jpegs.has_own_tables(frame)


@pytest.mark.parametrize("missing", [(QUANTISATION,), (QUANTISATION, HUFFMAN)])
def test_tiles_without_quantisation_tables_are_refused_whatever_came_before(missing: tuple[int, ...]) -> None:
    for seed in range(3):
        frame = saved(texture(seed=seed), "JPEG", quality=85)
        read(frame)
        with pytest.raises(jpegs.DamagedJpeg, match="Quantization table 0x00 was not defined"):
            read(without_segments(frame, *missing))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_own_tables_are_all_that_the_scans_need(mode: str) -> None:
    """One table less is not enough."""
    data = saved(texture().convert(mode), "JPEG")
    assert jpegs.has_own_tables(data)
    tables = [(start, end) for marker, start, end in jpegs.segments(data) if marker in (HUFFMAN, QUANTISATION)]
    assert len(tables) >= 3
    assert not any(jpegs.has_own_tables(data[:start] + data[end:]) for start, end in tables)


@pytest.mark.parametrize("kind", [*KINDS, "YCCK"])
@pytest.mark.parametrize("value", [0, 0xFF, 0x55])
def test_holes_are_found_in_every_kind_of_jpeg(kind: str, value: int) -> None:
    data = ycck(made("CMYK")) if kind == "YCCK" else made(kind)
    read(data)
    start = data.index(b"\xff\xda") + 20
    for n in range(6):
        with pytest.raises(jpegs.DamagedJpeg):
            read(hole(data, start + (len(data) - start - 5000) * n // 6, 4096, value))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left", [0.3, 0.7, 0.95])
def test_cut_jpegs_are_refused(kind: str, left: float) -> None:
    data = made(kind)
    with pytest.raises((jpegs.DamagedJpeg, OSError)):
        read(data[: int(len(data) * left)])


def test_a_harmless_oddity_hides_no_damage() -> None:
    """libjpeg names the first thing only."""
    data = made("baseline").replace(b"JFIF\0\1\1", b"JFIF\0\7\7")
    assert read(data).pixels.any()
    at = len(data) // 2
    with pytest.raises(jpegs.DamagedJpeg):
        read(hole(data, at, 4096))
    with pytest.raises(jpegs.DamagedJpeg):
        read(hole(data.replace(b"\xff\xdb", b"abc\xff\xdb", 1), at, 4096))


def oddities(data: bytes) -> dict[str, bytes]:
    """Files whose pixels are all there."""
    tables = data.index(b"\xff\xdb")
    found = {
        "stray bytes": data[:tables] + b"abc" + data[tables:],
        "fill bytes": data[:tables] + b"\xff\xff\xff" + data[tables:],
        "revision": data.replace(b"JFIF\0\1\1", b"JFIF\0\0\7"),
        "behind the end": data + b"words \xff\xd9 words",
    }
    found |= {f"{n} x {v:#x}": data[:-2] + bytes([v]) * n + data[-2:] for n in (2, 7, 5000) for v in (0, 10, 255)}
    return found


@pytest.mark.parametrize("kind", ["baseline", "progressive", "CMYK", "restarts"])
def test_oddities_that_touch_no_pixel_are_read(kind: str) -> None:
    data = made(kind)
    truth = read(data).pixels
    for name, odd in oddities(data).items():
        assert np.array_equal(read(odd).pixels, truth), name


def test_unknown_adobe_transforms_are_what_libjpeg_takes_them_for() -> None:
    data = without_segments(made("baseline"), 0xE0)
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"
    odd, known = (data[:2] + adobe + number + data[2:] for number in (b"\7", b"\1"))
    with pytest.raises(jpegs.OddJpeg):
        jpegs.decode(odd, 480, 320)
    assert np.array_equal(read(odd).pixels, read(known).pixels)


def test_padding_that_was_read_as_pixels_is_damage() -> None:
    data = made("baseline")
    for length in (300, 4096):
        with pytest.raises(jpegs.DamagedJpeg):
            read(hole(data, len(data) - 2 - length, length))


def test_what_the_strict_decoder_does_not_know_is_left_to_pillow() -> None:
    y, x = np.mgrid[:8, :12]
    assert np.array_equal(read(LOSSLESS_JPEG).pixels, np.stack([x * 20, y * 30, x * 0 + 77], 2))
    with pytest.raises(jpegs.UnknownJpeg):
        jpegs.decode(LOSSLESS_JPEG, 12, 8)


def test_a_hole_that_looks_like_another_process_is_damage() -> None:
    data = made("baseline")
    at = len(data) // 2
    with pytest.raises(jpegs.DamagedJpeg):
        read(data[:at] + b"\xff\xc3\0\x0b\x08\0\x10\0\x10\1\1\x11\0" + data[at + 13 :])


@pytest.mark.parametrize("kind", ["baseline", "grey", "restarts", "progressive"])
def test_a_header_is_whole_up_to_its_scan(kind: str) -> None:
    data = made(kind)
    scan = data.index(b"\xff\xda")
    behind = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
    assert jpegs.whole_header(data) == jpegs.whole_header(data[: behind + 1]) == (320, 480)
    for end in range(behind + 1):
        assert jpegs.whole_header(data[:end]) == (0, 0), end
    segments = [start for _, start, _ in jpegs.segments(data) if start < scan]
    for start in (0, *segments):
        assert jpegs.whole_header(data[:start] + b"\0" + data[start + 1 :]) == (0, 0), start
    assert jpegs.whole_header(bytes(len(data))) == (0, 0)
