"""Metrics: summed on the device, read every N updates, written to the run's journal.

MFU is model FLOPs per second (the rule is in `fasthpm.speed.flops`, teacher included) over the matmul rate that this
device reaches on squares of up to 2048 x 2048 in the run's dtype, measured when the run starts.
"""

import collections
import contextlib
import math
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from fasthpm.checkpoint import ways_on
from fasthpm.data import Batch
from fasthpm.errors import warn
from fasthpm.files import replacing
from fasthpm.run.health import NotFinite, SpikeDetector, first_not_finite
from fasthpm.run.journal import Journal
from fasthpm.step import METRICS, StepOutput

FORENSICS = "nonfinite"
SMALL_PRODUCT, LONGEST_PRODUCT = 256, 0.3  # side of a matrix; seconds that measuring a device may take for one
OVERVIEW = "1_overview"  # before all other groups: TensorBoard sorts by name, and its first screen holds few
TENSORBOARD_FIRST = ("loss", "difficulty_spearman", "images_per_second")
TENSORBOARD_GROUPS = {
    "loss": ("loss", "reconstruction_loss", "cls_loss", "patch_loss", "difficulty_loss"),
    "predictor": (
        "spearman",
        "pair_accuracy",
        "teacher_spearman",
        "map_spearman",
        "difficulty_spearman",
        "difficulty_auc",
    ),
    "schedule": ("lr", "alpha", "ema_momentum", "weight_decay", "teacher_temperature", "grad_norm"),
    "collapse": ("teacher_entropy", "mean_entropy", "teacher_kl", "rankme"),
    "health": ("loss_spikes", "skipped_updates"),
    "data": ("bad_samples",),
    "probe": ("probe_accuracy", "probe_loss", "knn_accuracy"),
    "speed": ("images_per_second", "data_wait_percent", "teacher_percent", "mfu_percent", "memory_gib"),
}


