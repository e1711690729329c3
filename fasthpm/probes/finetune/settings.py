"""What can be set of a fine-tuning, and the published presets."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from fasthpm.checkpoint import run_of
from fasthpm.data.video.sampling import FRAME_SAMPLINGS
from fasthpm.difficulty import DIFFICULTIES
from fasthpm.errors import UserError
from fasthpm.machine import cpu_has_bf16
from fasthpm.model import HPMViT
from fasthpm.options import option, validate
from fasthpm.probes.answers import AUTO, load_asked
from fasthpm.probes.classifier import POOLS
from fasthpm.probes.tokens import POLICIES
from fasthpm.rules import sides_of

PRESETS = ("auto", "mae", "k400", "ssv2", "small")
BY_DIFFICULTY = ("easiest", "hardest")  # of the token policies
SMALL_SIDE = 96  # pixels: up to here --preset auto means small


@dataclass(frozen=True)
class FineTune:
    """One fine-tuning. Defaults are MAE's for ViT-B; `preset` has the others.

    - `TESTS`: fields that a test without training goes by; the others are the training's
    """

    TESTS: ClassVar[frozenset[str]] = frozenset(
        {"val_path", "output_dir", "evaluate", "batch_size", "num_workers", "test_views"}
    )

    train_path: str = option(
        "", "prepared set (.beton), several joined by commas, image folder, or video set to train on"
    )
    val_path: str = option("", "the same to test on", run_only=True)
    output_dir: str = option("", "folder for results and checkpoints; empty = RUN/finetune", run_only=True)
    weights: str = option("student", "which encoder of the run to start from", choices=("student", "teacher"))
    from_scratch: bool = option(False, "start from random weights: what the network does without pretraining")
    evaluate: bool = option(False, "do not train: test the newest checkpoint of output_dir", run_only=True)
    # model
    input_size: str = option("", "side of the images, or HEIGHTxWIDTH; positions are interpolated; empty = the run's")
    global_pool: str = option("avg", "avg: mean of the patches, fresh norm; token: cls", choices=tuple(POOLS))
    drop_path: float = option(0.1, "stochastic depth, growing linearly to this", low=0, below=1)
    # optimisation
    batch_size: int = option(64, "images or videos per device and micro-step", run_only=True)
    accum_iter: int = option(0, "micro-steps per update; 0 = global_batch_size / (batch_size x devices)", run_only=True)
    global_batch_size: int = option(1024, "the same per update over all devices; 0 = batch_size x devices x accum_iter")
    epochs: int = option(100, "epochs", above=0)
    warmup_epochs: float = option(5.0, "epochs of linear warm-up, before the cosine", low=0)
    blr: float = option(5e-4, "base learning rate of the last layer: lr = blr x global batch / 256", low=0)
    lr: float = option(0.0, "absolute learning rate; 0 = from blr", low=0)
    min_lr: float = option(1e-6, "learning rate at the end", low=0)
    layer_decay: float = option(0.65, "each layer further from the head learns slower by this factor", above=0, high=1)
    weight_decay: float = option(0.05, "AdamW weight decay (none on biases, norms, cls token and positions)", low=0)
    clip_grad: float = option(0.0, "clip the gradient norm to this; 0 = off", low=0)
    seed: int = option(0, "seed of the head, the order, the augmentations, mixup and drop path")
    # regularisation
    mixup: float = option(0.8, "mixup's alpha; 0 = off", low=0)
    cutmix: float = option(1.0, "cutmix's alpha; 0 = off", low=0)
    smoothing: float = option(0.1, "label smoothing", low=0, below=1)
    reprob: float = option(0.25, "probability of random erasing", low=0, below=1)
    aa: str = option("rand-m9-mstd0.5-inc1", 'RandAugment or AutoAugment, by timm\'s names; "" = off')
    color_jitter: float = option(0.0, "colour jitter, where aa is off")
    crop_min: float = option(0.08, "smallest share of the image area that a random crop covers", above=0, high=1)
    flip: bool = option(True, "flip training images at random (videos: default as in pretraining)")
    num_sample: int = option(1, "repeated augmentation: draws of every image or video per epoch and update", low=1)
    # videos
    sampling_rate: int = option(0, "a clip takes every how many-th frame; 0 = as in pretraining", low=0)
    frame_sampling: str = option(
        "dense",
        "dense: frames sampling_rate apart; segments: one of each equal stretch of the whole video (SSv2)",
        choices=FRAME_SAMPLINGS,
    )
    test_views: str = option(
        "",
        "clips x crops of a video that --evaluate and the last test average the logits over, like 5x3 (Kinetics) "
        "or 2x3 (SSv2); empty = the preset's, 1x1 for images",
        run_only=True,
    )
    ema_decay: float = option(
        0.0, "test an average of the weights with this momentum instead of them; 0 = off", low=0, below=1
    )
    # which patches the network sees (the papers' pilot experiment)
    token_policy: str = option(
        "", "see only some patches, at random or by difficulty_run; empty = all", choices=("", *POLICIES)
    )
    keep_tokens: float = option(0.5, "share of the patches that are seen, with token_policy", above=0, high=1)
    difficulty_run: str = option("", "pretrained run that says what is hard; empty = RUN")
    token_difficulty: str = option(
        "", "how it is asked what is hard; empty = in the best way that it has", choices=("", *DIFFICULTIES)
    )
    # the run itself
    num_workers: int = option(0, "augmenting processes per device; 0 = cores / devices on this machine", run_only=True)
    deepspeed_config: str = option(
        "", "DeepSpeed preset or JSON; empty = zero1_bf16, or zero1_fp32 where a CPU lacks bf16", run_only=True
    )
    resume: str = option("auto", "auto = newest valid checkpoint in output_dir, none, or a checkpoint", run_only=True)
    log_every: int = option(20, "updates between two readings of the loss", run_only=True)
    eval_every: int = option(1, "epochs between two tests; the last is always tested", low=1, run_only=True)
    save_every: int = option(1, "epochs between two checkpoints", run_only=True)
    keep_checkpoints: int = option(1, "checkpoints kept", run_only=True)
    stop_after: int = option(0, "stop after this many updates, keeping the schedule; 0 = never", run_only=True)

    def __post_init__(self) -> None:
        validate(self)
        self._check_views()
        self._check_pairs()

    def _check_views(self) -> None:
        if not re.fullmatch(r"([1-9]\d*x[1-9]\d*)?", self.test_views):
            raise UserError(f"test_views is {self.test_views!r}, expected clips x crops, like 5x3")

    def _check_pairs(self) -> None:
        if self.mixes and not self.evaluate and self.batch_size * self.num_sample % 2:
            raise UserError(f"batch_size is {self.batch_size}, and mixup and cutmix pair images; use an even number")

    @property
    def views(self) -> tuple[int, int]:
        """(clips, crops) of a thorough test."""
        clips, _, crops = (self.test_views or "1x1").partition("x")
        return int(clips), int(crops)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def science(self) -> dict[str, Any]:
        """The fields that decide what is learnt."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.metadata["run_only"]}


