"""Where videos come from: class folders, lists `path label` (VideoMAE's csv), Something-Something V2's JSON."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sources import Files, number_labels
from fasthpm.data.pixels import list_images, require_inside
from fasthpm.errors import UserError

EXTENSIONS = frozenset(
    [".3gp", ".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm"]
)
LISTS = (".csv", ".txt")
SSV2_LABELS = ("something-something-v2-labels.json", "labels.json")
SSV2_FOLDERS = ("20bn-something-something-v2", "videos", ".")
SSV2_ENDING = ".webm"
EXPECTED = "expected a folder of class folders, a .csv or .txt of `path label`, or Something-Something V2's .json"


def open_videos(source: Path, root: Path | None = None) -> Files:
    """List the videos of `source`; no file is opened.

    **Args:** `root`: the folder that names in a list or JSON are relative to; None: where the list lies.

    **Raises:** `UserError` if there are none, or `source` is of another kind.
    """
    if source.is_dir():
        return _open_folder(source)
    if not source.is_file():
        raise UserError(f"{source} does not exist; {EXPECTED}")
    if source.suffix.lower() == ".json":
        return _open_ssv2(source, root)
    if source.suffix.lower() in LISTS:
        return _open_list(source, root or source.parent)
    raise UserError(f"{source} is a {source.suffix or 'file without ending'}; {EXPECTED}")


def _open_folder(source: Path) -> Files:
    entries = [entry for entry in source.iterdir() if not entry.name.startswith(".")]
    loose = sorted(entry.name for entry in entries if entry.is_file() and entry.suffix.lower() in EXTENSIONS)
    if loose and any(entry.is_dir() for entry in entries):
        raise UserError(
            f"{source} holds both folders and videos ({loose[0]}, {len(loose)} in all); move those into class "
            f"folders, or list the files you want in a .csv"
        )
    found = list_images(source, every_file=True)
    prefix = os.path.join(source, "")
    return Files(
        str(source), [path.removeprefix(prefix) for path in found.paths], np.array(found.labels), found.classes
    )


def _open_list(source: Path, root: Path) -> Files:
    try:
        lines = source.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror}); {EXPECTED}") from error
    rows = [_split(source, number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    return _listed(source, root, rows)


def _split(source: Path, number: int, line: str) -> tuple[str, str]:
    """Path and label of a line; a comma separates them, else a tab, else the last space."""
    mark = next((mark for mark in (",", "\t") if mark in line), None)
    path, _, label = line.rpartition(mark) if mark else line.rpartition(" ")
    if not path.strip() or not label.strip():
        raise UserError(f"{source} line {number} is {line[:80]!r}, expected a path and a label")
    return path.strip(), label.strip()


def _listed(source: Path, root: Path, rows: Iterable[tuple[str, str]]) -> Files:
    rows = list(rows)
    if not rows:
        raise UserError(f"{source} lists no videos; {EXPECTED}")
    require_inside(root, (path for path, _ in rows), source, "give a folder that holds them all as --video_root")
    labels, classes = number_labels([label for _, label in rows])
    return Files(str(root), [path for path, _ in rows], labels, classes)


# --------------------------------------------------------------------------------------------- Something-Something V2
def _open_ssv2(source: Path, root: Path | None) -> Files:
    """Entries {"id", "template"}; `labels.json` beside them numbers the templates, else their alphabet does."""
    entries = _read(source)
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and {"id", "template"} <= e.keys() for e in entries
    ):
        raise UserError(f"{source} is no list of objects with id and template, as Something-Something V2's .json has")
    folder = root or next(source.parent / name for name in SSV2_FOLDERS if (source.parent / name).is_dir())
    numbers = next((_read(source.parent / name) for name in SSV2_LABELS if (source.parent / name).is_file()), None)
    names = [f"{entry['id']}{SSV2_ENDING}" for entry in entries]
    require_inside(folder, names, source, "download it again")
    templates = [str(entry["template"]).replace("[", "").replace("]", "") for entry in entries]
    if not isinstance(numbers, dict):
        return _listed(source, folder, zip(names, templates, strict=True))
    unknown = next((template for template in templates if template not in numbers), None)
    if unknown is not None:
        raise UserError(f"{source} has the template {unknown!r}, which its labels.json lacks; download both again")
    classes = sorted(numbers, key=lambda name: int(numbers[name]))
    return Files(str(folder), names, np.array([classes.index(template) for template in templates]), classes)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); download it again") from error
