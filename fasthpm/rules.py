"""What must hold between the fields of a recipe: a function each, which raises a `UserError` that says what to change.

Arguments are named as the fields are; what one field may be by itself stands with the field (`options.option`).
"""

from typing import Any

from fasthpm import view_rules
from fasthpm.errors import UserError
from fasthpm.mask import POLICIES
from fasthpm.targets import TARGETS

MASK_TOKENS_IN_ENCODER = ("simmim_", "beit_", "ibot_")  # how the names of such models begin


def check(recipe: Any) -> None:
    """All of them, of a `Recipe` (which imports this module) whose fields are right by themselves."""
    _check_schedule(recipe)
    _check_predictor(recipe)
    _check_target(recipe)
    _check_patches(recipe)
    _check_channels(recipe)
    _check_masks(recipe)
    _check_positions(recipe)
    view_rules.check(recipe)


def _check_schedule(recipe: Any) -> None:
    kept_checkpoints_are_saved(recipe.keep_every, recipe.save_every)
    warmup_ends(recipe.warmup_epochs, recipe.epochs)


def _check_predictor(recipe: Any) -> None:
    width_fits_heads("decoder_dim", recipe.decoder_dim, recipe.decoder_heads)
    width_fits_heads("predictor_dim", recipe.predictor_dim, recipe.decoder_heads)
    model_has_predictor(recipe.model, recipe.predict_loss)
    if recipe.masks_by_difficulty:
        difficulty_is_learnt(recipe.mask_policy, recipe.question.predictor, recipe.predict_loss)
    predictor_is_used(recipe.predict_loss, recipe.predictor_dim, recipe.predictor_depth)
    _check_fast_modes(recipe)
    _check_difficulty(recipe)
    losses_are_standardized(recipe.absolute_standardize, recipe.predict_loss)


def _check_difficulty(recipe: Any) -> None:
    name, question = recipe.difficulty, recipe.question
    head_learns_from_masks(name, question.head, recipe.mask_policy, recipe.masks_by_difficulty)
    question_suits_model(name, question.mask_tokens_in_encoder, recipe.model)
    question_has_scales(name, question.scales, recipe.teacher_scale)


def _check_fast_modes(recipe: Any) -> None:
    policy, follows = recipe.mask_policy, recipe.masks_by_difficulty
    shared_predictor_is_used(recipe.predictor, recipe.predict_loss)
    shared_predictor_has_no_shape(recipe.predictor, recipe.predictor_dim, recipe.predictor_depth)
    decoder_has_blocks(recipe.model, recipe.predictor, recipe.decoder_attention)
    teacher_maps_are_of_images(recipe.teacher_maps, policy, follows, recipe.num_frames)
    teacher_is_asked(policy, follows, recipe.teacher_scale)


def _check_target(recipe: Any) -> None:
    teacher = recipe.target_teacher
    target_has_weights(recipe.target, teacher, recipe.target_weights, recipe.target_model, recipe.target_dim)
    tokenizer_is_known(recipe.target, TARGETS[recipe.target].tokenizers, recipe.target_weights, recipe.target_model)
    if teacher:
        features_are_of_images(recipe.target, recipe.model, recipe.num_frames)
        ema_features_are_whole(teacher, recipe.teacher_scale, recipe.teacher_maps)
        loss_is_of_pixels(recipe.target, recipe.pixel_loss, recipe.norm_pix_loss)


def _check_patches(recipe: Any) -> None:
    patches_fill_image(recipe.input_size, recipe.image_size, recipe.patch_size)
    is_multiple("num_frames", recipe.num_frames, "tubelet_size", recipe.tubelet_size)
    is_multiple("mask_unit", recipe.mask_unit, "patch_size", recipe.patch_size)
    small_teacher_sees_images(recipe.teacher_scale, recipe.num_frames, recipe.grid_size)


def _check_channels(recipe: Any) -> None:
    channels_are_normalised(recipe.norm_pix_channels, recipe.norm_pix_loss, recipe.patch_size)
    crops_are_square(recipe.rotate90, recipe.image_size)
    for name in ("flip_vertical", "rotate90", "channel_dropout", "channel_jitter"):
        is_of_images(name, getattr(recipe, name), recipe.num_frames)
    weights_are_given(recipe.init_channels, recipe.init_from)


