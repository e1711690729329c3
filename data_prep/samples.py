"""A numbered list of encoded samples with labels: what every source of a preparation is."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_prep.sets import byte_bar
from fasthpm.data.labels import UNLABELLED, count_unlabelled
from fasthpm.data.listing import files_below
from fasthpm.data.sampling import Array
from fasthpm.errors import UserError, nearest
from fasthpm.files import file_hash

LOOKERS = 16  # threads that ask for sizes and times, or hash: file servers answer slowly, but many at a time


class Samples(Protocol):
    """A numbered set: `sample(i)` is (bytes of an image file, PIL image or uint8 array; label), or raises."""

    def __len__(self) -> int: ...

    def sample(self, index: int) -> tuple[Any, int]: ...

    def name(self, index: int) -> str: ...  # relative to the source's root

    def where(self, index: int) -> str: ...  # for error messages and people

    def fingerprint(self) -> str | None: ...  # of names and labels; None if they cannot be told apart


class Source(ABC):
    """A `Samples` with known labels, of which -1 is unlabelled; its kinds say how bytes are read."""

    groups: Array | None = None  # int64 [N]: samples that must be read together
    by_hash = False  # whether `contents` reads the files
    samples = "images"

    def __init__(
        self, root: str, names: Sequence[str], labels: Array, classes: Sequence[str], words: Sequence[str] = ()
    ) -> None:
        self.root, self.names = root, names
        self.labels, self.classes = np.asarray(labels, np.int64), tuple(classes)
        self.chosen = np.ones(len(names), bool)  # bool [N]: samples that count
        self._words = list(words)

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

    def _on_disk(self) -> Sequence[str]:
        """The files that are read."""
        return [self.where(index) for index in range(len(self))]

    def contents(self) -> dict[str, str]:
        """What tells files from others of the same names: digests of sizes and times and, with `by_hash`, of all bytes;
        and the newest file, for people."""
        paths = self._on_disk()
        with ThreadPoolExecutor(LOOKERS) as pool:
            stamps = list(pool.map(_stamp, paths))
            found = {"stamps": hashlib.sha256(repr(stamps).encode()).hexdigest()}
            if self.by_hash:
                with byte_bar(sum(max(size, 0) for size, _ in stamps), "hash") as bar:
                    hashes = list(pool.map(lambda path: _hash(path, bar), paths))
                found["hashes"] = hashlib.sha256("".join(hashes).encode()).hexdigest()
        newest = max(range(len(paths)), key=lambda index: stamps[index][1], default=-1)
        return {**found, "newest": _plain(os.path.relpath(paths[newest], self.root or ".")) if paths else ""}

    @property
    def words(self) -> list[str]:
        """What people should know of what was found."""
        unlabelled = count_unlabelled(self.labels[self.chosen])
        return [*self._words, *([f"{unlabelled} of them unlabelled (label -1)"] if unlabelled else [])]

    def select(self, names: Sequence[str]) -> None:
        """Keep the classes called `names`, without what is unlabelled, and number them in that order.

        **Raises:** `UserError` for a class that the source has not.
        """
        unknown = [name for name in names if name not in set(self.classes)]
        if unknown:
            raise UserError(
                f"{len(unknown)} of {len(names)} classes asked for are not in {self.root}, the first is "
                f"{unknown[0]!r}{nearest(unknown[0], self.classes)}"
            )
        number = {name: index for index, name in enumerate(names)}
        table = np.array([number.get(name, UNLABELLED) for name in self.classes], np.int64)
        unlabelled = count_unlabelled(self.labels)
        if unlabelled:
            self._words.append(f"left out, unlabelled and so of none of the classes asked for: {unlabelled}")
        self.labels = np.where(self.labels >= 0, table[self.labels], UNLABELLED)
        self.chosen &= self.labels >= 0
        self.classes = tuple(names)


class Files(Source):
    """Files of a folder or a list."""

    def _bytes(self, index: int) -> bytes:
        with open(self.where(index), "rb") as file:
            return file.read()


class SingleFile(Files):
    """One file, or an array in it, that is the whole source."""


def _stamp(path: str) -> tuple[int, int]:
    """Size and time of a file, -1 where there is none; of a folder that is a sample, of all of its files."""
    try:
        if os.path.isdir(path):
            inside = [_stamp(str(file)) for file in files_below(Path(path), hidden=True)]
            return sum(size for size, _ in inside), max((time for _, time in inside), default=-1)
        status = os.stat(path)
    except (OSError, ValueError, UserError):
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _hash(path: str, bar: Any) -> str:
    try:
        if os.path.isdir(path):
            parts = [_hash(str(file), bar) for file in files_below(Path(path), hidden=True)]
            return hashlib.sha256("".join(parts).encode()).hexdigest()
        return file_hash(Path(path), bar.update)
    except (OSError, ValueError, UserError):
        return "-"


def _plain(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def have_changed(then: dict[str, str], now: dict[str, str]) -> bool:
    """Whether files differ from what they were, by their bytes where both are known, else by sizes and times."""
    by = "hashes" if then.get("hashes") and now.get("hashes") else "stamps"
    return then.get(by) != now.get(by)
