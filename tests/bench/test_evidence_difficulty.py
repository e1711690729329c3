"""The evidence on difficulty: rows that can be run, controls of the same architecture, differences seed by seed."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import difficulty_rows as rows
from bench import evidence_difficulty as evidence
from fasthpm import recipes
from fasthpm.errors import UserError
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe


def recipe_of(chosen: str, method: str) -> Recipe:
    arguments = argparse.Namespace(set=chosen, length="short")
    fields = evidence.typed(evidence.fields_of(arguments, method))
    return dataclasses.replace(recipes.from_name(rows.SETS[chosen].recipe), **fields)


@pytest.mark.parametrize("chosen", rows.SETS)
def test_every_row_is_a_recipe_and_its_control_differs_in_the_masks_alone(chosen: str) -> None:
    for name, method in rows.METHODS.items():
        recipe = recipe_of(chosen, name)
        if not method.control or name in (*rows.CONTROLS, *rows.SLOTS):
            continue
        control = recipe_of(chosen, evidence.control_of(chosen, name))
        assert not control.masks_by_difficulty or control.alpha_start == control.alpha_end == 0
        assert (control.mask_policy == recipe.mask_policy) == rows.SETS[chosen].slots
        assert recipe.masks_by_difficulty
        shapes = [
            {key: value.shape for key, value in model_of(one).state_dict().items() if "difficulty_head" not in key}
            for one in (recipe, control)
        ]
        assert shapes[0] == shapes[1], name
        for field in ("epochs", "steps_per_epoch", "batch_size", "lr", "mask_ratio", "predict_loss", "seed"):
            assert getattr(recipe, field) == getattr(control, field), (name, field)


@pytest.mark.parametrize("name", rows.SLOTS)
def test_a_control_slot_by_slot_is_its_row_with_other_masks(name: str) -> None:
    slots, whole = recipe_of("video", name), recipe_of("video", rows.SLOTS[name].control)
    masks = ("mask_policy", "difficulty", "alpha_start", "alpha_end")
    assert dataclasses.replace(slots, **{field: getattr(whole, field) for field in masks}) == whole


def test_the_same_cost_is_more_updates_of_mae() -> None:
    more, usual = recipe_of("fashion", "mae_same_cost"), recipe_of("fashion", "mae")
    assert more.steps_per_epoch == round(usual.steps_per_epoch * 1.6)
    assert dataclasses.replace(more, steps_per_epoch=usual.steps_per_epoch) == usual


def run(method: str, seed: int, knn: float, truth: float | None = None) -> dict[str, Any]:
    found = {} if truth is None else {"difficulty_spearman": truth, "difficulty_auc": 0.9}
    return {
        "method": method,
        "seed": seed,
        "probes": {"knn": knn, "linear": knn + 5},
        "truth": found,
        "saliency": None if truth is None else 0.7,
    }


def test_differences_are_taken_seed_by_seed() -> None:
    runs = [
        run("mae", 0, 70.0),
        run("mae", 1, 60.0),
        run("mae_same_cost", 0, 72.0),
        run("measured", 0, 71.0, 0.8),
        run("measured", 1, 63.0, 0.6),
        run("measured", 2, 99.0, 0.7),  # without a partner
    ]
    summary = evidence.summarise(runs, "fashion")
    row = summary["measured"]
    assert row["difficulty_spearman"]["mean"] == pytest.approx(0.7)
    assert row["difficulty_spearman"]["low"] == 0.6
    assert row["gain"]["knn"] == {"mean": 2.0, "std": pytest.approx(2**0.5), "low": 1.0, "high": 3.0, "won": 2}
    assert row["gain_same_cost"]["knn"]["mean"] == -1.0
    assert "gain" not in summary["mae"]
    text = evidence.markdown({"summary": summary, "settings": {"set": "fashion", "length": "short"}})
    assert "| +2.00 ± 1.41 (2) | +2.00 ± 1.41 (2) | -1.00 ± 0.00 (0) |" in text
    assert "| 0.70 (0.60) | 0.90 ± 0.00 | 0.70 ± 0.00 | 77.67 ± 18.90 |" in text


def test_fine_tuning_is_a_column_of_the_runs_that_have_it() -> None:
    runs = [run("mae", 0, 70.0), run("mae", 1, 60.0), run("measured", 0, 71.0, 0.8), run("measured", 1, 63.0, 0.6)]
    bare = evidence.summarise(runs, "fashion")
    settings = {"set": "fashion", "length": "short"}
    assert "fine-tune" not in evidence.markdown({"summary": bare, "settings": settings})
    for one, accuracy in zip(runs, (80.0, None, 81.5, 83.0), strict=True):
        one["probes"] |= {} if accuracy is None else {"finetune": accuracy}
    summary = evidence.summarise(runs, "fashion")
    assert summary["measured"]["finetune"]["mean"] == 82.25
    assert summary["measured"]["gain"]["finetune"] == {"mean": 1.5, "std": 0.0, "low": 1.5, "high": 1.5, "won": 1}
    text = evidence.markdown({"summary": summary, "settings": settings})
    assert "| fine-tune | fine-tune, less own control |" in text
    assert "| 82.25 ± 1.06 | +1.50 ± 0.00 (1) |" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--finetune", "-1"], "finetune is -1"), (["--set", "video", "--finetune", "1"], "finetune is of images")],
)
def test_fine_tuning_that_cannot_be(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        evidence.main(["--data", str(tmp_path), *flags])


def test_runs_without_weights_are_not_fine_tuned(tmp_path: Path) -> None:
    arguments = argparse.Namespace(finetune=2, set="fashion")
    result = run("mae", 0, 70.0)
    assert evidence.tuned_where_kept(arguments, tmp_path, result) is result


def test_a_table_of_what_is_there(tmp_path: Path) -> None:
    common = ["--data", str(tmp_path), "--work", str(tmp_path), "--finished", "-o", str(tmp_path / "table.json")]
    for name in ("train.beton", "val.beton"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="has no finished run of these methods"):
        evidence.main(common)
    for name, seed in (("mae", 0), ("mae", 3), ("measured", 3)):
        folder = tmp_path / f"{name}-seed{seed}"
        folder.mkdir()
        settings = {"set": "fashion", "length": "short", "bank": 10000, "extra": ""}
        (folder / evidence.RESULT).write_text(json.dumps({**run(name, seed, 70.0 + seed), "settings": settings}))
    evidence.main(common)
    summary = json.loads((tmp_path / "table.json").read_text())["summary"]
    assert {name: row["seeds"] for name, row in summary.items()} == {"mae": [0, 3], "measured": [3]}
    tuned = tmp_path / "mae-seed3" / "finetune-labelled-10000-2"
    tuned.mkdir()
    (tuned / "result.json").write_text('{"accuracy": 80.5}')
    evidence.main([*common, "--finetune", "2"])
    text = (tmp_path / "table.md").read_text()
    assert "Fine-tune: 2 epochs of 10,000 labelled images." in text
    assert "| 80.50 ± 0.00 |" in text
    evidence.main(common)
    assert "fine-tune" not in (tmp_path / "table.md").read_text()
    with pytest.raises(UserError, match="was made with"):
        evidence.main([*common, "--bank", "5"])


def test_patches_are_of_the_object_where_it_covers_most() -> None:
    mask = np.zeros((4, 6), np.uint8)
    mask[:2, :2] = 255
    mask[2:, 2] = 255  # half of a patch
    mask[2:, 4:] = 255
    mask[3, 5] = 0
    assert evidence.covered(mask, 2).tolist() == [1, 0, 0, 0, 0, 1]
    kept, labels = evidence.balanced(torch.arange(6.0)[:, None], torch.tensor([1, 0, 0, 0, 0, 1]))
    assert kept[:, 0].tolist() == [1, 2, 0, 5]
    assert labels.tolist() == [0, 0, 1, 1]
