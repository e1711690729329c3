"""The checkpoint bench."""

import json
from pathlib import Path

from tests.helpers.benches import run_bench


def test_checkpoint_bench_runs(tmp_path: Path) -> None:
    out = tmp_path / "checkpoint.json"
    done = run_bench("checkpoint", "--size", "nano", "--rounds", 1, "--deepspeed_config", "zero1_fp32", "-o", out)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["bytes"] >= 16 * result["parameters"]
    assert 0 < result["asynchronous"]["blocked"]["low"] < result["asynchronous"]["complete"]["low"]
    assert result["synchronous"]["blocked"] == result["synchronous"]["complete"]
    assert "| asynchronous | " in done.stdout
