"""Prepared images: the pixels that loaders make of them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasthpm.data import build_loader, read_info
from fasthpm.data.ffcv.beton import open_beton
from fasthpm.data.pixels import render
from tests.helpers.data_fixtures import image_folder, picture, prepare


@pytest.mark.parametrize("interpolation", ["area", "bicubic"])
def test_ffcv_pixels_agree_with_the_plain_truth(interpolation: str, tmp_path: Path) -> None:
    """Raw sets, same boxes: one grey level at most, but for a few values where PIL rounds or clips between passes."""
    folder = image_folder(tmp_path / "folder", 12, sizes=((40, 48), (61, 37), (24, 24)))
    loader = build_loader(
        prepare(folder, tmp_path / "set.beton", "--write_mode", "raw"),
        batch_size=12,
        image_size=(24, 24),
        channels=3,
        num_workers=2,
        interpolation=interpolation,
    )
    stored = build_loader(folder, batch_size=1, image_size=(8, 8), channels=3, train=False)
    originals = {np.asarray(Image.open(path)).tobytes(): path for path in map(Path, stored._images.paths)}
    decoded = raw_images(Path(loader.source))
    assert {image.tobytes() for image in decoded} == set(originals)
    for epoch in range(6):
        loader.set_epoch(epoch)
        (batch,) = loader
        for row, index, crop in zip(batch.images.numpy(), batch.ids.tolist(), batch.crops.numpy(), strict=True):
            truth = render(decoded[index], crop, (24, 24), interpolation, np.ones(3))
            difference = np.abs(row.astype(int) - truth)
            allowed = 0 if interpolation == "area" else 0.01
            assert (difference > 1).mean() <= allowed
            assert difference.max() <= (1 if interpolation == "area" else 12)
    loader.close()
    stored.close()


def raw_images(path: Path) -> list[np.ndarray]:
    """The stored pixels of a raw set, read through FFCV's own reader."""
    from ffcv.reader import Reader

    reader, data = Reader(str(path)), path.read_bytes()
    images = []
    for row in reader.metadata["f0"]:
        shape = (int(row["height"]), int(row["width"]), 3)
        start = int(row["data_ptr"])
        images.append(np.frombuffer(data, np.uint8, int(np.prod(shape)), start).reshape(shape))
    return images


def test_jpeg_pixels_agree_with_pil(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "folder", 6)
    out = prepare(folder, tmp_path / "set.beton", "--write_mode", "jpg", "--jpeg_quality", "90")
    beton, data = open_beton(out), out.read_bytes()
    loader = build_loader(out, batch_size=6, image_size=(40, 48), channels=3, train=False)
    (batch,) = loader
    loader.close()
    for index in range(6):
        start, length = int(beton.positions[index]), int(beton.lengths[index])
        (tmp_path / "x.jpg").write_bytes(data[start : start + length])
        truth = np.asarray(Image.open(tmp_path / "x.jpg")).astype(int)
        # FFCV decodes with turbojpeg's fast DCT: 1.03 levels on average at quality 90 (1.6 at 95, 2.7 at 100).
        difference = np.abs(batch.images[index].numpy() - truth)
        assert difference.mean() < 1.25
        assert difference.max() <= 8


@pytest.mark.parametrize("kind", ["ffcv", "plain"])
def test_grey_sets_come_out_with_one_channel(tmp_path: Path, kind: str) -> None:
    folder = image_folder(tmp_path / "folder", 4, grey=True)
    source = prepare(folder, tmp_path / "set.beton", "--write_mode", "raw") if kind == "ffcv" else folder
    info = read_info(source)
    assert info.channels == len(info.mean) == len(info.std) == 1
    loader = build_loader(source, batch_size=4, image_size=(40, 48), channels=1, train=False)
    (batch,) = loader
    loader.close()
    truth = sorted(np.asarray(picture(index, grey=True)).tobytes() for index in range(4))
    assert batch.images.shape == (4, 40, 48, 1)
    assert sorted(image.numpy().tobytes() for image in batch.images) == truth
    rgb = build_loader(source, batch_size=4, image_size=(40, 48), channels=3, train=False)
    (colours,) = rgb
    rgb.close()
    assert torch.equal(colours.images, batch.images.expand(-1, -1, -1, 3))
    assert rgb.info == dataclasses.replace(info, channels=3, mean=info.mean * 3, std=info.std * 3)


def test_evaluation_crop_is_whole_for_images_of_the_right_size(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "folder", 3)
    for source in (str(folder), "synthetic:3", str(prepare(folder, tmp_path / "set.beton"))):
        options = {"batch_size": 3, "channels": 3, "train": False}
        loader = build_loader(source, image_size=(40, 48), **options)
        (batch,) = loader
        assert batch.crops.tolist() == [[0, 0, 40, 48, 0]] * 3
        loader.close()
        if not source.startswith("synthetic"):
            loader = build_loader(source, image_size=(16, 16), **options)
            (batch,) = loader
            assert batch.crops.tolist() == [[2, 6, 35, 35, 0]] * 3  # 0.875 of the largest square
            loader.close()
