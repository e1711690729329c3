"""Recipes: what is wrong is named in one line, what is right round-trips."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fasthpm import recipes
from fasthpm.errors import UserError
from fasthpm.pretrain import parse_arguments
from fasthpm.recipe import Recipe, load_recipe, save_recipe


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


@pytest.mark.parametrize(("precision", "notes"), [("model", 0), ("fp8", 1)])
def test_recipe_files_with_a_field_that_is_no_more_still_load(
    precision: str, notes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that had it goes on; a value that did something is named."""
    recipe = dataclasses.replace(recipes.debug(), output_dir=str(tmp_path))
    values = dataclasses.asdict(recipe) | {"teacher_precision": precision}
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    assert load_recipe(tmp_path / "recipe.json") == recipe
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == notes
    assert all("recipe.json: teacher_precision fp8 is no longer offered; model takes" in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predictor": "shared", "predictor_depth": 2}, "but predictor is shared; use 0 for both"),
        ({"predictor": "shared", "predict_loss": "none", "mask_policy": "random"}, "predictor is shared, but predict"),
        ({"decoder_attention": "cross", "model": "simmim_vit_base_patch16_224"}, "has no decoder blocks to share"),
        ({"teacher_scale": 4}, "teacher_scale 4 does not divide the grid of 14 x 14"),
        ({"teacher_scale": 2, "mask_policy": "random"}, "changes the teacher, but mask_policy random uses none"),
        ({"teacher_maps": True, "mask_policy": "random"}, "teacher_maps keeps a teacher's maps of images, but"),
        ({"teacher_scale": 0}, "teacher_scale is 0, expected more than 0"),
    ],
)
def test_impossible_fast_modes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        dataclasses.replace(recipes.from_name("hpm_vit_base_in1k_200e"), **changes)
    assert message in str(caught.value)


def test_checkpoints_to_keep_must_be_written() -> None:
    with pytest.raises(UserError, match=r"keep_every 15 is not a multiple of save_every 10.*use e.g. --keep_every 20"):
        dataclasses.replace(recipes.debug(), save_every=10, keep_every=15)


def test_recipes_of_the_papers_have_the_papers_sizes() -> None:
    assert Recipe().num_patches == 196
    assert Recipe().num_masked == 147


def test_lr_scales_with_the_global_batch() -> None:
    recipe = Recipe(batch_size=64, global_batch_size=4096).resolve(10_000, 8)
    assert (recipe.accum_iter, recipe.lr) == (8, pytest.approx(1.5e-4 * 16))


VIDEO = {"model": "hpm_vit_nano_patch4_28_video", "num_frames": 4, "tubelet_size": 2}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"target": "pixel"}, "expected one of pixels, ema, dino, clip, tokens, distributions; did you mean"),
        ({"target": "ema", "norm_pix_loss": True}, "use --pixel_loss mse --no-norm_pix_loss"),
        ({"target": "clip", "pixel_loss": "l1"}, "use --pixel_loss mse --no-norm_pix_loss"),
        ({"target_weights": "dino.pth"}, "describe a dino or clip teacher, but target is pixels"),
        ({"target": "ema", "target_dim": 512}, "describe a dino or clip teacher, but target is ema"),
        ({"target": "ema", "teacher_scale": 7}, "takes features of every patch from the teacher"),
        ({"target": "ema", "teacher_maps": True}, "use --teacher_scale 1 --no-teacher_maps"),
        ({"target": "ema", **VIDEO}, "is for images, and hpm_vit_nano_patch4_28_video is a video model"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        dataclasses.replace(recipes.debug(), **changes)
    assert reason in str(caught.value)
