"""Fashion-MNIST as two prepared sets: `python -m data_prep.fashion_mnist OUT_DIR` writes train.beton and val.beton.

60000 and 10000 grey images of 28 x 28 pixels in 10 classes (Xiao et al. 2017), stored raw. They come from Debian's
package dataset-fashion-mnist, from `--source`, or else from torchvision's download.
"""

import argparse
import gzip
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.encode import WriteOptions
from data_prep.images import summary
from data_prep.sets import check_folder, make_folder
from data_prep.writer import write_beton
from fasthpm.cli import Parser, run_command
from fasthpm.data.ffcv.beton import open_beton
from fasthpm.data.sampling import Array
from fasthpm.errors import UserError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
SPLITS = {"train": "train", "val": "t10k"}  # our names and the files'
IMAGES_MAGIC, LABELS_MAGIC = 2051, 2049  # idx: unsigned bytes, 3 dimensions and 1


class Arrays:
    """uint8 [N, H, W] and labels [N] as an indexable set."""

    def __init__(self, images: Array, labels: Array) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Array, int]:
        return self.images[index], int(self.labels[index])


def find_idx(folder: Path, name: str) -> Path:
    """`name`.gz or `name`. **Raises:** `UserError` if neither is there."""
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise UserError(f"{folder} has no {name}.gz; apt-get install dataset-fashion-mnist, or name a folder that has it")


def check_source(asked: Path | None, kinds: Sequence[str] = ("images-idx3", "labels-idx1")) -> None:
    """Refuse a folder that the user names and that lacks one of the idx files, also where nothing is to be read.

    **Raises:** `UserError` with the first file that is not there.
    """
    if asked is not None:
        for stem, kind in itertools.product(SPLITS.values(), kinds):
            find_idx(asked, f"{stem}-{kind}-ubyte")


def read_idx(folder: Path, name: str, magic: int) -> Array:
    """The array in `name` or `name`.gz: uint8 [N, ...].

    **Raises:** `UserError` if neither is there, or it is no idx file of this kind.
    """
    path = find_idx(folder, name)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}); download it again") from error
    dimensions = magic % 256
    shape = np.frombuffer(data, ">i4", dimensions, 4) if len(data) >= 4 + 4 * dimensions else np.zeros(1)
    values = np.frombuffer(data, np.uint8, offset=min(4 + 4 * dimensions, len(data)))
    if int.from_bytes(data[:4], "big") != magic or values.size != shape.prod():
        raise UserError(f"{path} is not an idx file with magic number {magic}, or is truncated; download it again")
    return values.reshape(shape)


def find_source(asked: Path | None, out: Path) -> Path:
    """The folder with the four idx files, downloaded into `out` if need be.

    **Raises:** `UserError` with what to do, if there is none and none can be had.
    """
    if asked is not None or DEBIAN.is_dir():
        return asked or DEBIAN
    try:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(out / "download", download=True)
    except Exception as error:  # torchvision's or the network's, whichever
        raise UserError(
            f"Fashion-MNIST is not in {DEBIAN} and torchvision cannot download it ({error}); apt-get "
            f"install dataset-fashion-mnist, or name a folder with its four idx files"
        ) from error
    return out / "download" / "FashionMNIST" / "raw"


def is_prepared(path: Path) -> bool:
    """Whether a set is there already and fits its sidecar (size and table; not every byte)."""
    if not path.exists():
        return False
    try:
        return open_beton(path).info.classes == CLASSES
    except UserError:
        return False


def read_split(split: str, source: Path) -> tuple[Array, Array]:
    """Images uint8 [N, 28, 28] and labels [N] of train or val. **Raises:** `UserError` if they do not fit together."""
    images = read_idx(source, f"{SPLITS[split]}-images-idx3-ubyte", IMAGES_MAGIC)
    labels = read_idx(source, f"{SPLITS[split]}-labels-idx1-ubyte", LABELS_MAGIC)
    if len(images) != len(labels):
        raise UserError(f"{source} has {len(images)} {split} images but {len(labels)} labels; download it again")
    return images, labels


def prepare_split(split: str, source: Path, out: Path, num_workers: int) -> None:
    """Write `split`.beton, replacing one that does not fit its sidecar."""
    started = time.monotonic()
    path = out / f"{split}.beton"
    options = WriteOptions(write_mode="raw")
    sidecar = write_beton(
        Arrays(*read_split(split, source)), path, CLASSES, options=options, num_workers=num_workers, overwrite=True
    )
    print(summary(path, sidecar, time.monotonic() - started), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare both splits, unless they are there."""
    parser: argparse.ArgumentParser = Parser(prog="python -m data_prep.fashion_mnist", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder for train.beton and val.beton")
    parser.add_argument("--source", type=Path, help=f"folder with the idx files (default {DEBIAN}, else a download)")
    parser.add_argument("--num_workers", type=int, default=0, metavar="N", help="processes; 0 = all cores (default)")
    args = parser.parse_args(argv)
    check_folder(args.out, "OUT_DIR")
    check_source(args.source)
    missing = [split for split in SPLITS if not is_prepared(args.out / f"{split}.beton")]
    if not missing:
        print(f"{args.out} has train.beton and val.beton already; nothing to do", flush=True)
        return
    make_folder(args.out)
    source = find_source(args.source, args.out)
    for split in missing:
        prepare_split(split, source, args.out, args.num_workers)


if __name__ == "__main__":
    run_command(main)
