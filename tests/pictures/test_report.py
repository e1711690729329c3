"""Reports: figures from what a run wrote."""

import json
from pathlib import Path

import pytest
from PIL import Image

from fasthpm.errors import UserError
from fasthpm.pictures import report
from fasthpm.run import records as run_records
from tests.helpers.reports import written_run


def test_report_tells_first_last_and_gain(tmp_path: Path) -> None:
    run = written_run(tmp_path)
    assert [record["loss"] for record in run_records.read_metrics(run)] == [9.0, 7.5, 7.0]
    for weights, best in (("untrained", 60.0), ("student", 77.5)):
        result = {"weights": weights, "pool": "mean", "bank_size": 1000, "accuracy": {"10": best, "20": 50.0}}
        (run / f"knn_{weights}_mean.json").write_text(json.dumps(result))
    text = report.write(run).read_text()
    assert "| loss | 9 | 7 |" in text
    assert "| 1,000 | student | mean | 77.50 | 50.00 |" in text
    assert "+17.50 points over the untrained encoder with 1,000 labelled" in text
    with Image.open(run / "curves.png") as curves:
        assert curves.size == (1200, 600)


def test_report_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl is missing"):
        report.write(tmp_path)
