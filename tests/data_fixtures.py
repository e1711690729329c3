"""Small image folders and prepared sets for the tests of the data path."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep import images


def picture(index: int, size: tuple[int, int] = (40, 48), *, grey: bool = False) -> Image.Image:
    """A smooth, textured image, different for every index: height x width of `size`."""
    rng = np.random.default_rng(index)
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
    return image.convert("L") if grey else image


def image_folder(
    folder: Path, count: int, *, grey: bool = False, sizes: tuple[tuple[int, int], ...] = ((40, 48),)
) -> Path:
    """`count` PNG files in class folders ant and bee, whose sizes take turns."""
    for index in range(count):
        target = folder / ("ant", "bee")[index % 2]
        target.mkdir(parents=True, exist_ok=True)
        picture(index, sizes[index % len(sizes)], grey=grey).save(target / f"{index:03d}.png")
    return folder


def prepare(source: Path, out: Path, *flags: str) -> Path:
    """Run `data_prep.images`."""
    images.main([str(source), str(out), "--num_workers", "2", *flags])
    return out


def jpeg_bytes(image: Image.Image, **options: object) -> bytes:
    """`image` as a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()
