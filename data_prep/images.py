"""Images into a prepared set: `python -m data_prep.images SRC OUT.beton`.

SRC is one of
  a folder of class folders       sorted by name, they become the labels; every file counts, hidden ones and a
                                  system's or our own excepted
  a flat folder of images         one class, label 0
  a .txt or .csv list             a line `path` or `path label` each, relative to the list's folder; tab, comma or space
  WebDataset tar shards           a folder of .tar files or a pattern, 'train-{0000..0146}.tar'; the label is in .cls
  Hugging Face parquet files      a folder of .parquet files or a pattern, 'data/train-*.parquet'
  one file                        a slide for --tile, a volume for --pages samples
  FILE::KEY                       an array of an .npz, HDF5 or zarr file whose first axis counts samples

A label that is missing, empty or -1 means unlabelled: such images are kept, under the label -1, and counted; training
takes them, probes do not. Where no image has a label, all are of one class.

Writes OUT.beton (FFCV; fields image and label, in seeded random order), OUT.json (counts, classes, mean and std, sizes,
hash, options, versions), OUT.files.csv (the source of every sample) and, if files could not be read, OUT.rejected.csv;
if there is something to know of some that were, OUT.notes.csv (16 bits of which few are used, several pictures in one).
With --shards N it is OUT-00000-of-0000N.beton and so on, and OUT.json is their index; --data_path OUT.beton opens them.

Pixels that are no 8-bit photographs keep their values: TIFF, 16-bit PNG, .npy, DICOM, NIfTI, HDF5 and zarr of 8 or 16
bits or floats, with 1 to 64 channels, if the files looked at are alike (--values). What is asked of values (--window,
--log, …) is done once and written down; a pixel of --nodata takes no part in mean, std and losses.

Every photograph is decoded once, to check and measure it, and re-encoded with restart markers, which let the loader
decode only what a crop shows. With --keep_jpeg, a JPEG that needs no shrinking is stored untouched: no second loss, but
larger and slower to train from. It must have sequential Huffman coding, 8 bits, grey or RGB, no EXIF rotation, and at
most one byte per pixel. Transparency is laid over white, EXIF rotation applied, 16-bit grey scaled, CMYK and palettes
converted; of several pictures in a file the largest full one counts, of equal ones (an animation) the first.

Ctrl-C, a kill or a full disk loses seconds: the same command goes on where it stopped, and the result has the same
bytes. It notices files whose size or time has changed, or with --check_content any byte. Rows of parquet files are
shuffled by row groups, and within them.

presets (--preset; other flags override them), with bytes per image, and images per second and core that preparation
encodes, both measured on photographs of 500 x 375 pixels and 92 kB
  imagenet_500      sides up to 500, JPEG quality 90: 56 kB (92 kB with --keep_jpeg), 460/s (680/s). Keeps ImageNet's
                    detail; the default. With --keep_jpeg training decodes 0.6 times as many images per second
  imagenet_400      sides up to 400, JPEG quality 90: 35 kB, 360/s. Two thirds of the pixels; small crops are enlarged
  imagenet_256      sides up to 256, JPEG quality 90: 16 kB, 430/s. A quarter of the pixels; every crop is enlarged
  imagenet_raw256   sides up to 256, raw pixels: 147 kB, 510/s. As before, but nothing to decode while training
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.arranging import add_value_flags, arrange
from data_prep.array_form import words_about
from data_prep.encode import MAX_PIXELS, WRITE_MODES, WriteOptions
from data_prep.plan import plan_outputs, stored_order
from data_prep.sets import notes_path, rejected_path, validation_path
from data_prep.sources import Source, open_source
from data_prep.writer import check_output, prepare
from fasthpm.cli import Parser, run_command, without_effect
from fasthpm.data.ffcv.beton import sidecar_path
from fasthpm.data.keys import Stream
from fasthpm.data.sampling import Array, sample_order
from fasthpm.errors import UserError

DEFAULT_PRESET = "imagenet_500"
PRESETS: dict[str, dict[str, Any]] = {
    "imagenet_500": {"max_resolution": 500, "jpeg_quality": 90, "write_mode": "jpg"},
    "imagenet_400": {"max_resolution": 400, "jpeg_quality": 90, "write_mode": "jpg"},
    "imagenet_256": {"max_resolution": 256, "jpeg_quality": 90, "write_mode": "jpg"},
    "imagenet_raw256": {"max_resolution": 256, "jpeg_quality": 90, "write_mode": "raw"},
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m data_prep.images", description=__doc__)
    parser.add_argument("source", metavar="SRC", help="images, see above")
    parser.add_argument("out", type=Path, metavar="OUT.beton", help="file to write")
    _add_storage(parser)
    _add_selection(parser)
    add_value_flags(parser.add_argument_group("images that are not 8-bit RGB, and big ones"))
    parser.add_argument(
        "--max_rejected",
        type=float,
        default=0.01,
        metavar="N",
        help="unreadable files that are accepted: below 1 a share, from 1 a number (default .01)",
    )
    parser.add_argument("--num_workers", type=int, default=0, metavar="N", help="processes; 0 = all cores (default)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the sample order and of the validation split (default 0)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.beton if it exists")
    add_check_content(parser)
    return parser


def add_check_content(parser: argparse.ArgumentParser) -> None:
    """The flag that has files compared by their bytes."""
    parser.add_argument(
        "--check_content",
        action="store_true",
        help="tell changed files by a hash of all bytes, not by size and time: reads everything once more",
    )


def _add_storage(parser: argparse.ArgumentParser) -> None:
    preset = PRESETS[DEFAULT_PRESET]
    short = [name.removeprefix("imagenet_") for name in PRESETS]
    parser.add_argument(
        "--preset",
        choices=[*PRESETS, *short],
        default=DEFAULT_PRESET,
        metavar="NAME",
        help=f"{', '.join(PRESETS)}, or without imagenet_ (default {DEFAULT_PRESET})",
    )
    parser.add_argument(
        "--max_resolution",
        type=int,
        metavar="PIXELS",
        help=f"shrink images whose longer side is more; 0 = never (default {preset['max_resolution']})",
    )
    parser.add_argument(
        "--write_mode",
        choices=(*WRITE_MODES, "lz4"),
        help="jpg (default); raw pixels; proportion: a random share as JPEG; smart: large ones as JPEG; of values that "
        "are kept raw (default) or lz4, without loss",
    )
    parser.add_argument("--jpeg_quality", type=int, metavar="1..100", help=f"default {preset['jpeg_quality']}")
    parser.add_argument("--keep_jpeg", action="store_true", help="store JPEGs that need no shrinking untouched")
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
    parser.add_argument(
        "--channels",
        type=int,
        choices=(1, 3),
        help="1: store luma only; 3: RGB, even if all are grey (default: 3 if one of them has colours)",
    )
    parser.add_argument("--grey", action="store_true", help="the same as --channels 1")
    parser.add_argument("--shards", type=int, default=0, metavar="N", help="write N files and an index of them")


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="take only the classes that FILE names, one a line, and number them in that order",
    )
    split = parser.add_mutually_exclusive_group()
    split.add_argument(
        "--val_fraction",
        type=float,
        metavar="SHARE",
        help="set aside this share of every class, drawn by the seed, as OUT_val.beton; of tiles, pictures are drawn",
    )
    split.add_argument("--val_count", type=int, metavar="N", help="the same, N images in all")
    parser.add_argument("--label_column", metavar="NAME", help="which column of parquet files is the label")
    parser.add_argument(
        "--max_pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help=f"reject larger images by their headers, for the memory's sake (default {MAX_PIXELS})",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare a set and say what was written."""
    args = build_parser().parse_args(argv)
    for name in ("max_rejected", "num_workers", "shards"):
        if getattr(args, name) < 0:
            raise UserError(f"{name} {getattr(args, name):g} is negative, expected 0 or more")
    _options(args)  # wrong ones are refused before anything is read
    _refuse_idle(args)
    started = time.monotonic()
    check_output(args.out, [args.out])
    source = open_source(args.source, num_workers=args.num_workers, label_column=args.label_column)
    source.by_hash = args.check_content
    if args.classes:
        source.select(read_classes(args.classes))
    chosen = int(source.chosen.sum())
    print(f"{_printable(args.source)}: {chosen} images, {len(source.classes)} classes", flush=True)
    for line in source.words:
        print(f"      {line}", flush=True)
    source, arrays, words = arrange(source, args)
    options = arrays or _options(args)
    for line in words:
        print(f"      {line}", flush=True)
    order = stored_order(source, options.seed)
    order = order[source.chosen[order]]
    validation = draw_validation(source, args.val_fraction, args.val_count, options.seed)
    sidecar = prepare(
        source,
        args.out,
        source.classes,
        plan_outputs(args.out, order, args.shards, validation),
        options=options,
        max_rejected=args.max_rejected,
        num_workers=args.num_workers,
        overwrite=args.overwrite,
    )
    if sidecar is None:
        print(
            f"{_printable(args.out)} was prepared from these files with these options before; nothing to do", flush=True
        )
        return
    print(summary(args.out, sidecar, time.monotonic() - started), flush=True)
    if validation.any():
        print(f"      {validation_path(args.out)}: {int(validation.sum())} images set aside", flush=True)


