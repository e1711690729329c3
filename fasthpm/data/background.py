"""An iterator that runs in a thread, a bounded number of items ahead of its consumer."""

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
ENDED = "this iteration has ended: the loader was closed, moved, or iterated again"
ITEM, FAILED, EXHAUSTED = range(3)


class Background(Generic[T]):
    """The items of `source`, made in a thread, at most `depth` ahead. Dropping it, or `close`, ends the thread.

    An error of `source` reaches the consumer once, after the items that came before it.
    """

    def __init__(self, source: Iterator[T], depth: int, name: str) -> None:
        ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        slots, stop = threading.Semaphore(depth), threading.Event()
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        job = (source, ready, slots, stop, device)
        thread = threading.Thread(target=_produce, args=job, name=name, daemon=True)
        self._ready, self._slots, self._stop = ready, slots, stop
        # Also runs at interpreter exit, so that no thread is inside native code while Python is torn down.
        self.close = weakref.finalize(self, _finish, ready, slots, stop, thread)
        thread.start()

    def __iter__(self) -> "Background[T]":
        return self

    def __next__(self) -> T:
        if self._stop.is_set():
            raise RuntimeError(ENDED)
        kind, value = self._ready.get()
        if kind == ITEM:
            self._slots.release()
            return value
        self.close()
        if kind == FAILED:
            raise value
        raise StopIteration


def _produce(
    source: Iterator[Any],
    ready: "queue.SimpleQueue[Any]",
    slots: threading.Semaphore,
    stop: threading.Event,
    device: int | None,
) -> None:
    """Body of the thread. Whatever goes wrong is handed to the consumer."""
    try:
        if device is not None:
            torch.cuda.set_device(device)  # per thread: pinning from device 0's context would cost memory there
        while True:
            slots.acquire()
            if stop.is_set():
                return
            ready.put((ITEM, next(source)))
    except StopIteration:
        ready.put((EXHAUSTED, None))
    except BaseException as error:
        ready.put((FAILED, error))


def _finish(
    ready: "queue.SimpleQueue[Any]", slots: threading.Semaphore, stop: threading.Event, thread: threading.Thread
) -> None:
    """Stop the thread, wait for it, and wake a consumer that may still be waiting."""
    stop.set()
    slots.release()
    if thread.is_alive() and thread is not threading.current_thread():
        thread.join()
    while not ready.empty():
        ready.get_nowait()
    ready.put((FAILED, RuntimeError(ENDED)))
