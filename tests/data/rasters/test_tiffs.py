"""TIFF files in their own numbers: layouts, compressions, byte orders, windows, pages, pyramids, names; refusals."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasthpm.data.rasters.raster import AmbiguousPages, Blob, Raster, Reading
from fasthpm.data.rasters.tiffs import INVERTED, is_photograph, open_tiff
from tests.helpers.odd_files import Tiff

tifffile = pytest.importorskip("tifffile")
RNG = np.random.default_rng(0)
TILE = RNG.integers(0, 65536, (40, 50, 4)).astype(np.uint16)


def written(path: Path, values: np.ndarray, **more: Any) -> Raster:
    tifffile.imwrite(path, values, **({"photometric": "minisblack", "metadata": None} | more))
    return open_tiff(Blob(str(path)), Reading())


def whole(raster: Raster, number: int = 0) -> np.ndarray:
    return raster.read(number, raster.whole())


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"byteorder": ">"},
        {"planarconfig": "separate"},
        {"tile": (16, 32)},
        {"tile": (16, 16), "planarconfig": "separate", "compression": "zlib", "predictor": True},
        {"rowsperstrip": 7, "compression": "lzw"},
        {"compression": "zstd", "bigtiff": True, "byteorder": ">"},
    ],
)
def test_every_layout_gives_the_same_values(tmp_path: Path, more: dict[str, Any]) -> None:
    separate = more.get("planarconfig") == "separate"
    given = {"planarconfig": "contig"} | more
    raster = written(tmp_path / "a.tif", np.ascontiguousarray(TILE.transpose(2, 0, 1)) if separate else TILE, **given)
    assert (raster.height, raster.width, raster.channels, raster.dtype) == (40, 50, 4, "uint16")
    assert raster.windowed == ("tile" in more)
    out = whole(raster)
    assert out.dtype == np.uint16
    assert out.dtype.isnative
    assert np.array_equal(out, TILE)
    for top, left, height, width in ((0, 0, 1, 1), (15, 30, 20, 20), (39, 49, 1, 1), (3, 0, 30, 50)):
        assert np.array_equal(raster.read(0, (top, left, height, width)), TILE[top:, left:][:height, :width])


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float16", "float32", "float64", "int32", "int8"])
def test_types_are_kept_or_said(tmp_path: Path, dtype: str) -> None:
    values = (RNG.normal(0, 50, (9, 8, 2))).astype(dtype)
    raster = written(tmp_path / "a.tif", values, planarconfig="contig")
    expected = {"float64": "float32", "int32": "float32", "int8": "int16"}.get(dtype, dtype)
    assert (raster.dtype, whole(raster).dtype) == (expected, expected)
    assert np.array_equal(whole(raster), values.astype(expected))
    assert bool(raster.notes) == (dtype == "float64")


def test_pages_are_what_is_said(tmp_path: Path) -> None:
    values = np.ascontiguousarray(TILE.transpose(2, 0, 1))
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", metadata=None)
    blob = Blob(str(tmp_path / "a.tif"))
    with pytest.raises(AmbiguousPages, match=r"4 pages .*--pages"):
        open_tiff(blob, Reading())
    assert np.array_equal(whole(open_tiff(blob, Reading("channels"))), TILE)
    stack = open_tiff(blob, Reading("samples"))
    assert (stack.slices, stack.channels) == (4, 1)
    assert np.array_equal(whole(stack, 3)[..., 0], values[3])
    assert np.array_equal(whole(open_tiff(blob, Reading("first")))[..., 0], values[0])


def test_ome_says_what_pages_are_and_names_them(tmp_path: Path) -> None:
    values = np.ascontiguousarray(TILE.transpose(2, 0, 1))
    named = {"axes": "CYX", "Channel": {"Name": ["dapi", "gfp", "rfp", "cy5"]}}
    raster = written(tmp_path / "a.ome.tif", values, metadata=named, tile=(16, 16))
    assert raster.bands == ("dapi", "gfp", "rfp", "cy5")
    assert np.array_equal(whole(raster), TILE)


def test_geotiff_says_nodata_and_names(tmp_path: Path) -> None:
    items = "".join(f'<Item name="DESCRIPTION" sample="{k}" role="description">B{k + 2}</Item>' for k in range(4))
    tags = [(42113, "s", 0, "-9999", True), (42112, "s", 0, f"<GDALMetadata>{items}</GDALMetadata>", True)]
    raster = written(tmp_path / "a.tif", TILE, planarconfig="contig", extratags=tags)
    assert (raster.nodata, raster.bands) == (-9999, ("B2", "B3", "B4", "B5"))


def test_a_level_of_a_pyramid(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        shared = {"photometric": "minisblack", "tile": (16, 16), "planarconfig": "contig"}
        file.write(TILE, subifds=1, metadata={"axes": "YXS"}, **shared)
        file.write(np.ascontiguousarray(TILE[::2, ::2]), subfiletype=1, **shared)
    blob = Blob(str(tmp_path / "a.tif"))
    assert np.array_equal(whole(open_tiff(blob, Reading())), TILE)
    assert np.array_equal(whole(open_tiff(blob, Reading(level=1))), TILE[::2, ::2])
    with pytest.raises(ValueError, match="--level 2 of a file with 2 levels"):
        open_tiff(blob, Reading(level=2))


def test_white_is_turned_and_opacity_known(tmp_path: Path) -> None:
    raster = written(tmp_path / "a.tif", TILE[..., 0], photometric="miniswhite")
    assert np.array_equal(whole(raster)[..., 0], 65535 - TILE[..., 0])
    assert INVERTED in raster.notes
    raster = written(tmp_path / "b.tif", TILE, photometric="rgb", extrasamples=["unassalpha"])
    assert (raster.alpha, raster.premultiplied, raster.channels) == (3, False, 4)


def test_numbers_that_are_no_values_are_refused(tmp_path: Path) -> None:
    palette = RNG.integers(0, 65536, (3, 256)).astype(np.uint16)
    with pytest.raises(ValueError, match="palette"):
        written(tmp_path / "a.tif", TILE[..., 0].astype(np.uint8), photometric="palette", colormap=palette)
    with pytest.raises(ValueError, match="complex64"):
        written(tmp_path / "b.tif", TILE[..., 0].astype(np.complex64))
    wide = written(tmp_path / "c.tif", np.full((4, 5), 2**24 + 1, np.int32))
    with pytest.raises(ValueError, match="float32 does not hold"):
        whole(wide)


def test_truncated_pieces_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, TILE, photometric="minisblack", planarconfig="contig", metadata=None, rowsperstrip=8)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 3000])
    with pytest.raises(ValueError, match=r"a strip or tile at byte \d+ has \d+ bytes of"):
        whole(open_tiff(Blob(str(path)), Reading()))
    assert np.array_equal(whole(open_tiff(Blob("a.tif", data), Reading())), TILE)  # out of a tar file


def test_photographs_are_known_by_their_header() -> None:
    grey, colour = TILE[..., 0].astype(np.uint8), TILE[..., :3].astype(np.uint8)
    assert is_photograph(Blob("a.tif", Tiff().add(grey).bytes()))
    assert is_photograph(Blob("a.tif", Tiff(big=True).add(colour).bytes()))
    assert not is_photograph(Blob("a.tif", Tiff().add(TILE[..., 0]).bytes()))
    assert not is_photograph(Blob("a.tif", Tiff().add(grey, tags={277: 5}).bytes()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as users have it: Pillow's warnings are no errors there
        for damaged in (Tiff().add(grey).bytes()[:20], b"II*\0junk"):
            assert not is_photograph(Blob("a.tif", damaged))
    assert not is_photograph(Blob("a.tif", b"II*\0junk"))  # and says nothing


def test_a_tile_that_declares_too_much_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    written(path, TILE, tile=(16, 16), planarconfig="contig", compression="zlib").close()
    with tifffile.TiffFile(path, mode="r+b") as file:
        for name in ("TileWidth", "TileLength"):
            file.pages[0].tags[name].overwrite(48_000)
    with pytest.raises(ValueError, match=r"a tile or strip of \d+ bytes, more than"):
        open_tiff(Blob(str(path)), Reading())
    jpeg = np.zeros((64, 64), np.uint8)
    written(path, jpeg, tile=(64, 64), compression="jpeg").close()
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\xc0\x00\x0b\x08") + 5
    data[at : at + 4] = b"\xff\xf0\xff\xf0"
    with pytest.raises(ValueError, match="a JPEG of 65520 x 65520 pixels in a tile"):
        whole(open_tiff(Blob("a.tif", bytes(data)), Reading()))
