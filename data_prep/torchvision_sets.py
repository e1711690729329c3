"""Transfer data sets in the forms that torchvision and their authors give them, as prepared sets.

    python -m data_prep.torchvision_sets cifar10 SRC OUT_DIR         # or cifar100, stl10, tiny_imagenet

SRC is the unpacked folder or the folder around it: cifar-10-batches-py (or -bin), cifar-100-python (or -binary),
stl10_binary, tiny-imagenet-200. OUT_DIR receives train.beton and val.beton, for STL-10 also unlabeled.beton where its
file is there. Ordinary class folders need none of this: python -m data_prep.images SRC/train OUT_DIR/train.beton.
Nothing in a downloaded file is run: pickles may hold arrays and plain values only.
"""

import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import images
from data_prep.encode import WriteOptions
from data_prep.fashion_mnist import Arrays
from data_prep.images import summary
from data_prep.sets import check_folder, make_folder
from data_prep.writer import write_beton
from fasthpm.cli import Parser, run_command
from fasthpm.data.ffcv.beton import open_beton
from fasthpm.data.sampling import Array
from fasthpm.errors import UserError

Split = tuple[Array, Array, tuple[str, ...]]  # uint8 [N, H, W, 3], labels [N], classes
ALLOWED = {  # what CIFAR's pickles are made of
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
CIFAR_SIDE, STL_SIDE = 32, 96


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}")
        return super().find_class(module, name)


def read_pickle(path: Path) -> dict[str, Any]:
    """A CIFAR batch, its keys as text.

    **Raises:** `UserError` for a file that is missing, damaged, or holds more than arrays and plain values.
    """
    try:
        with path.open("rb") as file:
            values = _PlainUnpickler(file, encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in values.items()}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected an unpacked archive") from error
    except Exception as error:  # pickle raises nearly anything for damaged files
        raise UserError(f"{path} is not a CIFAR batch ({error}); download and unpack it again") from error


def find_folder(source: Path, names: Sequence[str]) -> Path:
    """The folder of one of these names: `source` itself or inside it. **Raises:** `UserError` if there is none."""
    for name in names:
        for folder in (source, source / name):
            if folder.name == name and folder.is_dir():
                return folder
    raise UserError(f"{source} has no folder {' or '.join(names)}; give the folder that the archive was unpacked into")


# -------------------------------------------------------------------------------------------------- CIFAR
def read_cifar(source: Path, classes: int) -> dict[str, Split]:
    """Both splits of CIFAR-10 or -100, in Python's or the binary form."""
    names = {10: ("cifar-10-batches-py", "cifar-10-batches-bin"), 100: ("cifar-100-python", "cifar-100-binary")}
    folder = find_folder(source, names[classes])
    read = _cifar_python if folder.name in ("cifar-10-batches-py", "cifar-100-python") else _cifar_binary
    return read(folder, classes)


def _cifar_files(folder: Path, classes: int, suffix: str) -> dict[str, list[Path]]:
    if classes == 100:
        return {"train": [folder / f"train{suffix}"], "val": [folder / f"test{suffix}"]}
    train = [folder / f"data_batch_{number}{suffix}" for number in range(1, 6)]
    return {"train": train, "val": [folder / f"test_batch{suffix}"]}


def _cifar_python(folder: Path, classes: int) -> dict[str, Split]:
    meta = read_pickle(folder / ("batches.meta" if classes == 10 else "meta"))
    texts = meta.get("label_names" if classes == 10 else "fine_label_names", [])
    names = tuple(text.decode() if isinstance(text, bytes) else str(text) for text in texts)
    splits = {}
    for split, files in _cifar_files(folder, classes, "").items():
        batches = [read_pickle(file) for file in files]
        key = "labels" if classes == 10 else "fine_labels"
        if not all({"data", key} <= batch.keys() for batch in batches):
            raise UserError(f"{files[0]} has no data or no {key}; it belongs to another data set")
        pixels = np.concatenate([np.asarray(batch["data"], np.uint8) for batch in batches])
        splits[split] = (_planes(pixels, CIFAR_SIDE), np.concatenate([batch[key] for batch in batches]), names)
    return splits


def _cifar_binary(folder: Path, classes: int) -> dict[str, Split]:
    listing = folder / ("batches.meta.txt" if classes == 10 else "fine_label_names.txt")
    names = tuple(_read_text(listing).split())
    head, splits = (1 if classes == 10 else 2), {}  # CIFAR-100 has the coarse label first
    for split, files in _cifar_files(folder, classes, ".bin").items():
        rows = np.concatenate([_read_rows(file, head + 3 * CIFAR_SIDE**2) for file in files])
        splits[split] = (_planes(rows[:, head:], CIFAR_SIDE), rows[:, head - 1].astype(np.int64), names)
    return splits


