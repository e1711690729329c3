"""Time spent on the device in a part of a step, read without making the step wait."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Region = tuple[torch.cuda.Event, torch.cuda.Event]  # its beginning and its end


class Stopwatch:
    """Sums the device time of the regions it measures: CUDA events on a GPU, the wall clock on a CPU.

    Regions of a step that is being recorded as a CUDA graph are measured whenever the graph runs: `recorded`, `again`.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[Region] = []
        self._recorded: list[Region] = []

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Measure the enclosed region."""
        if device.type == "cuda":
            capturing = torch.cuda.is_current_stream_capturing()
            options = {"external": True} if capturing else {}  # a node of the graph, with a time
            start, end = (torch.cuda.Event(enable_timing=True, **options) for _ in range(2))
            start.record()
            yield
            end.record()
            (self._recorded if capturing else self._events).append((start, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin

    def recorded(self) -> list[Region]:
        """The regions of the graph that was just recorded, for `again`."""
        regions, self._recorded = self._recorded, []
        return regions

    def again(self, regions: list[Region]) -> None:
        """A graph with these regions runs once more. Their events know its last run, which stands for all of them."""
        self._events += regions

    def read(self) -> float:
        """Seconds since the last `read`; call it where the host waits for the device anyway."""
        if self._events:
            torch.cuda.current_stream().synchronize()
        for start, end in self._events:
            self._seconds += start.elapsed_time(end) / 1e3
        seconds, self._seconds = self._seconds, 0.0
        self._events.clear()
        return seconds
