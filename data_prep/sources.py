"""Where images come from: folders and lists, WebDataset tar shards, Hugging Face parquet files.

A source is a numbered list of encoded images with labels. Listing it reads no image; `sample(i)` reads one. Tar shards
need the package webdataset, parquet files pyarrow.
"""

import glob
import hashlib
import os
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_prep.sets import progress_bar
from fasthpm.data.options import count_workers
from fasthpm.data.pixels import EXTENSIONS, MAX_LABEL, ImageList, list_images
from fasthpm.data.sampling import Array
from fasthpm.errors import UserError, nearest

TAR, PARQUET = ".tar", ".parquet"
MISSING = -1  # the label of a tar sample without one
MAX_ROW_GROUP = 1 << 30  # bytes: a worker holds a whole one
SPLIT_NAME = re.compile(r"^(train|validation|valid|val|test)[-_.]")


class Samples(Protocol):
    """A numbered set: `sample(i)` is (bytes of an image file, PIL image or uint8 array; label), or raises."""

    def __len__(self) -> int: ...

    def sample(self, index: int) -> tuple[Any, int]: ...

    def name(self, index: int) -> str: ...  # relative to the source's root

    def where(self, index: int) -> str: ...  # for error messages and people

    def fingerprint(self) -> str | None: ...  # of names and labels; None if they cannot be told apart


class Source(ABC):
    """A `Samples` with known labels; its kinds say how bytes are read."""

    groups: Array | None = None  # int64 [N]: samples that must be read together

    def __init__(self, root: str, names: Sequence[str], labels: Array, classes: Sequence[str]) -> None:
        self.root, self.names = root, names
        self.labels, self.classes = np.asarray(labels, np.int64), tuple(classes)
        self.chosen = np.ones(len(names), bool)  # bool [N]: samples that count

    def __len__(self) -> int:
        return len(self.names)

    def sample(self, index: int) -> tuple[bytes, int]:
        return self._bytes(index), int(self.labels[index])

    @abstractmethod
    def _bytes(self, index: int) -> bytes:
        """The encoded image."""

    def name(self, index: int) -> str:
        return self.names[index]

    def where(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.labels.tobytes() + np.packbits(self.chosen).tobytes())
        for name in (*self.classes, *self.names):
            digest.update(os.fsencode(name) + b"\0")
        return digest.hexdigest()

    def select(self, names: Sequence[str]) -> None:
        """Keep the classes called `names` and number them in that order.

        **Raises:** `UserError` for a class that the source has not.
        """
        unknown = [name for name in names if name not in set(self.classes)]
        if unknown:
            raise UserError(
                f"{len(unknown)} of {len(names)} classes asked for are not in {self.root}, the first is "
                f"{unknown[0]!r}{nearest(unknown[0], self.classes)}"
            )
        number = {name: index for index, name in enumerate(names)}
        table = np.array([number.get(name, MISSING) for name in self.classes], np.int64)
        labels = np.where(self.labels >= 0, table[self.labels], MISSING)
        self.chosen &= (labels >= 0) | (self.labels < 0)
        self.labels, self.classes = labels, tuple(names)


def open_source(source: str, *, num_workers: int = 0, label_column: str | None = None) -> Source:
    """What `source` names: a folder of images, of .tar or of .parquet files, a .txt list, or a pattern of such files.

    **Raises:** `UserError` if there is nothing, or it is ambiguous.
    """
    files = _packed_files(source)
    if not files:
        return _open_images(Path(source))
    if files[0].endswith(TAR):
        return open_tars(files, num_workers)
    return open_parquet(files, label_column)


