"""The step bench runs to the end and is reported."""

import argparse
import json
from pathlib import Path

import pytest

from bench import report, roofline, step
from bench.methods import METHODS
from fasthpm.errors import UserError
from tests.helpers.launch import run_ranks


def test_the_step_bench_runs_and_is_reported(tmp_path: Path) -> None:
    """Some of each kind, one round; then the roofline and the page. `bench/gpu.sh OUT --rehearse` does more."""
    out = tmp_path / "step.json"
    flags = ("--size", "nano", "--batch_size", 2, "--rounds", 1, "--threads", 1, "--precision", "bf16", "-o", out)
    variants = ("mae", "hpm", "hpm_fast", "in_place_maps", "measured_fast", *step.EAGER)
    done = run_ranks("bench.step", *flags, "--variants", *variants, launcher="python")
    assert done.status == 0, done.output
    found = json.loads(out.read_text())["precisions"]["bf16"]
    assert set(found["median_seconds"]) == set(variants)
    raw, maps = found["raw_seconds"], {name for name in variants if name in METHODS and METHODS[name].maps}
    assert set(raw) == {*variants, *(f"{name}_teacher_pass" for name in maps)}
    for name in variants:
        refresh = raw[f"{name}_teacher_pass"][0] / 10 if name in maps else 0.0
        assert found["seconds"][name] == [pytest.approx(raw[name][0] + refresh)]
        assert found["traffic_mb_per_sample"][name]["total"] > 0
    loop = found["loop"]
    assert loop["updates"] == 2
    assert 0 < loop["engine_seconds"] < loop["seconds"]
    assert loop["outside_share"] == pytest.approx(1 - loop["engine_seconds"] / loop["seconds"])
    assert set(found["ratios"]) == {name for name, *pair in step.RATIOS if {*pair} <= {*variants}}
    roofline.main(["--results", str(out), "-o", str(tmp_path / "roofline.json")])
    report.main([str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert "exact HPM / eager MAE" in text
    assert "Roofline (a model, not a measurement)" in text
    assert (tmp_path / "report.png").stat().st_size > 1000
    with pytest.raises(UserError, match=r"no result of bench\.step"):
        roofline.main(["--results", str(tmp_path / "roofline.json")])


def test_the_steps_are_of_the_recipes_that_they_are_named_after() -> None:
    """Of images and of clips, which keep no maps."""
    arguments = argparse.Namespace(size="nano", video=False, batch_size=2)
    chosen = {name: step.recipe_of(name, arguments, "zero0_fp32") for name in step.VARIANTS}
    assert {name for name, one in chosen.items() if one.teacher_maps} == {n for n, m in METHODS.items() if m.maps}
    assert {name for name, one in chosen.items() if not one.uses_teacher} == {"mae", "eager_mae"}
    for name, method in METHODS.items():
        one, predictor = chosen[name], method.predictor
        assert (one.predict_loss == "none", one.predictor == "shared") == (predictor == "none", predictor == "shared")
        assert one.decoder_attention == ("cross" if method.cross else "self")
        assert not method.difficulty or one.difficulty == method.difficulty
    assert step.chosen(None, video=False) == list(step.USUAL)
    clips = step.chosen(None, video=True)
    assert set(step.USUAL) - set(clips) == {"measured_maps"}
    arguments.video = True
    assert not any(step.recipe_of(name, arguments, "zero0_fp32").teacher_maps for name in clips)
    with pytest.raises(UserError, match="variants in_place_maps measured_maps keep maps, which are of images"):
        step.main(["--video", "--variants", "measured_maps", "in_place_maps", "mae"])
