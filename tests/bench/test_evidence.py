"""The evidence benches: one command for every cell, the same images, summaries paired by seed."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import evidence
from fasthpm.errors import UserError


def test_evidence_has_a_finetune_column_where_asked() -> None:
    values = {**dict.fromkeys(evidence.PROBES, 50.0), evidence.FINETUNE: 70.0}
    runs: list[dict[str, Any]] = [
        {"method": "random", "seed": 0, "probes": values, "untrained": {**values, evidence.FINETUNE: 60.0}},
        {"method": "hpm", "seed": 0, "probes": {**values, evidence.FINETUNE: 71.5}},
    ]
    settings = {"epochs": 2, "steps_per_epoch": 3, "batch_size": 4, "bank": 10, evidence.FINETUNE: 2}
    summary = evidence.summarise(runs, evidence.TITLES, evidence.probes_of(settings), evidence.BASELINE)
    text = evidence.markdown({"summary": summary, "settings": settings})
    assert "| linear, cls | fine-tune | paper: k-NN |" in text
    assert "| 71.50 ± 0.00 | 36.09 |" in text
    assert "+1.50 ± 0.00 |" in text
    assert "- finetune: random < hpm" in text
    assert "Fine-tune: 2 epochs" in text
    assert "Fine-tune: " not in evidence.markdown({"summary": summary, "settings": {**settings, evidence.FINETUNE: 0}})


def test_a_run_that_was_stopped_early_is_no_evidence(tmp_path: Path) -> None:
    names = ("step", "reconstruction_loss", "difficulty_loss", "spearman", "teacher_spearman")
    (tmp_path / "metrics.jsonl").write_text(json.dumps(dict.fromkeys(names, 5)) + "\n")
    evidence.check_complete(argparse.Namespace(epochs=1, steps_per_epoch=5), tmp_path)
    with pytest.raises(UserError, match="stopped after 5 of 6 updates"):
        evidence.check_complete(argparse.Namespace(epochs=2, steps_per_epoch=3), tmp_path)


def test_a_table_runs_what_is_not_there_and_is_written_after_every_cell(tmp_path: Path) -> None:
    arguments = argparse.Namespace(work=tmp_path, seeds=2, methods=["a", "b"], output=tmp_path / "table.json")
    (tmp_path / "table.md").write_text("the table")
    started: list[tuple[str, int]] = []
    written: list[int] = []

    def start_one(method: str, seed: int) -> None:
        started.append((method, seed))
        folder = evidence.folder_of(arguments, method, seed)
        folder.mkdir()
        (folder / evidence.RESULT).write_text(json.dumps({"settings": {"epochs": 2}, "probes": {"knn": 50.0}}))

    def fill(epochs: int) -> None:
        evidence.fill_table(arguments, {"epochs": epochs}, start_one, lambda runs: written.append(len(runs)))

    start_one("b", 0)
    fill(2)
    assert started == [("b", 0), ("a", 0), ("a", 1), ("b", 1)]
    assert written == [1, 2, 3, 4]
    with pytest.raises(UserError, match="use another --work"):
        fill(3)


def test_evidence_summary_is_paired_by_seed() -> None:
    from bench import evidence

    cells = (("random", 0, 50.0), ("random", 1, 60.0), ("hpm", 0, 52.0), ("hpm", 1, 61.0))
    runs = [{"method": name, "seed": seed, "probes": dict.fromkeys(evidence.PROBES, x)} for name, seed, x in cells]
    summary = evidence.summarise(runs, evidence.TITLES, evidence.PROBES, evidence.BASELINE)
    assert summary["hpm"]["knn_mean"]["mean"] == 56.5
    assert summary["hpm"]["gain"]["knn_mean"] == {"mean": 1.5, "std": pytest.approx(0.5**0.5), "low": 1.0, "high": 2.0}
    assert evidence.ordering(summary, "knn_mean") == "random < hpm"
    settings = {"epochs": 2, "steps_per_epoch": 3, "batch_size": 4, "bank": 10}
    assert "| HPM, α 0 → 0.5 | +1.50 ± 0.71 |" in evidence.markdown({"summary": summary, "settings": settings})
    assert json.dumps(summary)


def test_linear_accuracy_separates_what_is_separable() -> None:
    from bench import evidence

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    rows = torch.randn(60, 5, generator=generator) * 0.1 + torch.eye(3, 5)[labels] * 100 + 7
    assert evidence.linear_accuracy(rows, labels, rows, labels) == 100.0
    assert evidence.linear_accuracy(rows, labels, rows, (labels + 1) % 3) == 0.0
