"""The evidence of HPM on iBOT: rows are recipes, differences are taken seed by seed, the untrained network is a row."""

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from bench import evidence_ibot
from fasthpm import recipes
from fasthpm.recipe import Recipe

ARGUMENTS = Namespace(length="short", data=Path("data"), extra="--wandb", deepspeed_config="zero1_fp32")


def recipe_of(method: str) -> Recipe:
    return dataclasses.replace(recipes.from_name("ibot_demo"), **evidence_ibot.fields_of(ARGUMENTS, method))


@pytest.mark.parametrize("method", evidence_ibot.METHODS)
def test_every_row_is_a_recipe_that_differs_in_its_masks_alone(method: str) -> None:
    recipe, control = recipe_of(method), recipe_of("random")
    assert recipe.target == "distributions"
    assert control.mask_policy == "random"
    differing = {"mask_policy", "difficulty"}
    same = [field.name for field in dataclasses.fields(Recipe) if field.name not in differing]
    assert all(getattr(recipe, name) == getattr(control, name) for name in same)
    flags = evidence_ibot.train_flags(ARGUMENTS, method, 2, Path("out"))
    assert flags[:2] == ["--recipe", "ibot_demo"]
    assert flags[flags.index("--mask_policy") + 1] == recipe.mask_policy
    assert flags[-1] == "--wandb"


def run(method: str, seed: int, knn: float, untrained: float = 0.0) -> dict[str, Any]:
    probes = dict.fromkeys(evidence_ibot.PROBES, knn)
    begun = {"untrained": dict.fromkeys(evidence_ibot.PROBES, untrained)} if untrained else {}
    last = {"teacher_entropy": knn / 10, "rankme": 3.0}
    return {"method": method, "seed": seed, "probes": probes, **begun, "truth": {}, "last": last}


def test_differences_are_taken_seed_by_seed() -> None:
    runs = [run("random", 0, 50.0, 40.0), run("random", 1, 60.0, 42.0), run("hpm", 0, 51.0), run("hpm", 2, 10.0)]
    rows = evidence_ibot.summary_of(runs)
    assert rows["untrained"]["knn_cls"]["mean"] == 41.0
    assert rows["hpm"]["gain"]["knn_cls"] == {"mean": 1.0, "std": 0.0, "low": 1.0, "high": 1.0, "won": 1}
    assert rows["random"]["teacher_entropy"]["mean"] == 5.5
    assert "gain" not in rows["random"]
    text = evidence_ibot.markdown({"settings": {"length": "short"}, "summary": rows})
    assert "| HPM on iBOT, in place | 2 | 30.50 ± 28.99 |" in text
    assert "+1.00 ± 0.00 (1)" in text
    assert "| untrained | 2 | 41.00 ± 1.41 |" in text
