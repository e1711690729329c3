"""The bench of dense steps runs, and both sides train the same encoder on the same batch."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import dense
from fasthpm.errors import UserError
from fasthpm.patches import model_of
from tests.helpers.launch import run_ranks


def test_it_runs_and_writes_ratios(tmp_path: Path) -> None:
    out = tmp_path / "dense.json"
    flags = ("--batch_size", 2, "--rounds", 1, "--repeats", 1, "--threads", 1, "--tasks", "segment", "-o", out)
    done = run_ranks("bench.dense", *flags, ranks=1, launcher="forked")
    assert done.status == 0, done.output
    assert "| segment | fp32 |" in done.output
    (cell,) = json.loads(out.read_text())["cells"]
    raw = cell["raw_seconds"]
    assert cell["ratio"]["median"] == pytest.approx(raw["ours"][0] / raw["plain"][0])


def test_both_sides_have_the_same_encoder() -> None:
    arguments = argparse.Namespace(size="nano", batch_size=2)
    case = dense.CASES["segment"]
    settings, model = case.settings(arguments), model_of(dense.recipe_of(arguments, Path("out")))
    images, _ = case.batch(arguments, settings)
    ours = case.task.network(model, settings, dense.Classes()).eval()  # type: ignore[arg-type]
    plain = case.plain(model, settings).eval()
    with torch.no_grad():
        nets: list[Any] = [ours.net, plain]
        found, expected = (net.backbone(images.float() / 255).feature_maps[2] for net in nets)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="batch_size 2 or more"):
        dense.main(["--batch_size", "1"])
