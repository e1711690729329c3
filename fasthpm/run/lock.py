"""One run per output folder: a lock that ends with its process, also where several machines share a disk.

OUT/.lock is held twice over. The system's lock on the file (fcntl) ends with the process, however it dies. Where file
systems have no such locks between machines, the file tells who holds it (host, process, when that began), and its time
is renewed every `BEAT` seconds: who finds the note of another machine waits whether that still happens. A run that was
stopped meanwhile and finds another's note when it wakes ends at once.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from fasthpm import ranks
from fasthpm.cli import EXIT_USER_ERROR
from fasthpm.errors import UserError, warn
from fasthpm.files import writing

FILE = ".lock"
BEAT, SILENCE = 10.0, 75.0  # seconds between two signs of life; without one for so long a holder elsewhere is dead
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)
_held: set[str] = set()  # by this process: the system's lock does not stop who holds it already


class FolderLock:
    """Keeps other runs out of a folder from `take` until it is closed (`with`). The ranks of a run share one.

    - `rank`: only 0 holds the lock; the others only agree with it
    - `beat`, `silence`: seconds, see `BEAT`
    """

    def __init__(self, rank: int, *, beat: float = BEAT, silence: float = SILENCE) -> None:
        self.rank, self.beat, self.silence = rank, beat, silence
        self._folder = Path()
        self._file: int | None = None
        self._note: dict[str, Any] = {}
        self._made = False
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self, folder: Path) -> None:
        """Make `folder` if it is not there, and lock it. Collective.

        **Raises:** `UserError` on all ranks if another run holds it, or if it cannot be written.
        """
        with ranks.in_agreement():
            if self.rank == 0:
                self._take(folder)

    def release(self) -> None:
        """Let others in; safe to call twice. A folder that was made for the lock alone goes with it."""
        if self._file is None:
            return
        self._end.set()
        if self._thread:
            self._thread.join()
        with contextlib.suppress(OSError):
            if not self._taker():
                (self._folder / FILE).unlink()  # before the lock ends: afterwards it may be another's
        os.close(self._file)
        self._file = None
        _held.discard(os.path.realpath(self._folder))
        if self._made:
            with contextlib.suppress(OSError):  # it holds something
                self._folder.rmdir()

    def _take(self, folder: Path) -> None:
        self._folder = folder
        if os.path.realpath(folder) in _held:
            raise in_use(folder, f"this process, {os.getpid()}")
        with writing(folder, "choose another --output_dir"):
            self._made = not folder.is_dir()
            folder.mkdir(parents=True, exist_ok=True)
            file, system = self._open_locked(folder)
        try:
            self._refuse_living(folder, file, system)
            with writing(folder / FILE, "make room, or choose another --output_dir"):
                self._note = _note()
                os.truncate(file, 0)
                os.pwrite(file, json.dumps(self._note).encode(), 0)
        except BaseException:
            os.close(file)
            raise
        self._file = file
        _held.add(os.path.realpath(folder))
        self._thread = threading.Thread(target=self._beat, name="fasthpm-lock", daemon=True)
        self._thread.start()

    def _open_locked(self, folder: Path) -> tuple[int, bool]:
        """The lock file, open, and whether the system holds it for us. **Raises:** `UserError` if for another."""
        while True:
            file = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in UNSUPPORTED:
                    return file, False
                holder = _read(file)
                os.close(file)
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                raise in_use(folder, _name(holder)) from error
            if _same_file(file, folder / FILE):
                return file, True
            os.close(file)  # its holder has just removed it

    def _refuse_living(self, folder: Path, file: int, system: bool) -> None:
        """Judge the note that lies in the file: here by its process, elsewhere by its signs of life."""
        holder = _read(file)
        if not holder:
            return
        if holder.get("host") == socket.gethostname():
            if _lives(holder):
                raise in_use(folder, _name(holder))
            return
        warn(f"{folder} was left locked by {_name(holder)}; waiting {self.silence:g} s for a sign of life of it")
        seen, deadline = _time_of(folder, file, system), time.monotonic() + self.silence
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.silence / 10))
            if _time_of(folder, file, system) != seen:
                raise in_use(folder, _name(holder))

    def _beat(self) -> None:
        while not self._end.wait(self.beat):
            if taker := self._taker():
                taken = f"{in_use(self._folder, _name(taker))}; it saw no sign of life of this run, which ends here"
                print(f"fasthpm: error: {taken}", file=sys.stderr, flush=True)
                os._exit(EXIT_USER_ERROR)  # nothing may be written any more
            with contextlib.suppress(OSError):  # a disk that is full or away must not end the run
                os.utime(self._folder / FILE)

    def _taker(self) -> dict[str, Any]:
        """The note of another run that has taken the folder over; empty if it is still ours."""
        note = _read(self._file) if self._file is not None else {}
        return {} if note == self._note else note


def in_use(folder: Path, holder: str) -> UserError:
    """What the second run in a folder is told."""
    return UserError(
        f"output_dir {folder} is in use by another run ({holder}); wait for it or end it, or choose another "
        f"--output_dir"
    )


def _note() -> dict[str, Any]:
    began = psutil.Process().create_time()
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "began": began,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _read(file: int) -> dict[str, Any]:
    """The note of an open lock file; empty if there is none, or half of one."""
    try:
        note = json.loads(os.pread(file, 4096, 0))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _name(holder: dict[str, Any]) -> str:
    if not holder:
        return "its process has just begun"
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('time')}"


def _lives(holder: dict[str, Any]) -> bool:
    """Whether the process of a note of this machine is still there, and no other one under its number."""
    if holder.get("pid") == os.getpid():
        return False  # ours, of an earlier run that was not closed
    try:
        process = psutil.Process(int(holder["pid"]))
        return abs(process.create_time() - holder["began"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _time_of(folder: Path, file: int, system: bool) -> int:
    """When the lock file was renewed last, as its server knows it: locking or opening a file asks there again.

    - `system`: whether `file` is locked: then it must not be opened twice, closing one would end the lock
    """
    with contextlib.suppress(OSError):
        if system:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.fstat(file).st_mtime_ns
        with (folder / FILE).open("rb") as opened:
            return os.fstat(opened.fileno()).st_mtime_ns
    return 0


def _same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except OSError:
        return False
