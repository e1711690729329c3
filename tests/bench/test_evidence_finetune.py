"""The evidence benches' fine-tune column: the same images, one command, read when it is there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import evidence_finetune
from data_prep.encode import WriteOptions
from data_prep.fashion_mnist import Arrays
from data_prep.writer import write_beton
from fasthpm.data import build_loader
from fasthpm.errors import UserError
from fasthpm.probes.finetune import command
from fasthpm.probes.finetune import settings as finetune_settings


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
