"""A journal that goes on from an update: what belongs to it stays, what came after it is written anew, once."""

import json
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fasthpm.run.journal import Journal
from fasthpm.run.records import METRICS_FILE, append_line, cut_records, read_records
from tests.helpers.disk import fill


def write(journal: Journal, *steps: int, loss: float = 0.0) -> None:
    for step in steps:
        journal.write(step, step / 8, {"loss": loss or step}, {"loss/loss": loss or step})
        if step % 4 == 0:
            journal.image("panel", np.zeros((4, 4, 3), np.uint8), step)


def journal_of(folder: Path, done: int) -> Journal:
    return Journal(folder, "train", rank=0, total_steps=16, first_step=done)


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / METRICS_FILE).read_text().splitlines()]


@pytest.mark.parametrize("done", [0, 4, 6, 8])
def test_no_step_is_lost_or_doubled(tmp_path: Path, done: int) -> None:
    """Killed after update 8, whatever checkpoint it goes on from; and after that once more."""
    for begin in (0, done, done):
        journal = journal_of(tmp_path, begin)
        write(journal, *range(begin + 2, 10, 2))
        journal.close()
    assert steps_of(tmp_path) == [2, 4, 6, 8]
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert [event.step for event in board.Scalars("loss/loss")] == [2, 4, 6, 8]
    assert [event.step for event in board.Images("panel")] == [4, 8]


def test_a_rollback_in_the_run_cuts_as_a_resume_does(tmp_path: Path) -> None:
    journal = journal_of(tmp_path, 0)
    write(journal, 2, 4, 6)
    journal.rewind(4)
    assert steps_of(tmp_path) == [2, 4]
    write(journal, 6, 8, loss=0.5)
    journal.close()
    assert steps_of(tmp_path) == [2, 4, 6, 8]
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss/loss")] == [(2, 2), (4, 4), (6, 0.5), (8, 0.5)]


def test_records_that_older_runs_doubled_are_kept_once(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    cut_records(path, 4)
    assert not path.exists()
    for line in (
        '{"step": 2, "loss": 1}',
        '{"step": 4, "loss": 2}',
        '{"step": 4, "loss": 3}',
        "7",
        '{"step": 9}',
        '{"st',
    ):
        append_line(path, line)
    cut_records(path, 4)
    assert [(record["step"], record["loss"]) for record in read_records(path)] == [(2, 1), (4, 3)]
    before = path.stat().st_mtime_ns
    cut_records(path, 4)
    assert path.stat().st_mtime_ns == before


def test_a_full_disk_cuts_nothing_and_ends_nothing(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(journal := journal_of(small_disk, 0), 2, 4, 6)
    journal.close()
    fill(small_disk)
    journal_of(small_disk, 4).close()
    assert steps_of(small_disk) == [2, 4, 6]
    assert "training goes on" in capsys.readouterr().err
