"""Odd images, and how images are stored."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import encode
from data_prep.copy import copy_sets
from data_prep.encode import WriteOptions
from data_prep.sets import notes_path, read_csv, read_index
from fasthpm.data import jpegs
from fasthpm.data.ffcv.beton import open_beton
from tests.helpers.data_fixtures import jpeg_bytes, picture, prepare
from tests.helpers.odd_files import Tiff
from tests.helpers.prepared_sets import RAW_FLAGS, stored


def one_stored(folder: Path, *flags: str) -> np.ndarray:
    """The single image of `folder`, after preparation."""
    (pixels,) = stored(prepare(folder, folder.parent / "one.beton", *RAW_FLAGS, *flags))
    return pixels


def rgba() -> Image.Image:
    image = picture(0).convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 48).astype(np.uint8), (40, 1))))
    return image


def over_white(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image.convert("RGBA")).astype(float)
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha + 255 * (1 - alpha)


def test_alpha_is_laid_over_white(folder: Path) -> None:
    rgba().save(folder / "a.png")
    assert np.abs(one_stored(folder) - over_white(rgba())).max() <= 1


def test_grey_with_alpha_is_laid_over_white(folder: Path) -> None:
    image = Image.merge("LA", (picture(0, grey=True), rgba().getchannel("A")))
    image.save(folder / "a.png")
    assert np.abs(one_stored(folder) - over_white(image)[..., :1]).max() <= 1


def test_palettes_with_and_without_transparency(folder: Path) -> None:
    image = picture(0).quantize(16)
    image.save(folder / "a.png")
    assert np.array_equal(one_stored(folder), np.asarray(image.convert("RGB")))
    image.save(folder / "a.png", transparency=3)
    expected = np.asarray(image.convert("RGB")).copy()
    expected[np.asarray(image) == 3] = 255
    assert (np.asarray(image) == 3).any()
    assert np.array_equal(one_stored(folder, "--overwrite"), expected)


def test_cmyk_jpegs_come_out_in_their_colours(folder: Path) -> None:
    (folder / "a.jpg").write_bytes(jpeg_bytes(picture(0).convert("CMYK"), subsampling=0))
    assert np.abs(one_stored(folder).astype(int) - np.asarray(picture(0))).mean() < 4


def test_sixteen_bit_grey_is_scaled_not_clipped(folder: Path) -> None:
    values = np.linspace(0, 65535, 40 * 48).reshape(40, 48).astype(np.uint16)
    Image.fromarray(values).save(folder / "a.png")
    assert np.abs(one_stored(folder, "--values", "8bit")[..., 0] - values / 257).max() <= 0.5


def test_sixteen_bit_tiff_of_either_byte_order(folder: Path) -> None:
    values = np.linspace(0, 65535, 40 * 48).reshape(40, 48).astype(">u2")
    Image.frombytes("I;16B", (48, 40), values.tobytes()).save(folder / "a.tif")
    assert np.abs(one_stored(folder, "--values", "8bit")[..., 0] - values / 257).max() <= 0.5


def test_exif_rotation_is_applied(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "a.jpg").write_bytes(jpeg_bytes(picture(0), exif=exif))
    upright = Image.open(io.BytesIO(jpeg_bytes(picture(0))))
    assert np.array_equal(one_stored(folder), np.asarray(upright.transpose(Image.Transpose.ROTATE_270)))


def test_grey_images_are_stored_as_one_channel(folder: Path) -> None:
    picture(0, grey=True).save(folder / "a.png")
    assert np.array_equal(one_stored(folder)[..., 0], np.asarray(picture(0, grey=True)))


def test_one_bit_and_animated_images(folder: Path) -> None:
    picture(0, grey=True).convert("1").save(folder / "a.png")
    assert np.array_equal(one_stored(folder)[..., 0] > 0, np.asarray(picture(0, grey=True).convert("1")))
    (folder / "a.png").unlink()
    frames = [picture(k).quantize(32) for k in range(2)]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:])
    assert np.array_equal(one_stored(folder, "--overwrite"), np.asarray(frames[0].convert("RGB")))


def test_grey_flag_stores_luma(folder: Path) -> None:
    picture(0).save(folder / "a.png")
    assert np.array_equal(one_stored(folder, "--grey")[..., 0], np.asarray(picture(0).convert("L")))


@pytest.mark.parametrize(("size", "expected"), [((40, 100), (20, 50)), ((3, 400), (1, 50)), ((30, 50), (30, 50))])
def test_large_images_are_shrunk_but_never_to_nothing(
    folder: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    picture(0, size).save(folder / "a.png")
    beton = open_beton(prepare(folder, folder.parent / "a.beton", "--max_resolution", "50"))
    assert (beton.heights[0], beton.widths[0]) == expected


def test_large_jpegs_are_halved_while_decoding_and_look_the_same(tmp_path: Path) -> None:
    assert [jpegs.reduction(side, 500) for side in (1000, 1999, 2000, 4000, 40000)] == [0, 0, 1, 2, 3]
    assert jpegs.reduction(4000, 0) == 0
    data = jpeg_bytes(picture(3, (1200, 1601)))
    quick = encode.encode(data, WriteOptions(max_resolution=200, write_mode="raw"), 0.0)
    slow = encode.encode(Image.open(io.BytesIO(data)), WriteOptions(max_resolution=200, write_mode="raw"), 0.0)
    assert (quick.height, quick.width) == (slow.height, slow.width) == (149, 200)
    difference = np.frombuffer(quick.blob, np.uint8).astype(int) - np.frombuffer(slow.blob, np.uint8)
    assert np.abs(difference).mean() < 0.6


def test_sums_are_exact() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (301, 407, 3), dtype=np.uint8)
    sums, squares = encode.measure(pixels)
    flat = pixels.reshape(-1, 3).astype(np.int64)
    assert (list(sums), list(squares)) == (flat.sum(0).tolist(), (flat**2).sum(0).tolist())


def test_images_too_large_are_rejected_by_their_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.frombytes("1", (20000, 20000), bytes(20000 * 2500)).save(buffer, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="20000 x 20000 pixels, more than --max_pixels 100000000"):
        encode.encode(buffer.getvalue(), WriteOptions(), 0.0)


@pytest.mark.parametrize(("width", "expected"), [(500, 2), (375, 2), (16, 1), (17, 2), (48, 3), (112, 1)])
def test_restart_markers_divide_the_rows(width: int, expected: int) -> None:
    assert encode.restart_interval(width) == expected


def test_what_should_be_known_is_said_counted_and_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey = np.asarray(picture(0, grey=True)).astype(np.uint16)
    for k, bits in enumerate((10, 12, 12, 16)):
        Image.fromarray(grey << (bits - 8) | 255).save(folder / f"deep{k}.png")
    small = np.asarray(picture(1, (5, 6)))
    (folder / "two.tif").write_bytes(Tiff().add(small, tags={254: 1}).add(np.asarray(picture(1))).bytes())
    out = prepare(folder, folder.parent / "a.beton", "--shards", "2")
    said = capsys.readouterr().out
    listed = list(read_csv(notes_path(out)))
    assert [Path(path).name for path, _ in listed[1:]] == ["deep0.png", "deep1.png", "deep2.png", "two.tif"]
    notes = [note for _, note in listed[1:]]
    assert [next(share for share in ("1/64", "1/16", "largest") if share in note) for note in notes] == [
        "1/64",
        "1/16",
        "1/16",
        "largest",
    ]
    index = read_index(out)
    assert index["notes"] == {note: notes.count(note) for note in notes}
    for note, count in index["notes"].items():
        assert f"a.notes.csv: {count} file{'s' if count > 1 else ''}: {note}" in said
    copy_sets([out], folder.parent / "copy")
    assert (folder.parent / "copy" / "a.notes.csv").read_bytes() == notes_path(out).read_bytes()
    for path in folder.glob("*"):
        path.unlink()
    picture(0).save(folder / "a.png")
    prepare(folder, out, "--overwrite")
    assert not notes_path(out).exists()