class Metrics(Journal):
    """Everything a run measures, between two readings.

    - `flops_per_sample`: of a whole step; `matmul_rate`: FLOP/s of this rank's device
    - `shown`: those of the step's `METRICS` that are written; of another step see `are_of`
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        rank: int,
        world_size: int,
        total_steps: int,
        first_step: int,
        flops_per_sample: float,
        matmul_rate: float,
        device: torch.device,
        shown: Collection[str] = METRICS,
    ) -> None:
        super().__init__(output_dir, "pretrain", rank=rank, total_steps=total_steps, first_step=first_step)
        self.world_size, self.device = world_size, device
        self._names: Sequence[str] = METRICS
        self._told, self._rows = shown, 1
        self.flops_per_sample, self.matmul_rate = flops_per_sample, matmul_rate
        self._recent: collections.deque[tuple[int, Tensor, Tensor, Tensor]] = collections.deque()
        self._norms: dict[int, Tensor | float] = {}
        self._last_norm = 0.0
        self._spikes = SpikeDetector()
        self._sum = torch.zeros(len(self._names), device=device)
        self._count = self._samples = 0
        self.restart()

    def are_of(self, names: Sequence[str], rows_per_sample: int) -> None:
        """Say what a step's metrics are, and how many rows of a batch are one sample; before the first is added."""
        self._names, self._rows = names, rows_per_sample
        self.restart()

    def add(self, step: int, batch: Batch, output: StepOutput) -> None:
        """Take in one micro-step, without waiting for it."""
        self._sum = self._sum + output.metrics
        self._count += 1
        self._samples += len(batch.ids) // self._rows
        self._recent.append((step, batch.ids, output.mask, output.metrics))

    def updated(self, step: int, grad_norm: Tensor | float) -> None:
        """Take in the gradient norm of an update, without waiting for it."""
        self._norms[step] = grad_norm

    def discard(self, step: int) -> None:
        """Leave an update out of the averages."""
        self._norms.pop(step, None)
        kept = [entry for entry in self._recent if entry[0] != step]
        for _, ids, _, _ in (entry for entry in self._recent if entry[0] == step):
            self._count -= 1
            self._samples -= len(ids) // self._rows
        self._recent = collections.deque(kept)
        self._sum = torch.zeros(len(self._names), device=self.device)
        for *_, values in kept:
            self._sum = self._sum + values

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the rates: it is no training."""
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Measure the time that this host waits for its loader."""
        begin = time.perf_counter()
        yield
        self._data_wait += time.perf_counter() - begin

    def read(self, step: int, epoch: float, teacher_seconds: float, **values: float) -> dict[str, float]:
        """Average over ranks and micro-steps since the last reading, write it everywhere, start afresh.

        Every rank calls this after the same update. An interval without any update leaves no record.

        **Raises:** `NotFinite` on every rank if any loss or gradient was not finite, after saving what there is to
        know about the first such update under `nonfinite/`.
        """
        sums = torch.cat([self._sum.double(), self._sum.new_tensor([self._count, self._samples]).double()])
        together = torch.cat([sums, *self._checks()])
        dist.all_reduce(together)
        values_read = together.tolist()  # the host waits for the device here, and only here
        *means, count, samples = values_read[: len(sums)]
        seconds = time.perf_counter() - self._begin
        spikes = self._check(step, values_read[len(sums) :], all(map(math.isfinite, means)))
        if not count:
            self.restart()
            return {}
        rate = samples / seconds
        record = (
            {name: value / count for name, value in zip(self._names, means, strict=True) if name in self._told}
            | values
            | {
                "grad_norm": self._last_norm,
                "loss_spikes": spikes,
                "images_per_second": rate,
                "data_wait_percent": 100 * self._data_wait / seconds,
                "teacher_percent": 100 * teacher_seconds / seconds,
                "mfu_percent": 100 * rate * self.flops_per_sample / (self.matmul_rate * self.world_size),
                "memory_gib": memory_gib(self.device),
            }
        )
        self._tell(step, epoch, record)
        self.restart()
        return record

    def restart(self) -> None:
        """Start the sums and the clock anew, so that time spent on pictures and checkpoints is not counted."""
        self._sum = torch.zeros(len(self._names), device=self.device)
        self._count = self._samples = 0
        self._data_wait = 0.0
        self._begin = time.perf_counter()
        self._recent.clear()
        self._norms.clear()

    def rewind(self, step: int) -> None:
        """Go back to update `step`: what was written of later ones will be written anew."""
        self.restart()
        super().rewind(step)

    def _tell(self, step: int, epoch: float, record: dict[str, float]) -> None:
        self.write(step, epoch, record, tags_of(record))
        self.progress.set_postfix(
            loss=f"{record['loss']:.3f}",
            img_s=f"{record['images_per_second']:.0f}",
            wait=f"{record['data_wait_percent']:.0f}%",
        )

    def _checks(self) -> tuple[Tensor, Tensor, Tensor]:
        """What tells a bad update, to be summed over the ranks: float64, [n] losses and [n] sums of all metrics of the
        micro-steps since the last reading, [k] gradient norms of the updates."""
        recent = [values for *_, values in self._recent]
        table = (
            torch.stack(recent).double() if recent else torch.zeros(0, len(self._names), device=self.device).double()
        )
        norms = [torch.as_tensor(norm, device=self.device).double().reshape(()) for norm in self._norms.values()]
        return table[:, 0], table.sum(1), torch.stack(norms) if norms else table.new_zeros(0)

    def _check(self, step: int, summed: list[float], finite: bool) -> int:
        """Judge `_checks` of all ranks, summed; how many losses stand out."""
        steps, count = [step for step, *_ in self._recent], len(self._recent)
        norms = {update: norm / self.world_size for update, norm in zip(self._norms, summed[2 * count :], strict=True)}
        values = summed[count : 2 * count]
        first = first_not_finite(steps, values, norms)
        if first is not None or not finite:
            in_loss = any(when == first and not math.isfinite(value) for when, value in zip(steps, values, strict=True))
            self._stop(step, step - 1 if first is None else first, "loss" if in_loss or first is None else "gradient")
        if self._norms:
            self._last_norm = float(list(self._norms.values())[-1])
        losses: dict[int, float] = {}
        shares = collections.Counter(steps)
        for update, loss in zip(steps, summed[:count], strict=True):
            losses[update] = losses.get(update, 0.0) + loss / (self.world_size * shares[update])
        return self._report_spikes(losses)

    def _report_spikes(self, losses: dict[int, float]) -> int:
        found = self._spikes.spikes(list(losses.values()))
        if found and self.rank == 0:
            place, median = next(iter(found.items()))
            update, loss = list(losses.items())[place]
            more = f" (and of {len(found) - 1} more)" if len(found) > 1 else ""
            warn(f"the loss of update {update + 1}{more} is {loss:.4g}, the median before it {median:.4g}")
        return len(found)

    def forensics(self, update: int) -> Path:
        """Where `save_forensics` writes."""
        return self.output_dir / FORENSICS / f"update-{update + 1:08d}"

    def save_forensics(self, update: int) -> Path:
        """Write what this rank knows about an update (from 0) that is not finite; the folder."""
        folder = self.forensics(update)
        micro_steps = [
            {"step": when, "ids": ids.cpu(), "mask": mask.cpu(), "metrics": values.cpu()}
            for when, ids, mask, values in self._recent
            if when == update
        ]
        norms = {when: float(norm) for when, norm in self._norms.items()}
        found = {"metrics": self._names, "micro_steps": micro_steps, "grad_norms": norms}
        # A full disk must not end one rank alone; torch.save has its own error for it.
        with contextlib.suppress(OSError, RuntimeError):
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / f"rank{self.rank}.pt") as aside:
                torch.save(found, aside)
        return folder

    def _stop(self, step: int, first: int, what: str) -> NoReturn:
        """Save what is needed to look at update `first`; all ranks come here together."""
        folder = self.save_forensics(first)
        dist.barrier()  # a launcher may kill the others as soon as one has left
        raise NotFinite(
            f"the {what} is not finite by update {step}, first at {first + 1}; its sample ids, masks and norms are in "
            f"{folder}; look at these samples, lower --blr{ways_on(self.output_dir, 'blr')}; or start again with "
            f"--on_nonfinite skip or rollback to go on from the last checkpoint without them",
            first,
            printed_elsewhere=self.rank != 0,
        )


