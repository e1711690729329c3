"""Fine-tuning by MAE's or VideoMAE's recipe: all weights of the encoder and a fresh head, on labelled images or videos.

    fasthpm finetune RUN --train_path train.beton --val_path val.beton
    fasthpm finetune RUN --train_path k400_train --val_path k400_val  # a video run, sets by data_prep.videos
    deepspeed --module fasthpm.probes.finetune RUN …  # the same flags; torchrun too
    fasthpm finetune RUN … --from_scratch             # the same network without pretraining
    fasthpm finetune RUN … --evaluate                 # only test what is in the output folder
    fasthpm finetune RUN … --evaluate --test_views 5x3  # videos: mean over 5 clips x 3 crops

The network is timm's ViT, mixup, cutmix and the augmentations are timm's, the engine is DeepSpeed. --preset mae is the
published recipe, for ImageNet and larger images; k400 and ssv2 are VideoMAE's for Kinetics-400 and Something-Something
v2; small is ours, minutes for small images (up to 96 pixels) from a short pretraining: plain crops and flips, 5 epochs
(videos: 12). auto (the default) takes the one that fits, of videos by the run's size and whether it mirrored clips.
Every number can be given. The same command continues where a killed or interrupted one stopped.

RUN/finetune/ receives result.json, result.md, classifier.safetensors (timm), metrics.jsonl and the checkpoints.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from tqdm import tqdm

from fasthpm import checkpoint, engine, pretrain, schedule, shards, zero
from fasthpm.cli import Parser
from fasthpm.data import DatasetInfo, Loader, build_loader
from fasthpm.data.augmented import Augmentation, AugmentedLoader
from fasthpm.data.clip_sampling import FRAME_SAMPLINGS
from fasthpm.errors import UserError
from fasthpm.metrics import wait_for
from fasthpm.model import HPMViT
from fasthpm.probes import result
from fasthpm.probes.classifier import POOLS, architecture, build_classifier, layer_decay_groups
from fasthpm.probes.tokens import POLICIES, TokenChooser
from fasthpm.recipe import Recipe, add_recipe_arguments, option, save_recipe
from fasthpm.saver import Saver
from fasthpm.signals import StopSignals
from fasthpm.step import model_of
from fasthpm.teacher import EMATeacher

PRESETS = ("auto", "mae", "k400", "ssv2", "small")
SMALL_SIDE = 96  # pixels: up to here --preset auto means small
LOG, CLASSIFIER_FILE = "metrics.jsonl", "classifier.safetensors"


@dataclass(frozen=True)
class FineTune:
    """One fine-tuning. Defaults are MAE's for ViT-B; `preset` has the others."""

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
    drop_path: float = option(0.1, "stochastic depth, growing linearly to this")
    # optimisation
    batch_size: int = option(64, "images or videos per device and micro-step", run_only=True)
    accum_iter: int = option(0, "micro-steps per update; 0 = global_batch_size / (batch_size x devices)", run_only=True)
    global_batch_size: int = option(1024, "the same per update over all devices; 0 = batch_size x devices x accum_iter")
    epochs: int = option(100, "epochs")
    warmup_epochs: float = option(5.0, "epochs of linear warm-up, before the cosine")
    blr: float = option(5e-4, "base learning rate of the last layer: lr = blr x global batch / 256")
    lr: float = option(0.0, "absolute learning rate; 0 = from blr")
    min_lr: float = option(1e-6, "learning rate at the end")
    layer_decay: float = option(0.65, "each layer further from the head learns slower by this factor")
    weight_decay: float = option(0.05, "AdamW weight decay (none on biases, norms, cls token and positions)")
    clip_grad: float = option(0.0, "clip the gradient norm to this; 0 = off")
    seed: int = option(0, "seed of the head, the order, the augmentations, mixup and drop path")
    # regularisation
    mixup: float = option(0.8, "mixup's alpha; 0 = off")
    cutmix: float = option(1.0, "cutmix's alpha; 0 = off")
    smoothing: float = option(0.1, "label smoothing")
    reprob: float = option(0.25, "probability of random erasing")
    aa: str = option("rand-m9-mstd0.5-inc1", 'RandAugment or AutoAugment, by timm\'s names; "" = off')
    color_jitter: float = option(0.0, "colour jitter, where aa is off")
    crop_min: float = option(0.08, "smallest share of the image area that a random crop covers")
    flip: bool = option(True, "flip training images at random (videos: default as in pretraining)")
    num_sample: int = option(1, "repeated augmentation: draws of every image or video per epoch and update")
    # videos
    sampling_rate: int = option(0, "a clip takes every how many-th frame; 0 = as in pretraining")
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
    ema_decay: float = option(0.0, "test an average of the weights with this momentum instead of them; 0 = off")
    # which patches the network sees (the papers' pilot experiment)
    token_policy: str = option("", "see only some patches: random, easiest or hardest by difficulty_run; empty = all")
    keep_tokens: float = option(0.5, "share of the patches that are seen, with token_policy")
    difficulty_run: str = option("", "pretrained run whose loss predictor says what is hard; empty = RUN")
    # the run itself
    num_workers: int = option(0, "augmenting processes per device; 0 = cores / devices on this machine", run_only=True)
    deepspeed_config: str = option(
        "", "DeepSpeed JSON; empty = ZeRO 1 in bf16, or fp32 where a CPU lacks bf16", run_only=True
    )
    resume: str = option("auto", "auto = newest valid checkpoint in output_dir, none, or a checkpoint", run_only=True)
    log_every: int = option(20, "updates between two readings of the loss", run_only=True)
    eval_every: int = option(1, "epochs between two tests; the last is always tested", run_only=True)
    save_every: int = option(1, "epochs between two checkpoints", run_only=True)
    keep_checkpoints: int = option(1, "checkpoints kept", run_only=True)
    stop_after: int = option(0, "stop after this many updates, keeping the schedule; 0 = never", run_only=True)

    def __post_init__(self) -> None:
        shares = ("drop_path", "smoothing", "reprob", "ema_decay")
        expected = {
            "layer_decay": (0 < self.layer_decay <= 1, "more than 0, at most 1"),
            "token_policy": (self.token_policy in ("", *POLICIES), f"one of {', '.join(POLICIES)}"),
            "keep_tokens": (0 < self.keep_tokens <= 1, "a share, more than 0, at most 1"),
            "crop_min": (0 < self.crop_min <= 1, "more than 0, at most 1"),
            "eval_every": (self.eval_every >= 1, "1 or more"),
            "num_sample": (self.num_sample >= 1, "1 or more"),
            "sampling_rate": (self.sampling_rate >= 0, "1 or more, or 0 (as in pretraining)"),
            "test_views": (bool(re.fullmatch(r"([1-9]\d*x[1-9]\d*)?", self.test_views)), "clips x crops, like 5x3"),
            "mixup": (self.mixup >= 0, "0 (off) or more"),
            "cutmix": (self.cutmix >= 0, "0 (off) or more"),
            **{name: (0 <= getattr(self, name) < 1, "0 (off) or more, less than 1") for name in shares},
            **{
                f.name: (getattr(self, f.name) in f.metadata["choices"], f"one of {', '.join(f.metadata['choices'])}")
                for f in dataclasses.fields(self)
                if f.metadata["choices"]
            },
        }
        for name, (good, what) in expected.items():
            if not good:
                raise UserError(f"{name} is {getattr(self, name)!r}, expected {what}")
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


