"""What a training tells while it runs: metrics.jsonl, TensorBoard, a progress bar. A full disk costs it a warning."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fasthpm.errors import warn
from fasthpm.run.records import METRICS_FILE, append_line, cut_records


class Journal:
    """Written by rank 0; the other ranks write nothing.

    - `name`: what the progress bar calls it; `first_step`: updates that are done already, of `total_steps`
    """

    def __init__(self, output_dir: Path, name: str, *, rank: int, total_steps: int, first_step: int) -> None:
        self.output_dir, self.rank = output_dir, rank
        self.progress = tqdm(
            total=total_steps,
            initial=first_step,
            disable=rank != 0,
            unit="step",
            mininterval=1.0,
            smoothing=0.1,
            dynamic_ncols=True,
            desc=name,
        )
        self._first_step, self._disk_failed = first_step, False
        self._unwritten: list[str] = []  # lines that the disk has not taken yet
        self._shown: set[str] = set()  # figures that TensorBoard has; those that were zero so far, and when last
        self._zeros: dict[str, int] = {}
        self._writer: Any = None
        self._open(first_step)

    def write(self, step: int, epoch: float, record: dict[str, float], scalars: dict[str, float]) -> None:
        """A record for metrics.jsonl, and `scalars` by their names in TensorBoard, after update `step`."""
        if self.rank:
            return
        self._first_step = step
        self._unwritten.append(json.dumps({"step": step, "epoch": epoch, "time": time.time(), **record}))
        with self.surviving_the_disk(step):
            self._write_lines()
            with self._tensorboard() as writer:
                for name, value, when in self._told_of(scalars, step):
                    writer.add_scalar(name, value, when)

    def _told_of(self, scalars: dict[str, float], step: int) -> Iterator[tuple[str, float, int]]:
        """(name, value, update) of what is worth a curve: a figure begins with its last zero before it was another."""
        for name, value in scalars.items():
            if name not in self._shown and value == 0:
                self._zeros[name] = step
                continue
            self._shown.add(name)
            if name in self._zeros:
                yield name, 0.0, self._zeros.pop(name)
            yield name, value, step

    def image(self, tag: str, picture: Any, step: int) -> None:
        """Add a picture [H, W, 3] uint8 to TensorBoard (rank 0)."""
        if self.rank == 0:
            with self.surviving_the_disk(step), self._tensorboard() as writer:
                writer.add_image(tag, picture, step, dataformats="HWC")

    def animation(self, tag: str, gif: bytes, step: int) -> None:
        """Add a GIF to TensorBoard's images (rank 0), which shows it moving."""
        if self.rank == 0:
            from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

            image = Summary.Image(encoded_image_string=gif)
            with self.surviving_the_disk(step), self._tensorboard() as writer:
                writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def say(self, line: str) -> None:
        """A line on stderr that leaves the progress bar whole."""
        self.progress.write(line, file=sys.stderr)

    def rewind(self, step: int) -> None:
        """Go back to update `step`: what was written of later ones will be written anew."""
        self.progress.n = self._first_step = step
        self.progress.refresh()
        self._zeros.clear()
        self._close_writer()
        self._open(step)

    def close(self) -> None:
        """Flush and close all files."""
        self.progress.close()
        with self.surviving_the_disk(self.progress.n):
            self._write_lines()
        self._close_writer()

    @contextmanager
    def surviving_the_disk(self, step: int, what: str = "metrics") -> Iterator[None]:
        """Warn of what a disk did not take, once until it takes something again, and let training go on."""
        try:
            yield
        except OSError as error:
            if not self._disk_failed:
                warn(f"{what} of update {step} could not be written ({error.strerror or error}); training goes on")
            self._disk_failed = True
        else:
            self._disk_failed = False

    def _write_lines(self) -> None:
        while self._unwritten:
            append_line(self.output_dir / METRICS_FILE, self._unwritten[0])
            del self._unwritten[0]

    @contextmanager
    def _tensorboard(self) -> Iterator[Any]:
        """TensorBoard's writer, a new one if the last has ended with an error."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # What belongs to the step itself stays: only what a run wrote after it will be written again.
            purge = self._first_step + 1 if self._first_step else 0
            self._writer = SummaryWriter(str(self.output_dir / "tensorboard"), purge_step=purge)
        try:
            yield self._writer
        except OSError:
            self._writer = None
            raise

    def _open(self, step: int) -> None:
        if self.rank == 0:
            self._unwritten = [line for line in self._unwritten if json.loads(line)["step"] <= step]
            with self.surviving_the_disk(step):
                cut_records(self.output_dir / METRICS_FILE, step)
                with self._tensorboard():
                    pass

    def _close_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer:
            with self.surviving_the_disk(self.progress.n):
                writer.close()
