"""The evidence benches' fine-tune column: the same images, one command, read when it is there."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import evidence, evidence_finetune
from data_prep.encode import WriteOptions
from data_prep.fashion_mnist import Arrays
from data_prep.writer import write_beton
from fasthpm.data import build_loader
from fasthpm.errors import UserError
from fasthpm.probes.finetune import command
from fasthpm.probes.finetune import settings as finetune_settings


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


def test_finetuning_of_the_evidence_takes_the_banks_images(tmp_path: Path) -> None:
    pixels = np.arange(12, dtype=np.uint8)[:, None, None] + np.zeros((12, 8, 8), np.uint8)
    source, options = Arrays(pixels, np.arange(12) % 3), WriteOptions(write_mode="raw")
    write_beton(source, tmp_path / "train.beton", ("a", "b", "c"), options=options, num_workers=1)
    subset = evidence_finetune.labelled_subset(tmp_path / "train.beton", 5, tmp_path / "work")
    first, found = (stored_values(path) for path in (tmp_path / "train.beton", subset))
    assert len(found) == 5
    assert sorted(found) == sorted(first[:5])
    before = subset.stat().st_mtime_ns
    assert evidence_finetune.labelled_subset(tmp_path / "train.beton", 5, tmp_path / "work") == subset
    assert subset.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="bank is 13"):
        evidence_finetune.labelled_subset(tmp_path / "train.beton", 13, tmp_path / "work")


def stored_values(path: Path) -> list[tuple[int, int]]:
    """(grey value, label) of every stored sample, in order."""
    loader: Any = build_loader(path, batch_size=1, image_size=(8, 8), channels=1, train=False, num_workers=1)
    try:
        ids = np.arange(loader.info.num_samples)
        labels = loader.labels_of(ids)
        return [(int(loader.stored(int(i))[0, 0, 0]), int(label)) for i, label in zip(ids, labels, strict=True)]
    finally:
        loader.close()


def test_finetuning_of_the_evidence_is_a_finetune_command_and_read_when_done(tmp_path: Path) -> None:
    train = tmp_path / "labelled-5.beton"
    same: dict[str, Any] = {"epochs": 2, "seed": 3, "from_scratch": True}
    words = evidence_finetune.command(tmp_path, train, tmp_path / "val.beton", tmp_path / "out", **same)
    arguments, given = command.parse_arguments(words[4:])
    assert (arguments.run, arguments.preset) == (tmp_path, "small")
    settings = finetune_settings.FineTune(**{**finetune_settings.SMALL, **given})
    assert (settings.seed, settings.epochs, settings.lr, settings.from_scratch) == (3, 2, evidence_finetune.LR, True)
    done = tmp_path / "finetune-labelled-5-2" / "result.json"
    done.parent.mkdir()
    done.write_text('{"accuracy": 71.5}')
    common: dict[str, Any] = {"epochs": 2, "seed": 3, "threads": 1}
    assert evidence_finetune.finetuned(tmp_path, train, tmp_path / "val.beton", **common) == 71.5
    with pytest.raises(UserError, match="failed with status 2; see"):
        evidence_finetune.finetuned(tmp_path, train, tmp_path / "val.beton", **common, from_scratch=True)


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
