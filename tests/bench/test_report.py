"""The report of the step benches."""

import json
from pathlib import Path

from bench import end_to_end, report, scaling
from bench.training import READ


def test_a_report_pairs_every_speed_up_with_its_baseline(tmp_path: Path) -> None:
    spread = {"median": 2.0, "low": 1.0, "high": 3.0}
    figures = dict.fromkeys(READ, spread)
    made = {
        "a_end.json": {
            "bench": "end_to_end",
            "figures": {"hpm": figures},
            "epoch_seconds": {"hpm": 5.0},
            "time_over_mae": {},
        },
        "b_scaling.json": {"bench": "scaling", "images_per_second": {"case": spread}, "efficiency": {}},
        "c_old.json": {"bench": "step", "seconds": {}},
    }
    for name, result in made.items():
        (tmp_path / name).write_text(json.dumps(result))
    report.main([str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert "| hpm | 2.0 (1.0 to 3.0) | 5 | 2.0 (1.0 to 3.0) |  |" in text
    assert "Raw results without a section here: c_old.json." in text
    assert not (tmp_path / "report.png").exists()
    assert {end_to_end.METHODS["hpm"], ()} == {()}
    assert scaling.name_of((1, 2, 3)) == "stage 1, 2 ranks, accumulation 3"
