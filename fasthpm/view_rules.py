"""What must hold between a recipe's fields where it learns from several views of each image, or must not be set where
it doesn't. As in `rules`, a function each."""

import dataclasses
from typing import Any

from fasthpm.errors import UserError
from fasthpm.mask_counts import COUNTED_POLICIES, CountPlan
from fasthpm.view_fields import MOST_VIEWS, ViewFields


def check(recipe: Any) -> None:
    """All of them, of a `Recipe` whose fields are right by themselves."""
    crops_have_shares(recipe.crop_min, recipe.crop_max, recipe.num_frames)
    clipping_has_a_limit(recipe.clip_per_tensor, recipe.clip_grad)
    if not recipe.uses_views:
        views_are_used(recipe)
        return
    model_projects(recipe.model, recipe.target)
    views_are_compared(recipe.global_crops, recipe.local_crops)
    local_crops_hold_patches(recipe.local_crops, recipe.local_size, recipe.patch_size)
    local_crops_have_shares(recipe.local_crop_min, recipe.local_crop_max)
    any_number_can_be_masked(recipe.mask_policy, recipe.mask_unit, recipe.patch_size, recipe.positions)
    counts_make_sense(recipe.mask_ratio, recipe.mask_ratio_spread, recipe.num_patches)
    difficulty_is_in_place(recipe.predict_loss, recipe.difficulty, recipe.masks_by_difficulty)
    colours_are_of_images(recipe.view_augment, recipe.channels)
    teacher_is_exact(recipe.teacher_scale, recipe.teacher_maps)


def views_are_used(recipe: Any) -> None:
    """What concerns views is set where there are some."""
    for field in dataclasses.fields(ViewFields):
        value = getattr(recipe, field.name)
        if field.name != "crop_max" and value != field.default:
            raise UserError(
                f"{field.name} is {value}, but target is {recipe.target}, which learns from one view of each image; "
                f"use --target distributions with an ibot_ model, or leave it out"
            )
    if recipe.freeze_last_layer_epochs:
        raise UserError(
            f"freeze_last_layer_epochs is {recipe.freeze_last_layer_epochs}, but target {recipe.target} has no "
            f"projection head whose last layer could wait; use 0, or --target distributions"
        )
    if recipe.model.startswith("ibot_"):
        raise UserError(
            f"model {recipe.model} projects onto prototypes, but target is {recipe.target}; use --target "
            f"distributions, or a simmim_ or beit_ model"
        )


def model_projects(model: str, target: str) -> None:
    """Distributions over prototypes need the head that makes them."""
    if not model.startswith("ibot_"):
        other = f"ibot_{model.partition('_')[2].removesuffix('_video')}"
        raise UserError(f"target {target} needs a projection head, which model {model} lacks; use --model {other}")


def views_are_compared(global_crops: int, local_crops: int) -> None:
    """A view is compared with another one, and each has a number."""
    if global_crops < 2:
        raise UserError(f"global_crops is {global_crops}, but views are compared with each other; use --global_crops 2")
    if global_crops + local_crops > MOST_VIEWS:
        raise UserError(
            f"global_crops {global_crops} and local_crops {local_crops} are more than {MOST_VIEWS} views of an image; "
            f"use fewer"
        )


def clipping_has_a_limit(clip_per_tensor: bool, clip_grad: float) -> None:
    """What clips gradients one by one needs a norm to clip them to."""
    if clip_per_tensor and not clip_grad:
        raise UserError("clip_per_tensor clips every gradient to clip_grad, which is 0; use e.g. --clip_grad 3")


def crops_have_shares(crop_min: float, crop_max: float, num_frames: int) -> None:
    """The largest crop is no smaller than the smallest."""
    if crop_max < crop_min:
        raise UserError(f"crop_max {crop_max} is less than crop_min {crop_min}; use --crop_max 1, or a lower crop_min")
    if crop_max < 1 and num_frames > 1:
        raise UserError(f"crop_max {crop_max} is for images, and clips have {num_frames} frames; use --crop_max 1")


def local_crops_have_shares(local_crop_min: float, local_crop_max: float) -> None:
    """The same of the small ones."""
    if local_crop_max < local_crop_min:
        raise UserError(
            f"local_crop_max {local_crop_max} is less than local_crop_min {local_crop_min}; use one that is not"
        )


def local_crops_hold_patches(local_crops: int, local_size: int, patch_size: int) -> None:
    """Small crops are whole patches."""
    if local_crops and local_size % patch_size:
        near = max(1, round(local_size / patch_size)) * patch_size
        raise UserError(
            f"local_size {local_size} is not a multiple of patch_size {patch_size}; use e.g. --local_size {near}"
        )


def any_number_can_be_masked(mask_policy: str, mask_unit: int, patch_size: int, positions: str) -> None:
    """Counts are drawn anew for every image, patch by patch, in a model whose positions fit every grid."""
    if mask_policy not in COUNTED_POLICIES:
        raise UserError(
            f"mask_policy {mask_policy} masks one number of patches, and with several views it is drawn for each "
            f"image; use one of {', '.join(COUNTED_POLICIES)}"
        )
    if mask_unit not in (0, patch_size):
        raise UserError(f"mask_unit is {mask_unit}, but with several views patches are masked; use --mask_unit 0")
    if positions == "relative":
        raise UserError("positions relative are of one grid, and local crops have another; use learned or sincos")


def counts_make_sense(mask_ratio: float, mask_ratio_spread: float, patches: int) -> None:
    """What is drawn lies between none and all, and is not always none."""
    if mask_ratio_spread > mask_ratio or mask_ratio + mask_ratio_spread >= 1:
        raise UserError(
            f"mask_ratio {mask_ratio} ± mask_ratio_spread {mask_ratio_spread} reaches beyond 0 to 1; use a smaller "
            f"--mask_ratio_spread"
        )
    if not CountPlan(mask_ratio, mask_ratio_spread, 0.0, patches).most:
        raise UserError(f"mask_ratio {mask_ratio} of {patches} patches masks none; use a larger --mask_ratio")


def difficulty_is_in_place(predict_loss: str, difficulty: str, follows: bool) -> None:
    """A head on the teacher's features predicts what is hard: counts differ, and losses are of distributions."""
    if predict_loss != "none" or (follows and difficulty != "in_place"):
        raise UserError(
            f"predict_loss is {predict_loss} and difficulty {difficulty}, but with several views a head on the "
            f"teacher's features says what is hard; use --predict_loss none --difficulty in_place"
        )


def colours_are_of_images(view_augment: str, channels: int) -> None:
    """What changes colours knows grey and RGB."""
    if view_augment != "none" and channels not in (1, 3):
        raise UserError(
            f"view_augment {view_augment} is for grey images and RGB, and channels is {channels}; use --view_augment "
            f"none"
        )


def teacher_is_exact(teacher_scale: int, teacher_maps: bool) -> None:
    """The teacher reads all of both views in every step: there is nothing to save."""
    if teacher_scale != 1 or teacher_maps:
        raise UserError(
            f"teacher_scale {teacher_scale} and teacher_maps {teacher_maps} spare a teacher that has to read every "
            f"view anyway; use --teacher_scale 1 --no-teacher_maps"
        )
