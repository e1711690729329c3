"""A few rounds of `torture.py`; fifty are for an evening."""

from pathlib import Path

from tests.helpers import torture

PICO = "hpm_vit_pico_patch4_28"


def test_three_rounds_leave_no_difference(tmp_path: Path) -> None:
    plan = torture.Torture(tmp_path, updates=48, launcher="forked", longest_wait=0.25, model=PICO)
    report = torture.torture(plan, rounds=3, seed=1)
    assert report["differences"] == 0
    assert report["finished"]
    assert report["rounds"] >= 1
    assert all(round["status"] != 0 or round["left_at"] == plan.updates for round in report["history"])
