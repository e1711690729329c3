"""Images into a prepared set: `python -m data_prep.images SRC OUT.beton`.

SRC is a folder of class folders (sorted by name, they become the labels), a flat folder (one class, label 0), or a .txt
list with one `path` or `path<TAB>label` per line, relative to the list's folder (without a tab, the last space
separates them). Labels are whole numbers or class names. In folders every file that is not hidden counts.

Writes OUT.beton (FFCV; fields image and label, in seeded random order), OUT.json (counts, classes, mean and std, sizes,
hash, options, versions) and, if files could not be read, OUT.rejected.csv. Transparency is laid over white, EXIF
rotation applied, 16-bit grey scaled, CMYK and palettes converted; of an animation the first frame counts.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_prep.writer import WRITE_MODES, WriteOptions, rejected_path, write_beton
from fasthpm.cli import Parser, run_command
from fasthpm.data.beton import sidecar_path
from fasthpm.data.pixels import ImageList, list_images
from fasthpm.errors import UserError

MAX_PIXELS = 200_000_000


class ImageFiles:
    """Files as an indexable set of (PIL image, label). Opening is lazy; decoding errors surface in the conversion."""

    def __init__(self, images: ImageList, max_pixels: int) -> None:
        self.images, self.max_pixels = images, max_pixels

    def __len__(self) -> int:
        return len(self.images.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path = self.images.paths[index]
        if os.path.getsize(path) == 0:
            raise ValueError("the file is empty")
        Image.MAX_IMAGE_PIXELS = None  # ours takes its place: PIL only warns until twice the limit
        image = Image.open(path)
        if image.width * image.height > self.max_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels, more than --max_pixels {self.max_pixels}")
        return image, self.images.labels[index]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m data_prep.images", description=__doc__)
    parser.add_argument("source", type=Path, metavar="SRC", help="folder of class folders, flat folder, or .txt list")
    parser.add_argument("out", type=Path, metavar="OUT.beton", help="file to write")
    parser.add_argument(
        "--max_resolution",
        type=int,
        default=500,
        metavar="PIXELS",
        help="shrink images whose longer side is more; 0 = never (default 500)",
    )
    parser.add_argument(
        "--write_mode",
        choices=WRITE_MODES,
        default="jpg",
        help="jpg; raw pixels; proportion: a random share as JPEG; smart: large ones as JPEG",
    )
    parser.add_argument(
        "--jpeg_quality",
        type=int,
        default=90,
        metavar="1..100",
        help="default 90; the loader's fast DCT loses more above that than the quality gains",
    )
    parser.add_argument(
        "--compress_probability",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="share of JPEGs in proportion mode (default .5)",
    )
    parser.add_argument(
        "--smart_threshold",
        type=int,
        default=200_000,
        metavar="BYTES",
        help="smart mode stores images with more bytes of pixels as JPEG (default 200000)",
    )
    parser.add_argument("--grey", action="store_true", help="store luma only: one channel")
    parser.add_argument(
        "--max_rejected",
        type=float,
        default=0.01,
        metavar="N",
        help="unreadable files that are put up with: below 1 a share, from 1 a number (default .01)",
    )
    parser.add_argument(
        "--max_pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help=f"reject images with more pixels, for the memory's sake (default {MAX_PIXELS})",
    )
    parser.add_argument("--num_workers", type=int, default=0, metavar="N", help="processes; 0 = all cores (default)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample order (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.beton if it exists")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare a set and say what was written."""
    args = build_parser().parse_args(argv)
    if args.max_rejected < 0 or args.num_workers < 0 or args.max_pixels < 1:
        raise UserError(
            f"max_rejected {args.max_rejected:g}, num_workers {args.num_workers} and max_pixels "
            f"{args.max_pixels} must be 0 or more (max_pixels 1 or more)"
        )
    options = WriteOptions(
        max_resolution=args.max_resolution,
        jpeg_quality=args.jpeg_quality,
        write_mode=args.write_mode,
        compress_probability=args.compress_probability,
        smart_threshold=args.smart_threshold,
        grey=args.grey,
        seed=args.seed,
    )
    started = time.monotonic()
    images = list_images(args.source, every_file=True)
    print(f"{args.source}: {len(images.paths)} files, {len(images.classes)} classes", flush=True)
    sidecar = write_beton(
        ImageFiles(images, args.max_pixels),
        args.out,
        images.classes,
        options=options,
        name_of=images.paths.__getitem__,
        max_rejected=args.max_rejected,
        num_workers=args.num_workers,
        overwrite=args.overwrite,
    )
    print(summary(args.out, sidecar, time.monotonic() - started), flush=True)


def summary(out: Path, sidecar: dict[str, Any], seconds: float) -> str:
    """The closing words about a set that was written."""
    mean, std = ([round(value, 4) for value in sidecar[name]] for name in ("mean", "std"))
    rejected = sidecar["num_rejected"]
    lines = [
        f"wrote {out}: {sidecar['num_samples']} images, {len(sidecar['classes'])} classes, {sidecar['channels']} "
        f"channel{'s' if sidecar['channels'] > 1 else ''}, {sidecar['bytes']} bytes, in {seconds:.0f} s",
        f"      {sidecar_path(out)}: mean {mean}, std {std}, largest {sidecar['max_height']} x {sidecar['max_width']}",
    ]
    if rejected:
        lines.append(f"      {rejected_path(out)}: {rejected} unreadable files were left out")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
