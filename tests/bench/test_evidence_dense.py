"""The table of pretrained beside from scratch."""

from pathlib import Path
from typing import Any

import pytest

from bench import evidence_dense
from fasthpm.errors import UserError


def cell(method: str, seed: int, miou: float) -> dict[str, Any]:
    return {"method": method, "seed": seed, "probes": {"miou": miou, "macc": 2 * miou, "aacc": 70.0}}


def test_differences_are_taken_seed_by_seed() -> None:
    runs = [cell("segment", 0, 10.0), cell("segment", 1, 12.0), cell("segment", 2, 50.0)]
    runs += [cell("segment_scratch", 1, 9.0), cell("segment_scratch", 0, 8.0)]
    rows = evidence_dense.summarise(runs)
    assert rows["segment"]["miou"]["mean"] == 24.0
    assert rows["segment"]["gain"]["miou"] == {
        "mean": 2.5,
        "std": pytest.approx(0.7071, abs=1e-4),
        "low": 2.0,
        "high": 3.0,
    }
    assert "gain" not in rows["segment_scratch"]
    table = evidence_dense.markdown({"summary": rows})
    assert "| segment | miou | 3 | 24.00 ± 22.54 | 10.00 | +2.50 |" in table


def test_a_folder_without_scenes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*train; make it with data_prep\.scenes"):
        evidence_dense.main(["--data", str(tmp_path), "--work", str(tmp_path / "work")])
