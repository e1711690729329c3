"""Loading arrays for training, interleaved: this project's loader, and tifffile with torchvision's transforms.

    python -m bench.loader_arrays [--images 256] [--rounds 5] [-o bench/results/loader_arrays.json]

Satellite tiles (12 channels of uint16, 256 pixels) and X-rays (1 channel of uint16, 512 pixels), drawn, stored as TIFF
files and as prepared sets, raw and lz4. Random resized crops at 224, bicubic, flipped: ours in the stored type, as it
goes to the device; torchvision's of float32 tensors, for it has no resize of uint16. Each loader has one thread or
worker of a process of its own; they take turns, as in `bench.loader`. On a busy machine trust the ratios of processor
time. The other table: how fast samples are unpacked.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.common import json_file, machine, parse_quickly, say, show, table, work_folder, write_json
from bench.loader import measure, summarise
from bench.variants import CROP_MIN, SIDE, Spec, epoch, started, torch_epochs
from fasthpm.cli import Parser, run_command
from fasthpm.data import build_loader, read_info
from fasthpm.data.ffcv.codec import compress
from fasthpm.errors import UserError

SCENES = {"satellite": (256, 12), "x-ray": (512, 1)}  # side and channels
CODECS = ("raw", "lz4")
QUICK_IMAGES, QUICK_ROUNDS = 16, 1
UNPACKED_SECONDS = 1.0


def scene(index: int, side: int, channels: int) -> NDArray[np.uint16]:
    """A smooth picture with a sensor's noise, 12 of 16 bits."""
    rng = np.random.default_rng(index)
    y, x = np.mgrid[:side, :side] / (side / 6)
    waves = [np.sin(x * a + y * b + c) for a, b, c in rng.uniform(-2, 2, (channels, 3))]
    values = 2000 + 900 * np.stack(waves, -1) + rng.normal(0, 12, (side, side, channels))
    return values.astype(np.uint16)


def ours(spec: Spec) -> Callable[[int], int]:
    """Seeded crops with their boxes, in the stored type."""
    loader = build_loader(
        spec.data,
        batch_size=spec.batch_size,
        image_size=(SIDE, SIDE),
        channels=read_info(spec.data).channels,
        num_workers=spec.workers,
        crop_min=CROP_MIN,
        interpolation=spec.interpolation,
    )

    def run(number: int) -> int:
        loader.set_epoch(number)
        return epoch(loader, spec)

    return run


class Tiffs(torch.utils.data.Dataset[torch.Tensor]):
    """Every TIFF of a folder, read by tifffile, cropped and flipped by torchvision: float32 [C, H, W]."""

    def __init__(self, folder: Path) -> None:
        from torchvision.transforms import v2

        self.paths = sorted(folder.glob("*.tif"))
        crop = v2.RandomResizedCrop(
            SIDE, scale=(CROP_MIN, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True
        )
        self.transform = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        import tifffile

        pixels = tifffile.imread(self.paths[index])
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        tensor = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)
        made: torch.Tensor = self.transform(tensor)
        return made


def torchvision_tiff(spec: Spec) -> Callable[[int], int]:
    """tifffile and torchvision, in torch's loader."""
    torch.set_num_threads(1)
    return torch_epochs(Tiffs(Path(spec.data)), spec)


def make(work: Path, name: str, images: int) -> tuple[Path, dict[str, Path]]:
    """The TIFF files of a scene, and prepared sets of them by codec."""
    import tifffile

    folder, (side, channels) = work / name, SCENES[name]
    folder.mkdir(exist_ok=True)
    for index in range(images):
        path = folder / f"{index:05d}.tif"
        if not path.exists():
            pixels = scene(index, side, channels)
            whole = pixels[..., 0] if channels == 1 else pixels
            tifffile.imwrite(path, whole, photometric="minisblack", planarconfig="contig" if channels > 1 else None)
    sets = {}
    for codec in CODECS:
        sets[codec] = work / f"{name}-{codec}.beton"
        if not sets[codec].exists():
            command = [sys.executable, "-m", "data_prep.images", str(folder), str(sets[codec]), "--write_mode", codec]
            subprocess.run([*command, "--num_workers", "1"], check=True, stdout=subprocess.DEVNULL)
    return folder, sets


