"""PNG, PGM and other pictures in their own numbers; opacity kept or laid over a ground."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasthpm.data.rasters.pictures import is_transparent, open_photograph, open_wide, with_alpha
from fasthpm.data.rasters.raster import Blob, Raster, Reading
from tests.helpers.odd_files import hole, png, saved

RNG = np.random.default_rng(0)


def whole(raster: Raster) -> np.ndarray:
    return raster.read(0, raster.whole())


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_sixteen_bits(channels: int) -> None:
    values = RNG.integers(0, 65536, (7, 9, channels)).astype(np.uint16)
    raster = open_wide(Blob("a.png", png(values)), Reading())
    assert (raster.dtype, raster.channels, raster.alpha) == (
        "uint16",
        channels,
        channels - 1 if channels % 2 == 0 else None,
    )
    assert np.array_equal(whole(raster), values)


def test_damaged_png_is_refused() -> None:
    data = png(RNG.integers(0, 65536, (7, 9, 1)).astype(np.uint16))
    with pytest.raises(ValueError, match="checksum"):
        whole(open_wide(Blob("a.png", hole(data, len(data) - 40, 4)), Reading()))


def test_wide_grey_of_other_formats() -> None:
    values = RNG.integers(0, 65536, (7, 9)).astype(np.uint16)
    pgm = b"P5 9 7 65535\n" + values.astype(">u2").tobytes()
    assert np.array_equal(whole(open_wide(Blob("a.pgm", pgm), Reading()))[..., 0], values)
    jp2 = saved(Image.fromarray(values), "JPEG2000")
    assert np.array_equal(whole(open_wide(Blob("a.jp2", jp2), Reading()))[..., 0], values)


def test_opacity_of_photographs(tmp_path: Path) -> None:
    values = RNG.integers(0, 256, (5, 6, 4)).astype(np.uint8)
    data, opaque = saved(Image.fromarray(values), "PNG"), saved(Image.fromarray(values[..., :3]), "PNG")
    assert is_transparent(data)
    assert not is_transparent(opaque)
    assert np.array_equal(with_alpha(data, Reading(), "keep"), values)
    assert np.array_equal(with_alpha(opaque, Reading(), "keep")[..., 3], np.full((5, 6), 255))
    black = with_alpha(data, Reading(), "black").astype(int)
    assert np.abs(black - values[..., :3].astype(float) * values[..., 3:] / 255).max() <= 1
    kept = open_photograph(Blob("a.png", data), Reading(), "keep")
    assert np.array_equal(kept.read(0, (1, 2, 3, 4)), values[1:4, 2:6])
    buffer = io.BytesIO()
    Image.fromarray(values[..., :3]).save(buffer, "JPEG")
    assert whole(open_photograph(Blob("a.jpg", buffer.getvalue()), Reading())).shape == (5, 6, 3)
