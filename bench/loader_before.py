"""Loading photographs by two checkouts of this project, interleaved: has the loader become slower?

    git worktree add --detach OLD 63f04fc                # any commit: this one is before arrays were known
    python -m bench.loader_before OLD [--images 96] [--rounds 5] [-o bench/results/loader_before.json]

Photographs are drawn (500 x 375, JPEG 90), prepared by the old checkout, and loaded as training does: random resized
crops at 224, flipped, one thread. Each checkout has a process of its own; they take turns, an epoch at a time. What
counts is processor time per image; a ratio above 1 says that this checkout is faster than the old one.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.common import json_file, machine, parse_quickly, ratios, say, show, spread, table, work_folder, write_json
from fasthpm.cli import Parser, run_command
from fasthpm.errors import UserError

INTERPOLATIONS = ("area", "bicubic")
QUICK_IMAGES, QUICK_ROUNDS = 8, 1
HERE = Path(__file__).resolve().parents[1]
CHILD = """
import sys, time
from pathlib import Path
import fasthpm
from fasthpm.data import build_loader
assert Path(fasthpm.__file__).resolve().is_relative_to(Path(sys.argv[1]).resolve()), fasthpm.__file__
sizes = {"batch_size": 8, "image_size": (224, 224), "channels": 3, "num_workers": 1}
loader = build_loader(sys.argv[2], interpolation=sys.argv[3], **sizes)
for line in sys.stdin:
    loader.set_epoch(int(line))
    begin, count = time.process_time(), 0
    for batch in loader:
        count += len(batch.images)
    print((time.process_time() - begin) / count * 1e3, flush=True)
loader.close()
"""


def draw(folder: Path, count: int) -> Path:
    """`count` JPEG files of smooth colours with grain."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:375, :500] / 40
    for index in range(count):
        rng = np.random.default_rng(index)
        waves = [np.sin(x * a + y * b + c) for a, b, c in rng.uniform(-2, 2, (3, 3))]
        pixels = 128 + 90 * np.stack(waves, -1) + rng.normal(0, 12, (375, 500, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:05d}.jpg", quality=90)
    return folder


def command(checkout: Path, *words: str) -> dict[str, Any]:
    """How a program of a checkout is started."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    return {"args": [sys.executable, *words], "cwd": checkout, "env": environment}


class Side:
    """A checkout's loader in its own process."""

    def __init__(self, checkout: Path, data: Path, interpolation: str) -> None:
        words = ("-c", CHILD, str(checkout), str(data), interpolation)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(**command(checkout, *words), **pipes)
        self.taken: list[float] = []

    def epoch(self, number: int) -> float:
        """Milliseconds of processor time per image."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"the loader of {self.process.args!r} ended; see its message above")
        return float(line)

    def close(self) -> None:
        """End it."""
        self.process.communicate()


def bench(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Everything, as it goes into the JSON."""
    old, here = arguments.old.resolve(), HERE
    photos, data = draw(work / "photos", arguments.images), (work / "set.beton").resolve()
    flags = ("-m", "data_prep.images", str(photos.resolve()), str(data), "--num_workers", "1")
    subprocess.run(**command(old, *flags), check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = {}
    for interpolation in INTERPOLATIONS:
        sides = {name: Side(checkout, data, interpolation) for name, checkout in (("before", old), ("now", here))}
        for side in sides.values():
            side.epoch(0)  # compiles
        for number in range(arguments.rounds):
            for side in list(sides.values())[:: 1 if number % 2 == 0 else -1]:
                side.taken.append(side.epoch(number + 1))
            say(f"{interpolation}: round {number + 1} of {arguments.rounds}")
        for side in sides.values():
            side.close()
        before, now = (sides[name].taken for name in ("before", "now"))
        found[interpolation] = {
            "cpu_ms_before": spread(before),
            "cpu_ms_now": spread(now),
            "ratio": ratios(before, now),
            "rounds": {"before": before, "now": now},
        }
    revision = subprocess.run(["git", "-C", str(old), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    head = {"bench": "loader_before", "machine": machine(), "before": revision.strip(), "images": arguments.images}
    return head | {"rates": found}


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = [
        [name, show(row["cpu_ms_before"]), show(row["cpu_ms_now"]), show(row["ratio"])]
        for name, row in result["rates"].items()
    ]
    device, images = result["machine"]["device"], result["images"]
    head = f"{device}, one thread, {images} photographs, median (lowest to highest round)"
    return f"{head}\n\n{table(('resize', 'CPU ms per image before', 'now', 'times as fast'), rows)}"


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.loader_before`."""
    parser = Parser(prog="python -m bench.loader_before", description=__doc__)
    parser.add_argument("old", type=Path, help="folder of the other checkout")
    parser.add_argument("--images", type=int, default=96, help="photographs (default 96)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default 5)")
    parser.add_argument("--work", type=Path, default=None, help="folder for what is written; none = temporary")
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs: its figures mean nothing")
    parser.add_argument("-o", "--output", type=json_file, default=None, help="write the raw figures here as JSON")
    arguments = parse_quickly(parser, argv, images=QUICK_IMAGES, rounds=QUICK_ROUNDS)
    if arguments.rounds < 1 or arguments.images < 8:
        raise UserError(f"rounds {arguments.rounds} must be 1 or more, images {arguments.images} 8 or more")
    if not (arguments.old / "fasthpm").is_dir():
        raise UserError(f"{arguments.old} is no checkout of this project; make one with git worktree add")
    with work_folder(arguments.work) as work:
        result = bench(arguments, work)
    write_json(arguments.output, result)
    print(report(result))


if __name__ == "__main__":
    run_command(main)
