"""Batches on the device, one ahead: while a step works on one batch, the next one is decoded and copied."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from fasthpm.data.background import Background
from fasthpm.data.bad import BadSample
from fasthpm.data.types import Batch, Loader

Arrival = torch.cuda.Event | None  # fires when a batch is on the device; None where copies do not run by themselves
Copied = tuple[Batch, dict[str, Any], Arrival]  # and the loader's position after it


def on_device(loader: Loader, device: torch.device) -> Loader:
    """`loader` with its batches on `device`: copied ahead to a GPU, left as they are on a CPU."""
    return loader if device.type == "cpu" else DeviceLoader(loader, device)


class DeviceLoader:
    """A `Loader` that gives another loader's batches on `device`.

    One batch is asked for ahead of the consumer, from a thread, and copied from pinned memory on a stream of its own.
    `state_dict` speaks of what the consumer was given, not of what was asked for ahead.
    """

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self.info, self.source, self.batch_size = loader.info, loader.source, loader.batch_size
        self._loader, self._device = loader, device
        self._state = loader.state_dict()
        self._current: weakref.ref[_OnDevice] | None = None

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        self._stop_current()
        if self._loader.state_dict() != self._state:  # the last iteration ended with a batch asked for, not given
            self._loader.load_state_dict(self._state)
        copies = _copied(iter(self._loader), self._loader, self._device)
        current = _OnDevice(Background(copies, 1, "fasthpm-device"), self._device, self._given)
        self._current = weakref.ref(current)
        return current

    def set_epoch(self, epoch: int) -> None:
        self._stop_current()
        self._loader.set_epoch(epoch)
        self._state = self._loader.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stop_current()
        self._loader.load_state_dict(state)
        self._state = self._loader.state_dict()

    def bad_samples(self) -> list[BadSample]:
        return self._loader.bad_samples()

    def close(self) -> None:
        self._stop_current()
        self._loader.close()

    def _given(self, state: dict[str, Any]) -> None:
        """The consumer has the batch before `state`."""
        self._state = state

    def _stop_current(self) -> None:
        current = self._current() if self._current else None
        if current is not None:
            current.ahead.close()
        self._current = None


class _OnDevice:
    """The iterator of one epoch."""

    def __init__(
        self, ahead: Background[Copied], device: torch.device, given: Callable[[dict[str, Any]], None]
    ) -> None:
        self.ahead, self._device, self._given = ahead, device, given

    def __iter__(self) -> "_OnDevice":
        return self

    def __next__(self) -> Batch:
        batch, state, arrival = next(self.ahead)
        if arrival is not None:
            _hand_over(batch, arrival, torch.cuda.current_stream(self._device))
        self._given(state)
        return batch


def _copied(batches: Iterator[Batch], loader: Loader, device: torch.device) -> Iterator[Copied]:
    """Each batch on `device`, the loader's position after it, and when it arrives. Runs in the thread."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        with torch.cuda.stream(stream) if stream else nullcontext():
            moved = batch.to(device)
        item = moved, loader.state_dict(), stream.record_event() if stream else None
        del batch, moved
        yield item
        del item  # after the consumer has it; the memory is the consumer's alone


def _hand_over(batch: Batch, arrival: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
    """Let `stream` wait for the copy, and keep the memory from being used anew before `stream` is done with it."""
    stream.wait_event(arrival)
    for tensor in _tensors(vars(batch)):
        tensor.record_stream(stream)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All that are in `value`, however deep in lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)
