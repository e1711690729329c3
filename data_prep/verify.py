"""Check a prepared set against its sidecar: `python -m data_prep.verify OUT.beton`.

Size, header, allocation table, labels per class and sha256 must match, and every image must decode. Exit status 2 and
one line if not.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_prep.writer import hash_file, progress_bar
from fasthpm.cli import Parser, run_command
from fasthpm.data.beton import AGAIN, JPEG, Beton, open_beton
from fasthpm.data.ffcv_images import FfcvLoader
from fasthpm.data.prefetch import LoaderOptions
from fasthpm.data.sampling import Array, centre_crops
from fasthpm.errors import UserError

CHUNK = 64
THUMBNAIL = (8, 8)  # decoding is what is tested, so what comes out is small


def verify(path: Path, num_workers: int = 0) -> Beton:
    """Check everything; returns the table of the set.

    **Raises:** `UserError` at the first thing that does not match.
    """
    options = LoaderOptions(
        batch_size=CHUNK,
        image_size=THUMBNAIL,
        channels=open_beton(path).info.channels,
        num_workers=num_workers,
        train=False,
        crop_pct=1.0,
    )
    loader = FfcvLoader(path, options)
    beton = loader.beton
    _check_labels(beton)
    digest = hash_file(path)
    if digest != beton.sidecar["sha256"]:
        raise UserError(
            f"{path} has sha256 {digest}, its sidecar says {beton.sidecar['sha256']}: its content has "
            f"changed; copy it again or {AGAIN}"
        )
    _check_pixels(loader)
    return beton


def _check_labels(beton: Beton) -> None:
    classes = len(beton.info.classes)
    outside = (beton.labels < 0) | (beton.labels >= classes)
    if outside.any():
        raise UserError(
            f"{beton.path}: sample {int(outside.argmax())} has label {beton.labels[outside][0]}, but there "
            f"are {classes} classes: {AGAIN}"
        )
    counts = np.bincount(beton.labels, minlength=classes).tolist()
    if counts != beton.sidecar.get("counts"):
        raise UserError(f"{beton.path}: samples per class differ from the sidecar's counts: {AGAIN}")


def _check_pixels(loader: FfcvLoader) -> None:
    """Decode every image, in parallel."""
    total, bad = loader.info.num_samples, []
    chunks = [np.arange(start, min(start + CHUNK, total)) for start in range(0, total, CHUNK)]
    with ThreadPoolExecutor(loader.num_workers) as pool, progress_bar(total, "decode", "img") as bar:
        for ids, status in zip(chunks, pool.map(lambda ids: _status(loader, ids), chunks), strict=True):
            bad += ids[status != 0].tolist()
            bar.update(len(ids))
    if bad:
        raise UserError(
            f"{loader.source}: {len(bad)} of {total} images do not decode, the first is sample {bad[0]}: {AGAIN}"
        )


def _status(loader: FfcvLoader, ids: Array) -> Array:
    """Decoding status of samples, 0 if all is well: int32 [b]."""
    size = loader.options.image_size
    images = np.empty((len(ids), *size, loader.options.channels), np.uint8)
    return loader.decode(images, ids, centre_crops(loader._sizes(ids), size, 1.0))


def main(argv: Sequence[str] | None = None) -> None:
    """Check a set and print a summary."""
    parser: argparse.ArgumentParser = Parser(prog="python -m data_prep.verify", description=__doc__)
    parser.add_argument("path", type=Path, metavar="OUT.beton", help="prepared set; its .json lies beside it")
    parser.add_argument("--num_workers", type=int, default=0, metavar="N", help="threads; 0 = all cores (default)")
    args = parser.parse_args(argv)
    beton = verify(args.path, args.num_workers)
    jpegs, sidecar = int((beton.modes == JPEG).sum()), beton.sidecar
    print(
        f"{args.path} is sound: {sidecar['num_samples']} images ({jpegs} JPEG, {sidecar['num_samples'] - jpegs} raw), "
        f"{len(sidecar['classes'])} classes, {sidecar['channels']} channels, {sidecar['bytes']} bytes, sha256 "
        f"{sidecar['sha256'][:16]}…",
        flush=True,
    )


if __name__ == "__main__":
    run_command(main)
