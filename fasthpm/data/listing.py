"""What a folder holds: the one place that decides, for every command.

Hidden files, the folders that systems leave behind (`HELPERS`) and what FastHPM itself writes are never samples.
"""

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fasthpm.data.sources import is_video_set
from fasthpm.errors import UserError

HELPERS = frozenset(  # in lower case: of macOS, Windows, NAS servers, file systems
    [
        *("__macosx", "icon\r", "network trash folder", "temporary items"),
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
        *("@eadir", "@__thumb", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "lost+found"),
    ]
)
BETON = ".beton"
FILES, REJECTED, NOTES = ".files.csv", ".rejected.csv", ".notes.csv"
OURS = (BETON, FILES, REJECTED, NOTES)  # endings of what preparation writes
OUR_FOLDERS = (("metrics.jsonl", "checkpoints"), ("maps.npz", "images.csv"))  # a run's, those of `fasthpm maps`
NAMED = 3  # names that one message tells
STORE = ".zarr"  # ends the name of a folder that is one array, or several: a sample, as a file is
MAGIC = 16  # bytes that tell a kind of file


@dataclass(frozen=True)
class Kind:
    """What is looked for."""

    samples: str  # "images"
    extensions: frozenset[str]  # known ones, in lower case, with their dot
    looks_like: Callable[[bytes], bool]  # whether the first `MAGIC` bytes of a file without such an extension are one's
    list_ending: str = ".txt"
    foreign: frozenset[str] = frozenset()  # extensions of what lies beside samples and is none

    def holds(self, path: str) -> bool:
        """Whether a file is one, by its name, else by its first bytes."""
        ending = os.path.splitext(path)[1].lower()
        if ending in self.extensions or ending in self.foreign:
            return ending in self.extensions
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # reading from a pipe would wait
                return False
            with open(path, "rb") as file:
                return self.looks_like(file.read(MAGIC))
        except OSError:
            return False


@dataclass
class Listing:
    """Files of a folder, their labels, and what people should be told of what was left out."""

    paths: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    left_out: dict[str, list[str]] = field(default_factory=dict)  # reason: files, relative to the source

    def leave_out(self, reason: str, name: str) -> None:
        """Remember a file or folder that is no sample."""
        self.left_out.setdefault(reason, []).append(name)

    @property
    def words(self) -> tuple[str, ...]:
        """A line for each reason."""
        return tuple(f"{reason}: {tell(names)}" for reason, names in self.left_out.items())


def tell(names: Sequence[str]) -> str:
    """How many, and the first of them."""
    first = ", ".join(name.encode("utf-8", "backslashreplace").decode() for name in names[:NAMED])
    return f"{len(names)} ({first}{', …' if len(names) > NAMED else ''})"