def _check_positions(recipe: Any) -> None:
    video = recipe.num_frames > 1 or "video" in recipe.model
    positions_suit_model(recipe.positions, recipe.model, video)
    attention = POLICIES[recipe.mask_policy].follows == "attention"
    positions_suit_masks(recipe.positions, recipe.mask_policy, attention, recipe.teacher_scale)


def _check_masks(recipe: Any) -> None:
    patches, plan = recipe.num_patches, recipe.mask_plan
    some_stay_visible(recipe.mask_ratio, plan.num_masked, recipe.throw_ratio, plan.num_thrown, patches)
    some_are_masked(recipe.mask_ratio, plan.num_masked, patches)
    if recipe.uses_maps:
        some_are_masked_before_maps(recipe.warmup_mask_ratio, recipe.warmup_plan.num_masked, patches)


# --------------------------------------------------------------------------------------------------- schedule
def kept_checkpoints_are_saved(keep_every: int, save_every: int) -> None:
    """Only what is saved can be kept."""
    if keep_every % save_every:
        raise UserError(
            f"keep_every {keep_every} is not a multiple of save_every {save_every}: nothing would be there to keep; "
            f"use e.g. --keep_every {-(-keep_every // save_every) * save_every}"
        )


def warmup_ends(warmup_epochs: float, epochs: int) -> None:
    """The warm-up is part of the schedule."""
    if warmup_epochs > epochs:
        raise UserError(f"warmup_epochs {warmup_epochs:g} is more than epochs {epochs}; lower --warmup_epochs")


def devices_share_batch(global_batch_size: int, batch_size: int, devices: int) -> None:
    """An update is cut into whole micro-steps of all devices."""
    together = batch_size * devices
    if global_batch_size % together:
        raise UserError(
            f"global_batch_size {global_batch_size} is not a multiple of batch_size {batch_size} x {devices} devices "
            f"= {together}; choose a batch_size that divides {global_batch_size}/{devices}, another number of "
            f"devices, or --global_batch_size {max(1, global_batch_size // together) * together}"
        )


def accumulation_fits(accum_iter: int, global_batch_size: int, batch_size: int, devices: int) -> None:
    """The micro-steps of an update are as many as asked for; 0 = as many as it takes."""
    needed = global_batch_size // (batch_size * devices)
    if accum_iter not in (0, needed):
        raise UserError(
            f"accum_iter {accum_iter} contradicts global_batch_size {global_batch_size} (batch_size {batch_size} x "
            f"{devices} devices needs accum_iter {needed}); leave one of them out"
        )


def data_fill_epoch(num_samples: int, global_batch_size: int, steps_per_epoch: int) -> None:
    """A data set has the samples of an epoch, and at least those of one update."""
    available = num_samples // global_batch_size
    if available < 1:
        raise UserError(
            f"the data set has {num_samples} samples, fewer than one global batch of {global_batch_size}; "
            f"use a smaller --batch_size or --global_batch_size"
        )
    if steps_per_epoch > available:
        raise UserError(
            f"steps_per_epoch {steps_per_epoch} is more than the {available} full global batches "
            f"of {global_batch_size} that the data set has; use 0 for all of them"
        )


# ------------------------------------------------------------------------------------------------ loss predictor
def width_fits_heads(name: str, width: int, decoder_heads: int) -> None:
    """Heads share a decoder's width, and positions take four parts of it. `name`: of the field."""
    if width % decoder_heads or width % 4:
        raise UserError(f"{name} {width} must be a multiple of 4 and of decoder_heads {decoder_heads}")


def model_has_predictor(model: str, predict_loss: str) -> None:
    """MAE's models have no loss predictor to train."""
    if predict_loss != "none" and model.startswith(("mae_", "videomae_")):
        other = f"hpm_{model.partition('_')[2]}{'_video' if model.startswith('video') else ''}"
        raise UserError(f"model {model} has no loss predictor; use --predict_loss none, or the model {other}")


