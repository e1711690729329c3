"""The training loop of every tuning, and its log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasthpm import checkpoint, files, ranks
from fasthpm.errors import UserError
from fasthpm.ranks.signals import StopSignals
from fasthpm.ranks.watchdog import Watchdog
from fasthpm.recipe import save_recipe
from fasthpm.run import state
from fasthpm.run.journal import Journal
from fasthpm.run.metrics import wait_for
from fasthpm.tuning.run import Tuning, seed_all

LONG_SECONDS = 24 * 3600.0  # what a test may take at most, beside which nothing else moves


# -------------------------------------------------------------------------------------------------- the loop
def carry_out(run: Tuning[Any], about: str) -> bool:
    """Train to the last update or to a signal, with tests and checkpoints. Collective.

    - `about`: what is printed first

    **Returns:** whether it was Ctrl-C that ended it.
    """
    launch, folder = run.launch, Path(run.settings.output_dir)
    with ranks.in_agreement():
        if launch.rank == 0:
            prepare_output(run)
            print(about, file=sys.stderr)
    log = Log(run, folder)
    watchdog = Watchdog(folder, launch.rank, launch.world_size, timeout=ranks.timeout().total_seconds())
    try:
        with StopSignals() as stop, watchdog:
            train(run, log, stop, watchdog)
            stop.drain()
            state.finish_last_save(run, lambda: watchdog.progressed(run.done))
    finally:
        log.close()
        for loader in run.loaders():
            loader.close()
    return stop.interrupted


def prepare_output(run: Tuning[Any]) -> None:
    """Create output_dir and write what the tuning is (rank 0). **Raises:** `UserError` if it cannot be written."""
    folder = Path(run.settings.output_dir)
    with files.writing(folder, "choose another --output_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.require_space(folder, run.num_parameters)
        save_recipe(run.recipe, folder / checkpoint.RECIPE)
        for name, text in run.notes.items():
            files.write_text(folder / name, text)


def train(run: Tuning[Any], log: "Log", stop: StopSignals, watchdog: Watchdog) -> None:
    """Batch, step, test, save; until the last update, or the one at which the ranks agree to stop."""
    plan, device = run.recipe, run.launch.device
    last = min(plan.total_steps, plan.stop_after or plan.total_steps)
    batches = iter(run.loader)
    while run.done < last and not run.preempted:
        ranks.set_lr(run.engine, run.lr_at(run.done))
        for micro_step in range(plan.accum_iter):
            with log.waiting_for_data(), watchdog.doing("loading data"):
                batch = next(batches).to(device)
            seed_all(run.settings.seed, run.done, micro_step, run.launch.rank)
            losses = run.losses(run.engine(*run.inputs(batch)))
            run.engine.backward(losses["loss"])
            run.engine.step()
            log.add(losses, len(batch.ids))
        run.done += 1
        run.preempted = stop.agreed()
        log.progress.update()
        with watchdog.doing("testing or saving", LONG_SECONDS if is_tested(run) else 0.0):
            after_update(run, log, last)
        watchdog.progressed(run.done)


def is_tested(run: Tuning[Any]) -> bool:
    """Whether there is a test after this update."""
    return run.done == run.recipe.total_steps or run.testing_due()


def after_update(run: Tuning[Any], log: "Log", last: int) -> None:
    """Log, test and save, each at its own interval, and all of them at the end."""
    testing = is_tested(run)
    saving = run.done == last or run.preempted or run.saving_due()
    if run.done % run.recipe.log_every == 0 or testing or saving:
        log.read(run, run.test if testing else dict)
    if saving:
        state.save(run)


# -------------------------------------------------------------------------------------------------- logging
class Log(Journal):
    """Losses and tests: summed on the device, written to the tuning's journal."""

    def __init__(self, run: Tuning[Any], folder: Path) -> None:
        rank, total = run.launch.rank, run.recipe.total_steps
        super().__init__(folder, run.name, rank=rank, total_steps=total, first_step=run.done)
        self.world_size, self.device = run.launch.world_size, run.launch.device
        self._sums: dict[str, Any] = {}
        self._count = self._samples = 0
        self._restart()

    def add(self, losses: dict[str, Tensor], samples: int) -> None:
        """Take in one micro-step, without waiting for it."""
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().double()
        self._count, self._samples = self._count + 1, self._samples + samples

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Measure the time that this host waits for its loader."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def read(self, run: Tuning[Any], test: Any) -> None:
        """Average over ranks since the last reading, test, and write it. Collective.

        - `test`: a function of no arguments that gives the figures of a test, or none

        **Raises:** `UserError` on every rank if the loss was not finite.
        """
        losses = self._means()  # the host waits for the device here
        wait_for(self.device)
        seconds = time.perf_counter() - self._begin
        if not np.isfinite(losses["loss"]):
            flag, on = "blr" if hasattr(run.settings, "blr") else "lr", checkpoint.way_on(self.output_dir)
            ranks.agree(
                UserError(f"the loss is not finite by update {run.done}; lower --{flag}, or give --clip_grad 1{on}")
            )
        record = {
            **losses,
            "lr": run.lr_at(run.done - 1),
            "seconds": seconds,
            "data_wait": self._waited / seconds,
            "images_per_second": self._samples * self.world_size / seconds,
            **run.told(),
            **test(),
        }
        run.best = max(run.best, record.get(run.figure, 0.0))
        self._tell(run, record)
        self._restart()

    def _means(self) -> dict[str, float]:
        count = torch.full((), self._count, dtype=torch.float64, device=self.device)
        sums = ranks.share(torch.stack([*self._sums.values(), count]), self.world_size)
        return dict(zip(self._sums, (sums[:-1] / sums[-1]).tolist(), strict=True))

    def _restart(self) -> None:
        self._sums.clear()
        self._count = self._samples = 0
        self._waited, self._begin = 0.0, time.perf_counter()

    def _tell(self, run: Tuning[Any], record: dict[str, float]) -> None:
        epoch = run.done / run.recipe.steps_per_epoch
        self.write(run.done, epoch, record, {f"{run.name}/{name}": value for name, value in record.items()})
        shown = {"loss": f"{record['loss']:.3f}", "img_s": f"{record['images_per_second']:.0f}"}
        if run.figure in record:
            shown[run.figure] = f"{record[run.figure]:.2f}"
            if self.rank == 0:
                self.say(run.line(epoch, record))
        self.progress.set_postfix(shown)
