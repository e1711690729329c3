"""Network, engine and loaders of a fine-tuning."""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from fasthpm import checkpoint, ranks
from fasthpm.checkpoint.saver import Saver
from fasthpm.cli import without_effect
from fasthpm.data import Batch, DatasetInfo, Loader, LoaderOptions, build_loader
from fasthpm.data.augmented import Augmentation, AugmentedLoader
from fasthpm.data.device import on_device
from fasthpm.data.identity import identity_of
from fasthpm.data.statistics import PixelStatistics, statistics_from
from fasthpm.errors import UserError
from fasthpm.files import read_json
from fasthpm.model import HPMViT
from fasthpm.patches import model_of, statistics_for, suited
from fasthpm.probes import result
from fasthpm.probes.answers import AUTO
from fasthpm.probes.classifier import architecture, build_classifier, layer_decay_groups
from fasthpm.probes.finetune.settings import FineTune, complete, image_size_of, preset, stored
from fasthpm.probes.finetune.testing import test
from fasthpm.probes.tokens import TokenChooser
from fasthpm.ranks import zero
from fasthpm.recipe import Recipe
from fasthpm.run import state
from fasthpm.run.lock import FolderLock
from fasthpm.teacher import EMATeacher
from fasthpm.tuning.past import Kind, begun_from, describe, refuse_other
from fasthpm.tuning.run import Tuning, fitting_batch
from fasthpm.view_fields import PRETRAINING_ALONE

KIND = Kind(checkpoint.FINETUNE_NOTES, "fine-tuning", "classifier", "train_path")


# -------------------------------------------------------------------------------------------------- what is wrapped
class ClassifierStep(nn.Module):
    """Images and targets in, loss out; without targets, logits."""

    def __init__(self, vit: nn.Module, chooser: TokenChooser | None = None) -> None:
        super().__init__()
        self.vit = vit
        self.loss = SoftTargetCrossEntropy()
        self._chooser = [chooser]  # in a list: not a part of what is trained

    @property
    def chooser(self) -> TokenChooser | None:
        """What decides which patches are seen; None: all are."""
        return self._chooser[0]

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        """float [B, C, (T,) H, W], normalised, and [B, K] -> scalar; or -> float32 [B, K]."""
        if self.chooser:
            self.chooser.choose(images)
        logits = self.vit(images.to(self.vit.head.weight.dtype)).float()  # type: ignore[union-attr, arg-type]
        return logits if targets is None else self.loss(logits, targets)


@dataclass
class FineTuning(Tuning[ClassifierStep]):
    """A fine-tuning between two updates: images mixed with each other, and tests of accuracy."""

    name, figure = "finetune", "accuracy"

    settings: FineTune = dataclasses.field(kw_only=True)
    val_loader: Loader = dataclasses.field(kw_only=True)
    last_loader: Loader = dataclasses.field(kw_only=True)  # of the last test, all views
    mix: Mixup = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        settings, classes = self.settings, len(self.info.classes)
        self.mix = Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=classes)
        self.mix.mixup_enabled = settings.mixes

    @property
    def info(self) -> DatasetInfo:
        """Of the data."""
        return self.loader.info

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images and soft targets [B, K]."""
        return mixed(self.mix, batch.images, batch.labels)

    def test(self) -> dict[str, float]:
        """Top-1 and top-5 accuracy in percent and the loss on the test set, of the average if there is one. Collective.

        Of one view; the last test of videos is over all of them.
        """
        loader, views = self.val_loader, (1, 1)
        if self.done == self.recipe.total_steps:
            loader, views = self.last_loader, self.settings.views
        if self.teacher:
            forward = ClassifierStep(self.teacher.module, self.step.chooser)
            return test(forward, loader, self.pixels, self.launch, self.settings.seed, views)
        self.engine.eval()
        try:
            return test(self.engine, loader, self.pixels, self.launch, self.settings.seed, views)
        finally:
            self.engine.train()

    def testing_due(self) -> bool:
        """At the end of every `eval_every`-th epoch."""
        return self._ends_epoch(self.settings.eval_every)

    def saving_due(self) -> bool:
        """At the end of every `save_every`-th epoch."""
        return self._ends_epoch(self.recipe.save_every)

    def _ends_epoch(self, every: int) -> bool:
        epoch, rest = divmod(self.done, self.recipe.steps_per_epoch)
        return rest == 0 and epoch % every == 0

    def line(self, epoch: float, record: dict[str, float]) -> str:
        """What a test is told by."""
        return f"epoch {epoch:g}: top-1 {record['accuracy']:.2f} %, loss {record['loss']:.3f}"

    def loaders(self) -> tuple[Loader, ...]:
        """Of training and tests."""
        return self.loader, self.val_loader, self.last_loader


def mixed(mix: Mixup, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W] or clips [B, C, T, H, W] and labels [B] -> mixed, soft targets [B, K]; only smoothed where
    mixing is off. The frames of a clip are mixed alike: they are to timm channels of one image."""
    if mix.mixup_enabled:
        flat, targets = mix(images.flatten(1, -3), labels)
        return flat.reshape(images.shape), targets
    return images, mixup_target(labels, mix.num_classes, smoothing=mix.label_smoothing)