def preset(name: str, model: HPMViT, from_scratch: bool, flip: bool = True) -> dict[str, Any]:
    """What `--preset` changes of the defaults for this model; `flip`: whether its run mirrored its samples.

    **Raises:** `UserError` for a preset of videos for images, or the other way round.
    """
    small = name == "small" or (name == "auto" and max(model.img_size) <= SMALL_SIDE)
    if model.video:
        name = "small" if small else ("k400" if flip else "ssv2") if name == "auto" else name
    if (model.video and name == "mae") or (not model.video and name in ("k400", "ssv2")):
        raise UserError(f"preset {name} is not for {'videos' if model.video else 'images'}; leave --preset out")
    chosen: dict[str, Any] = SMALL if small else BY_WIDTH.get(model.embed_dim, {})
    if model.video:
        chosen = {"flip": flip, **BY_VIDEOS[name]}
        if name == "k400" and model.embed_dim == 1024:
            chosen |= LARGE_K400
    return {**chosen, **(SCRATCH if from_scratch else {})}


# -------------------------------------------------------------------------------------------------- what is wrapped
class ClassifierStep(nn.Module):
    """Images and targets in, loss out; without targets, logits."""

    def __init__(self, vit: nn.Module, chooser: TokenChooser | None = None) -> None:
        super().__init__()
        self.vit = vit
        self.loss = SoftTargetCrossEntropy()
        self._chooser = [chooser]  # in a list: not a part of what is trained

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        """float [B, C, (T,) H, W], normalised, and [B, K] -> scalar; or -> float32 [B, K]."""
        chooser = self._chooser[0]
        if chooser:
            chooser.choose(images)
        logits = self.vit(images.to(self.vit.head.weight.dtype)).float()  # type: ignore[union-attr, arg-type]
        return logits if targets is None else self.loss(logits, targets)


