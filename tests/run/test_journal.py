"""Lines that wait until a full disk takes them; curves that tell something, the most important first."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fasthpm.run.journal import Journal
from fasthpm.run.metrics import OVERVIEW, TENSORBOARD_GROUPS, overview_tag, tags_of
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


def test_only_zeros_make_no_curve(tmp_path: Path) -> None:
    """What begins to be something else begins with its last zero; then zeros count."""
    journal = Journal(tmp_path, "train", rank=0, total_steps=5, first_step=0)
    for step, value in enumerate((0.0, 0.0, 3.0, 0.0), 1):
        journal.write(step, 0.0, {"a": value, "b": 0.0}, {"health/a": value, "data/b": 0.0, "loss/loss": 1.0})
    journal.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Tags()["scalars"] == ["loss/loss", "health/a"]
    assert [(event.step, event.value) for event in board.Scalars("health/a")] == [(2, 0.0), (3, 3.0), (4, 0.0)]
    assert len(read_records(tmp_path / METRICS_FILE)) == 4  # all are in the file


def test_what_matters_most_sorts_first() -> None:
    names = [name for group in TENSORBOARD_GROUPS.values() for name in group]
    tags = sorted([*tags_of(dict.fromkeys(names, 1.0)), overview_tag("panel")])
    first = [tag for tag in tags if tag.startswith(OVERVIEW)]
    assert tags[: len(first)] == first
    assert [tag.rpartition("_")[0].partition("/")[2][:1] for tag in first] == list("1234")
    assert first[0] == f"{OVERVIEW}/1_loss"
    assert first[-1] == f"{OVERVIEW}/4_panel"