def is_helper(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or one that systems leave behind."""
    return name.startswith(".") or name.lower() in HELPERS


def is_ours(name: str, betons: Sequence[str]) -> bool:
    """Whether preparation wrote a file of this name, `betons` being the prepared sets in its folder."""
    if name.endswith(OURS):
        return True
    stem, ending = os.path.splitext(name)
    return ending == ".json" and any(set_ == stem + BETON or set_.startswith(f"{stem}-0") for set_ in betons)


def scan(folder: str | Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder, sorted; links count as what they lead to.

    **Raises:** `UserError` if it cannot be listed: what is in it would be lost without a word.
    """
    try:
        with os.scandir(folder) as entries:
            kinds = {entry.name: _is_folder(entry) for entry in entries}
    except OSError as error:
        raise UserError(
            f"folder {folder} cannot be listed ({error.strerror or error}); make it readable, or move it elsewhere"
        ) from error
    return sorted(n for n, is_dir in kinds.items() if is_dir), sorted(n for n, is_dir in kinds.items() if not is_dir)


def with_stores(folders: list[str], files: list[str]) -> tuple[list[str], list[str]]:
    """The names of `scan`, folders that are samples among the files."""
    stores = [name for name in folders if name.lower().endswith(STORE)]
    return [name for name in folders if name not in stores], sorted(files + stores) if stores else files


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere, or where we may not look: reading it says so
        return False


def files_below(folder: Path, *, hidden: bool = False) -> list[Path]:
    """All files of a folder and of the folders in it, sorted; those that are hidden or a system's only if asked for.

    **Raises:** `UserError` if one cannot be listed.
    """
    found, waiting, seen = [], [str(folder)], set()
    while waiting:
        place = waiting.pop()
        if _identity(place) in seen:
            continue
        seen.add(_identity(place))
        folders, files = with_stores(*scan(place))
        found += [Path(place, name) for name in files if hidden or not is_helper(name)]
        waiting += [os.path.join(place, name) for name in folders if hidden or not is_helper(name)]
    return sorted(found)


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise UserError(f"folder {folder} cannot be listed ({error.strerror or error}); list it again") from error
    return status.st_dev, status.st_ino


def is_our_folder(folder: str) -> bool:
    """Whether FastHPM wrote a folder: prepared videos, a run, maps."""
    marks = ([os.path.join(folder, name) for name in names] for names in OUR_FOLDERS)
    return is_video_set(Path(folder)) or any(all(map(os.path.exists, paths)) for paths in marks)


def list_folder(source: Path, kind: Kind, *, every_file: bool) -> Listing:
    """The samples of a tree of class folders, or of a flat folder (one class, label 0).

    With `every_file`, files of unknown kinds count too, so that those that are none can be reported.

    **Raises:** `UserError` for folders and loose samples together, and for a folder that cannot be listed.
    """
    found = Listing()
    folders, files = _usable(str(source), "", found)
    loose = [name for name in files if kind.holds(os.path.join(source, name))]
    if not folders:
        chosen = [name for name in files if _extension(name) not in kind.foreign] if every_file else loose
        found.paths, found.labels = [os.path.join(source, name) for name in chosen], [0] * len(chosen)
        found.classes = (source.resolve().name,)
        _note_others(found, kind, [name for name in files if name not in set(chosen)])
        return found
    if loose:
        raise UserError(
            f"{source} holds both folders and {kind.samples} ({loose[0]}, {len(loose)} in all); move those "
            f"into class folders, or list the files you want in a {kind.list_ending}"
        )
    found.classes = tuple(folders)
    for name in files:
        found.leave_out("left out, beside the class folders", name)
    for label, name in enumerate(folders):
        paths = _walk(source, name, kind, every_file, found)
        found.paths += paths
        found.labels += [label] * len(paths)
        if not paths:
            found.leave_out(f"class folders without {kind.samples}", name)
    return found


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _usable(folder: str, prefix: str, found: Listing) -> tuple[list[str], list[str]]:
    """Folders and files in a folder that may be, or hold, samples; the others that are not hidden are noted."""
    folders, files = with_stores(*scan(folder))
    for name in (*folders, *files):
        if is_helper(name) and not name.startswith("."):
            found.leave_out("left out, a system's own", os.path.join(prefix, name))
    folders, files = ([name for name in names if not is_helper(name)] for names in (folders, files))
    betons = [name for name in files if name.endswith(BETON)]
    ours = {name for name in files if is_ours(name, betons)}
    ours |= {name for name in folders if is_our_folder(os.path.join(folder, name))}
    for name in sorted(ours):
        found.leave_out("left out, FastHPM's own", os.path.join(prefix, name))
    return [name for name in folders if name not in ours], [name for name in files if name not in ours]


def _walk(source: Path, top: str, kind: Kind, every_file: bool, found: Listing) -> list[str]:
    """The files of a class folder and of the folders in it, each folder's own files first."""
    paths: list[str] = []
    seen, waiting = {_identity(str(source))}, [top]
    while waiting:
        inside = waiting.pop()
        folder = os.path.join(source, inside)
        identity = _identity(folder)
        if identity in seen:  # a link that leads back up
            continue
        seen.add(identity)
        folders, files = _usable(folder, inside, found)
        for name in files:
            path = os.path.join(folder, name)
            if _extension(name) not in kind.foreign if every_file else kind.holds(path):
                paths.append(path)
            else:
                _note_others(found, kind, [os.path.join(inside, name)])
        waiting += [os.path.join(inside, name) for name in reversed(folders)]
    return paths


def _note_others(found: Listing, kind: Kind, names: Iterable[str]) -> None:
    for name in names:
        found.leave_out(f"left out, no {kind.samples} by name or content", name)
