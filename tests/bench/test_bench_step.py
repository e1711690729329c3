"""The step benches: baselines compute what ours compute, formulas agree with the models, commands run to the end."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import baselines, baselines_video, end_to_end, report, roofline, scaling, step, video_memory
from bench import eager as bench_eager
from bench.training import READ, median_of
from fasthpm import loss, recipes
from fasthpm.errors import UserError
from fasthpm.mask import random_mask
from fasthpm.patches import model_of
from fasthpm.speed import flops
from tests.helpers.launch import run_ranks


def same_weights(eager: baselines.EagerModel, ours: Any) -> None:
    """Give the baseline the weights of an `HPMViT`; its wide loss head gets equal rows."""
    names = {
        "positions": "pos_embed",
        "decoder_positions": "decoder_pos_embed",
        "cls_token": "cls_token",
        "mask_token": "mask_token",
    }
    state: dict[str, Tensor] = ours.state_dict()
    for key, value in eager.state_dict().items():
        name = names.get(key, key.replace("patch_embed.", "patch_embed.proj.").replace("mlp.0", "mlp.fc1"))
        name = name.replace("mlp.2", "mlp.fc2")
        for theirs, suffix in (("reconstructor", ""), ("predictor", "_losspred")):
            for part, own in (("blocks", "decoder_blocks"), ("norm", "decoder_norm"), ("head", "decoder_pred")):
                name = name.replace(f"{theirs}.{part}.", f"{own}{suffix}.")
        value.copy_(state[name].expand_as(value))


def test_the_eager_baseline_computes_the_same_losses() -> None:
    """Same weights, images and masks: a baseline that computed something else would prove nothing."""
    recipe = dataclasses.replace(recipes.debug(), decoder_depth=2)
    ours = model_of(recipe).double()
    eager = baselines.EagerHPM(ours, predicts=True).double()
    with torch.no_grad():
        same_weights(eager, ours)
    images, mask = torch.randn(3, 1, 28, 28, dtype=torch.float64), random_mask(torch.rand(3, 49), 0.75)
    wanted = ours(images, mask)
    reconstruction, difficulty = eager(images, mask)
    torch.testing.assert_close(reconstruction, wanted.reconstruction_loss)
    assert difficulty.item() == pytest.approx(wanted.difficulty_loss.item(), rel=1e-4)  # 1e-6 inside the logarithm
    everything = torch.zeros(3, 49, dtype=torch.bool)
    torch.testing.assert_close(eager.decode(images, everything)[1], ours.predict_loss(images), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        baselines.ranking_loss_as_released(difficulty.new_ones(2, 5), torch.rand(2, 5)),
        torch.log(torch.tensor(2.0)),
        rtol=1e-4,
        atol=1e-4,
        check_dtype=False,
    )
    assert loss.ranking_loss(torch.rand(2, 5), torch.ones(2, 5)) == 0


def test_the_eager_baseline_of_clips_computes_the_same_losses() -> None:
    flags = argparse.Namespace(size="nano", video=True, batch_size=2)
    recipe = step.recipe_of("hpm", flags, step.CONFIGS["fp32"])
    ours = model_of(recipe).double()
    eager = baselines_video.EagerVideoHPM(ours, predicts=True).double()
    with torch.no_grad():
        same_weights(eager, ours)
    clips, noise = torch.randn(2, 3, 4, 32, 32, dtype=torch.float64), torch.rand(4, 16)
    mask = random_mask(noise, 0.9).reshape(2, 32)  # each frame slot by itself
    wanted = ours(clips, mask)
    reconstruction, difficulty = eager(clips, mask)
    torch.testing.assert_close(reconstruction, wanted.reconstruction_loss, rtol=1e-4, atol=1e-6)  # eps of the target
    assert difficulty.item() == pytest.approx(wanted.difficulty_loss.item(), rel=1e-4)
    everything = torch.zeros(2, 32, dtype=torch.bool)
    torch.testing.assert_close(eager.decode(clips, everything)[1], ours.predict_loss(clips), rtol=1e-5, atol=1e-6)
    drawn = baselines_video.tubes(3, 2, 16, 0.9).reshape(3, 2, 16)
    assert torch.equal(drawn[:, 0], drawn[:, 1])
    assert (drawn[:, 0].sum(1) == 14).all()
    update, model = bench_eager.eager_update(ours.float(), recipe, clips.float(), alpha=0.5, half=False)
    before = model.patch_embed.weight.detach().clone()
    update(0)
    assert not torch.equal(before, model.patch_embed.weight)


def test_masks_drawn_one_by_one_hold_the_hardest() -> None:
    difficulty = torch.rand(4, 49)
    mask = bench_eager.masks_one_by_one(difficulty, 0.75, 0.5)
    assert (mask.sum(1) == 37).all()
    for row, values in zip(mask, difficulty, strict=True):
        assert row[values.argsort(descending=True)[:18]].all()


@pytest.mark.parametrize("name", ["base", "large"])
def test_the_rooflines_work_is_that_of_the_models(name: str) -> None:
    for method, recipe in (
        ("mae", "mae_vit_base_in1k_200e"),
        ("hpm", "hpm_vit_base_in1k_200e"),
        ("hpm_fast", "hpm_vit_base_in1k_200e_fast"),
    ):
        base = recipes.from_name(recipe)
        made = dataclasses.replace(base, model=base.model.replace("base", name))
        with torch.device("meta"):
            wanted = flops.step_flops(model_of(made), made)
        assert roofline.work(roofline.SHAPES[name], method) == pytest.approx(wanted, rel=1e-6)


def test_the_rooflines_video_is_that_of_the_model() -> None:
    made = recipes.from_name("hpm_video_vit_base_ssv2_800e")
    with torch.device("meta"):
        wanted = flops.step_flops(model_of(made), made)
    shape = dataclasses.replace(roofline.SHAPES["video_base"], masked=made.num_masked)
    assert roofline.work(shape, "hpm") == pytest.approx(wanted, rel=1e-6)


def test_readings_leave_the_start_out() -> None:
    lines = [dict.fromkeys(READ, float(value)) for value in (100, 2, 4, 3)]
    assert median_of(lines)["images_per_second"] == 3
    assert median_of(lines[:1])["images_per_second"] == 100


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


def test_the_memory_bench_takes_turns_and_keeps_raw_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = dataclasses.replace(recipes.from_name("hpm_video_demo"), channels=3, batch_size=2)
    real = {
        again: video_memory.measure(dataclasses.replace(small, activation_checkpointing=bool(again)))
        for again in (0, 1)
    }
    assert all(found["seconds"] > 0 and found["gib"] >= 0 and found["gib_before"] > 0 for found in real.values())
    monkeypatch.setattr(video_memory, "in_a_process", lambda arguments, again: real[again])
    video_memory.main(["--rounds", "2", "-o", str(tmp_path / "memory.json")])
    raw = json.loads((tmp_path / "memory.json").read_text())["raw"]
    assert raw == {"kept": [real[0]] * 2, "checkpointed": [real[1]] * 2}
    assert "| checkpointed |" in capsys.readouterr().out
