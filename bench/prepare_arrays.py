"""Preparing arrays: `data_prep.images` on TIFF tiles against `tifffile.imread` and `numpy.save`, interleaved.

    python -m bench.prepare_arrays [--rounds 3] [--tiles 400] [-o bench/results/prepare_arrays.json]

Tiles are of 12 bands, 16 bits, 256 x 256 pixels (drawn), stored plainly, with deflate and with LZW. Both run as
commands with one process, on all tiles and on a tenth of them; the difference of processor time is what is compared,
so that starting Python counts in neither. The other side checks, measures, hashes and syncs nothing.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import (
    files_in,
    json_file,
    machine,
    parse_quickly,
    ratios,
    say,
    show,
    spread,
    table,
    work_folder,
    write_json,
)
from bench.prepare import time_command
from fasthpm.cli import Parser, run_command
from fasthpm.errors import UserError

SIDE, BANDS, START_SHARE = 256, 12, 10
COMPRESSIONS = ("none", "zlib", "lzw")
CODECS = ("raw", "lz4")
QUICK_TILES, QUICK_ROUNDS = 20, 1


def draw_tiles(folder: Path, count: int, compression: str) -> Path:
    """`count` tiles whose bands are smooth and a little noisy."""
    import tifffile

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE] / 40
    folder.mkdir(parents=True)
    for index in range(count):
        a, b, c = rng.uniform(-2, 2, (3, BANDS))
        waves = 2000 + 1500 * np.sin(x[..., None] * a + y[..., None] * b + c)
        tile = (waves + rng.normal(0, 20, waves.shape)).clip(1, 65535).astype(np.uint16)
        packed = None if compression == "none" else compression
        tifffile.imwrite(
            folder / f"{index:05d}.tif", tile, photometric="minisblack", planarconfig="contig", compression=packed
        )
    return folder


def copy_plainly(source: Path, out: Path) -> None:
    """The other side: every file read, its pixels written."""
    import tifffile

    for path in files_in(source):
        np.save(out / f"{path.stem}.npy", tifffile.imread(path))


def command_of(writer: str, source: Path, work: Path) -> list[str]:
    """The command line of one writing."""
    if writer == "numpy":
        (work / "npy").mkdir(exist_ok=True)
        return [sys.executable, "-m", "bench.prepare_arrays", "--numpy", str(source), str(work / "npy")]
    flags = ["--write_mode", writer, "--nodata", "0", "--num_workers", "1", "--overwrite"]
    return [sys.executable, "-m", "data_prep.images", str(source), str(work / f"{writer}.beton"), *flags]


def bench(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Everything, as it goes into the JSON."""
    os.environ["OMP_NUM_THREADS"] = "1"
    writers, sizes = ("numpy", *CODECS), (arguments.tiles, max(arguments.tiles // START_SHARE, 1))
    taken: dict[str, dict[str, list[float]]] = {name: {w: [] for w in writers} for name in COMPRESSIONS}
    for name in COMPRESSIONS:
        folders = [draw_tiles(work / f"{name}-{count}", count, name) for count in sizes]
        for number in range(arguments.rounds):
            for writer in writers[:: 1 if number % 2 == 0 else -1]:
                large, small = (time_command(command_of(writer, folder, work))[1] for folder in folders)
                taken[name][writer].append(1e3 * (large - small) / (sizes[0] - sizes[1]))
            say(f"{name}: round {number + 1} of {arguments.rounds}")
    return {
        "bench": "prepare_arrays",
        "machine": machine(),
        "tiles": arguments.tiles,
        "cpu_ms_per_tile": {name: {w: spread(values) for w, values in row.items()} for name, row in taken.items()},
        "ratio": {name: {w: ratios(row["numpy"], row[w]) for w in CODECS} for name, row in taken.items()},
    }


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = []
    for name, row in result["cpu_ms_per_tile"].items():
        rows.append([f"TIFF {name}", "tifffile + numpy.save", show(row["numpy"]), "1"])
        rows += [
            [f"TIFF {name}", f"data_prep.images, {codec}", show(row[codec]), show(result["ratio"][name][codec])]
            for codec in CODECS
        ]
    machine = result["machine"]
    head = (
        f"{machine['device']}, {machine['cores']} cores, one process, {result['tiles']} tiles of {SIDE} x {SIDE} x "
        f"{BANDS}, uint16, median (lowest to highest round); commit {machine['commit'][:10]}"
    )
    columns = ("source", "writer", "CPU ms per tile", "x tifffile + numpy")
    return f"{head}\n\n{table(columns, rows)}"


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.prepare_arrays`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--numpy"]:
        copy_plainly(Path(words[1]), Path(words[2]))
        return
    parser = Parser(prog="python -m bench.prepare_arrays", description=__doc__)
    parser.add_argument("--tiles", type=int, default=400, help="tiles (default 400)")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds (default 3)")
    parser.add_argument("--work", type=Path, default=None, help="folder for what is written; none = temporary")
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs: its figures mean nothing")
    parser.add_argument("-o", "--output", type=json_file, default=None, help="write the raw figures here as JSON")
    arguments = parse_quickly(parser, words, tiles=QUICK_TILES, rounds=QUICK_ROUNDS)
    if arguments.rounds < 1 or arguments.tiles < 2:
        raise UserError(f"rounds {arguments.rounds} must be 1 or more, tiles {arguments.tiles} 2 or more")
    with work_folder(arguments.work) as work:
        result = bench(arguments, work)
    write_json(arguments.output, result)
    print(report(result))


if __name__ == "__main__":
    run_command(main)