def _refuse_idle(args: argparse.Namespace) -> None:
    """**Raises:** `UserError` for a flag of another --write_mode than the one that is asked for."""
    mode = args.write_mode or _preset(args)["write_mode"]
    idle = {"smart": ["smart_threshold"], "proportion": ["compress_probability"]}
    for other in idle.keys() - {mode}:
        without_effect(idle[other], f"it is for --write_mode {other}, and that is {mode}")
    if mode == "raw":
        without_effect(["jpeg_quality", "keep_jpeg"], "--write_mode raw stores no JPEG")


def _preset(args: argparse.Namespace) -> dict[str, Any]:
    return PRESETS[args.preset if args.preset in PRESETS else f"imagenet_{args.preset}"]


def _options(args: argparse.Namespace) -> WriteOptions:
    if args.grey and args.channels == 3:
        raise UserError("--grey and --channels 3 contradict each other; leave one of them out")
    preset = _preset(args)
    given = {name: value for name in preset if (value := getattr(args, name)) not in (None, "lz4")}
    return WriteOptions(
        **(preset | given),
        compress_probability=args.compress_probability,
        smart_threshold=args.smart_threshold,
        grey=args.grey or args.channels == 1,
        colour=args.channels == 3,
        seed=args.seed,
        keep_jpeg=args.keep_jpeg,
        max_pixels=args.max_pixels,
    )


