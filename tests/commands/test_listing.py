"""`fasthpm recipes`: the list, one recipe with the origin of its numbers, two compared."""

import json
import re
from pathlib import Path

import pytest

from fasthpm import recipes
from fasthpm.__main__ import dispatch
from fasthpm.commands import listing
from fasthpm.commands.dense_recipes import DENSE
from fasthpm.errors import UserError
from fasthpm.recipe import Recipe


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    dispatch(["recipes", *arguments])
    return capsys.readouterr().out.splitlines()


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys)
    assert [line.split()[0] for line in lines[1:]] == [*recipes.RECIPES, *DENSE]
    line = next(line for line in lines if line.startswith("hpm_vit_base_in1k_800e"))
    cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
    assert cells[1:] == ["HPM, ViT-B/16, ImageNet-1K, 800 epochs", "fine-tune 84.2", "not yet run"]


def test_a_recipe_is_shown_with_the_origin_of_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "mae_vit_base_in1k_200e")
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in lines if line}
    assert "MAE, ViT-B/16, ImageNet-1K, 200 epochs: random masks" in lines[2]
    assert any(line.startswith("deepspeed --module fasthpm.pretrain --recipe mae_vit_base_in1k_200e") for line in lines)
    assert rows["mask_ratio"] == ["0.75", "paper"]
    assert rows["model"] == ["mae_vit_base_patch16_224", "set by this recipe"]
    assert rows["ema_momentum_end"] == ["0.9999", "released code"]
    assert rows["num_workers"] == ["0", "how it is run, not what"]
    assert set(vars(Recipe())) - {"recipe"} <= set(rows)


def test_a_recipe_is_shown_with_what_a_step_costs(capsys: pytest.CaptureFixture[str]) -> None:
    """One that asks its teacher with what other ways would cost, too; one with random masks without."""
    lines = shown(capsys, "hpm_vit_base_in1k_200e_fast")
    assert "A step: 51 GFLOP and 131 MB of memory traffic per sample, 0.89 x MAE's FLOPs." in lines
    rows = [re.split(r"  +", line) for line in lines]
    assert ["difficulty", "in every step", "cross decoders", "kept maps", "both"] in rows
    assert any(row[0] == "measured, no loss predictor" and row[-1] == "0.86 (128)" for row in rows)
    lines = shown(capsys, "mae_vit_base_in1k_200e")
    assert "A step: 57 GFLOP and 145 MB of memory traffic per sample, 1.00 x MAE's FLOPs." in lines
    assert not any("in every step" in line for line in lines)


def test_a_description_tags_what_its_recipe_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    def tagged() -> Recipe:
        """Something with blr 2e-4.

        [paper] mask ratio 0.5, 3 epochs. [released
        code] clip_grad 0 (paper: no word). [ours] the rest, crop min too.
        """
        return Recipe(recipe="tagged", clip_grad=0.0, mask_ratio=0.5, crop_min=0.5, epochs=50, beta1=0.8)

    monkeypatch.setitem(recipes.RECIPES, "tagged", tagged)
    names = ("mask_ratio", "clip_grad", "crop_min", "epochs", "beta1", "alpha_end")
    origins = [listing.origin(tagged(), name).split(",")[0] for name in names]
    assert origins == ["paper", "released code", "ours", "set by this recipe", "set by this recipe", "paper"]


def test_recipes_differ_where_they_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "hpm_vit_base_in1k_800e", "--diff", "hpm_vit_large_in1k_800e")
    assert [line.split() for line in lines[1:]] == [["model", "hpm_vit_base_patch16_224", "hpm_vit_large_patch16_224"]]
    (tmp_path / "recipe.json").write_text(json.dumps(vars(recipes.debug())))
    same = shown(capsys, "debug", "--diff", str(tmp_path / "recipe.json"))
    assert same == [f"debug and {tmp_path}/recipe.json differ in no field"]
    with pytest.raises(UserError, match="did you mean 'debug'"):
        dispatch(["recipes", "debgu"])
    with pytest.raises(UserError, match="--diff debug needs a recipe to compare with"):
        dispatch(["recipes", "--diff", "debug"])
