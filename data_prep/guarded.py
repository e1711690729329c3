"""FFCV's `DatasetWriter` with its processes watched: one that fails ends the run instead of hanging it.

Importing this needs FFCV.
"""

import contextlib
import errno
import os
import queue
from collections.abc import Callable, Iterable
from typing import Any

from ffcv.writer import DatasetWriter, MemoryAllocator

from fasthpm.errors import UserError

POLL_SECONDS, LAST_WORD_SECONDS = 0.05, 0.5


class GuardedWriter(DatasetWriter):
    """`DatasetWriter` whose `_write_common` reports progress to `progress` and notices failures of its processes.

    What the processes do, the file format and the order of the allocations stay FFCV's.
    """

    progress: Any = None
    enter_worker: Callable[[Any], None]
    pages = 0  # pages of pixels that the file has, once written

    def _write_common(
        self,
        num_samples: int,
        queue_content: Iterable[Any],
        work_fn: Callable[..., None],
        extra_worker_args: tuple[Any, ...],
    ) -> None:
        from data_prep.writer import fork  # which imports this module only where FFCV is needed

        self.num_samples = num_samples
        self.prepare()
        try:
            todo, results = fork.Queue(), fork.Queue()
            done = fork.Value("Q", 0)
            allocator = MemoryAllocator(self.fname, self.data_region_start, self.page_size)
            shared = (todo, self.metadata_sm, self.metadata_type, self.fields, allocator, done)
            job = (work_fn, self.enter_worker, shared, results, extra_worker_args)
            processes = [fork.Process(target=_work, args=job, daemon=True) for _ in range(self.num_workers)]
            allocations = self._run(processes, [*queue_content, *[None] * self.num_workers], todo, results, done)
            self.pages = allocator.next_page_written.value
            self.finalize(allocations)
        finally:
            self.metadata_sm.close()
            self.metadata_sm.unlink()

    def _run(self, processes: list[Any], items: list[Any], todo: Any, results: Any, done: Any) -> list[Any]:
        """Start the processes and collect their allocations, or stop them all at the first failure."""
        allocations: list[Any] = []
        waiting = len(processes)
        try:
            for process in processes:
                process.start()
            for item in items:  # after the forks: a queue that is in use has a thread
                todo.put(item)
            while waiting:
                self.progress.update(done.value - self.progress.n)
                try:
                    allocations += _unwrap(results.get(timeout=POLL_SECONDS))
                    waiting -= 1
                except queue.Empty:
                    _check_alive(processes, results)
            self.progress.update(self.num_samples - self.progress.n)
            for process in processes:
                process.join()
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
            todo.cancel_join_thread()  # nobody is left to read what a failure leaves in it
        return allocations


def _work(
    work_fn: Callable[..., None],
    enter: Callable[[Any], None],
    shared: tuple[Any, ...],
    results: Any,
    extra: tuple[Any, ...],
) -> None:
    """Body of a process: FFCV's own job, then its allocations or its error go to the parent."""
    enter(None)
    try:
        mine = _Box()
        work_fn(*shared, mine, *extra)
        results.put(("done", mine.content))
    except BaseException as error:
        results.put(("failed", (type(error).__name__, getattr(error, "errno", None), str(error))))
        results.close()
        results.join_thread()
        os._exit(1)  # the allocator's clean-up would wait for its turn to write, which may never come


class _Box:
    """Stands in for the queue that FFCV's job puts its allocations into."""

    content: Any = ()

    def put(self, content: Any) -> None:
        self.content = content


def _unwrap(result: tuple[str, Any]) -> list[Any]:
    status, content = result
    if status == "done":
        return content
    kind, number, text = content
    if number in (errno.ENOSPC, errno.EDQUOT):
        raise OSError(number, text)
    raise UserError(f"writing failed ({kind}: {text}); if a file changed after it was scanned, run again")


def _check_alive(processes: list[Any], results: Any) -> None:
    """Raise the error of a process that failed, or `UserError` if one was killed, most likely for want of memory."""
    dead = [process.exitcode for process in processes if process.exitcode not in (None, 0)]
    if not dead:
        return
    with contextlib.suppress(queue.Empty):
        _unwrap(results.get(timeout=LAST_WORD_SECONDS))
    raise UserError(
        f"a writing process died (exit code {dead[0]}), most likely for want of memory (main or /dev/shm); "
        f"use fewer --num_workers"
    )