# -------------------------------------------------------------------------------------------------- STL-10
def read_stl10(source: Path) -> dict[str, Split]:
    """train (5,000), val (8,000) and, if it is there, unlabeled (100,000, as one class) of STL-10."""
    folder = find_folder(source, ("stl10_binary",))
    classes = tuple(_read_text(folder / "class_names.txt").split())
    splits = {}
    for split, name in (("train", "train"), ("val", "test")):
        labels = _read_rows(folder / f"{name}_y.bin", 1)[:, 0].astype(np.int64) - 1  # from 1 in the files
        splits[split] = (_stl_images(folder / f"{name}_X.bin"), labels, classes)
    if (folder / "unlabeled_X.bin").is_file():
        pixels = _stl_images(folder / "unlabeled_X.bin")
        splits["unlabeled"] = (pixels, np.zeros(len(pixels), np.int64), ("unlabeled",))
    return splits


def _stl_images(path: Path) -> Array:
    pixels = _read_rows(path, 3 * STL_SIDE**2).reshape(-1, 3, STL_SIDE, STL_SIDE)
    return pixels.transpose(0, 3, 2, 1)  # stored column by column


# -------------------------------------------------------------------------------------------------- Tiny ImageNet
def list_tiny_imagenet(source: Path, lists: Path) -> dict[str, Path]:
    """Write a list of files and labels per split into `lists`; returns their paths.

    A list names files below its own folder only: there the data set is a link, because it may lie where none may write.
    """
    original = find_folder(source, ("tiny-imagenet-200",)).resolve()
    folder = lists / original.name
    folder.symlink_to(original, target_is_directory=True)
    train = [
        f"{path.relative_to(lists)}\t{path.parent.parent.name}"
        for path in sorted((folder / "train").glob("*/images/*.JPEG"))
    ]
    rows = [line.split("\t") for line in _read_text(folder / "val" / "val_annotations.txt").splitlines()]
    val = [f"{folder.name}/val/images/{row[0]}\t{row[1]}" for row in rows if len(row) > 1]
    labels = [{line.rpartition("\t")[2] for line in split} for split in (train, val)]
    if not train or labels[0] != labels[1]:
        raise UserError(
            f"{folder} has {len(labels[0])} classes in train and {len(labels[1])} or others in val; expected the "
            f"archive's train/WNID/images and val/val_annotations.txt"
        )
    paths = {}
    for split, lines in (("train", train), ("val", val)):
        paths[split] = lists / f"{split}.txt"
        paths[split].write_text("".join(f"{line}\n" for line in lines))
    return paths


# -------------------------------------------------------------------------------------------------- files
def _planes(rows: Array, side: int) -> Array:
    return rows.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)


def _read_rows(path: Path, width: int) -> Array:
    try:
        values = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected an unpacked archive") from error
    if not len(values) or len(values) % width:
        raise UserError(f"{path} has {len(values)} bytes, expected a multiple of {width}; download it again")
    return values.reshape(-1, width)


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); expected an unpacked archive") from error


def write_split(path: Path, split: Split, num_workers: int) -> None:
    """Write one prepared set, raw where images are tiny."""
    pixels, labels, classes = split
    if len(pixels) != len(labels) or (len(labels) and not 0 <= labels.min() <= labels.max() < len(classes)):
        raise UserError(
            f"{path.stem}: {len(pixels)} images, {len(labels)} labels up to {labels.max(initial=-1)}, {len(classes)} "
            f"class names do not fit together; download the set again"
        )
    started = time.monotonic()
    options = WriteOptions(write_mode="raw" if pixels.shape[1] <= CIFAR_SIDE else "jpg", jpeg_quality=95)
    sidecar = write_beton(
        Arrays(pixels, labels), path, classes, options=options, num_workers=num_workers, overwrite=True
    )
    print(summary(path, sidecar, time.monotonic() - started), flush=True)


def is_there(path: Path, split: Split) -> bool:
    """Whether this split was prepared before: as many images of the same classes."""
    if not path.is_file():
        return False
    try:
        info = open_beton(path).info
    except UserError:
        return False
    return (info.num_samples, info.classes) == (len(split[0]), split[2])


READERS: dict[str, Callable[[Path], dict[str, Split]]] = {
    "cifar10": lambda source: read_cifar(source, 10),
    "cifar100": lambda source: read_cifar(source, 100),
    "stl10": read_stl10,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare all splits, but those that are there."""
    parser = Parser(prog="python -m data_prep.torchvision_sets", description=__doc__)
    parser.add_argument("name", choices=(*READERS, "tiny_imagenet"), help="which data set")
    parser.add_argument("source", type=Path, metavar="SRC", help="unpacked folder, or the folder around it")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder for train.beton and val.beton")
    parser.add_argument("--num_workers", type=int, default=0, metavar="N", help="processes; 0 = all cores (default)")
    args = parser.parse_args(argv)
    check_folder(args.out, "OUT_DIR")
    if args.name == "tiny_imagenet":
        with tempfile.TemporaryDirectory() as lists:
            paths = list_tiny_imagenet(args.source, Path(lists))
            make_folder(args.out)
            for name, path in paths.items():
                images.main(
                    [str(path), str(args.out / f"{name}.beton"), "--keep_jpeg", "--num_workers", str(args.num_workers)]
                )
        return
    splits = READERS[args.name](args.source)
    make_folder(args.out)
    for name, split in splits.items():
        path = args.out / f"{name}.beton"
        if is_there(path, split):
            print(f"{path} is there already; nothing to do", flush=True)
        else:
            write_split(path, split, args.num_workers)


if __name__ == "__main__":
    run_command(main)
