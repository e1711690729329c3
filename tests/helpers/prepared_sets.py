"""What a prepared set holds, and flags that the tests of preparing share."""

import gzip
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.sets import members, read_csv
from fasthpm.data import build_loader
from fasthpm.data.ffcv.beton import files_path, open_beton
from tests.helpers.data_fixtures import jpeg_bytes, picture

RAW_FLAGS = ("--write_mode", "raw")


def stored(path: Path) -> list[np.ndarray]:
    """The stored images of a set with one image size, uint8 [H, W, C]."""
    beton = open_beton(path)
    size = (int(beton.heights[0]), int(beton.widths[0]))
    loader = build_loader(path, batch_size=4, image_size=size, channels=beton.info.channels, train=False, num_workers=1)
    pixels = [image.numpy() for batch in loader for image in batch.images]
    loader.close()
    return pixels


def idx_files(folder: Path, count: int = 40) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """idx files like Fashion-MNIST's, but few and, for val, not compressed."""
    rng, made = np.random.default_rng(0), {}
    folder.mkdir()
    for name in ("train", "t10k"):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        made[name] = (pixels, labels)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            data = (2048 + array.ndim).to_bytes(4, "big") + np.array(array.shape, ">i4").tobytes() + array.tobytes()
            packed = gzip.compress(data) if name == "train" else data
            (folder / f"{name}-{kind}-ubyte{'.gz' if name == 'train' else ''}").write_bytes(packed)
    return made


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def spoil(folder: Path) -> dict[str, str]:
    """Put unreadable files of every kind into `folder`: name -> part of the reason."""
    whole = jpeg_bytes(picture(0, (200, 200)))
    (folder / "empty.png").touch()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("not an image")
    (folder / "gone.png").symlink_to("nowhere.png")
    Image.new("1", (5000, 5000)).save(folder / "huge.png")
    Image.fromarray(np.full((4, 4), 1e6, np.float32)).save(folder / "float.tif")
    return {
        "empty.png": "empty",
        "cut.jpg": "Premature end",
        "notes.txt": "is no image that Pillow knows (begins with 'not an im')",
        "gone.png": "No such file",
        "huge.png": "--max_pixels",
        "float.tif": "expected 0 to 1",
    }


def blobs(path: Path) -> list[bytes]:
    """The stored bytes of every sample of a set."""
    found = []
    for member in members(path):
        beton, data = open_beton(member), member.read_bytes()
        spans = zip(beton.positions.tolist(), beton.lengths.tolist(), strict=True)
        found += [data[start : start + length] for start, length in spans]
    return found


def named(path: Path) -> list[str]:
    """The sources of a set's samples."""
    return [row[0] for member in members(path) for row in list(read_csv(files_path(member)))[1:]]


def jpeg_folder(folder: Path, count: int, **options: object) -> dict[str, bytes]:
    """`count` JPEG files in class folders ant and bee: name -> bytes."""
    made = {}
    for index in range(count):
        name = f"{('ant', 'bee')[index % 2]}/{index:03d}.jpg"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        made[name] = jpeg_bytes(picture(index, (64, 80)), **options)
        (folder / name).write_bytes(made[name])
    return made


KEEP = ("--keep_jpeg",)
