"""Saving while training goes on: each rank writes its own part in a thread, rank 0 completes the checkpoint.

The step waits only for the copy to the CPU. Ranks tell each other that they are done through small files beside the
checkpoint, not through collectives, so that a save never mixes with the communication of the training.
"""

import contextlib
import json
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasthpm import checkpoint
from fasthpm.checkpoint import shards
from fasthpm.files import file_hash, fsync, write_text
from fasthpm.ranks.zero import MasterLayout
from fasthpm.recipe import Recipe

POLL_SECONDS = 0.05


class Unsound(OSError):
    """What was to be written is not worth keeping: weights that are not finite. No room on a disk would help."""


@dataclass(frozen=True)
class Job:
    """A checkpoint to be written by all ranks into `aside`."""

    aside: Path
    taken: shards.Snapshot
    recipe: Recipe
    state: checkpoint.RunState


class Saver:
    """Writes one checkpoint at a time in the background.

    - `timeout`: seconds that rank 0 waits for the other ranks' parts
    """

    def __init__(self, rank: int, world_size: int, *, timeout: float) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self.unsound = False  # whether the last save failed for what it was to hold
        self._given_up = threading.Event()
        self._staging = shards.Staging()

    def take(self, layout: MasterLayout) -> shards.Snapshot:
        """This rank's part of the state as it is now; it lies where the last one lay, so `wait` for that first."""
        self._refuse_if_writing()
        return shards.snapshot(layout, self.rank, self._staging)

    def start(self, job: Job) -> None:
        """Begin to write; `wait` for the one before first."""
        self._refuse_if_writing()
        self.unsound = False
        self._thread = threading.Thread(target=self._run, args=(job,), name="fasthpm-saver", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is still at work."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> str:
        """Wait until this rank's part, and on rank 0 the whole checkpoint, is written.

        **Returns:** what went wrong on the disk, or an empty string. Other errors are raised.
        """
        if self._thread is None:
            return ""
        self._thread.join()
        self._thread = None
        failure, self._failure = self._failure, None
        if failure is None:
            return ""
        self.unsound = isinstance(failure, Unsound)
        if isinstance(failure, OSError):
            return failure.strerror or str(failure)
        raise failure

    def close(self) -> None:
        """End the thread: this rank's own part is still written, but parts of others are waited for no longer.

        A thread inside native code must not outlive the interpreter: the process would abort.
        """
        self._given_up.set()
        if self._thread is not None:
            self._thread.join()

    def _refuse_if_writing(self) -> None:
        if self._thread is not None:
            raise RuntimeError("a checkpoint is still being written")

    def _run(self, job: Job) -> None:
        try:
            _report(job.aside, self.rank, self._write(job))
            if self.rank == 0:
                self._complete(job)
        except BaseException as error:  # raised in the main thread, by wait
            self._failure = error
            with contextlib.suppress(OSError):
                _report(job.aside, self.rank, {"error": str(error), "unsound": isinstance(error, Unsound)})
            if self.rank == 0:
                shutil.rmtree(job.aside, ignore_errors=True)

    def _write(self, job: Job) -> dict[str, Any]:
        path = shards.rank_file(job.aside, self.rank)
        if not job.taken.tensors:
            return {}
        if wrong := shards.not_finite(job.taken.layout, job.taken.tensors.get):
            raise Unsound(f"its weights are not finite: {wrong}")
        shards.write(job.taken, path)
        fsync(path)
        return {str(path.relative_to(job.aside)): [path.stat().st_size, file_hash(path)]}

    def _complete(self, job: Job) -> None:
        written: dict[str, Any] = {}
        deadline = time.monotonic() + self.timeout
        for rank in range(self.world_size):
            while not (found := _reported(job.aside, rank)):
                if time.monotonic() > deadline:
                    raise OSError(f"rank {rank} did not write its part within {self.timeout:g} s")
                if self._given_up.wait(POLL_SECONDS):
                    raise OSError(f"the run ended before rank {rank} had written its part")
            if "error" in found["files"]:
                kind = Unsound if found["files"].get("unsound") else OSError
                raise kind(f"rank {rank}: {found['files']['error']}")
            written |= found["files"]
        for rank in range(self.world_size):
            _marker(job.aside, rank).unlink()
        newest = checkpoint.commit(job.aside, job.recipe, job.state, written)
        every = job.recipe.keep_every * job.recipe.steps_per_epoch
        checkpoint.rotate(job.aside.parent.parent, job.recipe.keep_checkpoints, newest=newest, every=every)


def _marker(aside: Path, rank: int) -> Path:
    return aside / f".rank-{rank:05d}.json"


def _report(aside: Path, rank: int, files: dict[str, Any]) -> None:
    """Tell rank 0 which files (size, sha256) this rank has written, or its error."""
    write_text(_marker(aside, rank), json.dumps({"files": files}))


def _reported(aside: Path, rank: int) -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError):
        return json.loads(_marker(aside, rank).read_text())
    return {}
