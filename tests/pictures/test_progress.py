"""The panel of a run as it stands: by its teacher, as the run asks it, with the figure that the run measured last."""

import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fasthpm import recipes
from fasthpm.pictures import panels, progress
from tests.helpers.runs import away


def test_the_panel_says_how_true_the_difficulty_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(
        recipes.debug(), output_dir=str(tmp_path), difficulty="in_place", epochs=2, steps_per_epoch=2
    )
    lines = [{"step": 1, "difficulty_spearman": 0.5}, {"step": 2, "loss": 1.0}, {"step": 4, "difficulty_spearman": 0.9}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    weights = {"student": away(recipe).state_dict(), "teacher": away(recipe, seed=6).state_dict()}
    run: Any = SimpleNamespace(
        recipe=recipe,
        weights=lambda: weights,
        launch=SimpleNamespace(rank=0, device=torch.device("cpu")),
        done=3,
        step=SimpleNamespace(frozen=None),
    )
    metrics: Any = SimpleNamespace(
        surviving_the_disk=lambda *_: contextlib.nullcontext(), image=lambda *_: None, animation=lambda *_: None
    )
    drawn: list[dict[str, Any]] = []
    pictures = panels.pictures

    def noting(model: Any, *arguments: Any, **keywords: Any) -> Any:
        assert torch.equal(model.difficulty_head.fc.weight, weights["teacher"]["difficulty_head.fc.weight"])
        drawn.append(pictures(model, *arguments, **keywords))
        return drawn[-1]

    monkeypatch.setattr(panels, "pictures", noting)
    progress.draw_panel(run, metrics)
    assert list(drawn[0]) == ["image", "reconstruction", "true loss", "predicted loss (in_place, 0.50)", "mask"]
    assert [path.name for path in (tmp_path / "panels").iterdir()] == ["step-00000003.png"]
