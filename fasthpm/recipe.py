"""`Recipe`: every number of a run in one frozen, flat dataclass, and the command line generated from it.

A field, its type, its default and its help sit together; there is no second configuration language. The recipe owns
*what* is trained (batch, accumulation, learning rate, clipping, epochs …); the DeepSpeed JSON owns *how* (ZeRO stage,
dtype, buckets). `recipes.py` holds one short function per published run.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasthpm.data.sampling import INTERPOLATIONS, SAMPLE_ORDERS
from fasthpm.data.video.sampling import DECODERS
from fasthpm.errors import UserError, nearest
from fasthpm.mask import BY_DIFFICULTY, MAP_CROPS, POLICIES, MaskPlan
from fasthpm.options import option

PREDICT_LOSSES = ("relative", "absolute", "none")
PIXEL_LOSSES = ("mse", "l1")
PREDICTORS = ("separate", "shared")
DECODER_ATTENTIONS = ("self", "cross")
TEACHER_PRECISIONS = ("model", "fp8")
TARGETS = ("pixels", "ema", "dino", "clip")
FROZEN_DIMS = {"dino": 768, "clip": 512}  # the published ViT-B/16s; CLIP's patches after its projection
ALPHA_SCHEDULES = ("released", "paper", "step")
ON_NONFINITE = ("halt", "skip", "rollback")


@dataclass(frozen=True)
class Recipe:
    """One pretraining run. Lengths are in epochs of the data set; sizes in pixels; rates per MAE's conventions."""

    recipe: str = option("debug", "name of the recipe that the other flags start from")
    # model
    model: str = option(
        "hpm_vit_base_patch16_224", "registered model name: hpm_…, mae_… (no loss predictor) or simmim_…"
    )
    input_size: str = option("224", "side of the training crop, or HEIGHTxWIDTH")
    patch_size: int = option(16, "side of a patch")
    channels: int = option(3, "image channels, as the prepared set has them")
    num_frames: int = option(1, "frames of a clip; 1 = images")
    sampling_rate: int = option(1, "a clip takes every how many-th frame of its video (VideoMAE: SSv2 2, Kinetics 4)")
    tubelet_size: int = option(1, "frames that a patch spans (VideoMAE: 2)")
    decoder_dim: int = option(512, "width of the reconstructor and of the loss predictor")
    decoder_depth: int = option(8, "blocks of the reconstructor (SimMIM's is a linear head) and of the loss predictor")
    predictor_dim: int = option(0, "width of the loss predictor alone; 0 = decoder_dim")
    predictor_depth: int = option(0, "blocks of the loss predictor alone; 0 = decoder_depth")
    predictor: str = option(
        "separate",
        "loss predictor: blocks of its own, or shared: a small head on the reconstructor's (fast mode)",
        choices=PREDICTORS,
    )
    decoder_attention: str = option(
        "self",
        "decoders: self attention over all tokens, or cross: only masked ones, attending to visible (fast mode)",
        choices=DECODER_ATTENTIONS,
    )
    decoder_heads: int = option(16, "attention heads of both decoders")
    # method
    mask_ratio: float = option(0.75, "share of patches that are masked")
    mask_policy: str = option("hpm", "which patches are masked", choices=POLICIES)
    mask_unit: int = option(0, "side in pixels of the squares that are masked as a whole (SimMIM: 32); 0 = patch_size")
    throw_ratio: float = option(0.0, "attention masks (AMT): share of patches that neither encoder nor loss sees")
    warmup_mask_ratio: float = option(0.75, "attention masks: ratio of the random masks before the first maps")
    map_refresh_epochs: int = option(40, "attention masks: epochs between two passes that make the maps anew")
    map_crop: str = option(
        "image",
        "attention masks: the map is cropped with its image, or its top left cells read, as released code does",
        choices=MAP_CROPS,
    )
    map_per_head: bool = option(False, "attention masks: scale each head's map and then average, as released code does")
    alpha_start: float = option(0.0, "share of the mask that the teacher chooses, at the start")
    alpha_end: float = option(0.5, "the same at the end; linear in between (Eq. 8)")
    alpha_schedule: str = option(
        "released",
        "how far between them: (epoch+1)/epochs as in the released code, epoch/epochs as in the paper, or per step",
        choices=ALPHA_SCHEDULES,
    )
    predict_loss: str = option("relative", "objective of the loss predictor (Eq. 4-7)", choices=PREDICT_LOSSES)
    absolute_standardize: bool = option(
        True, "absolute objective: of losses standardised per image (released code), not raw ones (Eq. 4)"
    )
    target: str = option(
        "pixels",
        "what masked patches are compared with: their pixels, or features by the EMA teacher, DINO or CLIP",
        choices=TARGETS,
    )
    target_weights: str = option(
        "",
        "weights of the dino or clip teacher: a file, timm:NAME, transformers:NAME or open_clip:NAME/TAG; empty = "
        "timm's of the published ViT-B/16",
    )
    target_model: str = option("", "timm architecture of these weights; empty = the published ViT-B/16, or timm:NAME's")
    target_dim: int = option(0, "width of their features; 0 = 768 for dino, 512 for clip")
    pixel_loss: str = option("mse", "reconstruction loss: mse (MAE, HPM) or l1 (SimMIM)", choices=PIXEL_LOSSES)
    norm_pix_loss: bool = option(False, "normalise each target patch to zero mean and unit variance")
    ema_momentum: float = option(0.999, "teacher momentum at the start (Eq. 1)")
    ema_momentum_end: float = option(0.9999, "teacher momentum after the ramp")
    ema_ramp_epochs: int = option(100, "epochs over which the momentum ramps up linearly")
    teacher_scale: int = option(
        1, "the teacher sees images this many times smaller, its map is enlarged; 1 = full size (fast mode)"
    )
    teacher_precision: str = option(
        "model",
        "the teacher's matrix products: model = as the model's, fp8 where the GPU has it (fast mode)",
        choices=TEACHER_PRECISIONS,
    )
    teacher_maps: bool = option(
        False,
        "masks follow maps of whole images that the teacher makes every map_refresh_epochs, cropped with the image "
        "(fast mode)",
    )
    # optimisation
    batch_size: int = option(64, "samples per device and micro-step", run_only=True)
    accum_iter: int = option(
        0, "micro-steps per update; 0 = global_batch_size / (batch_size x devices), or 1", run_only=True
    )
    global_batch_size: int = option(0, "samples per update over all devices; 0 = batch_size x devices x accum_iter")
    epochs: int = option(200, "epochs of the whole schedule")
    warmup_epochs: float = option(40.0, "epochs of linear learning-rate warm-up")
    blr: float = option(1.5e-4, "base learning rate: lr = blr x global batch / 256")
    lr: float = option(0.0, "absolute learning rate; 0 = from blr")
    min_lr: float = option(0.0, "learning rate at the end of the cosine")
    weight_decay: float = option(0.05, "AdamW weight decay (none on biases, norms and tokens)")
    beta1: float = option(0.9, "AdamW beta1")
    beta2: float = option(0.95, "AdamW beta2")
    clip_grad: float = option(5.0, "clip the gradient norm to this; 0 = off")
    init_from: str = option("", "start from the weights of this run, checkpoint or import; empty = from the seed")
    seed: int = option(0, "seed of the weights, the sample order, the crops and the masks")
    # data
    data_path: str = option("", "prepared set (.beton), several joined by commas, image folder, or synthetic:N")
    crop_min: float = option(0.2, "smallest share of the image area that a random crop covers")
    flip: bool = option(True, "flip training images at random")
    interpolation: str = option(
        "bicubic", "how crops are resized; area is a little faster and softer", choices=INTERPOLATIONS
    )
    color_jitter: float = option(0.0, "brightness, contrast and saturation vary by up to this share; 0 = off")
    sample_order: str = option(
        "random",
        "order of an epoch; blocks: for sets larger than memory, neighbours on disk are read together and shuffled "
        "within pools of 1 GiB",
        choices=SAMPLE_ORDERS,
    )
    video_decoder: str = option(
        "auto",
        "who decodes prepared videos: turbojpeg (auto); dali on the CPU; dali_gpu; dali_video, NVDEC on a set prepared "
        "with --copy",
        choices=DECODERS,
    )
    steps_per_epoch: int = option(0, "updates per epoch; 0 = all full global batches of the data set")
    # the run itself: none of these changes what is learnt
    activation_checkpointing: bool = option(
        False, "save memory: keep the blocks' inputs only, compute the rest again in the backward pass", run_only=True
    )
    num_workers: int = option(0, "decoding threads per device; 0 = cores / devices on this machine", run_only=True)
    max_bad_samples: float = option(
        0.001,
        "share of the samples that may turn out not to decode (others take their places) before the run stops; 10 are "
        "always put up with, 0 = none",
        run_only=True,
    )
    output_dir: str = option("", "folder for checkpoints, logs, pictures and the report", run_only=True)
    deepspeed_config: str = option("ds_configs/zero1_bf16.json", "DeepSpeed JSON: how to run", run_only=True)
    resume: str = option("auto", "auto = newest valid checkpoint in output_dir, none, or a checkpoint", run_only=True)
    log_every: int = option(20, "updates between two readings of the metrics", run_only=True)
    save_every: int = option(10, "epochs between two checkpoints", run_only=True)
    keep_checkpoints: int = option(3, "checkpoints kept; the newest valid one is never deleted", run_only=True)
    keep_every: int = option(0, "epochs between two checkpoints that are kept for ever; 0 = none", run_only=True)
    on_nonfinite: str = option(
        "halt",
        "what an update does whose loss or gradient is not finite: end the run, be left out, or go back to the last "
        "checkpoint and leave its samples out",
        choices=ON_NONFINITE,
        run_only=True,
    )
    max_nonfinite: int = option(10, "updates that on_nonfinite may leave out before the run ends", run_only=True)
    panel_every: int = option(10, "epochs between two picture panels; 0 = off", run_only=True)
    compile: bool = option(
        False, "compile the step with torch.compile: minutes at the start, then faster on GPUs", run_only=True
    )
    online_probe_every: int = option(
        0, "updates between two steps of a linear probe on the encoder's detached features; 0 = off", run_only=True
    )
    online_knn_every: int = option(
        0, "epochs between two k-NN tests on a fixed part of the training set; 0 = off", run_only=True
    )
    stop_after: int = option(0, "stop after this many updates, keeping the schedule; 0 = never", run_only=True)

    def __post_init__(self) -> None:
        self._check_types()
        self._check_ranges()
        self._check_target()
        self._check_patches()

    # ---------------------------------------------------------------------------------------------- derived
    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the training crop."""
        height, _, width = self.input_size.partition("x")
        return int(height), int(width or height)

    @property
    def grid_size(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def slots(self) -> int:
        """Frame slots: tubelets along time, 1 for images."""
        return self.num_frames // self.tubelet_size

    @property
    def num_patches(self) -> int:
        """L."""
        return self.slots * self.grid_size[0] * self.grid_size[1]

    @property
    def num_masked(self) -> int:
        """M; see `MaskPlan.num_masked`."""
        return self.mask_plan.num_masked

    @property
    def mask_plan(self) -> MaskPlan:
        """How the masks are drawn."""
        unit = (self.mask_unit or self.patch_size) // self.patch_size
        return MaskPlan(
            self.mask_policy, self.mask_ratio, self.grid_size, self.slots, unit=unit, throw_ratio=self.throw_ratio
        )

    @property
    def warmup_plan(self) -> MaskPlan:
        """How they are drawn as long as there are no maps, if the policy needs them; else `mask_plan`."""
        if self.mask_policy != "attention":
            return self.mask_plan
        return dataclasses.replace(self.mask_plan, policy="random", mask_ratio=self.warmup_mask_ratio, throw_ratio=0.0)

    @property
    def uses_maps(self) -> bool:
        """Whether a run keeps maps of its samples, of attention or of the teacher's difficulty."""
        return self.mask_policy == "attention" or self.teacher_maps

    @property
    def uses_teacher(self) -> bool:
        """Whether a step needs the EMA teacher: for its difficulty, or for its features."""
        return self.masks_by_difficulty or self.target == "ema"

    @property
    def masks_by_difficulty(self) -> bool:
        """Whether the mask policy follows the teacher's difficulty."""
        return self.mask_policy in BY_DIFFICULTY

    @property
    def frozen_dim(self) -> int:
        """Width of the frozen teacher's features (`target` dino or clip); 0 without one."""
        return self.target_dim or FROZEN_DIMS.get(self.target, 0)

    @property
    def approximates_teacher(self) -> bool:
        """Whether the masks follow a map that is not the exact teacher's of this crop and update."""
        return self.teacher_maps or self.teacher_scale > 1 or self.teacher_precision != "model"

    @property
    def fast_modes(self) -> list[str]:
        """The fast modes that are on, each as `field value`."""
        names = (
            "teacher_maps",
            "predictor",
            "predictor_depth",
            "predictor_dim",
            "decoder_attention",
            "teacher_scale",
            "teacher_precision",
        )
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        return [f"{name} {getattr(self, name)}" for name in names if getattr(self, name) != usual[name]]

    @property
    def total_steps(self) -> int:
        """Updates of the whole schedule; known once the recipe is resolved."""
        return self.epochs * self.steps_per_epoch

    def with_data(self, data_path: str) -> "Recipe":
        """The same recipe on other data."""
        return dataclasses.replace(self, data_path=data_path)

    def accumulation(self, world_size: int) -> int:
        """Micro-steps per update on `world_size` devices.

        **Raises:** `UserError` if they do not fit together with global_batch_size or accum_iter.
        """
        per_micro_step = self.batch_size * world_size
        asked = self.global_batch_size or per_micro_step * max(self.accum_iter, 1)
        if asked % per_micro_step:
            raise UserError(
                f"global_batch_size {asked} is not a multiple of batch_size {self.batch_size} x {world_size} devices "
                f"= {per_micro_step}; choose a batch_size that divides {asked}/{world_size}, another number of "
                f"devices, or --global_batch_size {max(1, asked // per_micro_step) * per_micro_step}"
            )
        accum_iter = asked // per_micro_step
        if self.accum_iter not in (0, accum_iter):
            raise UserError(
                f"accum_iter {self.accum_iter} contradicts global_batch_size {asked} (batch_size {self.batch_size} x "
                f"{world_size} devices needs accum_iter {accum_iter}); leave one of them out"
            )
        return accum_iter

    def resolve(self, num_samples: int, world_size: int) -> "Recipe":
        """Fill what depends on the data and the machines: accum_iter, global_batch_size, lr, steps_per_epoch.

        **Raises:** `UserError` where the numbers contradict each other.
        """
        accum_iter = self.accumulation(world_size)
        asked = accum_iter * self.batch_size * world_size
        available = num_samples // asked
        if available < 1:
            raise UserError(
                f"the data set has {num_samples} samples, fewer than one global batch of {asked}; "
                f"use a smaller --batch_size or --global_batch_size"
            )
        if self.steps_per_epoch > available:
            raise UserError(
                f"steps_per_epoch {self.steps_per_epoch} is more than the {available} full global batches "
                f"of {asked} that the data set has; use 0 for all of them"
            )
        return dataclasses.replace(
            self,
            accum_iter=accum_iter,
            global_batch_size=asked,
            lr=self.lr or self.blr * asked / 256,
            steps_per_epoch=self.steps_per_epoch or available,
        )

    # ---------------------------------------------------------------------------------------------- checks
    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            value, want = getattr(self, field.name), field.type
            if want is float and type(value) is int:
                object.__setattr__(self, field.name, float(value))
            elif type(value) is not want:
                raise UserError(f"{field.name} is {value!r}, expected {getattr(want, '__name__', want)}")
            choices = field.metadata["choices"]
            if choices and value not in choices:
                raise UserError(
                    f"{field.name} is {value!r}, expected one of {', '.join(choices)}{nearest(str(value), choices)}"
                )

    def _check_ranges(self) -> None:
        positive = (
            "patch_size",
            "channels",
            "num_frames",
            "sampling_rate",
            "tubelet_size",
            "decoder_dim",
            "decoder_depth",
            "decoder_heads",
            "batch_size",
            "epochs",
            "log_every",
            "save_every",
            "keep_checkpoints",
            "teacher_scale",
            "map_refresh_epochs",
        )
        not_negative = (
            "accum_iter",
            "online_probe_every",
            "online_knn_every",
            "global_batch_size",
            "warmup_epochs",
            "blr",
            "lr",
            "min_lr",
            "weight_decay",
            "clip_grad",
            "steps_per_epoch",
            "num_workers",
            "panel_every",
            "stop_after",
            "keep_every",
            "max_nonfinite",
            "ema_ramp_epochs",
            "seed",
            "mask_unit",
            "target_dim",
            "predictor_dim",
            "predictor_depth",
        )
        shares = (
            *("alpha_start", "alpha_end", "ema_momentum", "ema_momentum_end", "crop_min", "beta1", "beta2"),
            *("color_jitter", "max_bad_samples", "throw_ratio", "warmup_mask_ratio"),
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}, expected more than 0")
        for name in not_negative:
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} is {getattr(self, name)}, expected 0 or more")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        if self.keep_every % self.save_every:
            raise UserError(
                f"keep_every {self.keep_every} is not a multiple of save_every {self.save_every}: nothing would be "
                f"there to keep; use e.g. --keep_every {-(-self.keep_every // self.save_every) * self.save_every}"
            )
        if self.warmup_epochs > self.epochs:
            raise UserError(
                f"warmup_epochs {self.warmup_epochs:g} is more than epochs {self.epochs}; lower --warmup_epochs"
            )
        for name in ("decoder_dim", "predictor_dim"):
            if getattr(self, name) % self.decoder_heads or getattr(self, name) % 4:
                raise UserError(
                    f"{name} {getattr(self, name)} must be a multiple of 4 and of decoder_heads {self.decoder_heads}"
                )
        if self.predict_loss != "none" and self.model.startswith(("mae_", "videomae_")):
            other = f"hpm_{self.model.partition('_')[2]}{'_video' if self.model.startswith('video') else ''}"
            raise UserError(f"model {self.model} has no loss predictor; use --predict_loss none, or the model {other}")
        if self.masks_by_difficulty and self.predict_loss == "none":
            raise UserError(
                f"mask_policy {self.mask_policy} follows predicted losses, but predict_loss is none; use "
                f"--predict_loss relative, or --mask_policy random"
            )
        if self.predict_loss == "none" and (self.predictor_dim or self.predictor_depth):
            raise UserError(
                f"predictor_dim {self.predictor_dim} and predictor_depth {self.predictor_depth} shape the loss "
                f"predictor, but predict_loss is none; use 0 for both, or --predict_loss relative"
            )
        self._check_fast_modes()
        if not self.absolute_standardize and self.predict_loss != "absolute":
            raise UserError(
                f"absolute_standardize is off, but predict_loss is {self.predict_loss}; it belongs to "
                f"--predict_loss absolute"
            )

    def _check_fast_modes(self) -> None:
        shared, cross = self.predictor == "shared", self.decoder_attention == "cross"
        if shared and self.predict_loss == "none":
            raise UserError("predictor is shared, but predict_loss is none; use --predict_loss relative")
        if shared and (self.predictor_dim or self.predictor_depth):
            raise UserError(
                f"predictor_dim {self.predictor_dim} and predictor_depth {self.predictor_depth} shape a loss predictor "
                f"of its own, but predictor is shared; use 0 for both, or --predictor separate"
            )
        if (shared or cross) and self.model.startswith("simmim_"):
            raise UserError(
                f"model {self.model} has no decoder blocks to share or to attend in; use --predictor separate "
                f"--decoder_attention self"
            )
        if self.teacher_maps and (not self.masks_by_difficulty or self.num_frames > 1):
            raise UserError(
                f"teacher_maps keeps a teacher's maps of images, but mask_policy is {self.mask_policy} and num_frames "
                f"{self.num_frames}; use --mask_policy hpm on images, or --no-teacher_maps"
            )
        if not self.masks_by_difficulty and (self.teacher_scale != 1 or self.teacher_precision != "model"):
            raise UserError(
                f"teacher_scale {self.teacher_scale} and teacher_precision {self.teacher_precision} change the "
                f"teacher, but mask_policy {self.mask_policy} uses none; use --mask_policy hpm"
            )

    def _check_target(self) -> None:
        if self.target not in FROZEN_DIMS and (self.target_weights or self.target_model or self.target_dim):
            raise UserError(
                f"target_weights, target_model and target_dim describe a dino or clip teacher, but target is "
                f"{self.target}; leave them out, or use --target dino"
            )
        if self.target == "pixels":
            return
        if self.num_frames > 1 or "video" in self.model:
            raise UserError(
                f"target {self.target} is for images, and {self.model} is a video model; use --target pixels"
            )
        if self.target == "ema" and (self.teacher_scale != 1 or self.teacher_maps):
            raise UserError(
                f"target ema takes features of every patch from the teacher in every step, and teacher_scale is "
                f"{self.teacher_scale}, teacher_maps {self.teacher_maps}; use --teacher_scale 1 --no-teacher_maps"
            )
        if self.pixel_loss != "mse" or self.norm_pix_loss:
            raise UserError(
                f"target {self.target} compares directions of features, and pixel_loss {self.pixel_loss} with "
                f"norm_pix_loss {self.norm_pix_loss} is for pixels; use --pixel_loss mse --no-norm_pix_loss, or "
                f"--target pixels"
            )

    def _check_patches(self) -> None:
        parts = self.input_size.split("x")
        if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise UserError(f"input_size is {self.input_size!r}, expected a side like 224 or HEIGHTxWIDTH like 96x160")
        for side in self.image_size:
            if side % self.patch_size:
                near = max(1, round(side / self.patch_size)) * self.patch_size
                raise UserError(
                    f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}; "
                    f"use e.g. --input_size {near}"
                )
        if self.num_frames % self.tubelet_size:
            near = max(1, round(self.num_frames / self.tubelet_size)) * self.tubelet_size
            raise UserError(
                f"num_frames {self.num_frames} is not a multiple of tubelet_size {self.tubelet_size}; use e.g. "
                f"--num_frames {near}"
            )
        if self.mask_unit % self.patch_size:
            near = max(1, round(self.mask_unit / self.patch_size)) * self.patch_size
            raise UserError(
                f"mask_unit {self.mask_unit} is not a multiple of patch_size {self.patch_size}; use e.g. "
                f"--mask_unit {near}"
            )
        if self.teacher_scale > 1 and self.num_frames > 1:
            raise UserError(f"teacher_scale {self.teacher_scale} is for images; use 1 with {self.num_frames} frames")
        if any(side % self.teacher_scale for side in self.grid_size):
            raise UserError(
                f"teacher_scale {self.teacher_scale} does not divide the grid of {self.grid_size[0]} x "
                f"{self.grid_size[1]} patches; use 1, or another --input_size"
            )
        masked, thrown = self.num_masked, self.mask_plan.num_thrown
        if masked and thrown and masked + thrown >= self.num_patches:
            raise UserError(
                f"mask_ratio {self.mask_ratio} and throw_ratio {self.throw_ratio} of {self.num_patches} patches leave "
                f"no visible patch; choose ratios whose sum is below 1"
            )
        if not 0 < masked < self.num_patches:
            raise UserError(
                f"mask_ratio {self.mask_ratio} of {self.num_patches} patches leaves no "
                f"{'masked' if masked == 0 else 'visible'} patch; choose one strictly between 0 and 1 that "
                f"masks 1 to {self.num_patches - 1} patches"
            )
        if self.uses_maps and not 0 < self.warmup_plan.num_masked < self.num_patches:
            raise UserError(
                f"warmup_mask_ratio {self.warmup_mask_ratio} of {self.num_patches} patches leaves no masked or no "
                f"visible patch; choose one strictly between 0 and 1, e.g. --warmup_mask_ratio 0.75"
            )


# -------------------------------------------------------------------------------------------------- to and from text
def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write `recipe` as JSON that `--recipe PATH` replays."""
    path.write_text(recipe_text(recipe))


def recipe_text(recipe: Recipe) -> str:
    """`recipe` as JSON."""
    return json.dumps(dataclasses.asdict(recipe), indent=2) + "\n"


def load_recipe(path: Path) -> Recipe:
    """Read what `save_recipe` wrote.

    **Raises:** `UserError` for a missing or unreadable file and for unknown fields.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"recipe file {path} cannot be read ({error}); expected the recipe.json of a run") from error
    return build_recipe(values, source=str(path))


def build_recipe(values: dict[str, Any], *, source: str) -> Recipe:
    """A `Recipe` from named values; unknown names are an error that names the nearest field."""
    known = [field.name for field in dataclasses.fields(Recipe)]
    for name in values:
        if name not in known:
            raise UserError(f"{source}: unknown recipe field {name!r}{nearest(name, known)}")
    return Recipe(**values)


def science_of(recipe: Recipe) -> dict[str, Any]:
    """The fields that decide what is learnt: two runs that agree on them are the same run."""
    return {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe) if not f.metadata["run_only"]}
