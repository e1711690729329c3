"""What the training loop adds to its steps: its real functions, around an engine whose own calls are timed."""

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fasthpm import pretrain
from fasthpm.data import Batch
from fasthpm.ranks.launch import Launch
from fasthpm.ranks.signals import StopSignals
from fasthpm.ranks.watchdog import Watchdog
from fasthpm.recipe import Recipe
from fasthpm.run import state
from fasthpm.run.metrics import Metrics, wait_for
from fasthpm.speed.graph import Eager
from fasthpm.step import Step
from fasthpm.teacher import EMATeacher


class TimedEngine:
    """An engine whose forward, backward and step add up their time, the device's included, in `seconds`."""

    def __init__(self, engine: Any, device: torch.device) -> None:
        self._engine, self._device, self.seconds = engine, device, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *arguments: Any) -> Any:
        with self._timed():
            return self._engine(*arguments)

    def backward(self, loss: Tensor) -> None:
        """As the engine's."""
        with self._timed():
            self._engine.backward(loss)

    def step(self) -> None:
        """As the engine's."""
        with self._timed():
            self._engine.step()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        wait_for(self._device)
        self.seconds += time.perf_counter() - begin


def loop_share(
    recipe: Recipe, launch: Launch, engine: Any, step: Step, teacher: EMATeacher | None, images: Tensor, updates: int
) -> dict[str, float]:
    """Seconds per update of the loop of `fasthpm.pretrain`, of its engine, and the share that is not the engine's.

    - `images`: uint8, the batch of every update: no loader is measured

    An upper bound: metrics are read and written in every update, and a GPU is waited for after each of the engine's
    calls, so that no work of the host hides behind it. Nothing is saved or drawn.
    """
    timed = TimedEngine(engine, launch.device)
    with tempfile.TemporaryDirectory(prefix="fasthpm-bench-") as folder:
        recipe = dataclasses.replace(recipe, log_every=1, panel_every=0, save_every=10**9, output_dir=folder)
        run = state.Run(recipe, launch, _nothing(), timed, step, teacher, _nothing(), _nothing())
        run.micro_step = Eager(timed)  # a graph asks nothing of an engine that could be timed
        run.batches = itertools.repeat(_batch(images))
        run.bad_samples = _nothing()
        metrics = Metrics(
            Path(folder),
            rank=launch.rank,
            world_size=launch.world_size,
            total_steps=updates + 1,
            first_step=0,
            flops_per_sample=1.0,
            matmul_rate=1.0,
            device=launch.device,
        )
        last = updates + 2  # never reached: the end of a run saves
        watchdog = Watchdog(Path(folder), launch.rank, launch.world_size, timeout=600.0)
        with StopSignals() as stop, watchdog:
            pretrain.turn(run, metrics, stop, watchdog, last)  # the first one opens files
            timed.seconds, begin = 0.0, time.perf_counter()
            for _ in range(updates):
                pretrain.turn(run, metrics, stop, watchdog, last)
            seconds = time.perf_counter() - begin
            stop.drain()
        metrics.close()
    found = {"updates": updates, "seconds": seconds / updates, "engine_seconds": timed.seconds / updates}
    return {**found, "outside_share": 1 - timed.seconds / seconds}


def _nothing() -> Any:
    """What the loop holds but does not use here."""
    return SimpleNamespace(update=lambda loader: 0)


def _batch(images: Tensor) -> Batch:
    count = len(images)
    numbers = torch.arange(count, device=images.device)
    places = torch.zeros(count, 5, dtype=torch.int64, device=images.device)
    return Batch(images, numbers * 0, numbers, places, places[:, :2], numbers < 0)
