"""What belongs to a prepared set on disk: its files' names, the index of a sharded one, hashes, progress bars."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fasthpm.data.ffcv.beton import AGAIN, sidecar_path
from fasthpm.data.listing import NOTES, REJECTED
from fasthpm.data.sources import is_video_set
from fasthpm.errors import UserError
from fasthpm.files import check_above, read_json

SHARDED = "ffcv-shards"  # the "format" of an index
INDEX_TYPES = {"shards": list, "num_samples": int, "channels": int, "mean": list, "std": list, "classes": list}


def rejected_path(out: Path) -> Path:
    """`OUT.rejected.csv` of `OUT.beton`."""
    return out.with_suffix(REJECTED)


def notes_path(out: Path) -> Path:
    """`OUT.notes.csv` of `OUT.beton`: what its owner should know of single sources that were stored."""
    return out.with_suffix(NOTES)


def validation_path(out: Path) -> Path:
    """`OUT_val.beton` of `OUT.beton`."""
    return out.with_name(f"{out.stem}_val{out.suffix}")


def shard_path(out: Path, number: int, count: int) -> Path:
    """`OUT-00002-of-00008.beton` of `OUT.beton`."""
    return out.with_name(f"{out.stem}-{number:05d}-of-{count:05d}{out.suffix}")


def read_index(path: Path) -> dict[str, Any] | None:
    """The index `OUT.json` of a sharded set `OUT.beton`; None if `path` is, or is meant to be, a single file.

    **Raises:** `UserError` if the index lacks something.
    """
    index = {} if path.exists() else read_json(sidecar_path(path))
    if index.get("format") != SHARDED:
        return None
    for name, kind in INDEX_TYPES.items():
        if not isinstance(index.get(name), kind) or not index[name]:
            raise UserError(f"{sidecar_path(path)} has no {kind.__name__} named {name!r}: {AGAIN}")
    for name in index["shards"]:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".beton"):
            raise UserError(f"{sidecar_path(path)} names the shard {name!r}, expected a .beton beside it: {AGAIN}")
    return index


def members(path: Path) -> list[Path]:
    """The `.beton` files of a set: its shards, or itself."""
    index = read_index(path)
    return [path] if index is None else [path.with_name(name) for name in index["shards"]]


def check_folder(path: Path, flag: str) -> None:
    """Refuse a folder to write, before any work. **Raises:** `UserError` if a file is there, or above it.

    - `flag`: what the command line calls it
    """
    if path.is_file():
        raise UserError(f"{flag} is {path}, which is a file, and a folder is written; choose another")
    check_above(path, flag)


def require_set(path: Path) -> None:
    """**Raises:** `UserError` that says what is at `path`, if that is no file of images that were prepared."""
    expected = "expected a prepared set, the .beton that data_prep.images writes"
    if path.is_dir():
        kinds = {
            "a set of videos": is_video_set(path),
            "the folder of a run": (path / "checkpoints").is_dir() or (path / "recipe.json").is_file(),
        }
        raise UserError(f"{path} is {next((kind for kind, is_so in kinds.items() if is_so), 'a folder')}, {expected}")
    if not path.is_file() and read_index(path) is None:
        raise UserError(f"{path} is not there; {expected}")


def make_folder(path: Path) -> None:
    """Make a folder for output, if it is not there. **Raises:** `UserError` if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder {path} cannot be made ({error.strerror}); choose another") from error


def write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Write a table; names that are not UTF-8 keep their bytes."""
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def read_csv(path: Path) -> Iterator[list[str]]:
    """The rows of such a table, header first."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        yield from csv.reader(file)


def progress_bar(total: int, what: str, unit: str, **options: Any) -> Any:
    """A bar on stderr with rate and time left."""
    return tqdm(total=total, desc=what, unit=unit, mininterval=0.5, dynamic_ncols=True, **options)


def byte_bar(total: int, what: str) -> Any:
    """The same for bytes."""
    return progress_bar(total, what, "B", unit_scale=True, unit_divisor=1024)
