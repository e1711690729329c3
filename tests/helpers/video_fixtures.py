"""Small video files and prepared video sets for the tests, made by the system's ffmpeg."""

import subprocess
from pathlib import Path

from data_prep import videos

FRAMES = 10  # of every clip that `video_folder` makes


def ffmpeg(*arguments: object) -> None:
    """Run ffmpeg, quietly."""
    subprocess.run(["ffmpeg", "-v", "error", "-nostdin", "-y", *map(str, arguments)], check=True, timeout=60)


def pattern(path: Path, *coding: object, size: str = "64x48", seconds: float = 1.0, rate: int = 10) -> Path:
    """A moving test pattern, encoded as `coding` says (H.264 by default)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = coding or ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-preset", "ultrafast")
    ffmpeg("-f", "lavfi", "-i", f"testsrc2=s={size}:r={rate}:d={seconds}", *options, path)
    return path


def video_folder(folder: Path, count: int, sizes: tuple[str, ...] = ("48x40", "40x64")) -> Path:
    """`count` videos of FRAMES frames in class folders ant and bee, whose sizes take turns; one ffmpeg per size."""
    for number, size in enumerate(sizes):
        mine = range(number, count, len(sizes))
        parts = folder.parent / f"parts{number}"
        parts.mkdir(parents=True)
        cut = ("-g", FRAMES, "-keyint_min", FRAMES, "-sc_threshold", 0, "-bf", 0, "-f", "segment", "-segment_time", 1)
        coding = ("-c:v", "libx264", "-pix_fmt", "yuv420p", *cut, "-reset_timestamps", 1)
        pattern(parts / "%03d.mp4", *coding, size=size, rate=FRAMES, seconds=len(mine))
        for part, index in zip(sorted(parts.iterdir()), mine, strict=True):
            target = folder / ("ant", "bee")[index % 2] / f"{index:03d}.mp4"
            target.parent.mkdir(parents=True, exist_ok=True)
            part.rename(target)
    return folder


def prepare_videos(source: Path, out: Path, *flags: str) -> Path:
    """Run `data_prep.videos`, every frame stored."""
    videos.main([str(source), str(out), "--frame_stride", "1", "--num_workers", "2", *flags])
    return out
