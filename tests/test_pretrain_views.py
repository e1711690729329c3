"""Whole runs with several views: ranks, accumulation, ZeRO stages, resuming, what a run shows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fasthpm.checkpoint.folder import newest_valid
from fasthpm.checkpoint.weights import load_weights
from fasthpm.run.records import read_metrics
from tests.helpers.launch import ROOT, check_ranks

SMALL = (
    *("--data_path", "synthetic:64", "--epochs", 1, "--warmup_epochs", 0, "--steps_per_epoch", 0),
    *("--prototypes", 16, "--head_hidden", 16, "--local_crops", 1, "--difficulty_every", 0, "--panel_every", 0),
    *("--input_size", 16, "--patch_size", 4, "--local_size", 8, "--temperature_epochs", 1, "--log_every", 1),
    *("--global_batch_size", 16),
)
MODULE = "fasthpm.pretrain"


def run(folder: Path, *arguments: Any, recipe: str = "ibot_demo", ranks: int = 1) -> str:
    common = (*SMALL, "--recipe", recipe, "--output_dir", folder)
    return check_ranks(MODULE, *common, *arguments, ranks=ranks, launcher="forked")


def state(folder: Path, which: str = "student") -> dict[str, torch.Tensor]:
    return load_weights(folder, which)[0].state_dict()


def centres(folder: Path) -> torch.Tensor:
    newest = newest_valid(folder, pytest.fail)
    assert newest is not None
    return load_file(newest / "buffers.safetensors")["centres"]


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 1), (2, 2), (3, 2)])
def test_resuming_changes_no_bit(stage: int, ranks: int, tmp_path: Path) -> None:
    """In float32, which every CPU is quick at."""
    zero: dict[str, Any] = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    config = json.loads((ROOT / "ds_configs/zero1_fp32.json").read_text()) | {"zero_optimization": zero}
    (tmp_path / "config.json").write_text(json.dumps(config))
    resume(tmp_path, ranks, "--deepspeed_config", tmp_path / "config.json", "--batch_size", 8)


def test_resuming_changes_no_bit_in_bfloat16(tmp_path: Path) -> None:
    """Of four patches, since CPUs may only emulate it."""
    few = ("--data_path", "synthetic:16", "--input_size", 8, "--local_size", 4, "--mask_ratio", 0.5)
    resume(tmp_path, 1, "--deepspeed_config", "zero1_bf16", *few, "--batch_size", 4, "--global_batch_size", 4)


def resume(tmp_path: Path, ranks: int, *common: Any) -> None:
    """Run HPM on iBOT for four updates, and for two and two: weights, centres and losses are the same to the bit."""
    run(tmp_path / "straight", *common, recipe="hpm_ibot_demo", ranks=ranks)
    run(tmp_path / "broken", *common, "--stop_after", 2, recipe="hpm_ibot_demo", ranks=ranks)
    early = centres(tmp_path / "broken")
    output = run(tmp_path / "broken", *common, recipe="hpm_ibot_demo", ranks=ranks)
    assert "at update 2 of 4" in output
    for which in ("student", "teacher"):
        straight, broken = (state(tmp_path / name, which) for name in ("straight", "broken"))
        assert all(torch.equal(straight[name], broken[name]) for name in straight)
    assert torch.equal(centres(tmp_path / "straight"), centres(tmp_path / "broken"))
    assert not torch.equal(early, centres(tmp_path / "broken"))
    losses = [[record["loss"] for record in read_metrics(tmp_path / name)] for name in ("straight", "broken")]
    assert losses[0] == losses[1]


def test_ranks_and_accumulation_share_one_trajectory(tmp_path: Path) -> None:
    """One rank, or two with two micro-steps: centres are of the update, and the weights the same but for rounding."""
    for name, (ranks, batch_size) in {"one": (1, 16), "parts": (2, 4)}.items():
        arguments = ("--deepspeed_config", "zero1_fp32", "--batch_size", batch_size)
        run(tmp_path / name, *arguments, ranks=ranks)
    assert torch.allclose(centres(tmp_path / "one"), centres(tmp_path / "parts"), atol=1e-5)
    one, other = state(tmp_path / "one", "teacher"), state(tmp_path / "parts", "teacher")
    # Adam makes steps of the rounding noise of key biases, whose gradient is 0.
    assert all(torch.allclose(one[k], other[k], atol=1e-4) for k in one if not k.endswith("attn.qkv.bias"))
    losses = [read_metrics(tmp_path / name)[-1]["loss"] for name in ("one", "parts")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    """Centres are of the run: what two ranks began, one ends as if it had begun it, but for rounding."""
    common = ("--deepspeed_config", "zero1_fp32")
    run(tmp_path / "straight", *common, "--batch_size", 16)
    run(tmp_path / "moved", *common, "--batch_size", 8, "--stop_after", 2, ranks=2)
    early = centres(tmp_path / "moved")
    assert "at update 2 of 4" in run(tmp_path / "moved", *common, "--batch_size", 16)
    assert torch.allclose(centres(tmp_path / "straight"), centres(tmp_path / "moved"), atol=1e-5)
    assert not torch.allclose(early, centres(tmp_path / "moved"), atol=1e-5)


def test_what_a_run_shows(tmp_path: Path) -> None:
    extra = ("--difficulty_every", 4, "--panel_every", 1, "--deepspeed_config", "zero1_fp32", "--view_augment", "dino")
    run(tmp_path, *extra, "--batch_size", 8, "--freeze_last_layer_epochs", 1, recipe="hpm_ibot_demo")
    last = read_metrics(tmp_path)[-1]
    figures = {"cls_loss", "patch_loss", "difficulty_loss", "teacher_spearman", "rankme", "difficulty_spearman"}
    figures |= {"teacher_entropy", "mean_entropy", "teacher_kl", "weight_decay", "teacher_temperature"}
    assert figures <= set(last)
    assert "reconstruction_loss" not in last
    assert 1 <= last["rankme"] <= 16
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"collapse/teacher_entropy", "collapse/rankme"} <= set(board.Tags()["scalars"])
    report = (tmp_path / "report.md").read_text()
    assert "is a collapse" in report
    assert (tmp_path / "panels/step-00000004.png").stat().st_size > 0
    began, ended = (load_weights(tmp_path, which)[0].state_dict() for which in ("untrained", "student"))
    still = [name for name in began if torch.equal(began[name], ended[name])]
    assert "decoder_pred.last_layer.weight_v" in still  # frozen in the only epoch
    assert "decoder_pred.mlp.0.weight" not in still