def tags_of(record: dict[str, float]) -> dict[str, float]:
    """A record's figures under their names in TensorBoard: what matters most first, then all of them by groups."""
    first = {overview_tag(name): record[name] for name in TENSORBOARD_FIRST if name in record}
    groups = TENSORBOARD_GROUPS.items()
    return first | {f"{group}/{name}": record[name] for group, names in groups for name in names if name in record}


def overview_tag(name: str) -> str:
    """The name in TensorBoard's first group of a figure that is one of the first, or of a picture, after them."""
    places = {known: place for place, known in enumerate(TENSORBOARD_FIRST, 1)}
    return f"{OVERVIEW}/{places.get(name, len(places) + 1)}_{name}"


def memory_gib(device: torch.device) -> float:
    """Peak memory: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def measure_matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of square matrix products on this device, the best of a few (about a second on a CPU).

    A CPU begins with small ones, and goes on as long as the next take no more than `LONGEST_PRODUCT`: without
    instructions for bfloat16 one of 2048 takes half a minute.
    """
    if device.type == "cuda":
        return 2 * size**3 / _product_seconds(device, dtype, size, 20)
    side, best = min(SMALL_PRODUCT, size), 0.0
    while True:
        seconds = _product_seconds(device, dtype, side, 1)
        best = max(best, 2 * side**3 / seconds)
        if side == size or 8 * seconds > LONGEST_PRODUCT:
            return best
        side = min(2 * side, size)


def _product_seconds(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
    """How long a product of two matrices takes, at best."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        wait_for(device)
        begin = time.perf_counter()
        for _ in range(repeats):
            a @ b
        wait_for(device)
        best = min(best, (time.perf_counter() - begin) / repeats)
    return best


def wait_for(device: torch.device) -> None:
    """Let the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
