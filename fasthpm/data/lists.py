"""Lists of files, `path` or `path label` a line: one reader for images and videos."""

import csv
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fasthpm.data.labels import LABEL_HEADS
from fasthpm.errors import UserError

LISTS = (".txt", ".csv")
MARKS = ("\t", ",", ";", " ")  # between path and label; of equals the first
SAMPLED = 64  # lines that are tried on the disk to find out which mark separates
QUOTED = re.compile(r'"(?:[^"]|"")*"')
PATH_HEADS = re.compile(
    r"(image|img|video|clip|file|sample)?[_ -]?(path|name|file|filename|image|img|video|clip|id|url|sample)s?",
    re.IGNORECASE,
)
ENCODINGS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}  # by byte order marks


class Line(NamedTuple):
    """A line of a list; `label` is None where nothing but a path stands."""

    number: int
    path: str
    label: str | None


def read_list(source: Path, root: Path) -> list[Line]:
    """The files that a list names, relative to `root`.

    Path and label are separated by a tab, a comma, a semicolon or the last space: by what makes files that are there
    of the paths. Either may stand in double quotes. Byte order marks, empty lines and comments (#) are left out.

    **Raises:** `UserError` if it cannot be read, or begins with a header.
    """
    rows = [(k, line.strip(" ")) for k, line in enumerate(_read(source), 1) if line.strip()]
    there = _there(root)
    rows = [(k, line) for k, line in rows if not line.startswith("#") or any(map(there, _paths(line)))]
    some = [rows[k][1] for k in np.unique(np.linspace(0, len(rows) - 1, SAMPLED).astype(int))] if rows else []
    mark = _mark(some, [line for _, line in rows], there)
    lines = [Line(number, *_split(line, mark, there)) for number, line in rows]
    _refuse_header(source, lines, there)
    return lines


def _read(source: Path) -> list[str]:
    try:
        content = source.read_bytes()
        encoding = next((name for mark, name in ENCODINGS.items() if content.startswith(mark)), "utf-8")
        text = content.decode(encoding, "surrogateescape" if encoding != "utf-16" else "strict")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"list {source} cannot be read ({reason}); expected UTF-8 lines `path label`") from error
    return re.split(r"\r\n|\n|\r", text)  # not str.splitlines: names may hold other separators


def _there(root: Path) -> Callable[[str], bool]:
    def there(path: str) -> bool:
        try:
            return bool(path) and os.path.isfile(os.path.join(root, path))
        except ValueError:  # a zero byte
            return False

    return there


def _paths(line: str) -> list[str]:
    """The paths that a line may mean."""
    return [line, *(_cut(line, mark)[0] for mark in MARKS if mark in line)]


def _mark(some: Sequence[str], lines: Sequence[str], there: Callable[[str], bool]) -> str:
    """What separates; "" for paths alone."""
    marks = (*MARKS, "")
    found = {mark: sum(there(_cut(line, mark)[0]) for line in some) for mark in marks}
    most = max(found.values(), default=0)
    if most:
        return next(mark for mark in marks if found[mark] == most)
    having = {mark: sum(mark in line for line in lines) for mark in MARKS}
    return max(MARKS, key=lambda mark: having[mark])  # nothing is there: by what most lines have


def _split(line: str, mark: str, there: Callable[[str], bool]) -> tuple[str, str | None]:
    """Path and label of a line; one without the list's mark may have a space, unless it is a file as a whole."""
    path, label = _cut(line, mark)
    if label is None and not there(path) and (mark or there(_cut(line, " ")[0])):
        path, label = _cut(line, " ")
    if label is not None and mark in ("", " ") and there(line):
        return line, None
    return path, label


def _cut(line: str, mark: str) -> tuple[str, str | None]:
    """Path and label of a line as `mark` separates them, the last one unless the path stands in quotes."""
    quoted = QUOTED.match(line)
    if quoted:
        rest = line[quoted.end() :].lstrip(" " if mark != " " else "")
        if not rest.strip():
            return _unquoted(quoted[0]), None
        if mark and rest.startswith(mark):
            return _unquoted(quoted[0]), _unquoted(rest[1:].strip())
    path, found, label = line.rpartition(mark) if mark else ("", "", "")
    return (path.strip(), _unquoted(label.strip())) if found and path.strip() else (line.strip(), None)


def _unquoted(text: str) -> str:
    if not QUOTED.fullmatch(text):
        return text
    return next(csv.reader([text]))[0]


def _refuse_header(source: Path, lines: Sequence[Line], there: Callable[[str], bool]) -> None:
    """**Raises:** `UserError` for a first line that names columns and no file."""
    if not lines or there(lines[0].path):
        return
    number, path, label = lines[0]
    names_columns = PATH_HEADS.fullmatch(path.split(",")[0]) and (label is None or LABEL_HEADS.fullmatch(label))
    if names_columns and len(lines) > 1:
        shown = path if label is None else f"{path} {label}"
        raise UserError(f"{source} line {number} is {shown[:80]!r}, a header and no file; remove that line")


def require_inside(root: Path, paths: Iterable[str], source: Path, remedy: str) -> None:
    """Refuse a list that names files outside `root`, be it absolutely or by `..`; links in `root` are its owner's.

    **Raises:** `UserError` naming the first of them.
    """
    whole = os.path.join(os.path.abspath(root), "")
    for path in paths:
        suspicious = path.startswith("/") or ".." in path
        if suspicious and not os.path.normpath(os.path.join(whole, path)).startswith(whole):
            raise UserError(f"{source} names {path!r}, which lies outside {root}; {remedy}")
