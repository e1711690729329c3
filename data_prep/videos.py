"""Videos into a prepared set: `python -m data_prep.videos SRC OUT_DIR`.

SRC is one of
  a folder of class folders       sorted by name, they become the labels; every file counts, pictures, hidden ones
                                  and a system's or our own excepted
  a flat folder of videos         one class, label 0
  a .csv or .txt list             a line `path label` each (VideoMAE, Kinetics), by a tab, comma or space; # comments
  Something-Something V2's .json  with its labels.json beside it; the videos are looked for there too

A label that is missing, empty or -1 means unlabelled: such videos are kept, under the label -1, and counted; training
takes them, probes do not.

Writes a folder: frames.bin, the JPEG frames that training samples, at any of which a loader can begin; tables of them;
manifest.csv (source, frames, rate, size, label, codec, sha256); info.json (counts, classes, mean and std, settings,
versions, hashes); and, if videos could not be used, rejected.csv with the reasons. The system's ffmpeg (5.1 or newer)
decodes: at a constant rate, upright, deinterlaced, 8 bits, with square pixels, even sides and no sound. A variable rate
becomes the usual one of its pictures, some of which are repeated; pictures whose size changes on the way are fitted
into the first one's, with black borders where they are turned; HDR is tone mapped to SDR; a file that begins within a
group of pictures is stored from its first key frame on. What --max_seconds cuts off is counted in the closing words.

Ctrl-C, a kill or a full disk loses seconds: the same command goes on where it stopped, and the result has the same
bytes. It notices files whose size or time has changed, or with --check_content any byte. What ffmpeg finds damaged,
ends early, has one frame, no picture or one of more than 100 million pixels is rejected; remarks of ffmpeg after which
every picture is there are no damage. A list can't name files outside --video_root.

Choose --frame_stride as training's --sampling_rate, or a divisor of it: 2 for Something-Something V2 and 4 for Kinetics
as VideoMAE does; with 4, Kinetics takes about the originals' room.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.images import add_check_content, read_classes
from data_prep.video_sources import open_videos
from data_prep.video_writer import VideoOptions, prepare
from fasthpm.cli import Parser, run_command, without_effect
from fasthpm.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    default = VideoOptions()
    parser = Parser(prog="python -m data_prep.videos", description=__doc__)
    parser.add_argument("source", type=Path, metavar="SRC", help="videos, see above")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder to write")
    parser.add_argument(
        "--video_root", type=Path, metavar="DIR", help="where the names of a list or JSON begin; they can't leave it"
    )
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="a list's class names, one a line, in order of label"
    )
    parser.add_argument(
        "--short_side",
        type=int,
        default=default.short_side,
        metavar="PIXELS",
        help=f"shrink videos whose shorter side is more; 0 = never (default {default.short_side}; VideoMAE: 320)",
    )
    parser.add_argument(
        "--frame_stride",
        type=int,
        default=default.frame_stride,
        metavar="N",
        help=f"store every N-th frame; sampling rates must be multiples of it (default {default.frame_stride})",
    )
    parser.add_argument("--fps", type=float, default=0.0, help="frames per second, before that; 0 = each video's own")
    parser.add_argument("--jpeg_quality", type=int, default=default.jpeg_quality, metavar="1..100", help="default 90")
    parser.add_argument(
        "--copy",
        action="store_true",
        help="also keep video files for a GPU's decoder: originals that it shows as they are stored (constant rate, "
        "4:2:0, BT.601 or no matrix stated), else H.264 of the stored frames in BT.601, with short ways",
    )
    _add_limits(parser, default)
    parser.add_argument("--num_workers", type=int, default=0, metavar="N", help="processes; 0 = all cores (default)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the stored order (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT_DIR if it is a prepared set")
    add_check_content(parser)
    return parser


def _add_limits(parser: argparse.ArgumentParser, default: VideoOptions) -> None:
    """Flags that say which videos are taken, and how much of them."""
    parser.add_argument(
        "--min_frames",
        type=int,
        default=0,
        metavar="N",
        help="reject videos of fewer frames, e.g. num_frames x sampling_rate; by default they are looped in training",
    )
    parser.add_argument(
        "--max_seconds",
        type=float,
        default=default.max_seconds,
        metavar="S",
        help=f"of longer videos only so much is stored (default {default.max_seconds:g})",
    )
    parser.add_argument(
        "--max_rejected",
        type=float,
        default=0.01,
        metavar="N",
        help="unusable videos that are accepted: below 1 a share, from 1 a number (default .01)",
    )
    parser.add_argument("--timeout", type=float, default=default.timeout, metavar="S", help="reject slower ones (600)")


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare a set and say what was written."""
    args = build_parser().parse_args(argv)
    if args.source.is_dir():
        without_effect(["video_root"], f"{args.source} is a folder, in which the videos lie")
    for name in ("max_rejected", "num_workers"):
        if getattr(args, name) < 0:
            raise UserError(f"{name} {getattr(args, name):g} is negative, expected 0 or more")
    names = (
        "short_side",
        "frame_stride",
        "fps",
        "jpeg_quality",
        "min_frames",
        "max_seconds",
        "copy",
        "seed",
        "timeout",
    )
    options, started = VideoOptions(**{name: getattr(args, name) for name in names}), time.monotonic()
    source = open_videos(args.source, args.video_root)
    source.by_hash = args.check_content
    if args.classes:
        source.classes = _named(read_classes(args.classes), source.classes)
    print(f"{args.source}: {len(source)} videos, {len(source.classes)} classes", flush=True)
    for line in source.words:
        print(f"      {line}", flush=True)
    info = prepare(
        source,
        args.out,
        options,
        max_rejected=args.max_rejected,
        num_workers=args.num_workers,
        overwrite=args.overwrite,
    )
    if info is None:
        print(f"{args.out} was prepared from these files with these options before; nothing to do", flush=True)
    else:
        print(summary(args.out, info, time.monotonic() - started), flush=True)