def unpacked(path: Path, array: NDArray[Any]) -> dict[str, float]:
    """Bytes of pixels per second of one core, read whole and shrunk, and how much smaller lz4 is."""
    size = (16, 16)
    loader: Any = build_loader(
        str(path), batch_size=1, image_size=size, channels=array.shape[2], train=False, whole=True, num_workers=1
    )
    ids, crops = np.zeros(8, np.int64), np.tile([0, 0, *array.shape[:2], 0], (8, 1))
    images = np.empty((8, *size, array.shape[2]), array.dtype)
    loader.decode(images, ids, crops)
    count, begin = 0, time.process_time()
    while time.process_time() - begin < UNPACKED_SECONDS:
        loader.decode(images, ids, crops)
        count += len(ids)
    seconds = time.process_time() - begin
    loader.close()
    return {
        "megabytes_per_second": count * array.nbytes / seconds / 1e6,
        "times_smaller": array.nbytes / len(compress(array, "lz4")),
    }


def bench(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Everything, as it goes into the JSON."""
    rates: dict[str, Any] = {}
    speeds: dict[str, Any] = {}
    for name, (side, channels) in SCENES.items():
        folder, sets = make(work, name, arguments.images)
        say(f"{name}: {arguments.images} files")
        baseline = f"{name}, tifffile and torchvision"
        specs = [
            Spec(baseline, "bench.loader_arrays:torchvision_tiff", str(folder), 1, arguments.batch_size),
            *(
                Spec(f"{name}, {codec}", "bench.loader_arrays:ours", str(path), 1, arguments.batch_size, "bicubic")
                for codec, path in sets.items()
            ),
        ]
        with started(specs) as variants:
            rates |= summarise(measure(variants, arguments.rounds), 1, baseline)
        for codec, path in sets.items():
            speeds[f"{name}, {codec}"] = unpacked(path, scene(0, side, channels))
    return {
        "bench": "loader_arrays",
        "machine": machine(),
        "images": arguments.images,
        "batch_size": arguments.batch_size,
        "rates": rates,
        "unpacked": speeds,
    }


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = [
        [
            name,
            show(row["images_per_second_per_core"], 0),
            show(row["wall_ratio"]),
            show(row["cpu_ms_per_image"]),
            show(row["cpu_ratio"]),
        ]
        for name, row in result["rates"].items()
    ]
    speeds = [
        [name, f"{row['megabytes_per_second']:.0f}", f"{row['times_smaller']:.2f}"]
        for name, row in result["unpacked"].items()
    ]
    return "\n\n".join(
        [
            f"{result['machine']['device']}, one worker, {result['images']} samples, batch {result['batch_size']}, "
            f"median (lowest to highest round)",
            table(("loader", "images/s per core", "x baseline", "CPU ms per image", "x baseline, by CPU"), rows),
            table(("read whole, shrunk to 16 x 16", "MB/s per core", "times smaller by lz4"), speeds),
        ]
    )


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m bench.loader_arrays", description=__doc__)
    parser.add_argument("--images", type=int, default=256, help="samples of an epoch (default 256)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default 5)")
    parser.add_argument("--batch_size", type=int, default=32, help="samples per batch (default 32)")
    parser.add_argument("--work", type=Path, default=None, help="folder that keeps files and sets; none = temporary")
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs: its figures mean nothing")
    parser.add_argument("-o", "--output", type=json_file, default=None, help="write the raw figures here as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.loader_arrays`."""
    arguments = parse_quickly(build_parser(), argv, images=QUICK_IMAGES, rounds=QUICK_ROUNDS, batch_size=8)
    for name in ("images", "rounds", "batch_size"):
        if getattr(arguments, name) <= 0:
            raise UserError(f"{name} is {getattr(arguments, name)}, expected more than 0")
    with work_folder(arguments.work) as work:
        result = bench(arguments, work)
    write_json(arguments.output, result)
    print(report(result))


if __name__ == "__main__":
    run_command(main)
