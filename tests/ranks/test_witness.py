"""Ranks that die of a signal are named, by their number and with the signal; those that end by themselves are not.

The ranks run this file too (`main`).
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from fasthpm.cli import run_rank
from fasthpm.ranks import agreement, launch, witness
from fasthpm.ranks.watchdog import FOLDER, Watchdog
from tests.helpers.launch import run_ranks


def main(_: object = None) -> None:
    """Rank 1 ends in the way that is asked for, while rank 0 waits for it, and then for its witness."""
    folder, way = Path(sys.argv[-2]), sys.argv[-1]
    if os.environ["RANK"] == "0":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which the launcher ends this one when the other has ended
    with launch.session() as here, Watchdog(folder, here.rank, 2, timeout=1.0 if here.rank else 60.0) as watchdog:
        watchdog.progressed(12)
        time.sleep(0.5)  # a note of rank 1 is written
        if here.rank == 1:
            if way.isdecimal():
                os.kill(os.getpid(), int(way))
            if way == "raise":
                raise ValueError("odd")
        try:
            with agreement.naming_lost_ranks(lambda: "after update 12"):
                dist.barrier()
        finally:
            while here.rank == 0 and witnesses(folder / FOLDER / "rank-00001.json"):
                time.sleep(0.05)


def witnesses(word: Path) -> list[psutil.Process]:
    """Processes whose command line holds `word`."""
    return [one for one in psutil.process_iter(["cmdline"]) if str(word) in (one.info["cmdline"] or ())]


def test_a_rank_that_dies_of_a_signal_is_named(tmp_path: Path) -> None:
    finished = run_ranks(Path(__file__), tmp_path, int(signal.SIGABRT), launcher="forked")
    assert finished.status == -signal.SIGABRT
    found = re.findall(r"fasthpm: error: rank (\d) \(process \d+ on .+\) died .*without a word (.*)", finished.output)
    assert len(found) == 1, finished.output
    assert found[0][0] == "1"
    assert found[0][1].startswith("(its last note is of update 12, step): ")
    assert "fasthpm: error: rank 0 lost another rank after update 12" in finished.output


@pytest.mark.parametrize(("way", "status"), [("raise", 1), ("well", 0)])
def test_a_rank_that_ends_by_itself_is_not(tmp_path: Path, way: str, status: int) -> None:
    finished = run_ranks(Path(__file__), tmp_path, way, launcher="forked")
    assert finished.status == status
    assert "without a word" not in finished.output


def said_of(ending: str, tmp_path: Path, *, goodbye: bytes = b"") -> str:
    """What the witness says of a shell that ends so."""
    reading, writing = os.pipe()
    with subprocess.Popen(["/bin/sh", "-c", ending]) as process:
        os.write(writing, goodbye)
        os.close(writing)
        (tmp_path / "note").write_text('{"update": 12, "phase": "step"}')
        line = witness.watch(3, process.pid, tmp_path / "note", reading)  # nobody has waited for it yet
        assert not line or f"rank 3 (process {process.pid} on " in line
    os.close(reading)
    return line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ABRT", "native code gave up, NCCL for example"),
        ("KILL", "the system took it, as it does where memory is short"),
        ("SEGV", "native code crashed"),
    ],
)
def test_the_signal_is_named(tmp_path: Path, name: str, words: str) -> None:
    line = said_of(f"kill -{name} $$", tmp_path)
    assert f"died of SIG{name} without a word (its last note is of update 12, step): {words}" in line


def test_who_is_told_to_end_or_says_goodbye_is_not(tmp_path: Path) -> None:
    for ending in ("kill -TERM $$", "kill -INT $$", "exit 1", "exit 0"):
        assert said_of(ending, tmp_path) == ""
    assert said_of("kill -ABRT $$", tmp_path, goodbye=witness.GOODBYE) == ""


@pytest.mark.parametrize(("age", "name", "said"), [(-5, "KILL", False), (3600, "KILL", True), (-5, "ABRT", True)])
def test_who_is_killed_after_another_rank_has_failed_is_not(tmp_path: Path, age: float, name: str, said: bool) -> None:
    """By a launcher; an older run's mark means nothing."""
    mark, then = tmp_path / f"rank-00000{witness.ENDED}", time.time() - age
    mark.touch()
    os.utime(mark, (then, then))
    assert bool(said_of(f"kill -{name} $$", tmp_path)) == said


def test_a_rank_that_fails_leaves_its_mark_and_one_that_ends_well_none(tmp_path: Path) -> None:
    mark = tmp_path / FOLDER / f"rank-00000{witness.ENDED}"
    with pytest.raises(ValueError, match="odd"), Watchdog(tmp_path, 0, 2, timeout=5.0):
        raise ValueError("odd")
    assert mark.exists()
    with Watchdog(tmp_path, 0, 2, timeout=5.0):
        assert not mark.exists()
    assert not mark.exists()


def test_the_witness_leaves_with_the_watchdog(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 2, timeout=5.0) as watchdog:
        process = watchdog._witness
        assert process is not None
        assert process.poll() is None
    assert process.poll() == 0
    with Watchdog(tmp_path, 0, 1, timeout=5.0) as watchdog:
        assert watchdog._witness is None  # a rank alone is named by its shell


def test_a_rank_whose_end_nobody_can_see_any_more_is_named_too(tmp_path: Path) -> None:
    """Its launcher has asked for its status, and a child of it holds the pipe."""
    reading, writing = os.pipe()
    line = witness.watch(3, 2**22 + 1, tmp_path / "none.json", reading)
    os.close(reading)
    os.close(writing)
    assert re.match(
        r"fasthpm: error: rank 3 \(process 4194305 on .*\) died without a word \(it had noted nothing", line
    )


if __name__ == "__main__":
    run_rank(main)
