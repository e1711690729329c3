"""Photographs for the benches."""

from pathlib import Path

import numpy as np
from PIL import Image

from bench import common, photos


def test_photographs_are_cut_from_large_files(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    for index in range(2):
        large = Image.fromarray(np.roll(noise, index, 0)).resize((1600, 1200), Image.Resampling.BICUBIC)
        large.save(tmp_path / f"{index}.jpg", quality=95)
    files = sorted(tmp_path.glob("*.jpg"))
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        assert photos.write_photos(files, folder, 6, 0) == sum(f.stat().st_size for f in common.files_in(folder))
    first, second = ([file.read_bytes() for file in common.files_in(folder)] for folder in folders)
    assert first == second
    assert len(set(first)) == 6
    sizes = {_size(file) for file in common.files_in(folders[0])}
    assert sizes <= {(500, 375), (375, 500)}


def _size(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size
