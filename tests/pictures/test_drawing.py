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
