"""The evidence of HPM on BEiT: rows are recipes, differences are taken seed by seed."""

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from bench import evidence_beit
from fasthpm import recipes
from fasthpm.recipe import Recipe

ARGUMENTS = Namespace(length="short", data=Path("data"), work=Path("work"), extra="", deepspeed_config="zero1_bf16")


def recipe_of(method: str) -> Recipe:
    return dataclasses.replace(recipes.from_name("beit_demo"), **evidence_beit.fields_of(ARGUMENTS, method))


@pytest.mark.parametrize("method", evidence_beit.METHODS)
def test_every_row_is_a_recipe_and_its_control_has_random_masks(method: str) -> None:
    recipe, control = recipe_of(method), evidence_beit.METHODS[method].control
    assert recipe.target == "tokens"
    assert recipe.num_masked == 49 - int(49 * 0.62)
    if (control and control != "random") or method in ("beit", "measured", "in_place"):
        other = recipe_of(control)
        assert (other.mask_policy, other.predict_loss) == ("random", recipe.predict_loss)
    assert "kmeans:work/codebook.safetensors" in evidence_beit.train_flags(ARGUMENTS, method, 0, Path("out"))


def run(method: str, seed: int, knn: float) -> dict[str, Any]:
    return {"method": method, "seed": seed, "probes": {"knn": knn, "linear": 2 * knn}, "truth": {}}


def test_differences_are_taken_seed_by_seed() -> None:
    runs = [
        {**run("random", 0, 50.0), "untrained": {"knn": 40.0, "linear": 45.0}},
        run("random", 1, 60.0),
        run("measured", 0, 51.0),
        run("measured", 2, 10.0),
    ]
    rows = evidence_beit.summarise(runs)
    assert rows["measured"]["gain"]["knn"] == {"mean": 1.0, "std": 0.0, "low": 1.0, "high": 1.0, "won": 1}
    assert rows["measured"]["gain"]["linear"]["mean"] == 2.0
    assert "gain" not in rows["random"]
    text = evidence_beit.markdown({"settings": {"length": "short"}, "summary": rows})
    assert "| HPM, measured | 2 |" in text
    assert "+1.00 ± 0.00 (1)" in text
    assert list(rows) == ["untrained", "random", "measured"]
    assert "| untrained encoder | 1 |  | 40.00 ± 0.00 | 45.00 ± 0.00 |  |  |" in text
