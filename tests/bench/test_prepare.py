"""The bench of preparing."""

import json
from pathlib import Path

from tests.helpers.benches import run_bench


def test_prepare_bench_runs(photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "prepare.json"
    done = run_bench("prepare", photographs, "--quick", "--workers", 1, "-o", out)
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads(out.read_text())["sets"]["256"]
    assert set(row) == {"ours", "ffcv", "wall_ratio", "cpu_ratio"}
    ours, theirs = (row[writer]["bytes_per_image"]["median"] for writer in ("ours", "ffcv"))
    assert 1000 < ours < 256 * 192
    assert 1000 < theirs < 256 * 192
    assert "| 256, data_prep.images | " in done.stdout
