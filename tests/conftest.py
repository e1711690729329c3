"""Settings and fixtures that every test process and whatever it starts share."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.disk import mounted

# Idle OpenMP threads that spin would take the cores from the tests that run beside them. Set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Several workers share the cores: each computes with its share, and launches nothing that takes more.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(workers))))
# A shell's background jobs ignore Ctrl-C, and hand that down; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB."""
    with mounted(tmp_path / "disk", 48) as folder:
        yield folder
