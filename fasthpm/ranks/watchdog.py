"""A rank that is stuck ends the job, named, instead of holding it for ever.

A collective waits for its slowest rank, so one rank that hangs stops them all without an error. Each rank therefore
notes its update, what it is doing and whether it waits for others in a file beside the run, from a thread of its own;
one that has made no progress for the timeout reads the others' notes, says who is to blame, and ends its process. Its
launcher then ends the others. One that dies of a signal is named by its witness, a process of its own.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from fasthpm.files import read_json, write_text
from fasthpm.ranks import witness
from fasthpm.ranks.launch import TIMEOUT

EXIT_STUCK = 3
FOLDER = ".heartbeats"
STEPPING = "step"  # the phase of a rank that does nothing of its own
COLLECTIVES = "torch.distributed.distributed_c10d"


class Watchdog:
    """Watches this rank while it is open (`with`).

    - `timeout`: seconds without progress after which the job ends
    """

    def __init__(self, output_dir: Path, rank: int, world_size: int, *, timeout: float) -> None:
        self.folder, self.rank, self.world_size, self.timeout = output_dir / FOLDER, rank, world_size, timeout
        self._interval = min(timeout / 5, 10.0)
        self._note: dict[str, Any] = {"update": 0, "phase": STEPPING}
        self._longer = 0.0  # seconds, while this rank does what takes longer than the timeout
        self._progress = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fasthpm-watchdog", daemon=True)
        self._witness: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Watchdog":
        self._progress = time.monotonic()
        if self.world_size > 1:  # alone, a shell says it
            self._ended.unlink(missing_ok=True)
            self._witness = witness.start(self.rank, self._path(self.rank))
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._dismiss(failed=kind is not None)
        with contextlib.suppress(OSError):
            self._path(self.rank).unlink()

    def progressed(self, update: int) -> None:
        """This rank has done `update` updates."""
        self._progress = time.monotonic()
        self._note = {"update": update, "phase": STEPPING}

    @contextmanager
    def doing(self, phase: str, timeout: float = 0.0) -> Iterator[None]:
        """This rank is busy with something of its own: the others may have to wait for it.

        - `timeout`: seconds that it may take, if that is longer than the usual
        """
        note = self._note
        self._note, self._longer = {**note, "phase": phase}, timeout
        yield
        self._note, self._longer, self._progress = note, 0.0, max(self._progress, time.monotonic() if timeout else 0.0)

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._end.wait(self._interval):
            now = time.monotonic()
            stopped, looked = now - looked - self._interval, now
            if stopped > self._interval:  # by Ctrl-Z, a scheduler or a paused machine: nothing could go on
                self._progress += stopped
            self._write()
            limit = max(self.timeout, self._longer)
            if time.monotonic() - self._progress > limit:
                self._give_up(limit)

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end the run
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self._path(self.rank), json.dumps({**self._note, "waits": in_collective(), "time": time.time()}))

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"

    @property
    def _ended(self) -> Path:
        return self._path(self.rank).with_suffix(witness.ENDED)

    def _dismiss(self, *, failed: bool) -> None:
        """Let this rank's witness go, and the others' know that it has said why it ends."""
        if self._witness is None:
            return
        if failed:
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._ended.touch()
        witness.dismiss(self._witness)

    def _give_up(self, limit: float) -> NoReturn:
        notes = {rank: read_json(self._path(rank)) for rank in range(self.world_size)}
        culprit = blame(notes, time.time(), 3 * self._interval)
        print(
            f"fasthpm: error: no update for {limit:g} s after update {self._note['update']}: {culprit}; "
            f"start the same command to resume from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        self._dismiss(failed=True)
        os._exit(EXIT_STUCK)  # the main thread hangs in a call that no exception can reach


def in_collective() -> bool:
    """Whether this process is in a call that waits for the other ranks; NCCL's calls wait on the device, unseen."""
    return any(
        frame.f_globals.get("__name__") == COLLECTIVES
        for top in sys._current_frames().values()
        for frame, _ in traceback.walk_stack(top)
    )


def blame(notes: dict[int, dict[str, Any]], now: float, silent_after: float) -> str:
    """Which ranks hold the others up: the silent ones, else of those that do not wait the busy or those behind.

    - `notes`: {rank: {"update", "phase", "waits", "time"}, or {} for a rank that left none}
    - `silent_after`: seconds after which a rank that notes nothing counts as dead or stopped
    """
    nobody = "all ranks wait for each other in the same step; is the network between them down?"
    silent = {rank: note for rank, note in notes.items() if not note or now - note["time"] > silent_after}
    if silent:
        return _name(silent, "gave no sign of life")
    at_work = {rank: note for rank, note in notes.items() if not note["waits"]}
    if not at_work:
        return nobody
    busy = {rank: note for rank, note in at_work.items() if note["phase"] != STEPPING}
    if busy:
        return _name(busy, f"still busy with {', '.join(sorted({note['phase'] for note in busy.values()}))}")
    if len(notes) == 1:
        return f"the step does not end; if it needs longer, set {TIMEOUT}"
    last = min(note["update"] for note in notes.values())
    behind = {rank: note for rank, note in at_work.items() if note["update"] == last}
    if behind and len(behind) < len(notes):
        return _name(behind, "behind the others")
    return nobody


def _name(ranks: dict[int, dict[str, Any]], what: str) -> str:
    listed = ", ".join(f"{rank} (update {note.get('update', '?')})" for rank, note in sorted(ranks.items())[:8])
    return f"rank{'s' if len(ranks) > 1 else ''} {listed} {what}"