def _packed_files(source: str) -> list[str]:
    """The .tar or .parquet files of a folder or pattern; none if it is something else."""
    if os.path.isdir(source):
        found = [_files_below(source, ending) for ending in (TAR, PARQUET)]
        if all(found):
            raise UserError(f"{source} holds both .tar and .parquet files; name the ones you want by a pattern")
        return found[0] or _one_split(source, found[1])
    if not source.endswith((TAR, PARQUET)) and not glob.has_magic(source):
        return []
    files = sorted(path for pattern in _braces(source) for path in glob.glob(pattern) or [pattern])
    missing = [path for path in files if not os.path.isfile(path)]
    if missing:
        raise UserError(f"{missing[0]} is not there; expected files that {source!r} names")
    if not all(path.endswith((TAR, PARQUET)) for path in files) or len({Path(p).suffix for p in files}) > 1:
        raise UserError(f"{source!r} names files such as {files[0]}; expected .tar files, or .parquet files")
    return files


def _files_below(folder: str, ending: str) -> list[str]:
    """Files of one kind in a folder, or in its folder `data`, as Hugging Face lays them out."""
    for place in (Path(folder), Path(folder, "data")):
        found = sorted(str(path) for path in place.glob(f"*{ending}") if path.is_file())
        if found:
            return found
    return []


def _one_split(source: str, files: list[str]) -> list[str]:
    splits = sorted({match[1] for path in files if (match := SPLIT_NAME.match(Path(path).name))})
    if len(splits) > 1:
        pattern = os.path.join(os.path.dirname(files[0]), f"{splits[-1]}-*{PARQUET}")
        raise UserError(f"{source} holds the splits {', '.join(splits)}; name one by a pattern, e.g. '{pattern}'")
    return files


def _braces(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    return _webdataset("shardlists").expand_urls(pattern)


def _webdataset(module: str) -> Any:
    try:
        return __import__(f"webdataset.{module}", fromlist=["webdataset"])
    except ImportError as error:
        raise UserError(f"tar shards need webdataset ({error}); pip install 'fasthpm[webdataset]'") from error


def number_labels(texts: Sequence[str]) -> tuple[Array, tuple[str, ...]]:
    """Whole numbers stand for themselves, names for their place in alphabetical order; "" for none: int64 [N].

    **Raises:** `UserError` for an absurd number.
    """
    given = {text for text in texts if text}
    if not given:
        return np.zeros(len(texts), np.int64), ("all",)
    if all(text.isdecimal() for text in given):
        largest = max(map(int, given))
        if largest > MAX_LABEL:
            raise UserError(f"label {largest} is more than {MAX_LABEL}; number the classes from 0")
        table = {text: int(text) for text in given}
        classes = tuple(map(str, range(largest + 1)))
    else:
        classes = tuple(sorted(given))
        table = {text: index for index, text in enumerate(classes)}
    return np.array([table.get(text, MISSING) for text in texts], np.int64), classes


# ------------------------------------------------------------------------------------------------------- image files
class Files(Source):
    """Image files of a folder or a list."""

    def _bytes(self, index: int) -> bytes:
        with open(self.where(index), "rb") as file:
            return file.read()


def _open_images(source: Path) -> Files:
    images: ImageList = list_images(source, every_file=True)
    root = source if source.is_dir() else source.parent
    prefix = os.path.join(root, "") if str(root) != "." else ""
    names = [path.removeprefix(prefix) for path in images.paths]
    return Files(str(root), names, np.array(images.labels), images.classes)


# ------------------------------------------------------------------------------------------------------- tar shards
class Tars(Source):
    """Samples of WebDataset shards, read at the positions that the index found."""

    files: Sequence[str]
    table: Array  # int64 [N, 3]: shard, position, bytes

    def _bytes(self, index: int) -> bytes:
        shard, position, size = (int(value) for value in self.table[index])
        if position < 0:
            raise ValueError("none of its members is an image")
        if self.labels[index] == MISSING:
            raise ValueError("it has no label (.cls)")
        with open(self.files[shard], "rb") as file:
            return os.pread(file.fileno(), size, position)


def open_tars(files: Sequence[str], num_workers: int = 0) -> Tars:
    """Index tar shards: members of one name are a sample, of an image and its `.cls` (a number or a name).

    **Raises:** `UserError` for a shard that is damaged or packed.
    """
    split: Callable[[str], tuple[str | None, str | None]] = _webdataset("tariterators").base_plus_ext
    jobs = [(path, split) for path in files]
    root, found = os.path.commonpath([os.path.dirname(path) for path in files]), []
    with ProcessPoolExecutor(min(count_workers(num_workers), len(files)), _fork()) as pool:
        with progress_bar(len(files), "index", "tar") as bar:
            for rows in pool.map(_index_tar, jobs):
                found.append(rows)
                bar.update()
    labels, classes = number_labels([text for rows in found for *_, text in rows])
    names = [
        os.path.join(os.path.relpath(path, root or "."), row[0])
        for path, rows in zip(files, found, strict=True)
        for row in rows
    ]
    source = Tars(root, names, labels, classes)
    source.files = files
    source.table = np.array([(k, row[1], row[2]) for k, rows in enumerate(found) for row in rows], np.int64)
    if not names:
        raise UserError(
            f"{files[0]} (and {len(files) - 1} more) hold no samples; expected members like 0001.jpg, 0001.cls"
        )
    return source


def _fork() -> Any:
    import multiprocessing

    return multiprocessing.get_context("fork")


def _index_tar(job: tuple[str, Callable[[str], tuple[str | None, str | None]]]) -> list[tuple[str, int, int, str]]:
    """(member or key, position, bytes, label text) of each sample of a shard."""
    path, split = job
    try:
        with tarfile.open(path, "r:") as tar:
            rows = [_row(tar, key, group) for key, group in _groups(tar, split)]
        with open(path, "rb") as file:
            if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
                raise EOFError("it ends without an end mark")  # tarfile does not mind
        return rows
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{path} is no plain .tar file, or is damaged ({error}); unpack it or download it again"
        ) from error


