"""WebDataset tar shards: an index of their members, made without unpacking them.

Members whose names agree up to the first dot are a sample (WebDataset's rule): of an image, and its label in `.cls`.
Images that only differ after that dot (scan.001.jpg, scan.002.jpg) are samples of their own, if no label is shared.
"""

import multiprocessing
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from data_prep.samples import Source
from data_prep.sets import progress_bar
from fasthpm.data.labels import number_labels
from fasthpm.data.listing import HELPERS, MAGIC, is_helper, tell
from fasthpm.data.options import count_workers
from fasthpm.data.pixels import IMAGES
from fasthpm.data.sampling import Array
from fasthpm.errors import UserError

LABEL = "cls"
Split = Callable[[str], tuple[str | None, str | None]]


class Row(NamedTuple):
    """A sample of a shard."""

    name: str  # of the member, or the key of a sample without an image
    position: int  # -1: there is no image
    size: int
    label: str


class Tars(Source):
    """Samples of WebDataset shards, read at the positions that the index found."""

    files: Sequence[str]
    table: Array  # int64 [N, 3]: shard, position, bytes

    def _bytes(self, index: int) -> bytes:
        shard, position, size = (int(value) for value in self.table[index])
        if position < 0:
            raise ValueError("none of its members is an image")
        with open(self.files[shard], "rb") as file:
            return os.pread(file.fileno(), size, position)

    def _on_disk(self) -> Sequence[str]:
        return self.files


def webdataset(module: str) -> Any:
    """A module of webdataset. **Raises:** `UserError` if it is not installed."""
    try:
        return __import__(f"webdataset.{module}", fromlist=["webdataset"])
    except ImportError as error:
        raise UserError(f"tar shards need webdataset ({error}); pip install 'fasthpm[webdataset]'") from error


def open_tars(files: Sequence[str], num_workers: int = 0) -> Tars:
    """Index tar shards. A sample without `.cls` is unlabelled; without any, all are of one class.

    **Raises:** `UserError` for a shard that is damaged or packed, and for images that share a label by the rule.
    """
    split: Split = webdataset("tariterators").base_plus_ext
    jobs = [(path, split) for path in files]
    root, found, skipped = os.path.commonpath([os.path.dirname(path) for path in files]), [], []
    with ProcessPoolExecutor(min(count_workers(num_workers), len(files)), _fork()) as pool:
        with progress_bar(len(files), "index", "tar") as bar:
            for rows, others in pool.map(_index_tar, jobs):
                found.append(rows)
                skipped += others
                bar.update()
    flat = [(path, row) for path, rows in zip(files, found, strict=True) for row in rows]
    if not flat:
        raise UserError(
            f"{files[0]} (and {len(files) - 1} more) hold no samples; expected members like 0001.jpg, 0001.cls"
        )
    labels, classes = number_labels([row.label for _, row in flat], lambda k: f"{flat[k][0]}: {flat[k][1].name}")
    names = [os.path.join(os.path.relpath(path, root or "."), row.name) for path, row in flat]
    words = (
        [f"left out, further images of samples that have one, and files that are none: {tell(skipped)}"]
        if skipped
        else []
    )
    source = Tars(root, names, labels, classes, words)
    source.files = files
    source.table = np.array([(k, row.position, row.size) for k, rows in enumerate(found) for row in rows], np.int64)
    return source


def _fork() -> Any:
    return multiprocessing.get_context("fork")


def _index_tar(job: tuple[str, Split]) -> tuple[list[Row], list[str]]:
    """The samples of a shard, and the names of members that may be images and belong to none."""
    path, split = job
    skipped: list[str] = []
    try:
        with tarfile.open(path, "r:") as tar:
            rows = [row for group in _groups(tar, split, skipped) for row in _rows(path, tar, *group, skipped)]
        with open(path, "rb") as file:
            if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
                raise EOFError("it ends without an end mark")  # tarfile does not mind
        return rows, skipped
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{path} is no plain .tar file, or is damaged ({error}); unpack it or download it again"
        ) from error


def _groups(tar: Any, split: Split, skipped: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, members by what follows its dot) of each sample; a name without a dot is a sample of its own."""
    key: str | None = None
    group: dict[str, Any] = {}
    for member in tar:
        tar.members = []  # tarfile would keep them all
        *folders, name = member.name.split("/")
        if not member.isfile() or is_helper(name) or any(folder.lower() in HELPERS for folder in folders):
            continue
        base, extension = split(member.name)
        if base is None or extension is None:
            base, extension = member.name, ""
        if base != key and group:
            yield str(key), group
            group = {}
        key, extension = base, extension.lower()
        if extension in group and group[extension].name != member.name:  # a.jpg and a.JPG
            skipped.append(member.name)
        else:
            group[extension] = member
    if group:
        yield str(key), group


def _rows(path: str, tar: Any, key: str, group: dict[str, Any], skipped: list[str]) -> Iterator[Row]:
    """The samples of one key: usually one."""
    plain = [member for extension, member in group.items() if f".{extension}" in IMAGES.extensions]
    dotted = {e: m for e, m in group.items() if os.path.splitext(e)[1] in IMAGES.extensions and "." in e}
    label = _label(tar, group.get(LABEL))
    if not plain and not dotted:
        plain = [member for e, member in group.items() if e not in (LABEL, "json") and _is_image(tar, member)]
    if plain:
        skipped += [member.name for member in (*plain[1:], *dotted.values())]
        yield _row(plain[0], label)
    elif len(dotted) == 1:
        (extension, member), *_ = dotted.items()
        yield _row(member, label or _label(tar, group.get(os.path.splitext(extension)[0] + f".{LABEL}")))
    elif dotted and label:
        first, second, *_ = (member.name for member in dotted.values())
        raise UserError(
            f"{path} has {len(dotted)} images of the key {key!r} ({first}, {second}) and one label for them: a key "
            f"ends at the first dot of a name (WebDataset's rule); rename them without that dot"
        )
    elif dotted:
        for extension, member in dotted.items():
            own = os.path.splitext(extension)[0] + f".{LABEL}"
            yield _row(member, _label(tar, group.get(own)))
    elif list(group) == [""]:
        skipped.append(key)  # a file without extension that is no image: LICENSE
    else:
        yield Row(key, -1, 0, label)


def _row(member: Any, label: str) -> Row:
    return Row(member.name, member.offset_data, member.size, label)


def _label(tar: Any, member: Any) -> str:
    return tar.extractfile(member).read().decode("utf-8", "replace").strip() if member else ""


def _is_image(tar: Any, member: Any) -> bool:
    return IMAGES.looks_like(tar.extractfile(member).read(MAGIC))
