"""Folders of image files."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from fasthpm.data import build_loader
from tests.helpers.data_fixtures import image_folder, jpeg_bytes, picture


def test_plain_loader_sees_rotated_images_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.open(io.BytesIO(jpeg_bytes(picture(0))))
    (tmp_path / "a.jpg").write_bytes(jpeg_bytes(picture(0), exif=exif))
    loader = build_loader(tmp_path, batch_size=1, image_size=(48, 40), channels=3, train=False)
    (batch,) = loader
    loader.close()
    assert batch.sizes.tolist() == [[48, 40]]
    assert np.array_equal(batch.images[0], np.asarray(upright.transpose(Image.Transpose.ROTATE_270)))


def test_a_file_that_changes_its_size_is_a_bad_sample(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "folder", 4)
    loader = build_loader(folder, batch_size=4, image_size=(8, 8), channels=3)
    list(loader)
    picture(1, (8, 9)).save(folder / "ant" / "000.png")
    (batch,) = loader
    loader.close()
    assert batch.replaced.sum() == 1
    assert "another size" in loader.bad_samples()[0].why
