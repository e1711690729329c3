"""The unfinished files of a preparation, in the folder `.OUT.partial`: what a killed run goes on from.

    job.json        what is being prepared; another job in its place starts over
    journal.jsonl   one line per finished chunk: how far each file was, statistics, unreadable samples
    NAME.beton      pixels, in FFCV's layout; header and tables are filled in at the end
    NAME.rows       a fixed-size record per stored sample
    contents.json   what tells the source's files from others of the same names
    publish.json    once all is complete: which files go where

A line of the journal is written after the data that it tells of have reached the disk, so that whatever a kill or a
power cut leaves behind is sound up to the last whole line, and the rest is cut off. Waiting for the disk is a thread's
work; reading and encoding go on meanwhile.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_prep.encode import Stored
from data_prep.samples import have_changed
from fasthpm.data.ffcv.beton import ALLOCATION, DESCRIPTOR, FIELDS, HEADER, IMAGE, ROW, VERSION
from fasthpm.data.sampling import Array
from fasthpm.errors import UserError
from fasthpm.files import fsync, read_json, write_text

SMALL_PAGE, PAGE, SMALL_FILE = 1 << 21, 1 << 23, 1 << 26  # bytes; FFCV's own smallest and usual page
COMMIT_SECONDS = 3.0
CONTENTS = "contents.json"
RECORD = np.dtype([("index", "<i8"), ("label", "<i8"), ("image", IMAGE), ("size", "<u8")])


@dataclass
class Totals:
    """What the chunks of a file add up to. Whole numbers: the order of adding does not matter."""

    samples: int = 0
    pixels: int = 0
    sums: list[int] = field(default_factory=lambda: [0, 0, 0])
    squares: list[int] = field(default_factory=lambda: [0, 0, 0])
    coloured: int = 0
    kept: int = 0
    notes: dict[str, int] = field(default_factory=dict)  # how many sources each is said of
    skipped: int = 0  # tiles with too little in them

    def add(self, stored: Stored) -> None:
        self.samples += 1
        self.pixels += stored.height * stored.width
        self.sums = [a + b for a, b in zip(self.sums, stored.sums, strict=True)]
        self.squares = [a + b for a, b in zip(self.squares, stored.squares, strict=True)]
        self.coloured += not stored.grey
        self.kept += stored.kept
        self._count(dict.fromkeys(stored.notes, 1))

    def merge(self, other: "Totals") -> None:
        self.samples, self.pixels = self.samples + other.samples, self.pixels + other.pixels
        self.sums = [a + b for a, b in zip(self.sums, other.sums, strict=True)]
        self.squares = [a + b for a, b in zip(self.squares, other.squares, strict=True)]
        self.coloured, self.kept = self.coloured + other.coloured, self.kept + other.kept
        self.skipped += other.skipped
        self._count(other.notes)

    def _count(self, notes: dict[str, int]) -> None:
        self.notes = {note: self.notes.get(note, 0) + notes.get(note, 0) for note in sorted({*self.notes, *notes})}


@dataclass
class Chunk:
    """What a worker makes of some samples of one file."""

    indices: Array  # int64 [A], of the stored ones in the source
    labels: Array  # int64 [A]
    samples: list[Any]  # `Stored`, or of arrays `StoredArray`
    rejected: list[tuple[int, str]]
    facts: list[Any] = field(default_factory=list)  # more to remember, as JSON
    tally: Any = None  # of arrays, what their values add up to
    skipped: int = 0  # tiles with too little in them


class PartFile:
    """One `.beton` in the making. No sample straddles a page, so that FFCV can read it page by page."""

    fields: tuple[tuple[str, int], ...] = FIELDS
    row, record = ROW, RECORD
    totals: Any

    def __init__(self, path: Path, num_listed: int) -> None:
        """`num_listed`: the most samples that there can be; the tables' place is reserved for so many."""
        self.path, self.rows_path, self.num_listed = path, path.with_suffix(".rows"), num_listed
        rows_at = HEADER.itemsize + len(self.fields) * DESCRIPTOR.itemsize
        self.offset = -(-(rows_at + num_listed * self.row.itemsize) // SMALL_PAGE) * SMALL_PAGE
        self.page, self.totals = SMALL_PAGE, self._no_totals()
        self._files: tuple[BinaryIO, BinaryIO] | None = None

    def fresh(self) -> "PartFile":
        """The same with nothing in it."""
        return type(self)(self.path, self.num_listed)

    def _no_totals(self) -> Any:
        return Totals()

    def restore(self, entry: dict[str, Any]) -> None:
        """Go to where a line of the journal says that the file was."""
        self.offset, self.page, self.totals = entry["offset"], entry["page"], Totals(**entry["totals"])

    def recount(self) -> None:
        """Once all lines are read: find out what they do not say."""

    def entry(self) -> dict[str, Any]:
        return {"offset": self.offset, "page": self.page, "totals": dataclasses.asdict(self.totals)}

    def append(self, chunk: Chunk) -> None:
        data, rows = self._open()
        for index, label, stored in zip(chunk.indices, chunk.labels, chunk.samples, strict=True):
            at = self._place(len(stored.blob))
            if data.tell() != at:
                data.seek(at)
            data.write(stored.blob)
            rows.write(self._record(index, label, stored, at).tobytes())
        self._count(chunk)

    def _record(self, index: int, label: int, stored: Any, at: int) -> Array:
        image = (stored.mode, stored.width, stored.height, at)
        return np.array((index, label, image, len(stored.blob)), RECORD)

    def _count(self, chunk: Chunk) -> None:
        for stored in chunk.samples:
            self.totals.add(stored)
        self.totals.skipped += chunk.skipped

    def _pointers(self, records: Array) -> Array:
        return records["image"]["data_ptr"]

    def _rows(self, records: Array) -> Array:
        rows = np.zeros(len(records), ROW)
        rows["image"], rows["label"] = records["image"], records["label"]
        return rows

    def _place(self, size: int) -> int:
        """Position of the next sample. Pages grow with the file, and for a sample larger than one: cut at the
        multiples of a power of two, a file is cut well at those of a smaller one too."""
        if self.offset >= SMALL_FILE:
            self.page = max(self.page, PAGE)
        while self.page < size:
            self.page *= 2
        at = self.offset
        if at // self.page != (at + size - 1) // self.page:
            at = -(-at // self.page) * self.page
        self.offset = at + size
        return at

    def _open(self) -> tuple[BinaryIO, BinaryIO]:
        """Both files, cut to where we are."""
        if self._files is None:
            mode = os.O_RDWR | os.O_CREAT
            data, rows = (os.fdopen(os.open(path, mode, 0o666), "r+b") for path in (self.path, self.rows_path))
            data.truncate(self.offset if self.totals.samples else 0)
            rows.truncate(self.totals.samples * self.record.itemsize)
            rows.seek(0, os.SEEK_END)
            self._files = data, rows
        return self._files

    def flush(self) -> list[int]:
        """Hand everything appended to the system; the numbers of the files that are left to sync."""
        for file in self._files or ():
            file.flush()
        return [file.fileno() for file in self._files or ()]

    def sync(self) -> None:
        """Everything appended is on the disk afterwards."""
        for number in self.flush():
            os.fsync(number)

    def close(self) -> None:
        for file in self._files or ():
            with contextlib.suppress(OSError):  # a full disk has been reported before
                file.close()
        self._files = None

    def records(self) -> Array:
        """`record` [A] of the stored samples."""
        return np.fromfile(self.rows_path, self.record, self.totals.samples)

    def finish(self) -> Array:
        """Fill in header and tables, and return the records: afterwards it is an FFCV file. May be repeated."""
        data, _ = self._open()
        self.sync()
        records = self.records()
        end = -(-self.offset // self.page) * self.page
        allocations = np.zeros(len(records), ALLOCATION)
        allocations["sample_id"], allocations["size"] = np.arange(len(records)), records["size"]
        allocations["ptr"] = self._pointers(records)
        data.truncate(end)
        data.seek(end)
        data.write(allocations.tobytes())
        data.seek(0)
        data.write(self._head(records, end))
        self.sync()
        self.close()
        return records

    def _head(self, records: Array, end: int) -> bytes:
        fields = np.zeros(len(self.fields), DESCRIPTOR)
        for row, (name, kind) in zip(fields, self.fields, strict=True):
            row["type_id"], row["name"][: len(name)] = kind, list(name.encode())
        header = np.array((VERSION, len(self.fields), self.page, len(records), end), HEADER)
        return header.tobytes() + fields.tobytes() + self._rows(records).tobytes()


class Job:
    """The folder with a preparation's unfinished files, ours alone while it is open."""

    def __init__(self, folder: Path, parts: list[PartFile], contents: dict[str, str] | None = None) -> None:
        """`contents`: what tells the source's files from others of the same names; see `Source.contents`."""
        self.folder, self.parts, self.contents = folder, parts, contents or {}
        self.chunks = 0  # finished ones
        self.rejected: list[tuple[int, str]] = []
        self.facts: list[Any] = []
        self._pending: list[str] = []
        self._committed = time.monotonic()
        self._syncer = ThreadPoolExecutor(1, "commit")
        self._committing: Future[None] | None = None
        self._gone = False

    # ---- what was done before
    def resume(self, description: dict[str, Any]) -> list[str]:
        """Read the journal if it is of the same job, else start over.

        Returns the names of what differs, empty if the job is the same or there was none.
        """
        known = read_json(self.folder / "job.json")
        if known == description:
            self._read_journal()
            return []
        self.start_over(description)
        return sorted(name for name in {*known, *description} if known and known.get(name) != description.get(name))

    def start_over(self, description: dict[str, Any]) -> None:
        """Forget everything."""
        self.close()
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()
        self.chunks, self.rejected, self.facts, self._pending = 0, [], [], []
        self.parts = [part.fresh() for part in self.parts]
        (self.folder / CONTENTS).write_text(json.dumps(self.contents))
        (self.folder / "job.json").write_text(json.dumps(description))

    def news(self) -> str:
        """Why what was done before is of no use: files have changed since, though their names are the same."""
        then = read_json(self.folder / CONTENTS)
        if not then or not self.contents or not have_changed(then, self.contents):
            return ""
        return f"files have changed since they were read into {self.folder} (the newest is {self.contents['newest']})"

    def resume_same(self, description: dict[str, Any], useless: Callable[[], str] = lambda: "") -> None:
        """Go on with the same job of the same files, or start over and say why.

        **Args:** `useless`: why the same job is of no use, asked when it has been read.
        """
        changed = self.resume(description)
        if changed:
            print(f"the unfinished preparation in {self.folder} differs in {', '.join(changed)}; starting over")
            return
        why = useless() or self.news()
        if why:
            print(f"{why}; starting over", flush=True)
            self.start_over(description)
        elif self.chunks and self.contents and not read_json(self.folder / CONTENTS):
            print(
                f"{self.folder} was begun before sizes and times of files were noted, so they are not compared; delete "
                f"it to start over",
                flush=True,
            )

    def _read_journal(self) -> None:
        path, whole = self.folder / "journal.jsonl", 0
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for line in lines:
            try:
                entry = json.loads(line) if line.endswith(b"\n") else {}
            except ValueError:
                entry = {}
            if entry.get("chunk") != self.chunks:
                break
            self.parts[entry["part"]].restore(entry)
            self.rejected += [(index, reason) for index, reason in entry["rejected"]]
            self.facts += entry.get("facts", [])
            self.chunks, whole = self.chunks + 1, whole + len(line)
        if lines:
            os.truncate(path, whole)
        for part in self.parts:
            part.recount()

    # ---- what is being done
    def append(self, part: int, chunk: Chunk) -> None:
        """Add a chunk to its file; now and then make everything safe."""
        self.parts[part].append(chunk)
        self.rejected += chunk.rejected
        self.facts += chunk.facts
        entry = {"chunk": self.chunks, "part": part, **self.parts[part].entry(), "rejected": chunk.rejected}
        entry |= {"facts": chunk.facts} if chunk.facts else {}
        self._pending.append(json.dumps(entry) + "\n")
        self.chunks += 1
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            self._begin_commit()

    def commit(self) -> None:
        """Everything appended is safe afterwards."""
        self._begin_commit()
        self._end_commit()

    def _begin_commit(self) -> None:
        self._end_commit()  # a disk that cannot keep up slows us down
        numbers = [number for part in self.parts for number in part.flush()]
        lines, self._pending = self._pending, []
        self._committing = self._syncer.submit(self._make_safe, numbers, lines)
        self._committed = time.monotonic()

    def _end_commit(self) -> None:
        committing, self._committing = self._committing, None
        if committing:
            committing.result()

    def _make_safe(self, numbers: Sequence[int], lines: Sequence[str]) -> None:
        """Data first, then the journal's lines about them."""
        for number in numbers:
            os.fsync(number)
        with (self.folder / "journal.jsonl").open("a") as journal:
            journal.writelines(lines)
            journal.flush()
            os.fsync(journal.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # reported by the commit that is asked for
            self._end_commit()
        for part in self.parts:
            part.close()

    # ---- what is done
    def plan_publishing(self, names: list[str], remove: list[str]) -> None:
        """Write down that all is complete: the files `names` are to be moved, in this order, after removing others."""
        plan = self.folder / "publish.json"
        write_text(plan, json.dumps({"names": names, "remove": remove}), durable=True)

    def publish(self) -> None:
        """Carry the plan out to its end, wherever it stopped, and leave nothing here."""
        content = read_json(self.folder / "publish.json")
        waiting = [name for name in content["names"] if (self.folder / name).exists()]
        for name in {*content["remove"]} - ({*content["names"]} - {*waiting}):  # not what has been moved already
            (self.folder.parent / name).unlink(missing_ok=True)
        for name in waiting:
            (self.folder / name).rename(self.folder.parent / name)
        fsync(self.folder.parent)
        self.discard()

    def is_complete(self, description: dict[str, Any]) -> bool:
        """Whether only moving the files is left to do."""
        same = read_json(self.folder / "job.json") == description and not self.news()
        return same and (self.folder / "publish.json").exists()

    def has_progress(self) -> bool:
        """Whether there is something to go on from."""
        return (self.folder / "journal.jsonl").exists()

    def discard(self) -> None:
        """Remove the folder, unless that is done."""
        self.close()
        if not self._gone:
            self._gone = True
            shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Make `folder` ours; gives the lock's file number, which forked processes have to close.

    **Raises:** `UserError` at once if another process has it.
    """
    while True:
        folder.mkdir(exist_ok=True)
        try:
            number = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the other one has just finished
            continue
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = os.stat(folder / "lock").st_ino == os.fstat(number).st_ino
        except BlockingIOError as error:
            os.close(number)
            raise UserError(
                f"another preparation is writing into {folder}; wait for it, or choose another output"
            ) from error
        except FileNotFoundError:
            current = False
        if current:
            break
        os.close(number)
    try:
        yield number
    finally:
        os.close(number)


@contextlib.contextmanager
def readable_write_errors(out: Path, folder: Path) -> Iterator[None]:
    """**Raises:** `UserError` for a full or write-protected disk; `folder` holds what is done of `out`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left in {out.parent} while writing {out.name}; free some space, then run the same command "
                f"again to continue ({folder} holds what is done; delete it to give up)"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise UserError(f"folder {out.parent} of output {out.name} is not writable ({error.strerror})") from error
        raise
