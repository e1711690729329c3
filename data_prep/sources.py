"""Where images come from: folders and lists, WebDataset tar shards (`tars.py`), Hugging Face parquet files.

A source is a numbered list of encoded images with labels. Listing it reads no image; `sample(i)` reads one. Tar shards
need the package webdataset, parquet files pyarrow.
"""

import glob
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.samples import Files, SingleFile, Source
from data_prep.tars import open_tars, webdataset
from fasthpm.cli import without_effect
from fasthpm.data.labels import UNLABELLED, number_labels
from fasthpm.data.listing import STORE, is_helper, scan
from fasthpm.data.lists import LISTS
from fasthpm.data.pixels import EXTENSIONS, ImageList, list_images
from fasthpm.data.rasters.containers import blob_of
from fasthpm.data.sampling import Array
from fasthpm.errors import UserError

TAR, PARQUET = ".tar", ".parquet"
CLASS_FOLDERS = os.path.join("*", "")  # ends the name of a folder whose class folders are meant, not its shards
MAX_ROW_GROUP = 1 << 30  # bytes: a worker holds a whole one
SPLIT_NAME = re.compile(r"^(train|validation|valid|val|test)[-_.]")


def open_source(source: str, *, num_workers: int = 0, label_column: str | None = None) -> Source:
    """What `source` names: a folder of images, of .tar or of .parquet files, a list, or a pattern of such files.

    What exists is taken as it is, also if it could be a pattern; `FOLDER/*/` are the class folders of a folder.

    **Raises:** `UserError` if there is nothing, it is ambiguous, or it cannot be listed.
    """
    folder = source.removesuffix(CLASS_FOLDERS) or "."
    if source.endswith(CLASS_FOLDERS) and os.path.isdir(folder):
        files, single, source = [], None, folder
    else:
        files = _packed_files(source)
        single = None if files else _open_single(source)
    if files and files[0].endswith(PARQUET):
        return open_parquet(files, label_column)
    if label_column is not None and single is None:
        idle = ["label_column"]
        without_effect(idle, f"it is for parquet files and for one file of arrays, and {source} is neither", given=idle)
    return open_tars(files, num_workers) if files else single or _open_images(Path(source))


def _packed_files(source: str) -> list[str]:
    """The .tar or .parquet files of a folder or pattern; none if it is something else."""
    if os.path.isdir(source):
        found = [_files_below(source, ending) for ending in (TAR, PARQUET)]
        if all(found):
            raise UserError(f"{source} holds both .tar and .parquet files; name the ones you want by a pattern")
        packed = found[0] or found[1]
        if packed:
            _refuse_images_beside(source, packed)
        return found[0] or _one_split(source, found[1])
    if os.path.exists(source):
        return [source] if source.endswith((TAR, PARQUET)) else []
    if not source.endswith((TAR, PARQUET)) and not glob.has_magic(source):
        return []
    files = sorted(path for pattern in _patterns(source) for path in glob.glob(pattern) or [_plain(pattern)])
    missing = [path for path in files if not os.path.isfile(path)]
    if missing:
        raise UserError(f"{missing[0]} is not there; expected files that {source!r} names")
    if not all(path.endswith((TAR, PARQUET)) for path in files) or len({Path(p).suffix for p in files}) > 1:
        raise UserError(f"{source!r} names files such as {files[0]}; expected .tar files, or .parquet files")
    return files


def _files_below(folder: str, ending: str) -> list[str]:
    """Files of one kind in a folder, or in its folder `data`, as Hugging Face lays them out."""
    for place in (folder, os.path.join(folder, "data")):
        names = scan(place)[1] if os.path.isdir(place) else []
        found = [os.path.join(place, name) for name in names if name.endswith(ending) and not is_helper(name)]
        if found:
            return found
    return []


def _refuse_images_beside(source: str, packed: list[str]) -> None:
    """**Raises:** `UserError` for a folder with shards and images: what is meant, nobody can know."""
    folders, files = scan(source)
    usable = [os.path.join(source, name) for name in folders if not is_helper(name)]
    image = next((name for name in files if not is_helper(name) and _is_image(name)), None) or next(
        (found for folder in usable if (found := _first_image(folder))), None
    )
    if image is None:
        return
    ending, shown = os.path.splitext(packed[0])[1], os.path.relpath(packed[0], source)
    pattern = os.path.join(os.path.dirname(packed[0]), f"*{ending}")
    other = f"'{os.path.join(source, CLASS_FOLDERS)}' for the class folders"
    if os.path.basename(image) == image:
        other = f"move the {ending} files elsewhere for the images"
    raise UserError(
        f"{source} holds both {ending} files ({shown}, {len(packed)} in all) and images ({image}, …); say which: name "
        f"'{pattern}' for the {ending} files, or {other}"
    )