def _groups(tar: Any, split: Callable[[str], tuple[str | None, str | None]]) -> Iterator[tuple[str, dict[str, Any]]]:
    key: str | None = None
    group: dict[str, Any] = {}
    for member in tar:
        base, extension = split(member.name) if member.isfile() else (None, None)
        tar.members = []  # tarfile would keep them all
        if base is None or extension is None:
            continue
        if base != key and group:
            yield str(key), group
            group = {}
        key = base
        group[extension.lower()] = member
    if group:
        yield str(key), group


def _row(tar: Any, key: str, group: dict[str, Any]) -> tuple[str, int, int, str]:
    text = tar.extractfile(group["cls"]).read().decode("utf-8", "replace").strip() if "cls" in group else ""
    image = next((member for extension, member in group.items() if f".{extension}" in EXTENSIONS), None)
    if image is None:
        return key, -1, 0, text
    return image.name, image.offset_data, image.size, text


# ------------------------------------------------------------------------------------------------------- parquet files
class Parquet(Source):
    """Rows of Hugging Face parquet files; a worker keeps the row group that it read last."""

    files: Sequence[str]
    table: Array  # int64 [N, 3]: file, row group, row in the group
    column: str
    _held: tuple[tuple[int, int], Any] = ((-1, -1), None)

    def _bytes(self, index: int) -> bytes:
        file, group, row = (int(value) for value in self.table[index])
        if self._held[0] != (file, group):
            self._held = ((-1, -1), None)  # before the next one is read
            self._held = ((file, group), self._read(file, group))
        value = self._held[1][row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ValueError("the row holds no bytes of an image")
        return data

    def _read(self, file: int, group: int) -> Any:
        with _parquet().ParquetFile(self.files[file]) as opened:
            return opened.read_row_group(group, columns=[self.column], use_threads=False).column(0)

    def name(self, index: int) -> str:
        return f"{self.names[index]}#{index - int(np.searchsorted(self.table[:, 0], self.table[index, 0]))}"

    def where(self, index: int) -> str:
        return os.path.join(self.root, self.name(index))


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"parquet files need pyarrow ({error}); pip install 'fasthpm[parquet]'") from error
    return pyarrow.parquet


