"""Preparing images: `data_prep.images` against FFCV's own `DatasetWriter` with the same settings, interleaved.

    python -m bench.prepare photos [--rounds 3] [--images 1000] [-o bench/results/prepare.json]

Both run as commands, with as many processes as there are cores, on all the photographs and on a small part of them;
the difference is what is compared, so that starting Python and loading libraries counts in neither. FFCV's side is what
its documentation shows: a folder of PIL images into `DatasetWriter`. It neither checks files nor measures, hashes or
syncs anything; `data_prep.images` does all of that, in the time given here.
"""

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import (
    QUALITY,
    SETS,
    choose_photos,
    files_in,
    json_file,
    machine,
    parse_quickly,
    prepare_command,
    ratios,
    run,
    say,
    show,
    spread,
    table,
    work_folder,
    write_json,
)
from fasthpm.cli import Parser, run_command
from fasthpm.data.ffcv.beton import ALLOCATION, HEADER
from fasthpm.data.options import count_workers
from fasthpm.errors import UserError

START_SHARE = 10  # the small part of the photographs
QUICK_IMAGES, QUICK_ROUNDS = 40, 1
WRITERS = ("ours", "ffcv")


# -------------------------------------------------------------------------------------------------------- FFCV's side
class Photos:
    """(PIL image, label) of a folder, as FFCV's writer wants them."""

    def __init__(self, folder: Path) -> None:
        from torchvision.datasets import ImageFolder

        self._folder = ImageFolder(str(folder))

    def __len__(self) -> int:
        return len(self._folder)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self._folder[index]
        return image, label


def write_with_ffcv(source: Path, out: Path, name: str, workers: int) -> None:
    """FFCV's own way of writing the set `name`."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    words = [word for word in SETS[name] if word != "--keep_jpeg"]
    flags = dict(zip(words[::2], words[1::2], strict=True))
    field = RGBImageField(
        write_mode=flags.get("--write_mode", "jpg"), max_resolution=int(flags["--max_resolution"]), jpeg_quality=QUALITY
    )
    writer = DatasetWriter(str(out), {"image": field, "label": IntField()}, num_workers=workers)
    writer.from_indexed_dataset(Photos(source), shuffle_indices=True)


def command_of(writer: str, source: Path, out: Path, name: str, workers: int) -> list[str]:
    """The command line of one writing."""
    if writer == "ours":
        return prepare_command(source, out, name, workers)
    return [sys.executable, "-m", "bench.prepare", "--ffcv", str(source), str(out), name, str(workers)]


# -------------------------------------------------------------------------------------------------------- measuring
def time_command(command: Sequence[str]) -> tuple[float, float]:
    """(seconds, processor seconds) of a command and of all its processes."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    begin, cpu_begin = time.perf_counter(), used()
    run(command)
    return time.perf_counter() - begin, used() - cpu_begin


def stored_bytes(path: Path) -> int:
    """Bytes of the samples in an FFCV file, without its tables and the free space of its pages."""
    header = np.fromfile(path, HEADER, 1)[0]
    table = np.fromfile(path, ALLOCATION, int(header["num_samples"]), offset=int(header["alloc_table_ptr"]))
    return int(table["size"].sum())


def measure(writer: str, name: str, folders: Sequence[Path], work: Path, workers: int) -> dict[str, float]:
    """One writer on both folders, large and small: images/s per core and CPU ms per image of the difference.

    On a large one alone, the start counts too.
    """
    taken, sizes = [(0.0, 0.0)], [0]
    for folder in folders[::-1]:
        out = work / f"{writer}-{name}.beton"
        taken.append(time_command(command_of(writer, folder, out, name, workers)))
        sizes.append(len(files_in(folder)))
        stored = stored_bytes(out)
        out.unlink()
    (start, cpu_start), (seconds, cpu) = taken[-2:]
    images = sizes[-1] - sizes[-2]
    return {
        "images_per_second_per_core": images / max(seconds - start, 1e-9) / workers,
        "cpu_ms_per_image": 1e3 * (cpu - cpu_start) / images,
        "start_seconds": start,
        "total_seconds": seconds,
        "bytes_per_image": stored / sizes[-1],
    }