# -------------------------------------------------------------------------------------------------- building
def build(
    arguments: argparse.Namespace, given: dict[str, Any], launch: ranks.Launch, lock: FolderLock | None = None
) -> FineTuning:
    """Data, network and engine, at the first update or at the checkpoint; `lock`: of output_dir, once all is well."""
    with ranks.in_agreement():
        model, recipe = load_encoder(arguments.run, given)
        chosen = preset(arguments.preset, model, bool(given.get("from_scratch")), recipe.flip)
        settings = complete(FineTune(**{**chosen, **given}), arguments.run)
        if settings.aa:
            without_effect(["color_jitter"], f"aa is {settings.aa}, which changes the colours", given)
        if not {"batch_size", "accum_iter"} & given.keys():
            fitting = fitting_batch(settings.batch_size, settings.global_batch_size, launch.world_size)
            settings = dataclasses.replace(settings, batch_size=fitting)
        image_size = image_size_of(settings, model)
        plan, loader, val_loader, last_loader = open_data(settings, recipe, image_size, launch)
        data = identity_of(settings.train_path)
        pixels = loader.normalize_by(statistics_of_tuning(settings, model, loader))
        now = result.provenance(arguments.run, launch)
        origin = begun_from(KIND, settings, now)
        notes = describe(origin, settings.science, architecture(model), list(loader.info.classes), pixels)
        refuse_other(KIND, settings, notes, data, now, stored)
        config = ranks.merge_config(plan.deepspeed_config, plan, launch.world_size)
        vit = network(model, settings, image_size, len(loader.info.classes))
        chooser = choose_tokens(vit, settings, launch.device, pixels=pixels)
    if lock:
        lock.take(Path(settings.output_dir))
        with ranks.in_agreement():  # another one may have ended there since
            refuse_other(KIND, settings, notes, data, now, stored)
    step = ClassifierStep(vit, chooser)
    groups = layer_decay_groups(vit, settings.layer_decay, settings.weight_decay)
    deepspeed_engine = ranks.build_engine(step, plan, config, launch, groups)
    ema = None
    if settings.ema_decay:
        copy = network(model, settings, image_size, len(loader.info.classes))
        ema = EMATeacher(deepspeed_engine, step.vit, "vit.", copy, settings.ema_decay)
        choose_tokens(copy, settings, launch.device, chooser)
    saver = Saver(launch.rank, launch.world_size, timeout=ranks.timeout().total_seconds())
    test_loader = on_device(val_loader, launch.device)
    run = FineTuning(
        plan,
        launch,
        on_device(loader, launch.device),
        deepspeed_engine,
        step,
        ema,
        zero.MasterLayout(deepspeed_engine),
        saver,
        settings=settings,
        maps=None,
        val_loader=test_loader,
        last_loader=test_loader if last_loader is val_loader else on_device(last_loader, launch.device),
        origin=origin,
        pixels=pixels,
        notes={checkpoint.FINETUNE_NOTES: notes},
        data=data,
    )
    state.resume(run)
    return run