def _named(names: list[str], numbers: Sequence[str]) -> tuple[str, ...]:
    """Names for classes that a list only numbers."""
    if len(names) < len(numbers) or list(numbers) != list(map(str, range(len(numbers)))):
        raise UserError(
            f"--classes has {len(names)} names, the source {len(numbers)} classes ({', '.join(numbers[:3])}, …); "
            f"expected a name for each number from 0"
        )
    return tuple(names)


def _videos(count: int) -> str:
    return f"{count} video{'s were' if count > 1 else ' was'}"


def summary(out: Path, info: dict[str, Any], seconds: float) -> str:
    """The closing words about a set that was written."""
    mean, std = ([round(value, 4) for value in info[name]] for name in ("mean", "std"))
    rejected = info["num_rejected"]
    unlabelled = f", {info['num_unlabelled']} unlabelled" if info.get("num_unlabelled") else ""
    lines = [
        f"wrote {out}: {info['num_samples']} videos{unlabelled}, {info['num_frames']} frames (every "
        f"{info['frame_stride']}. of theirs), {len(info['classes'])} classes, {info['channels']} "
        f"channel{'s' if info['channels'] > 1 else ''}, {info['bytes']} bytes, in {seconds:.0f} s",
        f"      mean {mean}, std {std}, largest {info['max_height']} x {info['max_width']}, fewest frames "
        f"{info['fewest_frames']}",
    ]
    if cut := info.get("num_cut"):
        longest, lost = info["options"]["max_seconds"], info["seconds_cut"]
        lines.append(
            f"      {_videos(cut)} longer than --max_seconds {longest:g}: {lost:.0f} of {cut * longest + lost:.0f} s "
            f"were cut off"
        )
    if mapped := info.get("num_tone_mapped"):
        lines.append(f"      {_videos(mapped)} HDR, tone mapped to SDR")
    if rejected:
        lines.append(f"      {rejected} videos cannot be used; {out / 'rejected.csv'} says why")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
