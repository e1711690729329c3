"""Loading clips for training: prepared sets through libturbojpeg and DALI, decord and torchcodec on the original files.

    python -m bench.photos photos                                          # once
    python -m bench.video_loader photos [--rounds 5] [--videos 48] [-o bench/results/video_loader.json]

The videos are made first: 10 s of H.264 with ffmpeg's default key frames, 340 x 256 at 30 frames a second as Kinetics
has them, pans over two photographs each with a little noise. Clips of 16 frames, 4 apart, multi-scale crops at 224,
flipped. decord and torchcodec read the original files, as VideoMAE does; ours read what data_prep.videos makes of them.
Every loader runs in its own process with as many threads or workers; they take turns, an epoch at a time. A ratio is
the median of the rounds' ratios. Files are in the page cache. On a busy machine trust processor time more than rates.
"""

import argparse
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common import files_in, json_file, machine, show, table, work_folder, write_json
from bench.loader import measure, summarise
from bench.variants import Spec, started
from data_prep import videos
from data_prep.ffmpeg import check_tools
from fasthpm.cli import Parser, run_command
from fasthpm.data.options import count_workers
from fasthpm.data.video.prepared import open_videos
from fasthpm.errors import UserError

BASELINE = "decord, as VideoMAE reads"
SECONDS, FPS, WIDTH, HEIGHT = 10, 30, 340, 256
NOISE = 4  # ffmpeg's noise strength: without it pans compress far better than films
STRIDES = (4, 2)  # of the prepared sets


def make_videos(photos: Path, folder: Path, count: int) -> list[Path]:
    """Write `count` videos below `folder`, of two photographs each; those that are there stay."""
    pictures = files_in(photos)
    if len(pictures) < 2 * count:
        raise UserError(f"{photos} has {len(pictures)} photographs, {count} videos need {2 * count}")
    paths = [folder / f"class{k % 4}" / f"{k:04d}.mp4" for k in range(count)]
    for k, path in enumerate(paths):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _make_video(pictures[2 * k : 2 * k + 2], path)
    return paths


def _make_video(pictures: Sequence[Path], path: Path) -> None:
    half = SECONDS / len(pictures)
    command = ["ffmpeg", "-v", "error", "-nostdin", "-y"]
    for picture in pictures:
        command += ["-loop", "1", "-framerate", str(FPS), "-t", f"{half}", "-i", str(picture)]
    pan = f"scale=500:375,crop={WIDTH}:{HEIGHT}:x=(iw-ow)*t/{half}:y=(ih-oh)*(1+sin(t*2))/2"
    steps = [f"[{k}:v]{pan},setsar=1[v{k}]" for k in range(len(pictures))]
    joined = "".join(f"[v{k}]" for k in range(len(pictures)))
    steps.append(f"{joined}concat=n={len(pictures)},noise=alls={NOISE}:allf=t,format=yuv420p")
    waiting = path.with_suffix(".part.mp4")
    command += ["-filter_complex", ";".join(steps), "-r", str(FPS), "-c:v", "libx264", "-threads", "2", str(waiting)]
    subprocess.run(command, check=True)
    waiting.rename(path)


def prepared_set(files: Path, work: Path, stride: int, workers: int) -> Path:
    """The set of every `stride`-th frame, made unless it is there."""
    out = work / f"stride{stride}"
    videos.main([str(files), str(out), "--frame_stride", str(stride), "--num_workers", str(workers)])
    return out


def bench(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Everything, as it goes into the JSON."""
    files = work / "files"
    paths = make_videos(arguments.photos, files, arguments.videos)
    sets = {stride: prepared_set(files, work, stride, arguments.workers) for stride in STRIDES}

    def spec(name: str, kind: str, data: Path) -> Spec:
        return Spec(name, f"bench.video_variants:{kind}", str(data), arguments.workers, arguments.batch_size)

    compared = [
        spec(BASELINE, "videomae_decord", files),
        spec("decord, uint8", "decord_uint8", files),
        spec("torchcodec, uint8", "torchcodec_uint8", files),
        *(spec(f"ours, every {k}th frame stored", "ours_turbojpeg", path) for k, path in sets.items()),
        spec("DALI, the same set (4)", "ours_dali", sets[4]),
    ]
    with started(compared) as variants:
        taken = measure(variants, arguments.rounds)
    sizes = {f"every {k}th frame": open_videos(path).sidecar["bytes"] / len(paths) for k, path in sets.items()}
    sizes["originals"] = sum(path.stat().st_size for path in paths) / len(paths)
    return {
        "bench": "video_loader",
        "machine": machine(),
        "videos": len(paths),
        "workers": arguments.workers,
        "batch_size": arguments.batch_size,
        "rates": summarise(taken, arguments.workers, BASELINE, "clip"),
        "bytes_per_video": sizes,
    }


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = [
        [
            name,
            show(row["clips_per_second_per_core"], 1),
            show(row["wall_ratio"]),
            show(row["cpu_ms_per_clip"], 1),
            show(row["cpu_ratio"]),
        ]
        for name, row in result["rates"].items()
    ]
    about = result["machine"]
    sizes = ", ".join(f"{name} {value / 1e3:.0f} kB" for name, value in result["bytes_per_video"].items())
    return "\n\n".join(
        [
            f"{about['device']}, {about['cores']} cores, {result['workers']} workers, {result['videos']} videos, batch "
            f"{result['batch_size']}, median (lowest to highest round); commit {about['commit'][:10]}",
            table(("loader", "clips/s per core", "x baseline", "CPU ms per clip", "x baseline, by CPU"), rows),
            f"Bytes per video: {sizes}.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.video_loader`."""
    parser = Parser(prog="python -m bench.video_loader", description=__doc__)
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="folder of class folders, e.g. from bench.photos")
    parser.add_argument("--videos", type=int, default=48, help="videos of an epoch (default 48)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default 5)")
    parser.add_argument("--workers", type=int, default=0, help="threads or workers of each loader; 0 = all cores")
    parser.add_argument("--batch_size", type=int, default=8, help="clips per batch (default 8)")
    parser.add_argument("--work", type=Path, default=None, help="folder that keeps the videos; none = temporary")
    parser.add_argument("-o", "--output", type=json_file, default=None, help="write the raw figures here as JSON")
    arguments = parser.parse_args(argv)
    for name in ("videos", "rounds", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"{name} is {getattr(arguments, name)}, expected 1 or more")
    if arguments.videos % arguments.batch_size:
        raise UserError(f"videos {arguments.videos} is not a multiple of batch_size {arguments.batch_size}")
    check_tools()
    arguments.workers = count_workers(arguments.workers)
    with work_folder(arguments.work) as work:
        result = bench(arguments, work)
    write_json(arguments.output, result)
    print(report(result))


if __name__ == "__main__":
    run_command(main)
