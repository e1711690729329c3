"""Ranks that die of a signal are named, by their number and with the signal; those that end by themselves are not.

The ranks run this file too (`main`).
"""

import os
import re
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from fasthpm.cli import run_rank
from fasthpm.ranks import agreement, launch, witness
from fasthpm.ranks.watchdog import Watchdog
from tests.helpers.launch import run_ranks


def main(_: object = None) -> None:
    """Rank 1 ends in the way that is asked for, while rank 0 waits for it."""
    folder, way = Path(sys.argv[-2]), sys.argv[-1]
    with launch.session() as here, Watchdog(folder, here.rank, 2, timeout=1.0) as watchdog:
        watchdog.progressed(12)
        time.sleep(0.5)  # a note is written
        if here.rank == 1:
            if way.isdecimal():
                os.kill(os.getpid(), int(way))
            if way == "raise":
                raise ValueError("odd")
            if way == "leave":
                os._exit(1)
        with agreement.naming_lost_ranks(lambda: "after update 12"):
            dist.barrier()


@pytest.mark.parametrize(
    ("way", "words"),
    [
        (signal.SIGABRT, "native code gave up, NCCL for example"),
        (signal.SIGKILL, "the system took it, as it does where memory is short"),
        (signal.SIGSEGV, "native code crashed"),
    ],
)
def test_a_rank_that_dies_of_a_signal_is_named(tmp_path: Path, way: signal.Signals, words: str) -> None:
    finished = run_ranks(Path(__file__), tmp_path, int(way), launcher="forked")
    assert finished.status == -way
    found = re.findall(
        r"fasthpm: error: rank (\d) \(process \d+ on .+\) died of (\w+) without a word .*", finished.output
    )
    assert found == [("1", way.name)]
    assert f"(its last note is of update 12, step): {words}" in finished.output
    assert "fasthpm: error: rank 0 lost another rank after update 12" in finished.output


@pytest.mark.parametrize(("way", "status"), [("raise", 1), ("leave", 1), ("well", 0), (int(signal.SIGTERM), -15)])
def test_a_rank_that_ends_by_itself_or_is_told_to_is_not(tmp_path: Path, way: object, status: int) -> None:
    finished = run_ranks(Path(__file__), tmp_path, way, launcher="forked")
    assert finished.status == status
    assert "without a word" not in finished.output
    left = [process for process in psutil.process_iter(["cmdline"]) if str(tmp_path) in (process.info["cmdline"] or ())]
    assert left == []


def test_the_witness_leaves_with_the_watchdog(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 2, timeout=5.0) as watchdog:
        process = watchdog._witness
        assert process is not None
        assert process.poll() is None
    assert process.poll() == 0
    with Watchdog(tmp_path, 0, 1, timeout=5.0) as watchdog:
        assert watchdog._witness is None  # a rank alone is named by its shell


def test_a_rank_whose_end_nobody_can_see_any_more_is_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launcher has asked for its status; what it held is closed."""
    reading, writing = os.pipe()
    os.close(writing)
    standard = os.dup(0)
    os.dup2(reading, 0)
    try:
        line = witness.watch(3, 2**22 + 1, tmp_path / "none.json")
    finally:
        os.dup2(standard, 0)
    assert re.match(
        r"fasthpm: error: rank 3 \(process 4194305 on .*\) died without a word \(it had noted nothing", line
    )


if __name__ == "__main__":
    run_rank(main)