def open_parquet(files: Sequence[str], label_column: str | None = None) -> Parquet:
    """List the rows of parquet files with a column of images (`{bytes, path}` or bytes) and perhaps one of labels.

    **Raises:** `UserError` for files that are damaged, differ, or lack such a column.
    """
    pieces = [_list_parquet(path, label_column) for path in files]
    column, label_name, names = pieces[0][0]
    if any(head != pieces[0][0] for head, *_ in pieces):
        raise UserError(f"the columns or class names of {files[0]} and of other files differ; name files of one set")
    values = [value for _, _, labels in pieces for value in labels]
    if names:
        labels, classes = np.array(values, np.int64), names
    else:
        labels, classes = number_labels(["" if value is None else str(value) for value in values])
    if len(labels) and labels.max() >= len(classes):
        raise UserError(f"column {label_name} of {files[0]} has label {labels.max()}, but {len(classes)} class names")
    root = os.path.commonpath([os.path.dirname(path) for path in files])
    relative = [os.path.relpath(path, root or ".") for path in files]
    source = Parquet(
        root, [relative[k] for k, (_, rows, _) in enumerate(pieces) for _ in range(len(rows))], labels, classes
    )
    source.files, source.column = files, column
    source.table = np.concatenate([np.insert(rows, 0, k, axis=1) for k, (_, rows, _) in enumerate(pieces)])
    source.groups = np.unique(source.table[:, :2], axis=0, return_inverse=True)[1].astype(np.int64)
    return source


def _list_parquet(
    path: str, label_column: str | None
) -> tuple[tuple[str, str | None, tuple[str, ...]], Array, list[Any]]:
    """(image column, label column, class names), rows int64 [n, 2] of group and place in it, and labels of one file."""
    pq = _parquet()
    try:
        with pq.ParquetFile(path) as file:
            head = _columns(path, file.schema_arrow, label_column)
            groups = [file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)]
            labels = file.read([head[1]], use_threads=False).column(0).to_pylist() if head[1] else None
    except (OSError, ValueError) as error:  # pyarrow's own errors are such
        raise UserError(f"{path} cannot be read as parquet ({error}); download it again") from error
    if any(group.total_byte_size > MAX_ROW_GROUP for group in groups):
        raise UserError(
            f"{path} has row groups of more than {MAX_ROW_GROUP >> 20} MiB; write it with row_group_size=100"
        )
    sizes = [group.num_rows for group in groups]
    rows = np.stack(
        [np.repeat(np.arange(len(sizes)), sizes), np.concatenate([np.arange(0), *map(np.arange, sizes)])], 1
    )
    return head, rows.astype(np.int64), labels if labels is not None else [None] * len(rows)


def _columns(path: str, schema: Any, label_column: str | None) -> tuple[str, str | None, tuple[str, ...]]:
    """Image column, label column and class names, from Hugging Face's description, else by type and name."""
    import json

    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = described.get("info", {}).get("features", {})
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    images = [name for name in schema.names if kinds.get(name) == "Image"]
    images = images or [name for name in schema.names if _holds_images(schema.field(name).type)]
    labels = [name for name in schema.names if kinds.get(name) == "ClassLabel"]
    labels = [label_column] if label_column else labels or [n for n in ("label", "labels", "cls") if n in schema.names]
    if len(images) != 1 or len(labels) > 1 or not set(labels) <= set(schema.names):
        raise UserError(
            f"{path} has the columns {', '.join(schema.names)}; expected one of images and at most one of labels "
            f"(--label_column chooses)"
        )
    label = labels[0] if labels else None
    return images[0], label, tuple(features[label].get("names", ())) if kinds.get(label) == "ClassLabel" else ()


def _holds_images(kind: Any) -> bool:
    import pyarrow.types as t

    if t.is_struct(kind):
        return any(kind.field(k).name == "bytes" for k in range(kind.num_fields))
    return t.is_binary(kind) or t.is_large_binary(kind)
