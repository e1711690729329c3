"""A folder of photographs of ImageNet's size for the benches, cut from Debian's wallpaper packages.

    apt-get install lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 mate-backgrounds plasma-workspace-wallpapers \\
        ukui-wallpapers
    python -m bench.photos photos [--count 2000]

Installing them (170 MB) is up to you. The script finds their large JPEG files (`data_prep.photographs`), cuts boxes at
random places and scales, shrinks them to 500 x 375 or 375 x 500 pixels and saves them as JPEG, in 20 class folders. A
cut that is too smooth or too busy for ImageNet's 100 kB or so (a sky, a lawn) is drawn again. The same files, count and
seed give the same photographs.
"""

import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_prep.photographs import read_source, sources
from fasthpm.cli import Parser, run_command
from fasthpm.errors import UserError

CLASSES = 20
LONG, SHORT, PORTRAITS, QUALITY = 500, 375, 0.25, 96
SMALLEST, LARGEST = 60_000, 180_000  # bytes of a JPEG; ImageNet's are 110 kB on average
PROBES, FEWEST_GOOD = 12, 3  # a source is used if so many of its first cuts have that size
TRIES = 12  # cuts per photograph, on average, before a source is given up


def cut(source: Image.Image, generator: np.random.Generator) -> bytes:
    """A JPEG file of a random box of `source`, never enlarged."""
    width, height = (SHORT, LONG) if generator.random() < PORTRAITS else (LONG, SHORT)
    scale = np.exp(generator.uniform(0, np.log(min(source.width / width, source.height / height))))
    left = generator.uniform(0, source.width - width * scale)
    top = generator.uniform(0, source.height - height * scale)
    box = (left, top, left + width * scale, top + height * scale)
    buffer = io.BytesIO()
    source.resize((width, height), Image.Resampling.BICUBIC, box).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def good_cuts(source: Image.Image, generator: np.random.Generator, tries: int) -> Iterator[bytes]:
    """Those of `tries` cuts that have an ordinary photograph's bytes."""
    for _ in range(tries):
        data = cut(source, generator)
        if SMALLEST <= len(data) <= LARGEST:
            yield data


def detailed(files: Sequence[Path], seed: int) -> list[Path]:
    """The files whose cuts are mostly neither smooth nor busy."""
    chosen = []
    for number, file in enumerate(tqdm(files, desc="look", unit="file", dynamic_ncols=True)):
        found = good_cuts(read_source(file), np.random.default_rng((seed, 1, number)), PROBES)
        if sum(1 for _ in found) >= FEWEST_GOOD:
            chosen.append(file)
    return chosen


def write_photos(files: Sequence[Path], out: Path, count: int, seed: int) -> int:
    """Write `count` photographs into class folders below `out`; returns their bytes."""
    written = size = 0
    with tqdm(total=count, desc="cut", unit="photo", dynamic_ncols=True) as bar:
        for number, file in enumerate(files):
            wanted = -(-(count - written) // (len(files) - number))  # what is missing, over the sources that are left
            found = good_cuts(read_source(file), np.random.default_rng((seed, 2, number)), wanted * TRIES)
            for data in itertools.islice(found, wanted):
                folder = out / f"class{written % CLASSES:02d}"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{written:05d}.jpg").write_bytes(data)
                written, size = written + 1, size + len(data)
                bar.update()
    if written < count:
        raise UserError(f"only {written} of {count} photographs could be cut; install more packages or lower --count")
    return size


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.photos`."""
    parser = Parser(prog="python -m bench.photos", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist or be empty")
    parser.add_argument("--count", type=int, default=2000, help="photographs (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the cuts (default 0)")
    arguments = parser.parse_args(argv)
    if arguments.count < 1 or arguments.seed < 0:
        raise UserError(f"count {arguments.count} must be 1 or more, seed {arguments.seed} 0 or more")
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise UserError(f"{arguments.out} exists and is not an empty folder; give a new one")
    files = detailed(sources(), arguments.seed)
    size = write_photos(files, arguments.out, arguments.count, arguments.seed)
    print(
        f"wrote {arguments.out}: {arguments.count} photographs from {len(files)} sources, "
        f"{size / arguments.count / 1e3:.0f} kB on average"
    )


if __name__ == "__main__":
    run_command(main)