def difficulty_is_learnt(mask_policy: str, predictor_answers: bool, predict_loss: str) -> None:
    """Masks that follow predicted losses need a loss predictor that learns them."""
    if predictor_answers and predict_loss == "none":
        raise UserError(
            f"mask_policy {mask_policy} follows predicted losses, but predict_loss is none; use "
            f"--predict_loss relative, --difficulty in_place or measured, or --mask_policy random"
        )


def head_learns_from_masks(difficulty: str, head: bool, mask_policy: str, follows_difficulty: bool) -> None:
    """A head on the teacher's features learns where the teacher is asked."""
    if head and not follows_difficulty:
        raise UserError(
            f"difficulty {difficulty} has a head that learns on the teacher's features, but mask_policy {mask_policy} "
            f"asks no teacher; use --mask_policy hpm, or --difficulty paper"
        )


def question_suits_model(difficulty: str, mask_tokens_in_encoder: bool, model: str) -> None:
    """Mask tokens everywhere would hide the image from an encoder that sees them."""
    if model.startswith(MASK_TOKENS_IN_ENCODER) and not mask_tokens_in_encoder:
        raise UserError(
            f"difficulty {difficulty} asks with mask tokens in the decoder, and those of {model} enter its encoder; "
            f"use --difficulty measured or in_place"
        )


def question_has_scales(difficulty: str, scales: bool, teacher_scale: int) -> None:
    """Only some questions can be asked of images made smaller."""
    if teacher_scale != 1 and not scales:
        raise UserError(
            f"difficulty {difficulty} sees images in full size, but teacher_scale is {teacher_scale}; use "
            f"--teacher_scale 1, or --difficulty masked_query"
        )


def predictor_is_used(predict_loss: str, predictor_dim: int, predictor_depth: int) -> None:
    """What shapes the loss predictor needs an objective for it."""
    if predict_loss == "none" and (predictor_dim or predictor_depth):
        raise UserError(
            f"predictor_dim {predictor_dim} and predictor_depth {predictor_depth} shape the loss predictor, but "
            f"predict_loss is none; use 0 for both, or --predict_loss relative"
        )


def losses_are_standardized(absolute_standardize: bool, predict_loss: str) -> None:
    """Only the absolute objective knows raw losses."""
    if not absolute_standardize and predict_loss != "absolute":
        raise UserError(
            f"absolute_standardize is off, but predict_loss is {predict_loss}; it belongs to --predict_loss absolute"
        )


# --------------------------------------------------------------------------------------------------- fast modes
def shared_predictor_is_used(predictor: str, predict_loss: str) -> None:
    """A shared loss predictor needs an objective, too."""
    if predictor == "shared" and predict_loss == "none":
        raise UserError("predictor is shared, but predict_loss is none; use --predict_loss relative")


def shared_predictor_has_no_shape(predictor: str, predictor_dim: int, predictor_depth: int) -> None:
    """A shared loss predictor has the reconstructor's width and depth."""
    if predictor == "shared" and (predictor_dim or predictor_depth):
        raise UserError(
            f"predictor_dim {predictor_dim} and predictor_depth {predictor_depth} shape a loss predictor "
            f"of its own, but predictor is shared; use 0 for both, or --predictor separate"
        )


def decoder_has_blocks(model: str, predictor: str, decoder_attention: str) -> None:
    """SimMIM's linear head has no blocks."""
    if model.startswith(MASK_TOKENS_IN_ENCODER) and (predictor == "shared" or decoder_attention == "cross"):
        raise UserError(
            f"model {model} has no decoder blocks to share or to attend in; use --predictor separate "
            f"--decoder_attention self"
        )


def teacher_maps_are_of_images(teacher_maps: bool, mask_policy: str, follows_difficulty: bool, num_frames: int) -> None:
    """A teacher's maps are kept for masks of images that follow difficulty."""
    if teacher_maps and (not follows_difficulty or num_frames > 1):
        raise UserError(
            f"teacher_maps keeps a teacher's maps of images, but mask_policy is {mask_policy} and num_frames "
            f"{num_frames}; use --mask_policy hpm on images, or --no-teacher_maps"
        )


