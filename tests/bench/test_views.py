"""The bench of steps with several views."""

import json
from pathlib import Path

import pytest
import torch

from bench import views
from bench.views import EagerIBOT, recipe_of
from fasthpm.patches import model_of


def test_all_variants_take_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "views.json"
    views.main(["--size", "nano", "--batch_size", "2", "--local_crops", "1", "--rounds", "1", "-o", str(output)])
    found = json.loads(output.read_text())
    assert set(found["raw_seconds"]) == set(views.VARIANTS)
    assert set(found["ratios"]) == {name for name, *_ in views.RATIOS}
    assert found["head_mib_at_64"]["published"] > 1.5 * found["head_mib_at_64"]["ours"]
    assert "HPM-iBOT / iBOT" in capsys.readouterr().out


def test_the_eager_model_gives_logits_of_all_tokens() -> None:
    recipe = recipe_of("eager", "nano", 2, 1)
    made = EagerIBOT(model_of(recipe))
    images = torch.rand(2, 3, 28, 28)
    assert made(images).shape == (2, 50, 8192)
    assert made(images[:, :, :12, :12]).shape == (2, 10, 8192)
    assert made(images).abs().max() < 1.5  # cosines, of rows that are not of length 1 yet
