"""A few rounds of `torture.py`; fifty are for an evening."""

from pathlib import Path

import torture


def test_three_rounds_leave_no_difference(tmp_path: Path) -> None:
    report = torture.torture(tmp_path, rounds=3, seed=1, updates=160)
    assert report["differences"] == 0
    assert report["finished"]
    assert report["rounds"] >= 1
    assert all(round["status"] != 0 or round["left_at"] == 160 for round in report["history"])
