"""Folders of image files."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasthpm.data import build_loader, plain
from tests.helpers.data_fixtures import image_folder, jpeg_bytes, picture
from tests.helpers.odd_files import hole, saved, texture


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


def test_what_should_be_known_of_a_folder_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "_told", set())
    for k in range(3):
        Image.fromarray(np.full((8, 8), 1000 + k, np.uint16)).save(tmp_path / f"{k}.png")
    for _ in range(2):
        build_loader(tmp_path, batch_size=3, image_size=(8, 8), channels=1).close()
    said = capsys.readouterr().err
    assert said.count("16 bits, but no pixel above 1/64 of the range") == 1
    assert f"{tmp_path / '0.png'}: " in said


def test_damage_that_pillow_passes_over_is_a_bad_sample(tmp_path: Path) -> None:
    whole = saved(texture(160, 240), "JPEG", progressive=True)
    for k in range(4):
        (tmp_path / f"{k}.jpg").write_bytes(hole(whole, len(whole) // 2, 2000) if k == 1 else whole)
    Image.open(tmp_path / "1.jpg").load()
    loader = build_loader(tmp_path, batch_size=4, image_size=(8, 8), channels=3)
    (batch,) = loader
    loader.close()
    assert batch.replaced.sum() == 1
    ((sample, _, why),) = loader.bad_samples()
    assert sample == 1
    assert "Corrupt JPEG data" in why
