"""What becomes of the bytes of an image file: ranges, several pictures, reasons."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.encode import WriteOptions, encode
from fasthpm.data.decoding import FIRST, LARGEST, UnknownImage, read, size_of
from fasthpm.data.plain import read_pixels
from tests.helpers.odd_files import LOSSLESS_JPEG, Tiff, png, saved, texture, without_segments

GREY = np.asarray(texture(40, 56).convert("L"))
RGB = np.asarray(texture(40, 56))


def brightest(values: np.ndarray, bits: int) -> np.ndarray:
    """8-bit `values` as 16 bits of which `bits` are used, white among them."""
    values = values.astype(np.uint16)
    values.flat[0] = 255
    return (values << (bits - 8)) | (values >> (16 - bits))


@pytest.mark.parametrize(("bits", "share"), [(8, 256), (10, 64), (12, 16), (14, 4)])
@pytest.mark.parametrize("form", ["png grey", "png rgb", "png rgba", "tiff", "tiff >", "tiff rgb"])
def test_sixteen_bits_of_which_few_are_used_are_said(form: str, bits: int, share: int) -> None:
    def made(used: int) -> bytes:
        if form == "png rgba":
            opaque = np.full((*GREY.shape, 1), 65535, np.uint16)
            return png(np.concatenate([brightest(RGB, used), opaque], 2))
        values = brightest(RGB if "rgb" in form else GREY, used)
        if form.startswith("png"):
            return png(values.reshape(*values.shape[:2], -1))
        return Tiff(">" if ">" in form else "<").add(values).bytes()

    (note,) = read(made(bits)).notes
    assert f"16 bits, but no pixel above 1/{share} of the range" in note
    whole = read(made(16))
    assert whole.notes == ()
    assert np.abs(whole.pixels.astype(int)[1:] - (RGB if "rgb" in form else GREY[..., None])[1:]).max() <= 1


@pytest.mark.parametrize("kind", ["int32", "uint32", "int16", "int8"])
@pytest.mark.parametrize("most", [1, 127])
def test_integers_of_unknown_range_are_refused(kind: str, most: int) -> None:
    data = Tiff().add((GREY // 2).clip(0, most).astype(kind)).bytes()
    with pytest.raises(ValueError, match="integers of 32 bits or with a sign, whose range is unknown"):
        read(data)
    with pytest.raises(ValueError, match="range is unknown"):
        encode(Image.fromarray(GREY.astype(np.int32)), WriteOptions(), 0.0)


def test_formats_that_say_their_range_are_scaled_by_it() -> None:
    for white in (255, 1023, 4095, 65535):
        values = np.rint(GREY / 255 * white).astype(">u2" if white > 255 else np.uint8)
        decoded = read(b"P5 %d %d %d\n" % (*GREY.shape[::-1], white) + values.tobytes())
        assert np.abs(decoded.pixels[..., 0].astype(int) - GREY).max() <= 1
        assert decoded.notes == ()


def test_twelve_bits_of_a_tiff_are_scaled_by_their_own_range() -> None:
    values = GREY.astype(int) * 4095 // 255
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    file = Tiff()
    rows = packed.astype(np.uint8).reshape(GREY.shape[0], -1)
    tags = {256: GREY.shape[1], 258: 12}
    decoded = read(file.add(rows, tags=tags).bytes())
    assert np.abs(decoded.pixels[..., 0].astype(int) - GREY).max() <= 1


def test_floats_outside_their_range_are_refused_and_dark_ones_said() -> None:
    values = GREY.astype(np.float32) / 255
    assert np.array_equal(read(Tiff().add(values).bytes()).pixels[..., 0], GREY)
    (note,) = read(Tiff().add(values / 20).bytes()).notes
    assert "floats, but no pixel above 1/16 of the range" in note
    for wrong in (values * 255, values - 0.5, values * np.nan, values * np.inf):
        with pytest.raises(ValueError, match=r"F pixels span .*, expected 0 to 1"):
            read(Tiff().add(wrong).bytes())


def mpo(*images: Image.Image) -> bytes:
    return saved(images[0], "MPO", save_all=True, append_images=images[1:])


def test_the_largest_part_of_an_mpo_is_taken() -> None:
    large, small = texture(80, 120), texture(24, 32)
    truth = np.asarray(Image.open(io.BytesIO(saved(large, "JPEG"))))
    for parts, note in (((large, small), LARGEST), ((small, large), LARGEST), ((large, large.rotate(180)), FIRST)):
        decoded = read(mpo(*parts))
        assert decoded.notes == (note,)
        assert np.abs(decoded.pixels.astype(int) - truth).max() <= 2
    assert read(saved(large, "JPEG")).notes == ()


def test_of_an_icon_the_largest_is_taken() -> None:
    decoded = read(saved(texture(64, 64), "ICO", sizes=[(16, 16), (64, 64), (32, 32)]))
    assert decoded.pixels.shape == (64, 64, 3)
    assert decoded.notes == (LARGEST,)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(form: str) -> None:
    frames: dict[str, Any] = {"save_all": True, "append_images": [texture(40, 56, 1)]}
    frames |= {"lossless": True} if form == "WEBP" else {}
    one, two = (read(saved(texture(40, 56), form, **more)) for more in ({"lossless": True}, {**frames}))
    assert np.array_equal(one.pixels, two.pixels)
    assert (one.notes, two.notes) == ((), (FIRST,))


FILES = {
    b"<html>404</html>": "is no image that Pillow knows (begins with '<html>404')",
    b'{"error": 404}': "is no image that Pillow knows (begins with '{\"error\":')",
    bytes(50): "is no image that Pillow knows (begins with '" + r"\x00" * 9 + "')",
    b"\xc3\xa9\n": r"is no image that Pillow knows (begins with '\xc3\xa9\n')",
    b"": "the file is empty",
}


@pytest.mark.parametrize("data", FILES)
def test_what_is_no_image_is_named_by_its_beginning(data: bytes) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(FILES[data])}$"):
        read(data)


def reason(data: bytes) -> str:
    try:
        read(data)
    except Exception as error:  # whatever the decoders raise
        return str(error)
    return ""


@pytest.mark.parametrize("form", ["PNG", "GIF", "TIFF", "WEBP", "BMP", "JPEG", "PPM", "ICO", "JPEG2000"])
def test_reasons_of_broken_files_are_the_same_every_time(form: str) -> None:
    data = saved(texture(40, 40), form)
    for length in (len(data) // 2, 40, 12, 5):
        words = [reason(bytes(bytearray(data[:length]))) for _ in range(2)]
        assert words[0] == words[1] != ""
        assert " at 0x" not in words[0]


def test_a_known_kind_that_cannot_be_read_is_told_from_an_unknown_one() -> None:
    with pytest.raises(UnknownImage, match=r"Pillow cannot read this TIFF \(unknown pixel mode\)"):
        read(Tiff().add(GREY.astype(np.float64)).bytes())


def oriented(form: str, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(texture(40, 56), form, exif=exif, **options)


def odd_files() -> dict[str, bytes]:
    frame = saved(texture(), "JPEG")
    return {
        "frame.jpg": without_segments(frame, 0xC4),
        "lossless.jpg": LOSSLESS_JPEG,
        "cmyk.jpg": saved(texture().convert("CMYK"), "JPEG"),
        "turned.jpg": oriented("JPEG"),
        "turned.png": oriented("PNG"),
        "turned.tif": oriented("TIFF"),
        "turned_lzw.tif": oriented("TIFF", compression="tiff_lzw"),
        "several.mpo.jpg": mpo(texture(24, 32), texture(80, 120)),
        "thumbnail.tif": Tiff().add(RGB[::8, ::8], tags={254: 1}).add(RGB).bytes(),
        "deep.png": png(brightest(GREY, 12)[..., None]),
        "icon.ico": saved(texture(64, 64), "ICO", sizes=[(16, 16), (64, 64)]),
    }


@pytest.mark.parametrize("name", odd_files())
def test_folders_are_decoded_as_prepared_sets_are(name: str, tmp_path: Path) -> None:
    data = odd_files()[name]
    (tmp_path / name).write_bytes(data)
    stored = encode(data, WriteOptions(write_mode="raw"), 0.0)
    pixels = read_pixels(str(tmp_path / name))
    assert stored.blob == pixels.tobytes()
    assert size_of(str(tmp_path / name)) == pixels.shape[:2] == (stored.height, stored.width)
