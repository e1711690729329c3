"""`bench.loader_before`: it runs against a checkout, here this one, and refuses what is none."""

from pathlib import Path

import pytest

from bench import loader_before
from fasthpm.errors import UserError
from fasthpm.files import read_json
from tests.helpers.launch import ROOT


def test_it_runs_against_a_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    loader_before.main([str(ROOT), "--quick", "-o", str(out)])
    rates = read_json(out)["rates"]
    assert set(rates) == {"area", "bicubic"}
    assert all(row["cpu_ms_now"]["median"] > 0 and len(row["rounds"]["before"]) == 1 for row in rates.values())
    assert "times as fast" in capsys.readouterr().out


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no checkout of this project"):
        loader_before.main([str(tmp_path), "--quick"])