def bench(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Everything, as it goes into the JSON."""
    large = choose_photos(arguments.photos, work, arguments.images)
    total = len(files_in(large))
    folders = [large]
    if not arguments.quick:
        folders.append(choose_photos(large, work, max(total // START_SHARE, 2)))
    rounds: dict[str, dict[str, list[dict[str, float]]]] = {n: {w: [] for w in WRITERS} for n in arguments.sets}
    for number in range(arguments.rounds):
        for name in arguments.sets:
            for writer in WRITERS[:: 1 if number % 2 == 0 else -1]:
                rounds[name][writer].append(measure(writer, name, folders, work, arguments.workers))
        say(f"round {number + 1} of {arguments.rounds}")
    return {
        "bench": "prepare",
        "machine": machine(),
        "images": total,
        "workers": arguments.workers,
        "source_bytes_per_image": sum(file.stat().st_size for file in files_in(large)) / total,
        "sets": {name: summarise(writers) for name, writers in rounds.items()},
        "rounds": rounds,
    }


def summarise(writers: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Spreads of both writers, and our ratios to FFCV's, above 1 where we are faster."""

    def values(writer: str, key: str) -> list[float]:
        return [one[key] for one in writers[writer]]

    rate, cpu = "images_per_second_per_core", "cpu_ms_per_image"
    return {
        **{writer: {key: spread(values(writer, key)) for key in writers[writer][0]} for writer in writers},
        "wall_ratio": ratios(values("ours", rate), values("ffcv", rate)),
        "cpu_ratio": ratios(values("ffcv", cpu), values("ours", cpu)),
    }


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    labels = {"ours": "data_prep.images", "ffcv": "FFCV's writer"}
    rows = []
    for name, row in result["sets"].items():
        for writer in WRITERS:
            one, ours = row[writer], writer == "ours"
            rows.append(
                [
                    f"{name}, {labels[writer]}",
                    show(one["images_per_second_per_core"], 0),
                    show(row["wall_ratio"]) if ours else "1",
                    show(one["cpu_ms_per_image"]),
                    show(row["cpu_ratio"]) if ours else "1",
                    f"{one['bytes_per_image']['median'] / 1e3:.0f} kB",
                    f"{one['start_seconds']['median']:.1f} s",
                ]
            )
    machine = result["machine"]
    head = (
        f"{machine['device']}, {machine['cores']} cores, {result['workers']} processes, {result['images']} photographs "
        f"of {result['source_bytes_per_image'] / 1e3:.0f} kB, median (lowest to highest round); the start, which is "
        f"not counted, is a whole run on a tenth of them; commit {machine['commit'][:10]}"
    )
    columns = ("set", "images/s per core", "x FFCV", "CPU ms per image", "x FFCV, by CPU", "per image", "start")
    return f"{head}\n\n{table(columns, rows)}"


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m bench.prepare", description=__doc__)
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="folder of class folders, e.g. from bench.photos")
    parser.add_argument("--images", type=int, default=1000, help="photographs; 0 = all (default 1000)")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds (default 3)")
    parser.add_argument("--workers", type=int, default=0, help="processes of each writer; 0 = all cores")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="prepared sets to write")
    parser.add_argument("--work", type=Path, default=None, help="folder for what is written; none = temporary")
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs: its figures mean nothing")
    parser.add_argument("-o", "--output", type=json_file, default=None, help="write the raw figures here as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.prepare`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--ffcv"]:
        write_with_ffcv(Path(words[1]), Path(words[2]), words[3], int(words[4]))
        return
    arguments = parse_quickly(build_parser(), words, images=QUICK_IMAGES, rounds=QUICK_ROUNDS, sets=["256"])
    if arguments.rounds < 1 or arguments.images < 0:
        raise UserError(f"rounds {arguments.rounds} must be 1 or more, images {arguments.images} 0 or more")
    arguments.workers = count_workers(arguments.workers)
    with work_folder(arguments.work) as work:
        result = bench(arguments, work)
    write_json(arguments.output, result)
    print(report(result))


if __name__ == "__main__":
    run_command(main)
