"""Copy prepared sets to a local disk: `python -m data_prep.copy SRC.beton... DEST_DIR`.

Takes all files of each set along (shards, sidecars, lists), hashes the data on the way and compares with the sidecars.
Files that are there already, complete and sound, are not copied again, so that the same command goes on after a kill.
A file has its name in DEST_DIR only once it is whole; sidecars come last.
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.sets import byte_bar, check_folder, members, notes_path, read_index, rejected_path, require_set
from fasthpm.cli import Parser, run_command
from fasthpm.data.ffcv.beton import files_path, read_sidecar, sidecar_path
from fasthpm.errors import UserError
from fasthpm.files import HASH_CHUNK, file_hash, fsync

RESERVE = 1 << 20  # bytes that should stay free


@dataclass(frozen=True)
class Item:
    """A file to copy, and what it must hash to (None: a small one, which is always copied)."""

    source: Path
    size: int
    sha256: str | None = None


def plan(path: Path) -> list[Item]:
    """The files of a set, data first, sidecars and index last.

    **Raises:** `UserError` if one is missing or does not fit its sidecar.
    """
    require_set(path)
    data, small, last = [], [], []
    for member in members(path):
        if not member.is_file():
            raise UserError(f"{member}, a shard of {path}, is not there; prepare the set again, or copy all of it")
        sidecar = read_sidecar(member)
        if member.stat().st_size != sidecar["bytes"]:
            raise UserError(f"{member} has {member.stat().st_size} bytes, its sidecar says {sidecar['bytes']}")
        data.append(Item(member, sidecar["bytes"], sidecar["sha256"]))
        small += [extra for extra in (files_path(member),) if extra.exists()]
        last.append(sidecar_path(member))
    if read_index(path) is not None:
        last.append(sidecar_path(path))
    small += [extra for extra in (rejected_path(path), notes_path(path)) if extra.exists()]
    return data + [Item(file, file.stat().st_size) for file in (*small, *last)]


def copy_sets(paths: Sequence[Path], folder: Path) -> tuple[int, int]:
    """Copy sets into `folder`, making it; returns how many data files were copied, and how many were there.

    **Raises:** `UserError` for sets that are incomplete, that do not fit, or whose content does not match its hash.
    """
    check_folder(folder, "DEST_DIR")
    items = [item for path in paths for item in plan(path)]
    _check_names(items, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = _present(items, folder)
        todo = [item for item in items if item.source.name not in present]
        _check_space(todo, folder)
        with byte_bar(sum(item.size for item in todo), "copy") as bar:
            for item in todo:
                _copy(item, folder / item.source.name, bar)
        fsync(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UserError(f"cannot write to {folder} ({error.strerror}); what was copied so far is kept") from error
    return sum(item.sha256 is not None for item in todo), len(present)


def _check_names(items: list[Item], folder: Path) -> None:
    seen: dict[str, Path] = {}
    for item in items:
        other = seen.setdefault(item.source.name, item.source)
        if other.resolve() != item.source.resolve():
            raise UserError(f"{other} and {item.source} have the same name; copy them to different folders")
        if item.source.resolve() == (folder / item.source.name).resolve():
            raise UserError(f"{item.source} lies in {folder} itself; choose another folder")


def _present(items: list[Item], folder: Path) -> set[str]:
    """Names of data files that need no copying: of the right size and hash."""
    there = [i for i in items if i.sha256 and _size(folder / i.source.name) == i.size]
    with byte_bar(sum(item.size for item in there), "check") as bar:
        return {i.source.name for i in there if file_hash(folder / i.source.name, bar.update) == i.sha256}


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _check_space(todo: list[Item], folder: Path) -> None:
    # A file that is replaced exists until its successor is whole, so nothing is subtracted for it.
    needed, free = sum(item.size for item in todo) + RESERVE, shutil.disk_usage(folder).free
    if todo and needed > free:
        raise UserError(f"{folder} has {free >> 20} MiB free, the copy needs {(needed >> 20) + 1} MiB; free some space")


def _copy(item: Item, target: Path, bar: Any) -> None:
    with _temporary(target) as (partial, file):
        digest = hashlib.sha256()
        with item.source.open("rb") as source:
            while block := source.read(HASH_CHUNK):
                file.write(block)
                digest.update(block)
                bar.update(len(block))
        if item.sha256 not in (None, digest.hexdigest()):
            raise UserError(
                f"{item.source} has sha256 {digest.hexdigest()}, its sidecar says {item.sha256}; check the original "
                f"with python -m data_prep.verify"
            )
        file.flush()
        os.fsync(file.fileno())
        partial.rename(target)


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[tuple[Path, Any]]:
    """An empty hidden file beside `target`, ours alone, to be renamed; removed if that fails."""
    path = target.with_name(f".{target.name}.copying")
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another copy is writing {target}; wait for it, or choose another folder") from error
        file.truncate(0)  # what a killed copy left
        try:
            yield path, file
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def main(argv: Sequence[str] | None = None) -> None:
    """Copy sets and say what was done."""
    parser: argparse.ArgumentParser = Parser(prog="python -m data_prep.copy", description=__doc__)
    parser.add_argument("sets", nargs="+", type=Path, metavar="SRC.beton", help="prepared sets, single or sharded")
    parser.add_argument("folder", type=Path, metavar="DEST_DIR", help="where to; made if need be")
    args = parser.parse_args(argv)
    copied, present = copy_sets(args.sets, args.folder)
    was = "was" if present == 1 else "were"
    print(f"{args.folder}: {copied} data files copied and checked, {present} {was} there already", flush=True)
    for path in args.sets:
        print(f"      --data_path {args.folder / path.name}", flush=True)


if __name__ == "__main__":
    run_command(main)
