"""The files that samples were made of."""

import csv
from pathlib import Path

from fasthpm.data.ffcv.beton import files_path
from fasthpm.data.ffcv.prepared import open_set
from fasthpm.data.pixels import list_images
from fasthpm.data.sources import is_beton, is_video_set
from fasthpm.data.video.prepared import MANIFEST, MANIFEST_FILE


def known_names(data_path: str, count: int) -> list[str]:
    """The file of each of `count` samples; [] where the source does not tell all of them."""
    path = Path(data_path)
    if data_path.startswith("synthetic:"):
        return []
    if is_video_set(path):
        names = _column(path / MANIFEST_FILE, MANIFEST.index("path"))
    elif is_beton(data_path):
        names = [name for file in open_set(data_path).files for name in _column(files_path(file), 0)]
    else:
        names = list(list_images(path).paths)
    return names if len(names) == count else []


def sample_names(data_path: str, count: int) -> list[str]:
    """The same, with numbers for names that are not known."""
    return known_names(data_path, count) or [f"sample-{number:08d}" for number in range(count)]


def _column(path: Path, place: int) -> list[str]:
    """A column of a csv with a header; [] if it cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
            return [row[place] for row in csv.reader(lines)][1:]
    except (OSError, csv.Error, IndexError):
        return []
