"""A source of small images that misbehaves where it is told to."""

import os
import signal
import time
from pathlib import Path

import numpy as np

from data_prep import writer
from data_prep.encode import WriteOptions
from data_prep.plan import Output
from tests.helpers.data_fixtures import picture

CLASSES = ["x"]


class Numbers:
    """A source of small images that misbehaves at sample `at`, once, if told to."""

    def __init__(self, folder: Path, what: str = "", count: int = 40, at: int = 20) -> None:
        self.folder, self.what, self.count, self.at = folder, what, count, at

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> tuple[np.ndarray, int]:
        if index == self.at and self.what:
            getattr(self, self.what)()
        return np.asarray(picture(index, (20, 24))), 0

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def starve(self) -> None:
        raise MemoryError

    def hang(self) -> None:
        (self.folder / f"hanging-{os.getpid()}").touch()
        time.sleep(120)

    def name(self, index: int) -> str:
        return f"{index}.png"

    where = name

    def fingerprint(self) -> str:
        return f"{self.count} numbers"


def run(source: Numbers, out: Path, workers: int = 2, **flags: object) -> dict | None:
    """`prepare` in listed order, into one file."""
    outputs = [Output(out, np.arange(len(source)))]
    options = WriteOptions(max_resolution=500, jpeg_quality=flags.pop("jpeg_quality", 90))
    return writer.prepare(source, out, CLASSES, outputs, options=options, num_workers=workers, **flags)