@dataclass
class FineTuning(pretrain.Run):
    """A fine-tuning between two updates; saves and resumes as pretraining does."""

    step: Any  # a ClassifierStep
    settings: FineTune = dataclasses.field(kw_only=True)
    val_loader: Loader = dataclasses.field(kw_only=True)
    last_loader: Loader = dataclasses.field(kw_only=True)  # of the last test, all views
    origin: dict[str, Any] = dataclasses.field(kw_only=True)  # where the encoder comes from
    best: float = 0.0  # accuracy in percent

    @property
    def info(self) -> DatasetInfo:
        """Of the data."""
        return self.loader.info


# -------------------------------------------------------------------------------------------------- building
def build(arguments: argparse.Namespace, given: dict[str, Any], launch: engine.Launch) -> FineTuning:
    """Data, network and engine, at the first update or at the checkpoint."""
    with engine.in_agreement():
        model, recipe = load_encoder(arguments.run, given)
        chosen = preset(arguments.preset, model, bool(given.get("from_scratch")), recipe.flip)
        settings = complete(FineTune(**{**chosen, **given}), arguments.run)
        image_size = image_size_of(settings, model)
        plan, loader, val_loader, last_loader = open_data(settings, recipe, image_size, launch)
        notes = describe(settings, arguments.run, model, loader.info)
        refuse_other(Path(settings.output_dir), notes)
        config = engine.merge_config(plan.deepspeed_config, plan, launch.world_size)
        vit = network(model, settings, image_size, len(loader.info.classes))
        chooser = choose_tokens(vit, settings, launch.device)
        origin = result.provenance(arguments.run, launch)
    step = ClassifierStep(vit, chooser)
    groups = layer_decay_groups(vit, settings.layer_decay, settings.weight_decay)
    deepspeed_engine = engine.build_engine(step, plan, config, launch, groups)
    ema = None
    if settings.ema_decay:
        copy = network(model, settings, image_size, len(loader.info.classes))
        ema = EMATeacher(deepspeed_engine, step.vit, "vit.", copy, settings.ema_decay)
        choose_tokens(copy, settings, launch.device, chooser)
    saver = Saver(launch.rank, launch.world_size, timeout=engine.timeout().total_seconds())
    run = FineTuning(
        plan,
        launch,
        loader,
        deepspeed_engine,
        step,
        ema,
        zero.MasterLayout(deepspeed_engine),
        saver,
        settings=settings,
        maps=None,
        val_loader=val_loader,
        last_loader=last_loader,
        origin=origin,
        notes={checkpoint.CLASSIFIER: notes},
    )
    pretrain.resume(run)
    return run


def load_encoder(run: Path, given: dict[str, Any]) -> tuple[HPMViT, Recipe]:
    """The run's model with the weights that fine-tuning starts from, and its recipe."""
    model, recipe = checkpoint.load_weights(run, given.get("weights", "student"))
    if given.get("from_scratch"):
        model = model_of(dataclasses.replace(recipe, seed=given.get("seed", 0)))
    if model.video and given.get("token_policy"):
        raise UserError(f"{run} was trained on video, and --token_policy takes image models; leave it out")
    if not model.video and given.get("test_views", "1x1") != "1x1":
        raise UserError(f"test_views is {given['test_views']!r}, but {run} was trained on images; leave it out")
    return model, recipe


def complete(settings: FineTune, run: Path) -> FineTune:
    """`settings` with every path and preset filled in."""
    folder = "finetune_scratch" if settings.from_scratch else "finetune"
    run_folder = run if (run / "checkpoints").is_dir() else run.parent.parent
    zero1 = "ds_configs/zero1_bf16.json" if has_bf16() else "ds_configs/zero1_fp32.json"
    hard = settings.token_policy in ("easiest", "hardest")
    return dataclasses.replace(
        settings,
        output_dir=settings.output_dir or str(run_folder / folder),
        deepspeed_config=settings.deepspeed_config or zero1,
        difficulty_run=(settings.difficulty_run or str(run)) if hard else "",
    )


def has_bf16() -> bool:
    """Whether the device computes in bfloat16; a CPU without such instructions is faster in float32."""
    if torch.cuda.is_available():
        return True
    info = Path("/proc/cpuinfo")
    return info.is_file() and "bf16" in info.read_text()


