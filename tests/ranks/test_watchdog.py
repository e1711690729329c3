"""Who is to blame when no rank goes on."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fasthpm.ranks.watchdog import EXIT_STUCK, FOLDER, Watchdog, blame
from tests.helpers.launch import ROOT


def note(update: int, phase: str = "step", time: float = 100.0) -> dict[str, object]:
    return {"update": update, "phase": phase, "time": time}


@pytest.mark.parametrize(
    ("notes", "expected"),
    [
        ({0: note(5), 1: note(5, time=10.0), 2: note(5)}, "rank 1 (update 5) gave no sign of life"),
        ({0: note(5), 1: {}}, "rank 1 (update ?) gave no sign of life"),
        ({0: note(5), 1: note(5, "loading data")}, "rank 1 (update 5) still busy with loading data"),
        ({0: note(5), 1: note(4), 2: note(4)}, "ranks 1 (update 4), 2 (update 4) behind the others"),
        ({0: note(5), 1: note(5)}, "all ranks wait for each other in the same step; is the network between them down?"),
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
