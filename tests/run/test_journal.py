"""Lines that wait until a full disk takes them."""

from pathlib import Path

import pytest

from fasthpm.run.journal import Journal
from fasthpm.run.records import METRICS_FILE, read_records
from tests.helpers.disk import fill


def test_a_journal_keeps_what_a_full_disk_did_not_take(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(small_disk, "train", rank=0, total_steps=4, first_step=0)
    journal.write(1, 0.1, {"loss": 1.0}, {})
    fill(small_disk)
    long = {"loss": 2.0, **{f"figure_{number}": 1 / 3 for number in range(200)}}
    for step in (2, 3):
        journal.write(step, 0.1, long, {})
    assert [record["step"] for record in read_records(small_disk / METRICS_FILE)] == [1]
    (small_disk / "filler").unlink()
    journal.write(4, 0.1, {"loss": 3.0}, {"loss": 3.0})
    journal.close()
    assert [record["step"] for record in read_records(small_disk / METRICS_FILE)] == [1, 2, 3, 4]
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: metrics of update 2 could not be written (No space left on device); training goes on"]
