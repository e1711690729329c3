"""Where videos come from: class folders, lists `path label` (VideoMAE's csv), Something-Something V2's JSON."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.samples import Files
from fasthpm.data.labels import UNLABELLED, number_labels
from fasthpm.data.listing import Kind, list_folder
from fasthpm.data.lists import LISTS, read_list, require_inside
from fasthpm.data.pixels import EXTENSIONS as PICTURES
from fasthpm.errors import UserError

EXTENSIONS = frozenset(
    [
        *(".3g2", ".3gp", ".amv", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".h264", ".hevc", ".ivf"),
        *(".m1v", ".m2ts", ".m2v", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mod", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg"),
        *(".mpv", ".mts", ".mxf", ".nut", ".ogm", ".ogv", ".qt", ".rm", ".rmvb", ".tod", ".ts", ".vob", ".webm"),
        *(".wmv", ".wtv", ".y4m"),
    ]
)


def _looks_like_video(start: bytes) -> bool:
    """Whether a file that begins so is a video of a common kind."""
    matroska, asf, flash = b"\x1aE\xdf\xa3", b"0&\xb2u\x8ef\xcf\x11", b"FLV\1"
    mp4 = start[4:8] in (b"ftyp", b"moov", b"mdat", b"wide") and start[8:12] not in (b"avif", b"avis", b"heic", b"M4A ")
    avi = start[:4] == b"RIFF" and start[8:12] == b"AVI "
    return start.startswith((matroska, asf, flash, b"\0\0\1\xba", b"\0\0\1\xb3")) or mp4 or avi


VIDEO_FILES = Kind("videos", EXTENSIONS, _looks_like_video, ".csv", PICTURES - EXTENSIONS)
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
    found = list_folder(source, VIDEO_FILES, every_file=True)
    if not found.paths:
        raise UserError(f"{source} holds no videos{'; '.join(('', *found.words))}; {EXPECTED}")
    prefix = os.path.join(source, "") if str(source) != "." else ""
    names = [path.removeprefix(prefix) for path in found.paths]
    return Files(str(source), names, np.array(found.labels), found.classes, found.words)


def _open_list(source: Path, root: Path) -> Files:
    lines = read_list(source, root)
    bare = next((line for line in lines if line.label is None), None)
    if bare is not None:
        raise UserError(f"{source} line {bare.number} is {bare.path[:80]!r}, expected a path and a label")
    rows = [(line.path, line.label or "") for line in lines]
    return _listed(source, root, rows, lambda k: f"{source} line {lines[k].number}")


def _listed(source: Path, root: Path, rows: Iterable[tuple[str, str]], place: Callable[[int], str]) -> Files:
    rows = list(rows)
    if not rows:
        raise UserError(f"{source} lists no videos; {EXPECTED}")
    require_inside(root, (path for path, _ in rows), source, "give a folder that holds them all as --video_root")
    labels, classes = number_labels([label for _, label in rows], place)
    return Files(str(root), [path for path, _ in rows], labels, classes)


# --------------------------------------------------------------------------------------------- Something-Something V2
def _open_ssv2(source: Path, root: Path | None) -> Files:
    """Entries {"id", "template"}; `labels.json` beside them numbers the templates, else their alphabet does."""
    entries = _read(source)
    if not isinstance(entries, list) or not all(isinstance(e, dict) and "id" in e for e in entries):
        raise UserError(f"{source} is no list of objects with id and template, as Something-Something V2's .json has")
    folder = root or next(source.parent / name for name in SSV2_FOLDERS if (source.parent / name).is_dir())
    numbers = next((_read(source.parent / name) for name in SSV2_LABELS if (source.parent / name).is_file()), None)
    names = [f"{entry['id']}{SSV2_ENDING}" for entry in entries]
    require_inside(folder, names, source, "download it again")
    templates = [str(entry.get("template", "")).replace("[", "").replace("]", "") for entry in entries]
    if not isinstance(numbers, dict):
        rows = zip(names, templates, strict=True)
        return _listed(source, folder, rows, lambda k: f"{source} entry {k}")
    unknown = next((template for template in templates if template and template not in numbers), None)
    if unknown is not None:
        raise UserError(f"{source} has the template {unknown!r}, which its labels.json lacks; download both again")
    classes = sorted(numbers, key=lambda name: int(numbers[name]))
    place = {name: index for index, name in enumerate(classes)} | {"": UNLABELLED}  # the test split has no templates
    return Files(str(folder), names, np.array([place[template] for template in templates]), classes)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); download it again") from error
