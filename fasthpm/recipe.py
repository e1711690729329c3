"""`Recipe`: every number of a run in one frozen, flat dataclass, and the command line generated from it.

A field, its type, default, help, range and origin sit together; there is no second configuration language. What must
hold between fields stands in `rules`. The recipe owns *what* is trained (batch, accumulation, learning rate, clipping,
epochs …); the DeepSpeed JSON owns *how* (ZeRO stage, dtype, buckets). `recipes` holds a short function for each
published run.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasthpm import rules
from fasthpm.cli import OWNERS
from fasthpm.data.options import LoaderOptions
from fasthpm.data.sampling import INTERPOLATIONS, SAMPLE_ORDERS
from fasthpm.data.video.sampling import DECODERS
from fasthpm.difficulty import DIFFICULTIES, Difficulty, question_of
from fasthpm.errors import UserError, nearest, note_once
from fasthpm.files import write_text
from fasthpm.mask import MAP_CROPS, POLICIES, MaskPlan
from fasthpm.options import OURS, PAPER, RELEASED, option, validate
from fasthpm.sizes import Sizes
from fasthpm.targets import TARGETS
from fasthpm.view_fields import ViewFields

PREDICT_LOSSES = ("relative", "absolute", "none")
PIXEL_LOSSES = ("mse", "l1")
PREDICTORS = ("separate", "shared")
DECODER_ATTENTIONS = ("self", "cross")
POSITIONS = ("sincos", "learned", "relative")
ALPHA_SCHEDULES = ("released", "paper", "step")
EMA_SCHEDULES = ("linear", "cosine")
CUDA_GRAPH = ("auto", "on", "off")
ON_NONFINITE = ("halt", "skip", "rollback")
BACKENDS = ("auto", "flash", "cudnn", "efficient", "math")
GONE = {"teacher_precision": "model"}  # fields of older recipe files, and the value that is what all runs do now


@dataclass(frozen=True)
class Recipe(Sizes, ViewFields):
    """One pretraining run. Lengths are in epochs of the data set; sizes in pixels; rates per MAE's conventions."""

    recipe: str = option("debug", "name of the recipe that the other flags start from")
    # model
    model: str = option(
        "hpm_vit_base_patch16_224",
        "registered model name: hpm_…, mae_… (no loss predictor), simmim_… or beit_…",
        origin=f"{PAPER}, ViT-B/16",
    )
    input_size: str = option("224", "side of the training crop, or HEIGHTxWIDTH", origin=PAPER)
    patch_size: int = option(16, "side of a patch", above=0, origin=PAPER)
    channels: int = option(3, "image channels of the model, 1 or 3; sets are converted", above=0, origin=PAPER)
    num_frames: int = option(1, "frames of a clip; 1 = images", above=0)
    sampling_rate: int = option(
        1, "a clip takes every how many-th frame of its video (VideoMAE: SSv2 2, Kinetics 4)", above=0
    )
    tubelet_size: int = option(1, "frames that a patch spans (VideoMAE: 2)", above=0)
    decoder_dim: int = option(512, "width of the reconstructor and of the loss predictor", above=0, origin=RELEASED)
    decoder_depth: int = option(
        8,
        "blocks of the reconstructor (SimMIM's is a linear head) and of the loss predictor",
        above=0,
        origin=f"{PAPER}, which ablates 1 to 12",
    )
    predictor_dim: int = option(0, "width of the loss predictor alone; 0 = decoder_dim", low=0)
    predictor_depth: int = option(0, "blocks of the loss predictor alone; 0 = decoder_depth", low=0)
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
    positions: str = option(
        "sincos",
        "of the encoder's tokens: fixed sine-cosine, learned, or (mask tokens in the encoder) relative: one table of "
        "biases for all blocks, without the fastest attention kernels",
        choices=POSITIONS,
        origin=f"{RELEASED}, MAE's and HPM's; BEiT has learned or relative ones",
    )
    drop_path: float = option(
        0.0, "share of samples whose branch the student's last block leaves out, from 0 in the first", low=0, below=1
    )
    layer_scale: float = option(0.0, "the blocks' branches begin scaled by this, learnt per channel; 0 = off", low=0)
    decoder_heads: int = option(16, "attention heads of both decoders", above=0, origin=RELEASED)
    # method
    mask_ratio: float = option(0.75, "share of patches that are masked", origin=PAPER)
    mask_policy: str = option("hpm", "which patches are masked", choices=POLICIES, origin=f"{PAPER}, Alg. 1")
    mask_unit: int = option(
        0, "side in pixels of the squares that are masked as a whole (SimMIM: 32); 0 = patch_size", low=0
    )
    throw_ratio: float = option(
        0.0, "attention masks (AMT): share of patches that neither encoder nor loss sees", low=0, high=1
    )
    warmup_mask_ratio: float = option(
        0.75, "attention masks: ratio of the random masks before the first maps", low=0, high=1
    )
    map_refresh_epochs: int = option(
        40, "attention masks and teacher_maps: epochs after which the maps are renewed", above=0
    )
    map_crop: str = option(
        "image",
        "attention masks: the map is cropped with its image, or its top left cells read, as released code does",
        choices=MAP_CROPS,
    )
    map_per_head: bool = option(False, "attention masks: scale each head's map and then average, as released code does")
    alpha_start: float = option(
        0.0, "share of the mask that the teacher chooses, at the start", low=0, high=1, origin=f"{PAPER}, Eq. 8"
    )
    alpha_end: float = option(
        0.5,
        "the same at the end; linear in between (Eq. 8)",
        low=0,
        high=1,
        origin=f"{PAPER}, Eq. 8; the released code counts (epoch+1)/T",
    )
    alpha_schedule: str = option(
        "released",
        "how far between them: (epoch+1)/epochs as in the released code, epoch/epochs as in the paper, or per step",
        choices=ALPHA_SCHEDULES,
        origin=f"{RELEASED}, the paper counts epoch/T",
    )
    predict_loss: str = option(
        "relative", "objective of the loss predictor (Eq. 4-7)", choices=PREDICT_LOSSES, origin=f"{PAPER}, Eq. 5-7"
    )
    difficulty: str = option(
        "paper",
        "how the teacher is asked what is hard (cross decoders know masked_query only)",
        choices=DIFFICULTIES,
        origin=PAPER,
    )
    absolute_standardize: bool = option(
        True,
        "absolute objective: of losses standardised per image (released code), not raw ones (Eq. 4)",
        origin=f"{RELEASED}, Eq. 4 has raw losses",
    )
    target: str = option(
        "pixels",
        "what masked patches are compared with: their pixels, features by the EMA teacher, DINO or CLIP, or tokens",
        choices=TARGETS,
        origin=f"{PAPER}, which ablates features of the EMA teacher, DINO and CLIP",
    )
    target_weights: str = option(
        "",
        "weights of the dino or clip teacher: a file, timm:NAME, transformers:NAME or open_clip:NAME/TAG; empty = "
        "timm's of the published ViT-B/16; of tokens their tokenizer: kmeans:FILE, dvae:FOLDER or vqkd:FILE",
    )
    target_model: str = option(
        "", "timm architecture of these weights; empty = the published ViT-B/16, or timm:NAME's (kmeans, dvae: none)"
    )
    target_dim: int = option(
        0, "width of their features, or number of tokens; 0 = 768 for dino, 512 for clip, 8192 tokens", low=0
    )
    pixel_loss: str = option(
        "mse", "reconstruction loss: mse (MAE, HPM) or l1 (SimMIM)", choices=PIXEL_LOSSES, origin=PAPER
    )
    norm_pix_loss: bool = option(
        False,
        "normalise each target patch to zero mean and unit variance",
        origin=f"{RELEASED}, its scripts; MAE's have --norm_pix_loss",
    )
    ema_momentum: float = option(
        0.999,
        "teacher momentum at the start (Eq. 1)",
        low=0,
        high=1,
        origin=f"{RELEASED}, a ramp; the papers name one momentum: --ema_ramp_epochs 0 with both momenta alike",
    )
    ema_momentum_end: float = option(0.9999, "teacher momentum after the ramp", low=0, high=1, origin=RELEASED)
    ema_schedule: str = option(
        "linear", "how it gets there: linear over ema_ramp_epochs, or a cosine over all updates", choices=EMA_SCHEDULES
    )
    ema_ramp_epochs: int = option(
        100,
        "epochs over which the momentum ramps up linearly",
        low=0,
        origin=f"{RELEASED}, not scaled to the run's length",
    )
    teacher_scale: int = option(
        1, "the teacher sees images this many times smaller, its map is enlarged; 1 = full size (fast mode)", above=0
    )
    teacher_maps: bool = option(
        False,
        "masks follow maps of whole images that the teacher makes every map_refresh_epochs, cropped with the image "
        "(fast mode)",
    )
    # optimisation
    batch_size: int = option(64, "samples per device and micro-step", above=0, run_only=True)
    accum_iter: int = option(
        0, "micro-steps per update; 0 = global_batch_size / (batch_size x devices), or 1", low=0, run_only=True
    )
    global_batch_size: int = option(
        0,
        "samples per update over all devices; 0 = batch_size x devices x accum_iter",
        low=0,
        origin=f"{OURS}, PRETRAIN.md: 2048, the released scripts: 256",
    )
    epochs: int = option(200, "epochs of the whole schedule", above=0, origin=f"{PAPER}, of the ablations")
    warmup_epochs: float = option(40.0, "epochs of linear learning-rate warm-up", low=0, origin=RELEASED)
    blr: float = option(1.5e-4, "base learning rate: lr = blr x global batch / 256", low=0, origin=RELEASED)
    lr: float = option(0.0, "absolute learning rate; 0 = from blr", low=0, origin=f"{RELEASED}, blr x batch / 256")
    min_lr: float = option(0.0, "learning rate at the end of the cosine", low=0, origin=RELEASED)
    weight_decay: float = option(
        0.05,
        "AdamW weight decay (none on biases, norms and tokens)",
        low=0,
        origin=f"{RELEASED}, which decays cls and mask token too",
    )
    weight_decay_end: float = option(-1.0, "the same at the end of a cosine; below 0 = constant", low=-1)
    beta1: float = option(0.9, "AdamW beta1", low=0, high=1, origin=RELEASED)
    beta2: float = option(0.95, "AdamW beta2", low=0, high=1, origin=RELEASED)
    clip_grad: float = option(
        5.0, "clip the gradient norm to this; 0 = off", low=0, origin=f"{RELEASED}, not in the papers: --clip_grad 0"
    )
    clip_per_tensor: bool = option(False, "clip_grad is of each parameter's gradient by itself (DINO, iBOT)")
    freeze_last_layer_epochs: int = option(0, "epochs in which the head's last layer stays as it is", low=0)
    init_from: str = option("", "start from the weights of this run, checkpoint or import; empty = from the seed")
    seed: int = option(0, "seed of the weights, the sample order, the crops and the masks", low=0)
    # data
    data_path: str = option("", "prepared set (.beton), several joined by commas, image folder, or synthetic:N")
    crop_min: float = option(
        0.2, "smallest share of the image area that a random crop covers", low=0, high=1, origin=RELEASED
    )
    flip: bool = option(True, "flip training images at random", origin=RELEASED)
    interpolation: str = option(
        "bicubic", "how crops are resized; area is a little faster and softer", choices=INTERPOLATIONS
    )
    color_jitter: float = option(
        0.0, "brightness, contrast and saturation vary by up to this share; 0 = off", low=0, high=1
    )
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
    steps_per_epoch: int = option(0, "updates per epoch; 0 = all full global batches of the data set", low=0)
    # the run itself: none of these changes what is learnt
    activation_checkpointing: bool = option(
        False, "save memory: keep the blocks' inputs only, compute the rest again in the backward pass", run_only=True
    )
    num_workers: int = option(
        0, "decoding threads per device; 0 = cores / devices on this machine", low=0, run_only=True
    )
    max_bad_samples: float = option(
        0.001,
        "share of the samples that may turn out not to decode (others take their places) before the run stops; 10 are "
        "always accepted, 0 = none",
        low=0,
        high=1,
        run_only=True,
    )
    output_dir: str = option("", "folder for checkpoints, logs, pictures and the report", run_only=True)
    deepspeed_config: str = option(
        "zero1_bf16", "DeepSpeed JSON, how to run: a preset of ds_configs/ by name, or a file", run_only=True
    )
    resume: str = option("auto", "auto = newest valid checkpoint in output_dir, none, or a checkpoint", run_only=True)
    log_every: int = option(20, "updates between two readings of the metrics", above=0, run_only=True)
    save_every: int = option(10, "epochs between two checkpoints", above=0, run_only=True)
    keep_checkpoints: int = option(3, "checkpoints kept; the newest valid one is never deleted", above=0, run_only=True)
    keep_every: int = option(0, "epochs between two checkpoints that are kept for ever; 0 = none", low=0, run_only=True)
    on_nonfinite: str = option(
        "halt",
        "what an update does whose loss or gradient is not finite: end the run, be left out, or go back to the last "
        "checkpoint and leave its samples out",
        choices=ON_NONFINITE,
        run_only=True,
    )
    max_nonfinite: int = option(10, "updates that on_nonfinite may leave out before the run ends", low=0, run_only=True)
    panel_every: int = option(10, "epochs between two picture panels; 0 = off", low=0, run_only=True)
    difficulty_every: int = option(
        500,
        "updates between two measurements of difficulty_spearman, the agreement of the difficulty with the mean loss "
        "over random masks; 0 = never",
        low=0,
        run_only=True,
    )
    val_path: str = option(
        "", "held-out set on which that is measured; empty = images of data_path, seen whole", run_only=True
    )
    compile: bool = option(
        False, "compile the step with torch.compile: minutes at the start, then faster on GPUs", run_only=True
    )
    cuda_graph: str = option(
        "auto",
        "run updates as one CUDA graph, which takes the host next to no time: auto = on GPUs where that can be, on "
        "(says why it can't be), or off",
        choices=CUDA_GRAPH,
        run_only=True,
    )
    attention_backend: str = option(
        "auto",
        "torch's attention kernel on GPUs; auto = for each shape the one that is the fastest at the start",
        choices=BACKENDS,
        run_only=True,
    )
    online_probe_every: int = option(
        0,
        "updates between two steps of a linear probe on the encoder's detached features; 0 = off",
        run_only=True,
        low=0,
    )
    online_knn_every: int = option(
        0, "epochs between two k-NN tests on a fixed part of the training set; 0 = off", low=0, run_only=True
    )
    dense_path: str = option(
        "",
        "images with masks ({train,val}/{images,masks}/, or ADE20K's) for a k-NN test of patches; empty = off",
        run_only=True,
    )
    dense_every: int = option(10, "epochs between two such tests", above=0, run_only=True)
    stop_after: int = option(0, "stop after this many updates, keeping the schedule; 0 = never", low=0, run_only=True)

    def __post_init__(self) -> None:
        validate(self)
        rules.check(self)

    # ---------------------------------------------------------------------------------------------- derived
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
        if POLICIES[self.mask_policy].follows != "attention":
            return self.mask_plan
        return dataclasses.replace(self.mask_plan, policy="random", mask_ratio=self.warmup_mask_ratio, throw_ratio=0.0)

    @property
    def uses_maps(self) -> bool:
        """Whether a run keeps maps of its samples, of attention or of the teacher's difficulty."""
        return POLICIES[self.mask_policy].follows == "attention" or self.teacher_maps

    @property
    def uses_teacher(self) -> bool:
        """Whether a step needs the EMA teacher: for its difficulty, or for its features."""
        return self.masks_by_difficulty or self.target_teacher == "ema"

    @property
    def uses_views(self) -> bool:
        """Whether it learns from several views of each image (iBOT)."""
        return TARGETS[self.target].objective == "distributions"

    @property
    def question(self) -> Difficulty:
        """How the teacher is asked what is hard."""
        return DIFFICULTIES[question_of(self.difficulty, self.decoder_attention)]

    @property
    def answers_difficulty(self) -> bool:
        """Whether the recipe's model can say what is hard."""
        return self.predict_loss != "none" or not self.question.predictor

    @property
    def masks_by_difficulty(self) -> bool:
        """Whether the mask policy follows the teacher's difficulty."""
        return POLICIES[self.mask_policy].follows == "difficulty"

    @property
    def target_teacher(self) -> str:
        """Who gives the features that are reconstructed: "ema", "frozen", or "" where they are pixels."""
        return TARGETS[self.target].teacher

    @property
    def frozen_dim(self) -> int:
        """Width of the frozen teacher's features (`target` dino or clip), or number of tokens; 0 without one."""
        return self.target_dim or TARGETS[self.target].width

    @property
    def approximates_teacher(self) -> bool:
        """Whether the masks follow a map that is not the exact teacher's of this crop and update."""
        return self.teacher_maps or self.teacher_scale > 1

    @property
    def fast_modes(self) -> list[str]:
        """The fast modes that are on, each as `field value`."""
        names = ("teacher_maps", "predictor", "predictor_depth", "predictor_dim", "decoder_attention", "teacher_scale")
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
        rules.devices_share_batch(asked, self.batch_size, world_size)
        rules.accumulation_fits(self.accum_iter, asked, self.batch_size, world_size)
        return asked // per_micro_step

    def resolve(self, num_samples: int, world_size: int) -> "Recipe":
        """Fill what depends on the data and the machines: accum_iter, global_batch_size, lr, steps_per_epoch.

        **Raises:** `UserError` where the numbers contradict each other.
        """
        accum_iter = self.accumulation(world_size)
        asked = accum_iter * self.batch_size * world_size
        available = num_samples // asked
        rules.data_fill_epoch(num_samples, asked, self.steps_per_epoch)
        return dataclasses.replace(
            self,
            accum_iter=accum_iter,
            global_batch_size=asked,
            lr=self.lr or self.blr * asked / 256,
            steps_per_epoch=self.steps_per_epoch or available,
        )

    def loader_options(self, **changes: Any) -> LoaderOptions:
        """What a loader of samples for this recipe's model is asked for, but for `changes`.

        With `train=False` only what the model needs (sizes, frames): how training draws its crops is not asked for.
        """
        names = ["batch_size", "image_size", "channels", "num_workers", "num_frames", "sampling_rate"]
        asked: dict[str, Any] = {}
        if changes.get("train", True):
            names += ["seed", "crop_min", "crop_max", "flip", "interpolation", "color_jitter", "sample_order"]
            names += ["max_bad_samples"]
            asked["decoder"] = self.video_decoder
            if self.uses_views:
                names += ["local_crops", "local_size", "local_crop_min", "local_crop_max"]
                asked["views"] = (self.global_crops, 1)
        return LoaderOptions(**{name: getattr(self, name) for name in names} | asked | changes)


OWNERS.update({f"--{field.name}": "fasthpm pretrain" for field in dataclasses.fields(Recipe)})


# -------------------------------------------------------------------------------------------------- to and from text
def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write `recipe` as JSON that `--recipe PATH` replays."""
    write_text(path, recipe_text(recipe))


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
    for name in GONE.keys() & values.keys():
        if values[name] != GONE[name]:
            note_once(f"{source}: {name} {values[name]} is no longer offered; {GONE[name]} takes its place")
    values = {name: value for name, value in values.items() if name not in GONE}
    known = [field.name for field in dataclasses.fields(Recipe)]
    for name in values:
        if name not in known:
            raise UserError(f"{source}: unknown recipe field {name!r}{nearest(name, known)}")
    return Recipe(**values)


def science_of(recipe: Recipe) -> dict[str, Any]:
    """The fields that decide what is learnt: two runs that agree on them are the same run."""
    fields = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe) if not f.metadata["run_only"]}
    return fields | {"difficulty": recipe.question.name}