def teacher_is_asked(mask_policy: str, follows_difficulty: bool, teacher_scale: int) -> None:
    """What makes the teacher faster needs masks that ask it."""
    if not follows_difficulty and teacher_scale != 1:
        raise UserError(
            f"teacher_scale {teacher_scale} changes the teacher, but mask_policy {mask_policy} uses none; use "
            f"--mask_policy hpm"
        )


# ------------------------------------------------------------------------------------------------------- target
def target_has_weights(target: str, teacher: str, target_weights: str, target_model: str, target_dim: int) -> None:
    """Only a frozen teacher has weights of its own."""
    if teacher != "frozen" and (target_weights or target_model or target_dim):
        raise UserError(
            f"target_weights, target_model and target_dim describe a dino or clip teacher, but target is "
            f"{target}; leave them out, or use --target dino"
        )


def tokenizer_is_known(target: str, tokenizers: tuple[str, ...], target_weights: str, target_model: str) -> None:
    """A tokenizer is named with its kind, and one kind alone has an architecture to choose."""
    kind, colon, file = target_weights.partition(":")
    if tokenizers and target_weights and not (kind in tokenizers and colon and file):
        raise UserError(
            f"target {target} needs the kind of its tokenizer, and target_weights is {target_weights!r}; expected one "
            f"of {', '.join(f'{name}:PATH' for name in tokenizers)}"
        )
    if tokenizers and target_model and kind != "vqkd":
        raise UserError(
            f"target_model {target_model} is the encoder of a vqkd tokenizer, and target_weights is "
            f"{target_weights!r}; leave it out, or use --target_weights vqkd:FILE"
        )


def features_are_of_images(target: str, model: str, num_frames: int) -> None:
    """Features are targets for images only."""
    if num_frames > 1 or "video" in model:
        raise UserError(f"target {target} is for images, and {model} is a video model; use --target pixels")


def ema_features_are_whole(teacher: str, teacher_scale: int, teacher_maps: bool) -> None:
    """Features of the EMA teacher come from its full forward in every step."""
    if teacher == "ema" and (teacher_scale != 1 or teacher_maps):
        raise UserError(
            f"target ema takes features of every patch from the teacher in every step, and teacher_scale is "
            f"{teacher_scale}, teacher_maps {teacher_maps}; use --teacher_scale 1 --no-teacher_maps"
        )


def loss_is_of_pixels(target: str, pixel_loss: str, norm_pix_loss: bool) -> None:
    """Losses of pixels need pixels."""
    if pixel_loss != "mse" or norm_pix_loss:
        raise UserError(
            f"target {target} compares no pixels, and pixel_loss {pixel_loss} with "
            f"norm_pix_loss {norm_pix_loss} is for pixels; use --pixel_loss mse --no-norm_pix_loss, or "
            f"--target pixels"
        )


# ---------------------------------------------------------------------------------------------------- positions
def positions_suit_model(positions: str, model: str, video: bool) -> None:
    """Learned and relative positions are of images, relative ones of encoders that see all places."""
    if positions != "sincos" and video:
        raise UserError(f"positions {positions} are of images, and {model} is a video model; use --positions sincos")
    if positions == "relative" and not model.startswith(MASK_TOKENS_IN_ENCODER):
        raise UserError(
            f"positions relative need an encoder that sees all places, and {model}'s sees the visible patches alone; "
            f"use --positions sincos or learned, or a beit_ or simmim_ model"
        )


def positions_suit_masks(positions: str, mask_policy: str, attention: bool, teacher_scale: int) -> None:
    """Relative positions are of one whole grid, and masks do not follow attention that they are part of."""
    if positions == "relative" and (attention or teacher_scale != 1):
        raise UserError(
            f"positions relative are of one grid, all of whose patches are seen, and mask_policy is {mask_policy}, "
            f"teacher_scale {teacher_scale}; use --positions learned, or other masks and --teacher_scale 1"
        )


# ------------------------------------------------------------------------------------------------------ patches
def sides_of(input_size: str) -> tuple[int, int]:
    """(height, width) of "224" or "96x160", in pixels."""
    parts = input_size.split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"input_size is {input_size!r}, expected a side like 224 or HEIGHTxWIDTH like 96x160")
    return int(parts[0]), int(parts[-1])


