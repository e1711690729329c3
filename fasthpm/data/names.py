"""The files that samples were made of, and where in them."""

import csv
from pathlib import Path
from typing import NamedTuple

from fasthpm.data.ffcv.beton import files_path, sidecar_path
from fasthpm.data.ffcv.prepared import open_set
from fasthpm.data.pixels import list_images
from fasthpm.data.sources import is_beton, is_video_set, split_sources
from fasthpm.data.video.prepared import MANIFEST, MANIFEST_FILE
from fasthpm.files import read_json

LISTS = (".txt", ".csv")
PLACE = ("path", "top", "left", "height", "width")  # columns of the files of a set of tiles


class Place(NamedTuple):
    """Where a tile was cut, in pixels of its scene."""

    scene: str
    top: int
    left: int
    height: int
    width: int

    @property
    def name(self) -> str:
        """What a tile is called."""
        return f"{self.scene}#{self.top},{self.left}"


def known_names(data_path: str, count: int) -> list[str]:
    """The file of each of `count` samples, of tiles and their place in it; [] where the source does not tell all."""
    path = Path(data_path)
    if data_path.startswith("synthetic:"):
        return []
    if is_video_set(path):
        names = _column(path / MANIFEST_FILE, MANIFEST.index("path"))
    elif places := known_places(data_path, count):
        names = [place.name for place in places]
    elif is_beton(data_path):
        names = [name for file in open_set(data_path).files for name in _column(files_path(file), 0)]
    else:
        names = list(list_images(path).paths)
    return names if len(names) == count else []


def known_places(data_path: str, count: int) -> list[Place]:
    """The place of each of `count` samples; [] of a set that is not made of tiles."""
    if not is_beton(data_path):
        return []
    columns = [
        [name for file in open_set(data_path).files for name in _column(files_path(file), column)] for column in PLACE
    ]
    try:
        found = [Place(scene, *map(int, rest)) for scene, *rest in zip(*columns, strict=True)]
    except ValueError:  # other columns, or fewer
        return []
    return found if len(found) == count else []


def sample_names(data_path: str, count: int) -> list[str]:
    """The same, with numbers for names that are not known."""
    return known_names(data_path, count) or [f"sample-{number:08d}" for number in range(count)]


def stored_in(data_path: str, output: Path) -> list[Path]:
    """What of a data set an `output` may not overwrite, for `files.check_place`: its files, and its folder.

    A folder of images holds none in .json, which may lie there.
    """
    if not data_path or data_path.startswith("synthetic:"):
        return []
    found: list[Path] = []
    for name in map(Path, split_sources(data_path)):
        if name.suffix == ".beton":
            shards = read_json(sidecar_path(name)).get("shards", [])
            for one in (name, *(name.parent / str(shard) for shard in shards)):
                found += [one, sidecar_path(one), files_path(one)]
        elif name.is_file():  # a list, or what is no data at all
            found += [name, *(map(Path, list_images(name).paths) if name.suffix.lower() in LISTS else ())]
        elif is_video_set(name) or output.suffix.lower() != ".json":
            found.append(name)
    return found


def _column(path: Path, place: int | str) -> list[str]:
    """A column of a csv with a header, by number or name; [] if there is none, or it cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
            header, *rows = csv.reader(lines)
            number = header.index(place) if isinstance(place, str) else place
            return [row[number] for row in rows]
    except (OSError, csv.Error, IndexError, ValueError):
        return []
