"""What `fasthpm pretrain` must be told: a recipe, unless the folder that it goes on in has one."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fasthpm import recipes
from fasthpm.__main__ import dispatch
from fasthpm.errors import UserError
from fasthpm.pretrain import parse_arguments
from fasthpm.recipe import save_recipe
from tests.helpers.runs import recipe_in, write


@pytest.mark.parametrize("left", ["nothing", "a recipe without a checkpoint"])
@pytest.mark.parametrize("form", [list, dict])
def test_a_recipe_is_asked_for(tmp_path: Path, left: str, form: Any) -> None:
    if left != "nothing":
        save_recipe(recipe_in(tmp_path), tmp_path / "recipe.json")
    flags = {"data_path": "synthetic:8", "output_dir": str(tmp_path)}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    with pytest.raises(UserError) as caught:
        parse_arguments(flags if form is dict else words)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith("--recipe is missing")
    assert "fasthpm recipes" in said
    assert any(f"--recipe {name} " in said for name in recipes.RECIPES)


def test_a_run_that_goes_on_has_its_own(tmp_path: Path) -> None:
    write(tmp_path, 4)
    theirs = recipe_in(tmp_path, recipe="hpm_demo", data_path="synthetic:64", mask_ratio=0.5, stop_after=4, lr=0.01)
    save_recipe(theirs, tmp_path / "recipe.json")
    assert parse_arguments(["--output_dir", str(tmp_path)]) == dataclasses.replace(theirs, stop_after=0)
    assert parse_arguments(["--output_dir", str(tmp_path), "--epochs", "7"]).epochs == 7
    other = parse_arguments(["--recipe", "debug", "--data_path", "x", "--output_dir", str(tmp_path)])
    assert other.mask_ratio == recipes.debug().mask_ratio


def test_a_base_rate_is_not_overruled_by_the_rate_that_an_old_one_gave(tmp_path: Path) -> None:
    """A recipe.json holds both; the rate that follows from the new base is the one that is meant."""
    save_recipe(recipe_in(tmp_path, blr=1e-3, lr=5e-4, data_path="x"), tmp_path / "recipe.json")
    words = ["--recipe", str(tmp_path / "recipe.json"), "--output_dir", "new"]
    assert parse_arguments(words).lr == 5e-4
    assert parse_arguments([*words, "--blr", "1e-4"]).lr == 0
    assert parse_arguments([*words, "--blr", "1e-4", "--lr", "0.3"]).lr == 0.3


def test_the_command_asks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--recipe is missing"):
        dispatch(["pretrain", "--data_path", "synthetic:8", "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