def patches_fill_image(input_size: str, image_size: tuple[int, int], patch_size: int) -> None:
    """Both sides of an image hold whole patches."""
    for side in image_size:
        if side % patch_size:
            near = max(1, round(side / patch_size)) * patch_size
            raise UserError(
                f"input_size {input_size} is not a multiple of patch_size {patch_size}; use e.g. --input_size {near}"
            )


def is_multiple(name: str, value: int, unit_name: str, unit: int) -> None:
    """Field `name` holds whole units, whose size is field `unit_name`."""
    if value % unit:
        near = max(1, round(value / unit)) * unit
        raise UserError(f"{name} {value} is not a multiple of {unit_name} {unit}; use e.g. --{name} {near}")


def small_teacher_sees_images(teacher_scale: int, num_frames: int, grid_size: tuple[int, int]) -> None:
    """A teacher that sees images smaller divides the grid of patches, and takes no video."""
    if teacher_scale > 1 and num_frames > 1:
        raise UserError(f"teacher_scale {teacher_scale} is for images; use 1 with {num_frames} frames")
    if any(side % teacher_scale for side in grid_size):
        raise UserError(
            f"teacher_scale {teacher_scale} does not divide the grid of {grid_size[0]} x "
            f"{grid_size[1]} patches; use 1, or another --input_size"
        )


# ----------------------------------------------------------------------------------------------------- channels
def channels_are_normalised(norm_pix_channels: bool, norm_pix_loss: bool, patch_size: int) -> None:
    """Targets that are normalised per channel are normalised, and of several pixels."""
    if norm_pix_channels and not norm_pix_loss:
        raise UserError("norm_pix_channels is on, but norm_pix_loss is off; use --norm_pix_loss too")
    if norm_pix_channels and patch_size == 1:
        raise UserError(
            "norm_pix_channels needs several pixels per patch, and patch_size is 1; use --patch_size 2 or more"
        )


def crops_are_square(rotate90: bool, image_size: tuple[int, int]) -> None:
    """What is turned by 90 degrees has as many rows as columns."""
    if rotate90 and image_size[0] != image_size[1]:
        raise UserError(
            f"rotate90 turns crops by 90 degrees, and input_size is {image_size[0]}x{image_size[1]}; use a square one, "
            f"or --flip_vertical"
        )


def is_of_images(name: str, value: Any, num_frames: int) -> None:
    """Field `name` is for images only."""
    if value and num_frames > 1:
        raise UserError(f"{name} is {value}, and num_frames {num_frames}; it is of images: leave it out")


def weights_are_given(init_channels: str, init_from: str) -> None:
    """Only weights that a run starts from have channels."""
    if init_channels and not init_from:
        raise UserError(
            f"init_channels {init_channels} is of the weights of init_from, which is empty; use --init_from"
        )


# -------------------------------------------------------------------------------------------------------- masks
def some_stay_visible(mask_ratio: float, masked: int, throw_ratio: float, thrown: int, patches: int) -> None:
    """Masked and thrown patches together leave some; counts of one sample."""
    if masked and thrown and masked + thrown >= patches:
        raise UserError(
            f"mask_ratio {mask_ratio} and throw_ratio {throw_ratio} of {patches} patches leave "
            f"no visible patch; choose ratios whose sum is below 1"
        )


def some_are_masked(mask_ratio: float, masked: int, patches: int) -> None:
    """Some patches are masked, and some are not; counts of one sample."""
    if not 0 < masked < patches:
        raise UserError(
            f"mask_ratio {mask_ratio} of {patches} patches leaves no {'masked' if masked == 0 else 'visible'} patch; "
            f"choose one strictly between 0 and 1 that masks 1 to {patches - 1} patches"
        )


def some_are_masked_before_maps(warmup_mask_ratio: float, masked: int, patches: int) -> None:
    """The same, as long as there are no maps."""
    if not 0 < masked < patches:
        raise UserError(
            f"warmup_mask_ratio {warmup_mask_ratio} of {patches} patches leaves no masked or no "
            f"visible patch; choose one strictly between 0 and 1, e.g. --warmup_mask_ratio 0.75"
        )
