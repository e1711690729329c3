"""Worker processes of a preparation: their results are appended in order, and they are gone with their parent."""

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, TypeVar

from data_prep.arena import Arena, whole
from data_prep.partial import Chunk, Job
from data_prep.sets import progress_bar
from fasthpm.data.options import count_workers
from fasthpm.data.sampling import Array
from fasthpm.errors import UserError

AHEAD = 3  # chunks per process that are under way or wait for their turn
PR_SET_PDEATHSIG = 1
PASSING = re.compile(rf"(?: at| @) 0x[0-9a-fA-F]{{6,}}|{re.escape(tempfile.gettempdir())}/[^\s'\":]*tmp\w{{8}}\S*")
fork = multiprocessing.get_context("fork")
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Work:
    """What the processes do, and how messages speak of it."""

    encode: Callable[[Array], Chunk]  # of source indices
    enter: Callable[..., None]  # the start of every process
    setup: tuple[Any, ...]  # its arguments
    samples: str  # "images"
    unit: str  # of the progress bar
    unusable: str  # "unreadable"
    limit: str  # the flag that bounds the memory of one sample
    shared: int = 0  # bytes of a chunk's samples that go through shared memory; 0: all through a pipe


def append_all(job: Job, work: Work, todo: Sequence[tuple[int, Array]], total: int, num_workers: int) -> None:
    """Encode what is not done yet, (part, source indices) of each chunk, and append it in order.

    **Raises:** `UserError` if a process dies, as it does when memory runs out; `KeyboardInterrupt` if told to stop.
    """
    done = total - sum(len(indices) for _, indices in todo)
    if done:
        print(f"going on after {done} of {total} {work.samples}", flush=True)
    if not todo:
        return
    workers = min(count_workers(num_workers), len(todo))
    window = workers * AHEAD
    arena = arena_for(work, window)
    pool = ProcessPoolExecutor(workers, fork, initializer=_enter, initargs=(work, arena))
    with pool, progress_bar(total, "prepare", work.unit, initial=done) as bar, asked_to_stop() as stopping:
        try:
            asked = [(number % (window + 1), indices) for number, (_, indices) in enumerate(todo)]
            results = in_order(pool, _encode, asked, window)
            for (part, indices), chunk in zip(todo, results, strict=True):
                job.append(part, arena.unpacked(chunk) if arena else chunk)
                done += len(indices)
                bar.update(len(indices))
                if job.rejected:
                    bar.set_postfix_str(f"{len(job.rejected)} {work.unusable}", refresh=False)
                if stopping():
                    raise KeyboardInterrupt
            job.commit()
        except BaseException as error:
            with contextlib.suppress(OSError):
                job.commit()
            _explain(error, work, done, total)
            raise
        finally:
            pool.shutdown(cancel_futures=True)  # and waits: nobody may hold the lock afterwards


def arena_for(work: Work, window: int) -> Arena | None:
    """For the chunks under way, and the one that is being appended."""
    try:
        return Arena(window + 1, work.shared) if work.shared else None
    except OSError:  # the pipe does as well
        return None


_work: Any = None
_arena: Arena | None = None


def _enter(work: Work, arena: Arena | None) -> None:
    global _work, _arena
    _work, _arena = work, arena
    work.enter(*work.setup)


def _encode(asked: tuple[int, Array]) -> Chunk:
    slot, indices = asked
    chunk: Chunk = _work.encode(indices)
    return _arena.packed(chunk, slot) if _arena else whole(chunk)


def _explain(error: BaseException, work: Work, done: int, total: int) -> None:
    if isinstance(error, KeyboardInterrupt):
        print(
            f"\nstopped after {done} of {total} {work.samples}; run the same command again to continue", file=sys.stderr
        )
    if isinstance(error, (BrokenProcessPool, MemoryError)):
        raise UserError(
            f"a process that reads {work.samples} died after {done} of {total}, most likely because memory ran out; "
            f"run the same command again with fewer --num_workers (or a lower {work.limit}) to continue"
        ) from error


def in_order(
    pool: ProcessPoolExecutor, work: Callable[[Item], Made], items: Iterable[Item], window: int
) -> Iterator[Made]:
    """Results of `work` in order, with at most `window` of them under way or waiting."""
    waiting: deque[Any] = deque()
    items = iter(items)
    for item in itertools.islice(items, window):
        waiting.append(pool.submit(work, item))
    while waiting:
        chunk = waiting.popleft().result()
        for item in itertools.islice(items, 1):
            waiting.append(pool.submit(work, item))
        yield chunk


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM only ask to stop after the current chunk; a second one stops at once."""
    asked: list[int] = []

    owner = os.getpid()

    def ask(number: int, frame: Any) -> None:
        if os.getpid() != owner:  # a worker that has not come to `_enter_worker` yet
            if number == signal.SIGTERM:
                os._exit(1)
            return
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def become_worker(lock: int | None = None) -> None:
    """Die with the parent, leave Ctrl-C to it, and let go of its lock, if it holds one."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")  # libraries' remarks on odd but readable files
    if lock is not None:
        os.close(lock)  # else it would stay locked for a moment after the parent has been killed


def reason_of(error: Exception) -> str:
    """One line, the same in every run: without addresses in memory and names of temporary files."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    text = PASSING.sub("", text)
    return f"{type(error).__name__}: {' '.join(text.split())}"