def load_encoder(run: Path, given: dict[str, Any]) -> tuple[HPMViT, Recipe]:
    """The run's model with the weights that fine-tuning starts from, and its recipe."""
    model, recipe = checkpoint.load_weights(run, given.get("weights", "student"))
    if given.get("from_scratch"):
        pixels, model = model.pixels, model_of(dataclasses.replace(recipe, seed=given.get("seed", 0)))
        model.pixels = pixels
    if model.video and given.get("token_policy"):
        raise UserError(f"{run} was trained on video, and --token_policy takes image models; leave it out")
    if not model.video:
        without_effect(["sampling_rate", "frame_sampling"], f"{run} was trained on images", given)
    if not model.video and given.get("test_views", "1x1") != "1x1":
        raise UserError(f"test_views is {given['test_views']!r}, but {run} was trained on images; leave it out")
    return model, recipe


def statistics_of_tuning(settings: FineTune, model: HPMViT, loader: Loader) -> PixelStatistics:
    """By what a fine-tuning's images are normalised: as its encoder was trained, or as it began itself."""
    begun = statistics_from(read_json(Path(settings.output_dir) / checkpoint.FINETUNE_NOTES))
    if begun:
        return suited(begun, loader.info, loader.source)
    return statistics_for(model, loader.info, loader.source)


def open_data(
    settings: FineTune, recipe: Recipe, image_size: tuple[int, int], launch: ranks.Launch
) -> tuple[Recipe, AugmentedLoader, Loader, Loader]:
    """The resolved plan (a recipe, for schedule and engine), both sets, checked, and the second with all views."""
    plan = dataclasses.replace(
        recipe,
        data_path=settings.train_path,
        crop_min=settings.crop_min,
        beta1=0.9,
        beta2=0.999,
        steps_per_epoch=0,
        **PRETRAINING_ALONE,
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
    options = loader_options(settings, recipe, image_size, launch)
    augmentation = Augmentation(settings.aa, settings.reprob, settings.crop_min, settings.flip, settings.color_jitter)
    val = build_loader(settings.val_path, options)
    last = thorough_loader(settings, options) if settings.views != (1, 1) else val
    drawn = dataclasses.replace(options, seed=settings.seed, accum_iter=plan.accum_iter)
    loader = AugmentedLoader(settings.train_path, augmentation, drawn, repeats=settings.num_sample)
    result.check_sets((settings.train_path, loader.info), (settings.val_path, val.info))
    labels = torch.from_numpy(loader.base.labels_of(np.arange(loader.info.num_samples)))
    result.check_labels(labels, settings.train_path, len(loader.info.classes))
    return plan.resolve(loader.info.num_samples, launch.world_size), loader, val, last


def loader_options(
    settings: FineTune, recipe: Recipe, image_size: tuple[int, int], launch: ranks.Launch
) -> LoaderOptions:
    """What the tests of a fine-tuning ask for, and its training with random draws on top."""
    return recipe.loader_options(
        image_size=image_size,
        rank=launch.rank,
        world_size=launch.world_size,
        num_workers=settings.num_workers,
        batch_size=settings.batch_size,
        sampling_rate=settings.sampling_rate or recipe.sampling_rate,
        frame_sampling=settings.frame_sampling,
        train=False,
    )


def thorough_loader(settings: FineTune, options: LoaderOptions) -> Loader:
    """The test set with all views of every video, as many rows in a batch as without."""
    clips, crops = settings.views
    batch_size = max(settings.batch_size // (clips * crops), 1)
    return build_loader(settings.val_path, dataclasses.replace(options, views=settings.views, batch_size=batch_size))


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
    vit: Any,
    settings: FineTune,
    device: torch.device,
    chosen: TokenChooser | None = None,
    pixels: PixelStatistics | None = None,
) -> TokenChooser | None:
    """What decides which patches `vit` sees, if not all; a second ViT shares the first one's choice.

    `pixels`: by which its images are normalised.
    """
    if chosen is not None:
        vit.patch_drop = chosen.kept
        return chosen
    if not settings.token_policy:
        return None
    run = Path(settings.difficulty_run) if settings.difficulty_run else None
    return TokenChooser(
        vit, settings.token_policy, settings.keep_tokens, run, device, settings.token_difficulty or AUTO, pixels
    )