def read_classes(path: Path) -> list[str]:
    """The class names of a file, one a line.

    **Raises:** `UserError` if it cannot be read, is empty, or names a class twice.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"class list {path} cannot be read ({error.strerror})") from error
    names = [line.strip() for line in text.splitlines() if line.strip()]
    twice = next((name for index, name in enumerate(names) if name in set(names[:index])), None)
    if not names or twice is not None:
        fault = "names no class" if not names else f"names {twice!r} twice"
        raise UserError(f"class list {path} {fault}; expected one class a line")
    return names


def draw_validation(source: Source, fraction: float | None, count: int | None, seed: int) -> Array:
    """Which samples go into the validation set: bool [N]. Every class gives the same share, to within one image.

    **Raises:** `UserError` if nothing would be left on one side.
    """
    if fraction is None and count is None:
        return np.zeros(len(source), bool)
    scenes = getattr(source, "scenes", None)
    if scenes is None:
        return _draw(source.labels, source.chosen, fraction, count, seed)
    first = np.unique(scenes, return_index=True)[1]  # tiles of one picture stay on one side
    return _draw(source.labels[first], source.chosen[first], fraction, count, seed)[scenes]


def _draw(labels: Array, chosen: Array, fraction: float | None, count: int | None, seed: int) -> Array:
    drawn = np.zeros(len(labels), bool)
    order = sample_order(seed, Stream.SPLIT, len(labels))
    order = order[chosen[order] & (labels[order] >= 0)]
    total = round(fraction * len(order)) if fraction is not None else int(count or 0)
    if not 0 < total < len(order):
        asked = f"--val_fraction {fraction:g}" if fraction is not None else f"--val_count {count}"
        labelled = "labelled " if len(order) < chosen.sum() else ""
        raise UserError(f"{asked} of {len(order)} {labelled}images is {total}; expected at least 1 on either side")
    of = labels[order]
    sizes = np.bincount(of)
    quota = shares_of(total, sizes)
    by_class = np.argsort(of, kind="stable")
    rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    drawn[order[by_class[rank < quota[of[by_class]]]]] = True
    return drawn


def shares_of(total: int, sizes: Array) -> Array:
    """`total` split over classes in proportion to their `sizes`, int64 [K], by largest remainders."""
    exact = total * sizes / sizes.sum()
    quota = np.floor(exact).astype(np.int64)
    largest_first = np.argsort(quota - exact, kind="stable")
    quota[largest_first[: total - quota.sum()]] += 1
    return quota


def summary(out: Path, sidecar: dict[str, Any], seconds: float) -> str:
    """The closing words about a set that was written."""
    mean, std = ([round(value, 4) for value in sidecar[name]] for name in ("mean", "std"))
    rejected, samples = sidecar["num_rejected"], sidecar["num_samples"]
    unlabelled = f", {sidecar['num_unlabelled']} unlabelled" if sidecar.get("num_unlabelled") else ""
    shards = f" in {len(sidecar['shards'])} shards" if "shards" in sidecar else ""
    kept = f"; {sidecar['kept_jpegs']} JPEGs kept untouched" if sidecar["kept_jpegs"] else ""
    lines = [
        f"wrote {_printable(out)}{shards}: {samples} images{unlabelled}, {len(sidecar['classes'])} classes, "
        f"{sidecar['channels']} channel{'s' if sidecar['channels'] > 1 else ''}, {sidecar['bytes']} bytes, in "
        f"{seconds:.0f} s",
        f"      {_printable(sidecar_path(out))}: mean {mean}, std {std}, largest {sidecar['max_height']} x "
        f"{sidecar['max_width']}{kept}",
    ]
    if rejected:
        lines.append(f"      {_printable(rejected_path(out))}: {rejected} unreadable files were left out")
    if "dtype" in sidecar:
        lines += [f"      {word}" for word in words_about(sidecar)]
    if sidecar.get("num_skipped"):
        lines.append(f"      {sidecar['num_skipped']} tiles with less than --min_content were left out")
    for note, count in sidecar.get("notes", {}).items():
        lines.append(f"      {_printable(notes_path(out))}: {count} file{'s' if count > 1 else ''}: {note}")
    return "\n".join(lines)


def _printable(path: object) -> str:
    """A path that any terminal can show, also if its bytes are not UTF-8."""
    encoding = sys.stdout.encoding or "utf-8"
    return str(path).encode(encoding, "backslashreplace").decode(encoding)


if __name__ == "__main__":
    run_command(main)
