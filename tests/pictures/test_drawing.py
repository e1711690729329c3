"""PNG files."""

from pathlib import Path

import numpy as np
from PIL import Image

from fasthpm.pictures import drawing


def test_png_is_written_whole(tmp_path: Path) -> None:
    picture = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    drawing.save_png(picture, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as written:
        assert np.array_equal(np.asarray(written), picture)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_rounding_is_not_painted() -> None:
    values = np.full((2, 4, 4), 0.3, np.float32)
    values[:, 0] = np.nextafter(values[:, 0], np.float32(1))
    values[1, 2, 2] = 0.4
    colours = drawing.heat(values)
    assert (colours[0] == colours[0, 0, 0]).all()
    assert not (colours[1] == colours[1, 0, 0]).all()


def test_a_map_leaves_the_picture_where_it_is_nan() -> None:
    picture = np.full((4, 4, 3), 90, np.uint8)
    values = np.array([[np.nan, 1.0], [2.0, 3.0]])
    found = drawing.blended(picture, values)
    assert (found[:2, :2] == 90).all()
    whole = drawing.blended(picture, np.where(np.isnan(values), 1.0, values))
    np.testing.assert_array_equal(found[2:], whole[2:])
    np.testing.assert_array_equal(drawing.blended(picture, np.full((2, 2), np.nan)), picture)