def image_size_of(settings: FineTune, model: HPMViT) -> tuple[int, int]:
    """(height, width) that is asked for, or the run's."""
    if not settings.input_size:
        return model.img_size
    parts = settings.input_size.split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"input_size is {settings.input_size!r}, expected a side like 224 or HEIGHTxWIDTH like 96x160")
    return int(parts[0]), int(parts[-1])


def open_data(
    settings: FineTune, recipe: Recipe, image_size: tuple[int, int], launch: engine.Launch
) -> tuple[Recipe, AugmentedLoader, Loader, Loader]:
    """The resolved plan (a recipe, for schedule and engine), both sets, checked, and the second with all views."""
    plan = dataclasses.replace(
        recipe,
        data_path=settings.train_path,
        crop_min=settings.crop_min,
        beta1=0.9,
        beta2=0.999,
        steps_per_epoch=0,
        **{
            name: getattr(settings, name)
            for name in (
                "batch_size",
                "accum_iter",
                "global_batch_size",
                "epochs",
                "warmup_epochs",
                "blr",
                "lr",
                "min_lr",
                "weight_decay",
                "clip_grad",
                "seed",
                "num_workers",
                "output_dir",
                "deepspeed_config",
                "resume",
                "log_every",
                "save_every",
                "keep_checkpoints",
                "stop_after",
            )
        },
    )
    plan = checkpoint.continued(plan, launch.world_size)
    plan = dataclasses.replace(plan, accum_iter=plan.accumulation(launch.world_size))
    shared = loader_options(settings, recipe, image_size, launch)
    augmentation = Augmentation(settings.aa, settings.reprob, settings.crop_min, settings.flip, settings.color_jitter)
    val = build_loader(settings.val_path, train=False, **shared)
    last = thorough_loader(settings, shared) if settings.views != (1, 1) else val
    loader = AugmentedLoader(
        settings.train_path,
        augmentation,
        repeats=settings.num_sample,
        seed=settings.seed,
        accum_iter=plan.accum_iter,
        **shared,
    )
    result.check_sets((settings.train_path, loader.info), (settings.val_path, val.info))
    labels = torch.from_numpy(loader.base.labels_of(np.arange(loader.info.num_samples)))
    result.check_labels(labels, settings.train_path, len(loader.info.classes))
    return plan.resolve(loader.info.num_samples, launch.world_size), loader, val, last


def loader_options(
    settings: FineTune, recipe: Recipe, image_size: tuple[int, int], launch: engine.Launch
) -> dict[str, Any]:
    """What all loaders of a fine-tuning are built with."""
    return {
        "image_size": image_size,
        "channels": recipe.channels,
        "rank": launch.rank,
        "world_size": launch.world_size,
        "num_workers": settings.num_workers,
        "batch_size": settings.batch_size,
        "num_frames": recipe.num_frames,
        "sampling_rate": settings.sampling_rate or recipe.sampling_rate,
        "frame_sampling": settings.frame_sampling,
    }


