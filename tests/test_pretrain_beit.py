"""Whole runs of HPM on BEiT, tokens of a codebook: every ZeRO stage goes on to the bit, and all is shown."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fasthpm.checkpoint.weights import load_weights
from fasthpm.run.records import read_metrics
from fasthpm.tokenizers import Codebook, save_codebook
from tests.helpers.launch import ROOT, check_ranks

SMALL = (
    *("--recipe", "hpm_beit_demo", "--data_path", "synthetic:32", "--epochs", 1, "--warmup_epochs", 0),
    *("--steps_per_epoch", 0, "--input_size", 12, "--global_batch_size", 8, "--target_dim", 16, "--log_every", 1),
    *("--difficulty", "in_place", "--difficulty_every", 0, "--panel_every", 0),
    *("--positions", "relative", "--layer_scale", 0.1, "--drop_path", 0.2),  # what BEiT has and the others have not
)


def config(folder: Path, stage: int, dtype: str) -> Path:
    """A preset of its own for one ZeRO stage."""
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    found = json.loads((ROOT / f"ds_configs/zero1_{dtype}.json").read_text()) | {"zero_optimization": zero}
    (folder / "config.json").write_text(json.dumps(found))
    return folder / "config.json"


@pytest.mark.parametrize(
    ("stage", "ranks", "dtype"), [(0, 1, "fp32"), (1, 2, "fp32"), (2, 2, "fp32"), (3, 2, "fp32"), (1, 1, "bf16")]
)
def test_resuming_changes_no_bit(stage: int, ranks: int, dtype: str, tmp_path: Path) -> None:
    save_codebook(Codebook(torch.randn(16, 16), 4, (0.5,), (0.2,)), tmp_path / "book.safetensors", {})

    def run(name: str, *more: Any) -> str:
        common = ("--target_weights", f"kmeans:{tmp_path / 'book.safetensors'}", "--batch_size", 8 // ranks)
        where = ("--deepspeed_config", config(tmp_path, stage, dtype), "--output_dir", tmp_path / name)
        return check_ranks("fasthpm.pretrain", *SMALL, *common, *where, *more, ranks=ranks, launcher="forked")

    run("straight")
    run("broken", "--stop_after", 2)
    assert "at update 2 of 4" in run("broken")
    for which in ("student", "teacher"):
        straight, broken = (load_weights(tmp_path / name, which)[0].state_dict() for name in ("straight", "broken"))
        assert all(torch.equal(straight[name], broken[name]) for name in straight)
    began, ended = (load_weights(tmp_path / "broken", which)[0].state_dict() for which in ("untrained", "student"))
    for name in ("rel_pos_bias.relative_position_bias_table", "blocks.0.gamma_1", "difficulty_head.fc.weight"):
        assert not torch.equal(began[name], ended[name])
    records = [read_metrics(tmp_path / name) for name in ("straight", "broken")]
    for name in ("loss", "reconstruction_loss", "difficulty_loss", "teacher_spearman"):
        assert [record[name] for record in records[0]] == [record[name] for record in records[1]]
    assert records[0][-1]["rankme"] == records[1][-1]["rankme"] > 1
