"""metrics.jsonl: what is appended is read again, whatever a kill or a full disk left in between."""

import json
from pathlib import Path

import pytest

from fasthpm.errors import UserError
from fasthpm.run.records import METRICS_FILE, append_line, gpu_hours, latest, read_metrics, read_records
from tests.helpers.disk import fill


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_the_last_record_of_an_update_counts_and_unfinished_lines_do_not(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    assert read_records(path) == []
    with pytest.raises(UserError, match="is missing; expected the output_dir of a run"):
        read_metrics(tmp_path)
    path.write_text('{"step": 2, "lo')
    with pytest.raises(UserError, match="is empty; expected at least one record"):
        read_metrics(tmp_path)
    for step, loss in ((2, 0.5), (4, 0.4), (3, 0.3), (2, 0.2)):
        append_line(path, json.dumps({"step": step, "loss": loss}))
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(2, 0.2), (3, 0.3), (4, 0.4)]
    assert lines(path)[:2] == ['{"step": 2, "lo', '{"step": 2, "loss": 0.5}']


def test_the_latest_record_of_a_figure_that_not_all_have() -> None:
    records = [{"step": 1, "auc": 0.1}, {"step": 2, "auc": 0.2}, {"step": 3, "loss": 1.0}]
    assert latest(records, "auc") == latest(records, "auc", 2) == records[1]
    assert latest(records, "auc", 1) == records[0]
    assert latest(records, "auc", 0) == latest(records, "spearman") == {}


def test_a_line_that_the_disk_does_not_take_leaves_the_file_as_it_was(small_disk: Path) -> None:
    path = small_disk / "log"
    append_line(path, "first")
    fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        append_line(path, "x" * 10_000)
    assert path.read_text() == "first\n"
    (small_disk / "filler").unlink()
    append_line(path, "second")
    assert lines(path) == ["first", "second"]


def test_gpu_hours_count_work_and_no_pauses() -> None:
    records = [{"step": 100, "images_per_second": 1.0}, {"step": 300, "images_per_second": 4.0}]
    assert gpu_hours(records, 36, 2) == pytest.approx([2.0, 3.0])
    assert gpu_hours([{"step": 5}], 36, 2) == [0.0]