def thorough_loader(settings: FineTune, shared: dict[str, Any]) -> Loader:
    """The test set with all views of every video, as many rows in a batch as without."""
    clips, crops = settings.views
    options = {**shared, "views": settings.views, "batch_size": max(settings.batch_size // (clips * crops), 1)}
    return build_loader(settings.val_path, train=False, **options)


def describe(settings: FineTune, run: Path, model: HPMViT, info: DatasetInfo) -> str:
    """What tells one fine-tuning from another, and rebuilds its classifier: JSON."""
    return (
        json.dumps(
            {
                "run": str(run),
                "settings": settings.science,
                "model": architecture(model),
                "classes": list(info.classes),
                "mean": list(info.mean),
                "std": list(info.std),
            },
            indent=2,
        )
        + "\n"
    )


def refuse_other(output_dir: Path, notes: str) -> None:
    """Refuse an output folder that belongs to another fine-tuning, or to a pretraining run.

    **Raises:** `UserError` naming the first thing that differs.
    """
    path = output_dir / checkpoint.CLASSIFIER
    if not path.is_file():
        if (output_dir / "checkpoints").is_dir():
            raise UserError(f"output_dir {output_dir} holds checkpoints of another kind; choose another --output_dir")
        return
    theirs, ours = json.loads(path.read_text()), json.loads(notes)
    theirs["settings"] = FineTune().science | theirs["settings"]  # of an earlier version, with fewer
    if theirs["model"] != ours["model"]:
        raise UserError(
            f"output_dir {output_dir} holds the classifier of another architecture ({_differences(theirs['model'], ours['model'])}); "  # noqa: E501
            f"choose another --output_dir"
        )
    if theirs["classes"] != ours["classes"]:
        raise UserError(
            f"the classifier in {output_dir} has {len(theirs['classes'])} classes, the data has {len(ours['classes'])} "
            f"or others; use the data that it was trained for, or another --output_dir"
        )
    if theirs["settings"] != ours["settings"]:
        raise UserError(
            f"output_dir {output_dir} belongs to a fine-tuning with other settings "
            f"({_differences(theirs['settings'], ours['settings'])}); choose another --output_dir"
        )


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    return ", ".join(f"{k} {theirs.get(k)!r}, here {ours[k]!r}" for k in ours if theirs.get(k) != ours[k])


def network(model: HPMViT, settings: FineTune, image_size: tuple[int, int], num_classes: int) -> Any:
    """timm's ViT as these settings want it."""
    vit = build_classifier(
        model,
        num_classes,
        image_size=image_size,
        global_pool=settings.global_pool,
        drop_path=settings.drop_path,
        seed=settings.seed,
    )
    if not torch.cuda.is_available():  # the fused kernel is the slower one there in bf16 (see `model.attend`)
        for block in vit.blocks:
            block.attn.fused_attn = False
    return vit


def choose_tokens(
    vit: Any, settings: FineTune, device: torch.device, chosen: TokenChooser | None = None
) -> TokenChooser | None:
    """What decides which patches `vit` sees, if not all; a second ViT shares the first one's choice."""
    if chosen is not None:
        vit.patch_drop = chosen.kept
        return chosen
    if not settings.token_policy:
        return None
    run = Path(settings.difficulty_run) if settings.difficulty_run else None
    return TokenChooser(vit, settings.token_policy, settings.keep_tokens, run, device)


# -------------------------------------------------------------------------------------------------- training
def train(run: FineTuning, log: "Log", stop: StopSignals) -> None:
    """The loop: batch, mix, step, test, save; until the last update, or the one at which the ranks agree to stop."""
    plan, settings, device = run.recipe, run.settings, run.launch.device
    last = min(plan.total_steps, plan.stop_after or plan.total_steps)
    classes = len(run.info.classes)
    mix = Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=classes)
    mix.mixup_enabled = settings.mixes
    batches = iter(run.loader)
    while run.done < last and not run.preempted:
        engine.set_lr(run.engine, schedule.lr_at(plan, run.done))
        for micro_step in range(plan.accum_iter):
            batch = next(batches).to(device)
            seed_all(settings.seed, run.done, micro_step, run.launch.rank)
            images, targets = mixed(mix, batch.images, batch.labels)
            loss = run.engine(images, targets)
            run.engine.backward(loss)
            run.engine.step()
            log.add(loss, len(batch.labels))
        run.done += 1
        run.preempted = stop.agreed()
        log.progress.update()
        after_update(run, log, last)


def mixed(mix: Mixup, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W] or clips [B, C, T, H, W] and labels [B] -> mixed, soft targets [B, K]; only smoothed where
    mixing is off. The frames of a clip are mixed alike: they are to timm channels of one image."""
    if mix.mixup_enabled:
        flat, targets = mix(images.flatten(1, -3), labels)
        return flat.reshape(images.shape), targets
    off = mix.label_smoothing / mix.num_classes
    targets = torch.full((len(labels), mix.num_classes), off, device=labels.device)
    return images, targets.scatter_(1, labels[:, None], 1 - mix.label_smoothing + off)


def seed_all(*parts: int) -> None:
    """Seed what mixup (numpy) and drop path (torch, every device) draw from."""
    seed = result.torch_seed(*parts)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def after_update(run: FineTuning, log: "Log", last: int) -> None:
    """Log, test and save, each at its own interval, and all of them at the end."""
    plan, epoch_length = run.recipe, run.recipe.steps_per_epoch
    ending, (epoch, rest) = run.done == last, divmod(run.done, epoch_length)
    testing = run.done == plan.total_steps or (rest == 0 and epoch % run.settings.eval_every == 0)
    saving = ending or run.preempted or (rest == 0 and epoch % plan.save_every == 0)
    if run.done % plan.log_every == 0 or testing or saving:
        log.read(run, evaluate(run) if testing else {})
    if saving:
        pretrain.save(run)


# -------------------------------------------------------------------------------------------------- testing
def evaluate(run: FineTuning) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent and the loss on the test set, of the average if there is one. Collective.

    Of one view; the last test of videos is over all of them.
    """
    loader, views = run.val_loader, (1, 1)
    if run.done == run.recipe.total_steps:
        loader, views = run.last_loader, run.settings.views
    if run.teacher:
        forward = ClassifierStep(run.teacher.module, run.step._chooser[0])
        return test(forward, loader, run.info, run.launch, run.settings.seed, views)
    run.engine.eval()
    try:
        return test(run.engine, loader, run.info, run.launch, run.settings.seed, views)
    finally:
        run.engine.train()


@torch.no_grad()
def test(
    forward: Any, loader: Loader, info: DatasetInfo, launch: engine.Launch, seed: int, views: tuple[int, int]
) -> dict[str, float]:
    """{"accuracy", "accuracy_top5", "val_loss"} over all ranks' shares of `loader`.

    - `forward`: images [B, C, (T,) H, W] -> logits [B, K]; `info`: of the data that it was trained on
    - `views`: (clips, crops) of every sample that `loader` gives as rows of a batch; their logits are averaged
      (VideoMAE's code averages the softmax of them)
    """
    rows = views[0] * views[1]
    sums = torch.zeros(4, dtype=torch.float64, device=launch.device)
    for number, batch in enumerate(tqdm(loader, desc="test", disable=launch.rank != 0, leave=False)):
        seed_all(seed, number, launch.rank)  # of randomly chosen tokens
        images, labels = normalised(batch.images.to(launch.device), info), batch.labels[::rows].to(launch.device)
        # A rank without samples runs along: the others may need it to gather weights.
        logits = forward(images if len(images) else images.new_zeros(rows, *images.shape[1:]))
        logits = logits.unflatten(0, (-1, rows)).mean(1)[: len(labels)]
        hits = [result.count_hits(logits, labels, k) for k in (1, 5)]
        loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        sums += torch.stack([*hits, loss, hits[0] * 0 + len(labels)]).double()
    top1, top5, loss, total = result.share(sums, launch.world_size).tolist()
    return {"accuracy": 100 * top1 / total, "accuracy_top5": 100 * top5 / total, "val_loss": loss / total}


def normalised(images: Tensor, info: DatasetInfo) -> Tensor:
    """uint8 [B, (T,) H, W, C] -> float32 [B, C, (T,) H, W], zero mean and unit variance over the data set."""
    mean, std = (torch.tensor(values, device=images.device) for values in (info.mean, info.std))
    return ((images.float() / 255 - mean) / std).movedim(-1, 1)


# -------------------------------------------------------------------------------------------------- logging
class Log:
    """Loss and accuracy: summed on the device, written to metrics.jsonl, TensorBoard and the progress bar."""

    def __init__(self, run: FineTuning, folder: Path) -> None:
        self.rank, self.world_size, self.device = run.launch.rank, run.launch.world_size, run.launch.device
        self.path = folder / LOG
        self.progress = tqdm(
            total=run.recipe.total_steps,
            initial=run.done,
            disable=self.rank != 0,
            unit="step",
            mininterval=1.0,
            dynamic_ncols=True,
            desc="finetune",
        )
        self._writer: Any = None
        self._sum, self._count, self._samples, self._begin = torch.zeros(()), 0, 0, 0.0
        if self.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=run.done)
        self._restart()

    def add(self, loss: Tensor, samples: int) -> None:
        """Take in one micro-step, without waiting for it."""
        self._sum = self._sum + loss.detach().double()
        self._count, self._samples = self._count + 1, self._samples + samples

    def read(self, run: FineTuning, tested: dict[str, float]) -> None:
        """Average over ranks since the last reading and write it. Collective.

        **Raises:** `UserError` on every rank if the loss was not finite.
        """
        sums = result.share(torch.stack([self._sum, self._sum * 0 + self._count]), self.world_size)
        loss = float(sums[0] / sums[1])  # the host waits for the device here
        wait_for(self.device)
        seconds = time.perf_counter() - self._begin
        if not np.isfinite(loss):
            engine.agree(UserError(f"the loss is not finite by update {run.done}; lower --blr, or give --clip_grad 1"))
        record = {
            "loss": loss,
            "lr": schedule.lr_at(run.recipe, run.done - 1),
            "seconds": seconds,
            "images_per_second": self._samples * self.world_size / seconds,
            **tested,
        }
        run.best = max(run.best, tested.get("accuracy", 0.0))
        self._write(run.done, run.done / run.recipe.steps_per_epoch, record)
        self._restart()

    def close(self) -> None:
        """Flush and close."""
        self.progress.close()
        if self._writer:
            self._writer.close()

    def _restart(self) -> None:
        self._sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self._count = self._samples = 0
        self._begin = time.perf_counter()

    def _write(self, step: int, epoch: float, record: dict[str, float]) -> None:
        if self.rank:
            return
        with self.path.open("a") as log:
            log.write(json.dumps({"step": step, "epoch": epoch, "time": time.time(), **record}) + "\n")
        for name, value in record.items():
            self._writer.add_scalar(f"finetune/{name}", value, step)
        shown = {"loss": f"{record['loss']:.3f}", "img_s": f"{record['images_per_second']:.0f}"}
        if "accuracy" in record:
            shown["accuracy"] = f"{record['accuracy']:.2f}"
            self.progress.write(
                f"epoch {epoch:g}: top-1 {record['accuracy']:.2f} %, loss {record['loss']:.3f}", file=sys.stderr
            )
        self.progress.set_postfix(shown)


