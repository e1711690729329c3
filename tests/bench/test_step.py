"""The step bench runs to the end and is reported."""

import json
from pathlib import Path

import pytest

from bench import report, roofline, step
from fasthpm.errors import UserError
from tests.helpers.launch import run_ranks


def test_the_step_bench_runs_and_is_reported(tmp_path: Path) -> None:
    """Every variant, one round; then the roofline and the page. `TINY=1 bench/gpu.sh OUT` does all the rest too."""
    out = tmp_path / "step.json"
    flags = ("--size", "nano", "--batch_size", 2, "--rounds", 1, "--threads", 1, "--precision", "bf16", "-o", out)
    done = run_ranks("bench.step", *flags, launcher="python")
    assert done.status == 0, done.output
    found = json.loads(out.read_text())["precisions"]["bf16"]
    assert set(found["median_seconds"]) == set(step.VARIANTS)
    loop = found["loop"]
    assert loop["updates"] == 2
    assert 0 < loop["engine_seconds"] < loop["seconds"]
    assert loop["outside_share"] == pytest.approx(1 - loop["engine_seconds"] / loop["seconds"])
    assert set(found["ratios"]) == {name for name, _, _ in step.RATIOS}
    roofline.main(["--results", str(out), "-o", str(tmp_path / "roofline.json")])
    report.main([str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert "exact HPM / eager MAE" in text
    assert "Roofline (a model, not a measurement)" in text
    assert (tmp_path / "report.png").stat().st_size > 1000
    with pytest.raises(UserError, match=r"no result of bench\.step"):
        roofline.main(["--results", str(tmp_path / "roofline.json")])
