"""Recipes and the command line: what is wrong is named in one line, what is right round-trips."""

import dataclasses
import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest

from fasthpm import recipes
from fasthpm.__main__ import COMMANDS, dispatch
from fasthpm.cli import run_command
from fasthpm.errors import UserError
from fasthpm.pretrain import parse_arguments
from fasthpm.recipe import Recipe, load_recipe, save_recipe


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_are_what_they_say(name: str) -> None:
    recipe = recipes.from_name(name)
    assert recipe.recipe == name
    assert recipes.RECIPES[name].__doc__


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio 1.0 of 196 patches leaves no visible patch"),
        ({"mask_ratio": 0.0}, "mask_ratio 0.0 of 196 patches leaves no masked patch"),
        ({"mask_ratio": 1.5}, "mask_ratio is 1.5, expected between 0 and 1"),
        ({"input_size": "225"}, "input_size 225 is not a multiple of patch_size 16; use e.g. --input_size 224"),
        ({"input_size": "224x"}, "input_size is '224x', expected a side"),
        ({"input_size": "96x100"}, "input_size 96x100 is not a multiple"),
        ({"mask_policy": "hpn"}, "uniform, tube, hpm_tube; did you mean 'hpm'"),
        ({"epochs": 0}, "epochs is 0, expected more than 0"),
        ({"blr": float("nan")}, "blr is nan, expected 0 or more"),
        ({"alpha_end": 1.1}, "alpha_end is 1.1, expected 0 to 1"),
        ({"warmup_epochs": 300}, "warmup_epochs 300 is more than epochs 200"),
        ({"epochs": 1.5}, "epochs is 1.5, expected int"),
        ({"decoder_dim": 100}, "decoder_dim 100 must be a multiple of 4 and of decoder_heads 16"),
        ({"model": "mae_vit_base_patch16_224"}, "has no loss predictor; use --predict_loss none"),
        ({"predict_loss": "none"}, "follows predicted losses, but predict_loss is none"),
        ({"mask_policy": "uniform", "mask_ratio": 0.6}, "mask_policy uniform leaves one patch of every 2 x 2 visible"),
        ({"mask_policy": "tube"}, "mask_policy tube repeats one mask in every frame of a video"),
        ({"mask_policy": "block", "mask_unit": 32}, "mask_policy block does not mask in units; use --mask_unit 0"),
        ({"mask_unit": 40}, "mask_unit 40 is not a multiple of patch_size 16; use e.g. --mask_unit 32"),
        ({"mask_unit": 48}, "a mask unit of 3 x 3 patches does not divide the 14 x 14 patches"),
        ({"alpha_schedule": "steps"}, "alpha_schedule is 'steps', expected one of released, paper, step"),
        ({"predictor_dim": 100}, "predictor_dim 100 must be a multiple of 4 and of decoder_heads 16"),
        ({"predict_loss": "none", "mask_policy": "random", "predictor_depth": 4}, "shape the loss predictor, but"),
        ({"absolute_standardize": False}, "absolute_standardize is off, but predict_loss is relative"),
    ],
)
def test_impossible_values_name_value_and_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        dataclasses.replace(Recipe(), **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "samples", "world", "message"),
    [
        ({"batch_size": 64, "global_batch_size": 1000}, 5000, 8, "global_batch_size 1000 is not a multiple"),
        ({"batch_size": 64, "global_batch_size": 1024, "accum_iter": 3}, 5000, 8, "accum_iter 3 contradicts"),
        ({"batch_size": 64}, 100, 2, "has 100 samples, fewer than one global batch of 128"),
        ({"batch_size": 10, "steps_per_epoch": 11}, 100, 1, "steps_per_epoch 11 is more than the 10 full"),
    ],
)
def test_contradictions_are_found_when_resolved(
    changes: dict[str, int], samples: int, world: int, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        Recipe(**changes).resolve(samples, world)
    assert message in str(caught.value)


def test_resolve_fills_what_depends_on_the_machines() -> None:
    recipe = Recipe(batch_size=64, global_batch_size=1024).resolve(10_000, 4)
    assert (recipe.accum_iter, recipe.steps_per_epoch, recipe.total_steps) == (4, 9, 1800)
    again = recipe.resolve(10_000, 4)
    assert again == recipe


def test_rectangles() -> None:
    recipe = Recipe(input_size="96x160")
    assert (recipe.image_size, recipe.grid_size, recipe.num_patches) == ((96, 160), (6, 10), 60)


def test_recipe_file_replays_a_run(tmp_path: Path) -> None:
    recipe = dataclasses.replace(recipes.debug(), mask_ratio=0.6, flip=False)
    save_recipe(recipe, tmp_path / "recipe.json")
    assert load_recipe(tmp_path / "recipe.json") == recipe
    replayed = parse_arguments(["--recipe", str(tmp_path / "recipe.json"), "--output_dir", "x", "--epochs", "3"])
    assert replayed == dataclasses.replace(recipe, output_dir="x", epochs=3)


def test_recipe_file_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"mask_ration": 0.5}')
    with pytest.raises(UserError, match="unknown recipe field 'mask_ration'; did you mean 'mask_ratio'"):
        load_recipe(tmp_path / "recipe.json")
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(UserError, match=r"recipe\.json cannot be read"):
        load_recipe(tmp_path / "recipe.json")


OUT = ["--output_dir", "out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*OUT, "--mask_ration", "0.6"], "unknown argument '--mask_ration'; did you mean '--mask_ratio'"),
        ([*OUT, "--mask_rati", "0.6"], "unknown argument '--mask_rati'"),
        ([*OUT, "--norm_pix_loss", "False"], "unknown argument 'False'"),
        ([*OUT, "--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        ([*OUT, "--recipe", "hpm_vit_base_in1k_100e"], "did you mean 'hpm_vit_base_in1k_"),
        (["--recipe", "debug"], "--output_dir is missing"),
        ([*OUT, "--recipe", "hpm_demo"], "--data_path is missing"),
    ],
)
def test_wrong_command_lines(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_arguments(arguments)
    assert message in str(caught.value)


def test_flags_override_and_launcher_flags_are_swallowed() -> None:
    recipe = parse_arguments([*OUT, "--local_rank=1", "--no-flip", "--norm_pix_loss", "--blr", "1e-3"])
    assert (recipe.flip, recipe.norm_pix_loss, recipe.blr) == (False, True, 1e-3)


def test_every_field_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(Recipe):
        assert f"--{field.name}" in text
        assert field.metadata["help"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        dispatch([command, "--help"])
    assert caught.value.code == 0
    assert f"fasthpm {command}" in capsys.readouterr().out


def test_a_user_error_is_one_line_and_status_2() -> None:
    stream = io.StringIO()
    with redirect_stderr(stream), pytest.raises(SystemExit) as caught:
        run_command(dispatch, ["pretran"])
    assert caught.value.code == 2
    assert stream.getvalue().count("\n") == 1
    assert "unknown command 'pretran'; did you mean 'pretrain'" in stream.getvalue()


def test_an_internal_error_keeps_its_traceback() -> None:
    def broken(_: Any) -> None:
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError, match="ours"):
        run_command(broken)
