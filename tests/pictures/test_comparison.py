"""Several runs in one report."""

import json
from pathlib import Path

import pytest
from PIL import Image

from fasthpm.errors import UserError
from fasthpm.pictures import report
from tests.helpers.reports import written_run


def test_runs_are_compared_over_epochs_and_gpu_hours(tmp_path: Path) -> None:
    for name, best in (("one", 70.0), ("two", 75.0)):
        (tmp_path / name).mkdir()
        run = written_run(tmp_path / name)
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:-1]]
        del records[-1]["difficulty_auc"]
        records[-2]["difficulty_auc"] = 0.25  # measured before the last reading
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
        knn = {"protocol": "DINO weighted k-NN, t", "weights": "student", "accuracy": {"10": best, "20": 5.0}}
        (run / "knn_student_cls.json").write_text(json.dumps(knn))
    (tmp_path / "two" / "linear").mkdir()
    (tmp_path / "two" / "linear" / "result.json").write_text(json.dumps({"protocol": "linear", "accuracy": 81.5}))
    (tmp_path / "two" / "old_result.json").write_text("{broken")
    report.main([str(tmp_path / "one"), str(tmp_path / "two"), "-o", str(tmp_path / "out")])
    text = (tmp_path / "out" / "comparison.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[0][6:10] == ["difficulty", "teacher_spearman", "difficulty_spearman", "difficulty_auc"]
    assert rows[2][6:10] == ["paper", "7", "7", "0.25"]
    assert rows[0][-2:] == ["DINO weighted k-NN, student", "linear"]
    assert rows[2][0] == "one"
    assert rows[2][-2:] == ["70.00", ""]
    assert rows[3][-2:] == ["75.00", "81.50"]
    with Image.open(tmp_path / "out" / "comparison.png") as curves:
        assert curves.size == (1200, 800)
    with pytest.raises(UserError, match="is missing"):
        report.main([str(tmp_path / "one"), str(tmp_path)])
