"""Garments in motion: `python -m data_prep.moving_fashion OUT_DIR` writes the prepared video sets train and val there.

A Fashion-MNIST garment moves over a dark square that joins up at its edges. The label is direction times speed, which
no single frame shows: where a garment begins is uniform, so every frame of every class looks alike. ffmpeg encodes the
clips as real video files (H.264), and `data_prep.videos` prepares those. Seeded: the same flags give the same pixels.
"""

import argparse
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep import videos
from data_prep.fashion_mnist import IMAGES_MAGIC, SPLITS, check_source, find_source, read_idx
from data_prep.ffmpeg import check_tools
from data_prep.sets import check_folder, make_folder, progress_bar
from fasthpm.cli import Parser, run_command
from fasthpm.data.keys import Stream
from fasthpm.data.sampling import Array, key_of, uniforms
from fasthpm.data.video.prepared import INFO
from fasthpm.errors import UserError
from fasthpm.files import fsync, read_json

FPS = 16
DIRECTIONS = ("right", "down", "left", "up")
DIAGONALS = ("right-down", "left-down", "left-up", "right-up")
STEPS = {"right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0)}
STREAMS = {"train": 1, "val": 2}  # in the place of an epoch in the keys of what is drawn
CRF = "12"


def class_names(directions: int, speeds: Sequence[int]) -> list[str]:
    """`right-1`, …: every direction at every speed, in pixels per frame."""
    names = (*DIRECTIONS, *DIAGONALS)[:directions]
    return [f"{name}-{speed}" for name in names for speed in speeds]


def velocity(name: str) -> tuple[int, int]:
    """Pixels per frame down and to the right; a diagonal moves so much on either axis."""
    *parts, speed = name.split("-")
    steps = [STEPS[part] for part in parts]
    return sum(step[0] for step in steps) * int(speed), sum(step[1] for step in steps) * int(speed)


def draw_clip(garment: Array, start: tuple[int, int], motion: tuple[int, int], frames: int, size: int) -> Array:
    """uint8 [frames, size, size]: `garment`, uint8 [h, w], at `start` (row, column), moved by `motion` every frame."""
    canvas = np.zeros((size, size), np.uint8)
    canvas[: garment.shape[0], : garment.shape[1]] = garment
    shifts = np.array(start) + np.arange(frames)[:, None] * np.array(motion)
    return np.stack([np.roll(canvas, (int(row), int(column)), (0, 1)) for row, column in shifts])


def draw_class(images: Array, label: int, name: str, args: argparse.Namespace, split: str, count: int) -> Array:
    """Clips of one class one after the other: uint8 [count * frames, size, size]."""
    ids = np.arange(count) + (label << 32)
    draws = uniforms(key_of(args.seed, STREAMS[split], Stream.PREPARATION), ids, 3)
    chosen = (draws[:, 0] * len(images)).astype(int)
    starts = (draws[:, 1:] * args.size).astype(int)
    pairs = zip(chosen, starts.tolist(), strict=True)
    return np.concatenate([draw_clip(images[k], s, velocity(name), args.num_frames, args.size) for k, s in pairs])


def encode_clips(clips: Array, folder: Path, num_frames: int) -> None:
    """Write every `num_frames` of `clips`, uint8 [n, h, w], as an .mp4 of its own, all by one ffmpeg."""
    folder.mkdir(parents=True)
    height, width = clips.shape[1:]
    command = ["ffmpeg", "-v", "error", "-nostdin", "-f", "rawvideo", "-pix_fmt", "gray", "-s", f"{width}x{height}"]
    command += ["-r", str(FPS), "-i", "pipe:0", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", CRF, "-bf", "0"]
    command += ["-threads", "1", "-g", str(num_frames), "-keyint_min", str(num_frames), "-sc_threshold", "0"]
    command += ["-f", "segment", "-segment_time", f"{num_frames / FPS:.6f}", "-reset_timestamps", "1"]
    done = subprocess.run([*command, f"{folder}/%05d.mp4"], input=clips.tobytes(), capture_output=True)
    written = len(list(folder.glob("*.mp4")))
    if done.returncode or written != len(clips) // num_frames:
        words = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise UserError(
            f"ffmpeg wrote {written} of {len(clips) // num_frames} videos into {folder} ({''.join(words[-1:])}); it "
            f"needs libx264"
        )


def make_files(images: Array, split: str, count: int, folder: Path, args: argparse.Namespace) -> None:
    """The video files of a split, in class folders below `folder`, which appears when all is there."""
    names = class_names(args.directions, args.speeds)
    waiting = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(waiting, ignore_errors=True)
    with progress_bar(count, f"encode {split}", "video") as bar:
        for label, name in enumerate(names):
            mine = len(range(label, count, len(names)))
            encode_clips(draw_class(images, label, name, args, split, mine), waiting / name, args.num_frames)
            bar.update(mine)
    fsync(waiting)
    shutil.rmtree(folder, ignore_errors=True)
    waiting.rename(folder)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="python -m data_prep.moving_fashion", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder for the sets train and val")
    parser.add_argument("--train", type=int, default=1600, metavar="N", help="videos of train (default 1600)")
    parser.add_argument("--val", type=int, default=400, metavar="N", help="videos of val (default 400)")
    parser.add_argument("--size", type=int, default=48, metavar="PIXELS", help="side of the square (default 48)")
    parser.add_argument("--num_frames", type=int, default=16, metavar="T", help="frames of a video (default 16)")
    parser.add_argument("--directions", type=int, choices=(4, 8), default=4, help="with 8, also diagonals (default 4)")
    parser.add_argument(
        "--speeds", type=int, nargs="+", default=[1, 3], metavar="V", help="pixels per frame (default 1 3)"
    )
    parser.add_argument("--source", type=Path, help="folder with Fashion-MNIST's idx files (default: Debian's package)")
    parser.add_argument("--seed", type=int, default=0, help="of garments and places (default 0)")
    parser.add_argument("--num_workers", type=int, default=0, metavar="N", help="processes; 0 = all cores (default)")
    return parser


def _check(args: argparse.Namespace) -> None:
    classes = args.directions * len(args.speeds)
    for name, value, least in (
        ("train", args.train, classes),
        ("val", args.val, classes),
        ("size", args.size, 28),
        ("num_frames", args.num_frames, 2),
        ("speeds", min(args.speeds), 1),
        ("seed", args.seed, 0),
    ):
        if value < least:
            raise UserError(f"{name} is {value}, expected {least} or more")
    if args.size % 2 or len(set(args.speeds)) < len(args.speeds):
        raise UserError(f"size {args.size} must be even, and the speeds {args.speeds} distinct")


def main(argv: Sequence[str] | None = None) -> None:
    """Make both splits, unless they are there."""
    args = build_parser().parse_args(argv)
    _check(args)
    check_folder(args.out, "OUT_DIR")
    check_source(args.source, ["images-idx3"])
    check_tools()
    make_folder(args.out)
    asked = {n: getattr(args, n) for n in ("train", "val", "size", "num_frames", "directions", "speeds", "seed")}
    if read_json(args.out / "made.json") == asked and all((args.out / split / INFO).is_file() for split in SPLITS):
        print(f"{args.out} has train and val already; nothing to do", flush=True)
        return
    source = find_source(args.source, args.out)
    for split, count in (("train", args.train), ("val", args.val)):
        files = args.out / "files" / split
        files.parent.mkdir(exist_ok=True)
        images = read_idx(source, f"{SPLITS[split]}-images-idx3-ubyte", IMAGES_MAGIC)
        make_files(images, split, count, files, args)
        flags = ["--frame_stride", "1", "--short_side", "0", "--jpeg_quality", "95", "--overwrite"]
        videos.main([str(files), str(args.out / split), *flags, "--num_workers", str(args.num_workers)])
    (args.out / "made.json").write_text(json.dumps(asked) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
