"""`python -m bench.loader_arrays` runs; what its figures are, only real runs tell."""

import json
from pathlib import Path

import pytest

from bench import loader_arrays


def test_a_quick_run_measures_every_loader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loader_arrays.main(["--quick", "--work", str(tmp_path / "work"), "-o", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert len(result["rates"]) == 6
    assert set(result["unpacked"]) == {
        f"{name}, {codec}" for name in ("satellite", "x-ray") for codec in ("raw", "lz4")
    }
    assert all(row["times_smaller"] > 1.2 for row in result["unpacked"].values())
    assert "x baseline, by CPU" in capsys.readouterr().out