def _first_image(folder: str) -> str | None:
    """Some image file of a class folder, without looking at more than it takes."""
    waiting, seen = [folder], 0
    while waiting and (seen := seen + 1) <= 100:
        place = waiting.pop()
        folders, files = scan(place)
        for name in files:
            if not is_helper(name) and _is_image(name):
                return os.path.relpath(os.path.join(place, name), os.path.dirname(folder))
        waiting += [os.path.join(place, name) for name in reversed(folders) if not is_helper(name)]
    return None


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _one_split(source: str, files: list[str]) -> list[str]:
    splits = sorted({match[1] for path in files if (match := SPLIT_NAME.match(Path(path).name))})
    if len(splits) > 1:
        pattern = os.path.join(os.path.dirname(files[0]), f"{splits[-1]}-*{PARQUET}")
        raise UserError(f"{source} holds the splits {', '.join(splits)}; name one by a pattern, e.g. '{pattern}'")
    return files


def _patterns(source: str) -> list[str]:
    """Patterns for glob: the folders that exist are meant as they are, whatever is in their names."""
    folder, rest = os.path.split(source)
    while folder and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
        rest = os.path.join(name, rest)
    literal = os.path.join(glob.escape(folder), "") if folder else ""
    names = webdataset("shardlists").expand_urls(rest) if "{" in rest else [rest]
    return [literal + name for name in names]


def _plain(pattern: str) -> str:
    """What `glob.escape` was given."""
    return re.sub(r"\[([*?[])\]", r"\1", pattern)


# ------------------------------------------------------------------------------------------------------- image files
def _open_single(source: str) -> SingleFile | None:
    """One file that is the source: a slide to be cut up, a volume, an array `path::key`; None if it is none."""
    path = blob_of(source).path
    is_list = source.lower().endswith(LISTS)
    if is_list or not (os.path.isfile(path) or (path.endswith(STORE) and os.path.isdir(path))):
        return None
    root, name = os.path.split(source if path == source else path)
    stem = name.split(".")[0] or name
    return SingleFile(root or ".", [name + source.removeprefix(path)], np.zeros(1, np.int64), (stem,))


def _open_images(source: Path) -> Files:
    images: ImageList = list_images(source, every_file=True)
    root = source if source.is_dir() else source.parent
    prefix = os.path.join(root, "") if str(root) != "." else ""
    names = [path.removeprefix(prefix) for path in images.paths]
    return Files(str(root), names, np.array(images.labels), images.classes, images.words)


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

    def _on_disk(self) -> Sequence[str]:
        return self.files

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
        labels, classes = _described(values, f"column {label_name} of {files[0]}", names), names
    else:
        texts = ["" if value is None or value != value else str(value) for value in values]
        labels, classes = number_labels(texts, lambda k: f"row {k} of {files[0]} and others, column {label_name},")
    root = os.path.commonpath([os.path.dirname(path) for path in files])
    relative = [os.path.relpath(path, root or ".") for path in files]
    if not len(labels):
        raise UserError(f"{files[0]} (and {len(files) - 1} more) hold no rows; expected images")
    source = Parquet(
        root, [relative[k] for k, (_, rows, _) in enumerate(pieces) for _ in range(len(rows))], labels, classes
    )
    source.files, source.column = files, column
    source.table = np.concatenate([np.insert(rows, 0, k, axis=1) for k, (_, rows, _) in enumerate(pieces)])
    source.groups = np.unique(source.table[:, :2], axis=0, return_inverse=True)[1].astype(np.int64)
    return source


def _described(values: Sequence[Any], where: str, names: Sequence[str]) -> Array:
    """Labels int64 [N] of a column whose classes have names: their numbers; none and -1 are unlabelled.

    **Raises:** `UserError` for anything else.
    """
    absent = [value is None or value != value or value == UNLABELLED for value in values]
    given = (value for value, none in zip(values, absent, strict=True) if not none)
    wrong = [value for value in given if not (_is_whole(value) and 0 <= value < len(names))]
    if wrong:
        raise UserError(f"{where} has label {wrong[0]}, but {len(names)} class names; expected their numbers from 0")
    return np.array([UNLABELLED if none else int(v) for v, none in zip(values, absent, strict=True)], np.int64)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and value == int(value))


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
