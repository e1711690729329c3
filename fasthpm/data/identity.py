"""Which data a source holds, wherever it lies: what a run that goes on compares, instead of a path."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fasthpm.data.sources import is_beton, is_video_set, split_sources
from fasthpm.files import file_hash

READ = 256  # files of a folder whose content counts, evenly spaced
SAID = ("num_samples", "channels", "mean", "std", "bytes", "pixels", "counts")  # of a sidecar without a hash


def identity_of(data_path: str | Path) -> str:
    """The same text for the same data under any path; of other data another one.

    Of a prepared set the sha256 that its sidecar has (of several, or of shards, one of all of them in order); of a
    folder or list the files' names below their common folder, and what is in up to `READ` of them; of `synthetic:N`
    the name.

    **Raises:** `UserError` if the source is missing, or its sidecar cannot be read.
    """
    source = str(data_path)
    if source.startswith("synthetic:"):
        return source
    if is_video_set(Path(source)):
        from fasthpm.data.video import prepared

        return _joined([_of_sidecar(prepared.read_sidecar(Path(source)))])
    if is_beton(source):
        return _joined([one for name in split_sources(source) for one in _of_beton(Path(name))])
    from fasthpm.data.pixels import list_images

    return _joined([_of_files(list_images(Path(source)).paths)])


def _of_beton(path: Path) -> list[str]:
    from fasthpm.data.ffcv.beton import read_index, read_sidecar

    index = read_index(path)
    names = [path] if index is None else [path.parent / name for name in index["shards"]]
    return [_of_sidecar(read_sidecar(name)) for name in names]


def _of_sidecar(sidecar: dict[str, Any]) -> str:
    """A sidecar's own hash; of videos one of all that is decoded, of a sidecar without any one of its figures."""
    known = sidecar["sha256"]
    if isinstance(known, str) and known:
        return known
    parts = {name: digest for name, digest in known.items() if name != "manifest.csv"} if known else {}
    return _hash([json.dumps(parts or {name: sidecar.get(name) for name in SAID}, sort_keys=True)])


def identity_of_files(paths: Sequence[str]) -> str:
    """The same of loose files, as of a folder: their names below the common folder, and what is in up to `READ`."""
    return _joined([_of_files(paths)])


def _of_files(paths: Sequence[str]) -> str:
    common = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    names = [os.path.relpath(os.path.abspath(path), common) for path in paths]
    read = [paths[index * len(paths) // READ] for index in range(READ)] if len(paths) > READ else paths
    return _hash([*names, *map(_content, read)])


def _content(path: str) -> str:
    try:
        return file_hash(Path(path))
    except OSError:
        return "unreadable"


def _joined(parts: list[str]) -> str:
    return f"sha256:{parts[0] if len(parts) == 1 else _hash(parts)}"


def _hash(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()
