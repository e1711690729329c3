"""Worker processes of a preparation: in order, and gone with their parent."""

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from data_prep.partial import Chunk
from fasthpm.data.sampling import Array

AHEAD = 3  # chunks per process that are under way or wait for their turn
PR_SET_PDEATHSIG = 1
fork = multiprocessing.get_context("fork")


def in_order(
    pool: ProcessPoolExecutor, work: Callable[[Array], Chunk], items: Iterable[Array], window: int
) -> Iterator[Chunk]:
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


def become_worker(lock: int) -> None:
    """Die with the parent, leave Ctrl-C to it, and let go of its lock."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.close(lock)  # else it would stay locked for a moment after the parent has been killed


def reason_of(error: Exception) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}"
