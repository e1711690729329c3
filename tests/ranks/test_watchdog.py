"""Who is to blame when no rank goes on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fasthpm.ranks.watchdog import EXIT_STUCK, FOLDER, Watchdog, blame
from tests.helpers.launch import ROOT


def note(update: int, phase: str = "step", time: float = 100.0, *, waits: bool = True) -> dict[str, object]:
    return {"update": update, "phase": phase, "waits": waits, "time": time}


NOBODY = "all ranks wait for each other in the same step; is the network between them down?"


@pytest.mark.parametrize(
    ("notes", "expected"),
    [
        ({0: note(5), 1: note(5, time=10.0), 2: note(5)}, "rank 1 (update 5) gave no sign of life"),
        ({0: note(5), 1: {}}, "rank 1 (update ?) gave no sign of life"),
        ({0: note(5), 1: note(5, "loading data", waits=False)}, "rank 1 (update 5) still busy with loading data"),
        (
            {0: note(5), 1: note(4, waits=False), 2: note(4, waits=False)},
            "ranks 1 (update 4), 2 (update 4) behind the others",
        ),
        ({0: note(5), 1: note(5, waits=False)}, "rank 1 (update 5) behind the others"),
        ({0: note(5, waits=False)}, "the step does not end; if it needs longer, set FASTHPM_TIMEOUT_MINUTES"),
        ({0: note(5), 1: note(5)}, NOBODY),
        ({0: note(5, waits=False), 1: note(5, waits=False)}, NOBODY),  # NCCL's waiting does not show
        ({0: note(5, "saving"), 1: note(5, "saving")}, NOBODY),  # the network went down while they agreed on a save
        ({0: note(5, "saving"), 1: note(6)}, NOBODY),  # one of them had heard of the other
        (
            {0: note(5, "saving"), 1: note(5, "loading data", waits=False)},
            "rank 1 (update 5) still busy with loading data",
        ),
        ({0: note(5, "a"), 1: note(5, "b", 10.0)}, "rank 1 (update 5) gave no sign of life"),
    ],
)
def test_blame(notes: dict[int, dict[str, object]], expected: str) -> None:
    assert blame(notes, now=101.0, silent_after=30.0) == expected


def test_a_rank_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, 0, 1, timeout=0.5)
    with watchdog:
        for update in range(8):
            watchdog.progressed(update)
            with watchdog.doing("drawing"):
                time.sleep(0.15)
        assert json.loads((tmp_path / FOLDER / "rank-00000.json").read_text())["phase"] == "drawing"
    assert not list((tmp_path / FOLDER).iterdir())


def test_what_takes_longer_may(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 1, timeout=0.3) as watchdog:
        with watchdog.doing("compiling", timeout=30):
            time.sleep(0.8)
        time.sleep(0.15)  # counted from here


def test_a_rank_that_hangs_ends(tmp_path: Path) -> None:
    program = (
        "import time; from pathlib import Path; from fasthpm.ranks.watchdog import Watchdog\n"
        f"with Watchdog(Path({str(tmp_path)!r}), 0, 1, timeout=0.5) as w:\n"
        "    w.progressed(7)\n"
        "    with w.doing('loading data'):\n"
        "        time.sleep(60)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )
    assert finished.returncode == EXIT_STUCK
    assert "no update for 0.5 s after update 7: rank 0 (update 7) still busy with loading data" in finished.stderr


def test_the_time_in_which_a_run_is_stopped_does_not_count(tmp_path: Path) -> None:
    program = (
        "import time; from pathlib import Path; from fasthpm.ranks.watchdog import Watchdog\n"
        f"with Watchdog(Path({str(tmp_path)!r}), 0, 1, timeout=2.0) as w:\n"
        "    print('begun', flush=True)\n"
        "    for _ in range(12):\n"
        "        time.sleep(0.1)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, errors


PAIR = """
import sys, time
from pathlib import Path
import torch, torch.distributed as dist
from fasthpm.ranks.watchdog import Watchdog
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
with Watchdog(folder, rank, 2, timeout=2.0 + 3 * rank) as watchdog:
    watchdog.progressed(7)
    with watchdog.doing("drawing" if rank else "saving"):
        if rank:
            time.sleep(60)
        dist.all_reduce(torch.zeros(1))
"""


def test_a_rank_that_only_waits_is_not_blamed_for_what_it_was_about_to_do(tmp_path: Path) -> None:
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", PAIR, str(tmp_path), str(rank)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    try:
        _, errors = pair[0].communicate(timeout=60)
    finally:
        for process in pair:
            process.kill()
    pair[1].communicate(timeout=60)
    assert pair[0].returncode == EXIT_STUCK
    assert "no update for 2 s after update 7: rank 1 (update 7) still busy with drawing;" in errors