SMALL = {
    "epochs": 5,
    "warmup_epochs": 0.5,
    "global_batch_size": 128,
    "blr": 1e-3,
    "layer_decay": 0.75,
    "mixup": 0.0,
    "cutmix": 0.0,
    "reprob": 0.0,
    "aa": "",
    "crop_min": 0.6,
    "drop_path": 0.0,
    "log_every": 50,
    "batch_size": 128,
}
BY_WIDTH = {  # MAE's FINETUNE.md, per model (HPM's scripts: blr 5e-4, layer decay 0.8, drop path 0.1 for all)
    1024: {"epochs": 50, "blr": 1e-3, "layer_decay": 0.75, "drop_path": 0.2},
    1280: {"epochs": 50, "blr": 1e-3, "layer_decay": 0.75, "drop_path": 0.3},
}
VIDEO = {  # VideoMAE's paper and released scripts, of 64 GPUs
    "global_batch_size": 512,
    "batch_size": 8,
    "num_sample": 2,
    "layer_decay": 0.75,
    "aa": "rand-m7-n4-mstd0.5-inc1",
}
BY_VIDEOS = {
    "k400": {**VIDEO, "epochs": 100, "blr": 1e-3, "flip": True, "test_views": "5x3"},
    "ssv2": {**VIDEO, "epochs": 50, "blr": 5e-4, "flip": False, "frame_sampling": "segments", "test_views": "2x3"},
    "small": {**SMALL, "epochs": 12, "warmup_epochs": 1.0, "blr": 6e-3, "global_batch_size": 64, "batch_size": 64},
}
LARGE_K400 = {"epochs": 35, "global_batch_size": 128, "blr": 2e-3, "batch_size": 2}  # the released script for ViT-L
SCRATCH = {"layer_decay": 1.0}  # no layer knows anything yet
OF_PRESETS = set[str]().union(SMALL, LARGE_K400, *BY_WIDTH.values(), *BY_VIDEOS.values())


def preset(name: str, model: HPMViT, from_scratch: bool, flip: bool = True) -> dict[str, Any]:
    """What `--preset` changes of the defaults for this model; `flip`: whether its run mirrored its samples.

    **Raises:** `UserError` for a preset of videos for images, or the other way round.
    """
    small = name == "small" or (name == "auto" and max(model.img_size) <= SMALL_SIDE)
    if model.video and small:
        name = "small"
    elif model.video and name == "auto":
        name = "k400" if flip else "ssv2"
    if (model.video and name == "mae") or (not model.video and name in ("k400", "ssv2")):
        raise UserError(f"preset {name} is not for {'videos' if model.video else 'images'}; leave --preset out")
    chosen: dict[str, Any] = SMALL if small else BY_WIDTH.get(model.embed_dim, {})
    if model.video:
        chosen = {"flip": flip, **BY_VIDEOS[name]}
        if name == "k400" and model.embed_dim == 1024:
            chosen |= LARGE_K400
    return {**chosen, **(SCRATCH if from_scratch else {})}


def complete(settings: FineTune, run: Path) -> FineTune:
    """`settings` with every path and preset filled in."""
    folder = "finetune_scratch" if settings.from_scratch else "finetune"
    zero1 = "zero1_bf16" if has_bf16() else "zero1_fp32"
    hard = settings.token_policy in BY_DIFFICULTY
    asked = (settings.difficulty_run or str(run)) if hard else ""
    way = load_asked(Path(asked), settings.token_difficulty or AUTO)[2].way if asked else ""
    return dataclasses.replace(
        settings,
        output_dir=settings.output_dir or str(run_of(run) / folder),
        deepspeed_config=settings.deepspeed_config or zero1,
        difficulty_run=asked,
        token_difficulty=way,
    )


def stored(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a fine-tuning, as `FineTune.science` was then, with what has come since."""
    hard = settings.get("token_policy") in BY_DIFFICULTY
    return FineTune().science | {"token_difficulty": "paper" if hard else ""} | settings


def has_bf16() -> bool:
    """Whether the device computes in bfloat16; a CPU without such instructions is faster in float32."""
    return torch.cuda.is_available() or cpu_has_bf16()


def image_size_of(settings: FineTune, model: HPMViT) -> tuple[int, int]:
    """(height, width) that is asked for, or the run's."""
    if not settings.input_size:
        return model.img_size
    return sides_of(settings.input_size)