def read_log(folder: Path, until: int) -> list[dict[str, float]]:
    """The records of metrics.jsonl up to update `until`, one per update number, in order."""
    records = {}
    for line in (folder / LOG).read_text().splitlines():
        if line.endswith("}"):  # a killed run may leave its last line unfinished
            record = json.loads(line)
            records[record["step"]] = record
    return [records[step] for step in sorted(records) if step <= until]


# -------------------------------------------------------------------------------------------------- results
def prepare_output(run: FineTuning) -> None:
    """Create output_dir and write what the fine-tuning is (rank 0). **Raises:** `UserError` if it cannot be written."""
    folder = Path(run.settings.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.require_space(folder, run.num_parameters)
        save_recipe(run.recipe, folder / checkpoint.RECIPE)
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written ({error.strerror}); choose another") from error
    result.write_text(folder / checkpoint.CLASSIFIER, run.notes[checkpoint.CLASSIFIER])


def finish(run: FineTuning) -> None:
    """Write classifier and result, say where they are. Collective."""
    folder = Path(run.settings.output_dir)
    weights = zero.full_state(run.layout, "ema" if run.teacher else "master")
    if weights is None:
        return
    if run.done < run.recipe.total_steps:
        why = "preempted" if run.preempted else "stopped"
        print(
            f"{why} at update {run.done} of {run.recipe.total_steps}; run the same command to continue", file=sys.stderr
        )
        return
    records = read_log(folder, run.done)
    tested = [record for record in records if "accuracy" in record]
    write_classifier(run, weights, folder / CLASSIFIER_FILE)
    hours = sum(record["seconds"] for record in records) * run.launch.world_size / 3600
    final = {name: tested[-1][name] for name in ("accuracy", "accuracy_top5", "val_loss")}
    best = max(record["accuracy"] for record in tested)
    report(run.settings, run.origin, folder, {**final, "best_accuracy": best, "gpu_hours": round(hours, 4)})


def write_classifier(run: FineTuning, weights: dict[str, Tensor], path: Path) -> None:
    """timm's ViT as safetensors; the metadata holds what builds it, the classes, mean and std."""
    vit = run.step.vit
    embed = vit.patch_embed
    settings = {
        **json.loads(run.notes[checkpoint.CLASSIFIER])["model"],
        "num_classes": len(run.info.classes),
        "global_pool": run.settings.global_pool,
        "img_size": list(embed.img_size),
    }
    if "num_frames" in settings:  # not trained, and interpolated to img_size
        weights = {**weights, "pos_embed": vit.pos_embed.float().cpu()}
    metadata = {"timm": settings, "classes": run.info.classes, "mean": run.info.mean, "std": run.info.std}
    aside = path.with_name(f".writing-{path.name}")
    tensors = {name.removeprefix("vit."): value.contiguous() for name, value in weights.items()}
    try:
        save_file(tensors, aside, metadata={name: json.dumps(value) for name, value in metadata.items()})
        os.replace(aside, path)
    except Exception as error:  # safetensors has its own for a full disk
        raise UserError(f"{path} cannot be written ({error}); make room and start again") from error


def report(settings: FineTune, origin: dict[str, Any], folder: Path, figures: dict[str, Any]) -> None:
    """Write result.json and result.md, and print the accuracy."""
    name = "from scratch" if settings.from_scratch else "fine-tune"
    tokens = f", {settings.keep_tokens:.0%} {settings.token_policy} tokens" if settings.token_policy else ""
    views = f", {settings.test_views} views" if settings.views != (1, 1) else ""
    made = {
        "protocol": f"{name}, {settings.epochs} epochs{tokens}{views}",
        **figures,
        **origin,
        "settings": dataclasses.asdict(settings),
    }
    row = result.write_result(folder, made)
    print(f"{made['protocol']}: top-1 {figures['accuracy']:.2f} %, top-5 {figures['accuracy_top5']:.2f} %\n{row}")
    print(f"written to {folder / 'result.json'}", file=sys.stderr)


def evaluate_only(arguments: argparse.Namespace, given: dict[str, Any], launch: engine.Launch) -> None:
    """Test the newest checkpoint of a fine-tuning on `val_path`."""
    with engine.in_agreement():
        model, recipe = load_encoder(arguments.run, given)
        views = preset(arguments.preset, model, False, recipe.flip).get("test_views", "")
        settings = complete(FineTune(**{"test_views": views, **given}), arguments.run)
        folder = checkpoint.newest_valid(Path(settings.output_dir), lambda line: print(line, file=sys.stderr))
        if folder is None or not (folder / checkpoint.CLASSIFIER).is_file():
            raise UserError(f"{settings.output_dir} holds no fine-tuned classifier; fine-tune first, or --output_dir")
        notes = json.loads((folder / checkpoint.CLASSIFIER).read_text())
        if notes["model"] != architecture(model):
            raise UserError(
                f"{folder} is of another architecture than {arguments.run} "
                f"({_differences(notes['model'], architecture(model))}); give the run that it came from"
            )
        settings = dataclasses.replace(settings, **notes["settings"])
        image_size = image_size_of(settings, model)
        loader = thorough_loader(settings, loader_options(settings, recipe, image_size, launch))
        if list(loader.info.classes) != notes["classes"]:
            raise UserError(
                f"the classifier in {folder} has {len(notes['classes'])} classes, {settings.val_path} has "
                f"{len(loader.info.classes)} or others; give the data that it was trained for"
            )
        vit = network(model, settings, image_size, len(notes["classes"]))
        saved = shards.SavedState(folder)
        kind: zero.State = "ema" if saved.has("ema") else "master"
        vit.load_state_dict({name.removeprefix("vit."): saved.whole(kind, name) for name in saved.names})
        origin = result.provenance(arguments.run, launch)
    begin = time.perf_counter()
    step = ClassifierStep(vit.to(launch.device), choose_tokens(vit, settings, launch.device)).eval()
    info = dataclasses.replace(loader.info, mean=tuple(notes["mean"]), std=tuple(notes["std"]))
    figures = test(step, loader, info, launch, settings.seed, settings.views)
    loader.close()
    if launch.rank == 0:
        hours = (time.perf_counter() - begin) * launch.world_size / 3600
        report(settings, origin, Path(settings.output_dir) / "evaluate", {**figures, "gpu_hours": round(hours, 4)})


# -------------------------------------------------------------------------------------------------- command
def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """(run, preset), and the settings that were given."""
    parser = Parser(prog="fasthpm finetune", description=__doc__)
    parser.add_argument("run", type=Path, help="output_dir of a pretraining run, or one of its checkpoints")
    parser.add_argument("--preset", choices=PRESETS, default="auto", help="see above")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    add_recipe_arguments(parser, FineTune)
    arguments = parser.parse_args(argv)
    known = {field.name for field in dataclasses.fields(FineTune)}
    given = {name: value for name, value in vars(arguments).items() if name in known}
    for name in ("val_path",) if given.get("evaluate") else ("train_path", "val_path"):
        if not given.get(name):
            raise UserError(f"--{name} is missing; see fasthpm finetune --help")
    return arguments, given


def main(argv: Sequence[str] | None = None) -> None:
    """`fasthpm finetune`, once per rank."""
    arguments, given = parse_arguments(argv)
    with engine.session() as launch:
        if given.get("evaluate"):
            evaluate_only(arguments, given, launch)
            return
        run = build(arguments, given, launch)
        with engine.in_agreement():
            if launch.rank == 0:
                prepare_output(run)
        plan = run.recipe
        if launch.rank == 0:
            effective = f"{plan.global_batch_size} = {plan.batch_size} x {launch.world_size} x {plan.accum_iter}"
            print(
                f"lr {plan.lr:.3e}, global batch {effective}, "
                f"{plan.total_steps} updates, {len(run.info.classes)} classes",
                file=sys.stderr,
            )
        log = Log(run, Path(run.settings.output_dir))
        try:
            with StopSignals() as stop:
                train(run, log, stop)
                stop.drain()
                pretrain.finish_last_save(run)
        finally:
            log.close()
            run.loader.close()
            run.val_loader.close()
            run.last_loader.close()
        finish(run)
        if stop.interrupted:
            raise KeyboardInterrupt


if __name__ == "__main__":
    from fasthpm.cli import run_rank

    run_rank(main)
