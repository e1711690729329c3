"""Metrics: summed on the device, read every N updates, written to TensorBoard, metrics.jsonl and a progress bar.

MFU is model FLOPs per second (the rule is in `fasthpm.flops`, teacher included) over the matmul rate that this device
reaches on 2048 x 2048 squares in the run's dtype, measured when the run starts.
"""

import collections
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from fasthpm import engine
from fasthpm.data import Batch
from fasthpm.errors import UserError
from fasthpm.step import METRICS, StepOutput

FORENSICS = "nonfinite"
TENSORBOARD_GROUPS = {
    "loss": ("loss", "reconstruction_loss", "difficulty_loss"),
    "predictor": ("spearman", "pair_accuracy", "teacher_spearman"),
    "schedule": ("lr", "alpha", "ema_momentum", "grad_norm"),
    "data": ("bad_samples",),
    "probe": ("probe_accuracy", "probe_loss", "knn_accuracy"),
    "speed": ("images_per_second", "data_wait_percent", "teacher_percent", "mfu_percent", "memory_gib"),
}


class Metrics:
    """Everything a run measures, between two readings.

    - `flops_per_sample`: of a whole step; `matmul_rate`: FLOP/s of this rank's device
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
    ) -> None:
        self.output_dir, self.rank, self.world_size, self.device = output_dir, rank, world_size, device
        self.flops_per_sample, self.matmul_rate = flops_per_sample, matmul_rate
        self._recent: collections.deque[tuple[int, Tensor, Tensor, Tensor]] = collections.deque()
        self._sum = torch.zeros(len(METRICS), device=device)
        self._count = self._samples = 0
        self.restart()
        self._writer: Any = None
        self.progress = tqdm(
            total=total_steps,
            initial=first_step,
            disable=rank != 0,
            unit="step",
            mininterval=1.0,
            smoothing=0.1,
            dynamic_ncols=True,
            desc="pretrain",
        )
        self._first_step, self._disk_failed = first_step, False
        self._open_writer()

    def add(self, step: int, batch: Batch, output: StepOutput) -> None:
        """Take in one micro-step, without waiting for it."""
        self._sum = self._sum + output.metrics
        self._count += 1
        self._samples += len(batch.ids)
        self._recent.append((step, batch.ids, output.mask, output.metrics))

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Measure the time that this host waits for its loader."""
        begin = time.perf_counter()
        yield
        self._data_wait += time.perf_counter() - begin

    def read(self, step: int, epoch: float, teacher_seconds: float, **values: float) -> dict[str, float]:
        """Average over ranks and micro-steps since the last reading, write it everywhere, start afresh.

        Every rank calls this after the same update. **Raises:** `UserError` on every rank if any loss was not finite,
        after saving step, sample ids, losses and masks of the offending micro-steps under `nonfinite/`.
        """
        sums = torch.cat([self._sum.double(), self._sum.new_tensor([self._count, self._samples]).double()])
        dist.all_reduce(sums)
        *means, count, samples = sums.tolist()  # the host waits for the device here, and only here
        seconds = time.perf_counter() - self._begin
        if not all(x == x and abs(x) != float("inf") for x in means):
            self._stop(step)
        rate = samples / seconds
        record = (
            {name: value / count for name, value in zip(METRICS, means, strict=True)}
            | values
            | {
                "images_per_second": rate,
                "data_wait_percent": 100 * self._data_wait / seconds,
                "teacher_percent": 100 * teacher_seconds / seconds,
                "mfu_percent": 100 * rate * self.flops_per_sample / (self.matmul_rate * self.world_size),
                "memory_gib": memory_gib(self.device),
            }
        )
        self._write(step, epoch, record)
        self.restart()
        return record

    def image(self, tag: str, picture: Any, step: int) -> None:
        """Add a picture [H, W, 3] uint8 to TensorBoard (rank 0)."""
        if self.rank == 0:
            with self.surviving_the_disk(step):
                self._open_writer()
                self._writer.add_image(tag, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close all files."""
        self.progress.close()
        if self._writer:
            with self.surviving_the_disk(self.progress.n):
                self._writer.close()

    @contextmanager
    def surviving_the_disk(self, step: int) -> Iterator[None]:
        """Log what a disk did not take, once until it takes something again, and let training go on."""
        try:
            yield
        except OSError as error:
            self._writer = None  # TensorBoard's has ended with its error; the next writing opens another
            if not self._disk_failed:
                self.progress.write(
                    f"warning: metrics of update {step} were not written ({error.strerror}); training goes on",
                    file=sys.stderr,
                )
            self._disk_failed = True
        else:
            self._disk_failed = False

    def _open_writer(self) -> None:
        if self.rank == 0 and self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.output_dir / "tensorboard"), purge_step=self._first_step)

    def restart(self) -> None:
        """Start the sums and the clock anew, so that time spent on pictures and checkpoints is not counted."""
        self._sum = torch.zeros(len(METRICS), device=self.device)
        self._count = self._samples = 0
        self._data_wait = 0.0
        self._begin = time.perf_counter()
        self._recent.clear()

    def _write(self, step: int, epoch: float, record: dict[str, float]) -> None:
        if self.rank:
            return
        self._first_step = step
        with self.surviving_the_disk(step):
            with (self.output_dir / "metrics.jsonl").open("a") as log:
                log.write(json.dumps({"step": step, "epoch": epoch, "time": time.time(), **record}) + "\n")
            self._open_writer()
            for group, names in TENSORBOARD_GROUPS.items():
                for name in names:
                    if name in record:
                        self._writer.add_scalar(f"{group}/{name}", record[name], step)
        self.progress.set_postfix(
            loss=f"{record['loss']:.3f}",
            img_s=f"{record['images_per_second']:.0f}",
            wait=f"{record['data_wait_percent']:.0f}%",
        )

    def _stop(self, step: int) -> None:
        """Save what is needed to look at a non-finite loss, then end this rank; all ranks come here together."""
        folder = self.output_dir / FORENSICS
        folder.mkdir(exist_ok=True)
        bad = [
            {"step": when, "ids": ids.cpu(), "mask": mask.cpu(), "metrics": values.cpu()}
            for when, ids, mask, values in self._recent
            if not torch.isfinite(values).all()
        ]
        torch.save({"metrics": METRICS, "micro_steps": bad}, folder / f"rank{self.rank}.pt")
        engine.agree(
            UserError(
                f"the loss is not finite by update {step}; step, sample ids and masks are in {folder}; look at these "
                f"samples, lower --blr, or resume from the last checkpoint"
            )
        )


def memory_gib(device: torch.device) -> float:
    """Peak memory: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def measure_matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of square matrix products on this device, the best of a few (about half a second on a CPU)."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        wait_for(device)
        begin = time.perf_counter()
        for _ in range(20 if device.type == "cuda" else 1):
            a @ b
        wait_for(device)
        best = min(best, (time.perf_counter() - begin) / (20 if device.type == "cuda" else 1))
    return 2 * size**3 / best


def wait_for(device: torch.device) -> None:
    """Let the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
