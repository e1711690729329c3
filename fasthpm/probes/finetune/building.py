"""Network, engine and loaders of a fine-tuning."""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from fasthpm import checkpoint, ranks
from fasthpm.checkpoint.saver import Saver
from fasthpm.data import DatasetInfo, Loader, LoaderOptions, build_loader
from fasthpm.data.augmented import Augmentation, AugmentedLoader
from fasthpm.data.device import on_device
from fasthpm.data.identity import identity_of
from fasthpm.data.statistics import PixelStatistics, statistics_from
from fasthpm.errors import UserError
from fasthpm.files import read_json
from fasthpm.model import HPMViT
from fasthpm.patches import model_of, statistics_for
from fasthpm.probes import result
from fasthpm.probes.answers import AUTO
from fasthpm.probes.classifier import architecture, build_classifier, layer_decay_groups
from fasthpm.probes.finetune.settings import FineTune, complete, image_size_of, preset, stored
from fasthpm.probes.tokens import TokenChooser
from fasthpm.ranks import zero
from fasthpm.recipe import Recipe
from fasthpm.run import state
from fasthpm.run.lock import FolderLock
from fasthpm.teacher import EMATeacher


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
class FineTuning(state.Run[ClassifierStep]):
    """A fine-tuning between two updates; saves and resumes as pretraining does."""

    settings: FineTune = dataclasses.field(kw_only=True)
    val_loader: Loader = dataclasses.field(kw_only=True)
    last_loader: Loader = dataclasses.field(kw_only=True)  # of the last test, all views
    origin: dict[str, Any] = dataclasses.field(kw_only=True)  # where the encoder comes from
    pixels: PixelStatistics = dataclasses.field(kw_only=True)  # by which images are normalised
    best: float = 0.0  # accuracy in percent

    @property
    def info(self) -> DatasetInfo:
        """Of the data."""
        return self.loader.info


# -------------------------------------------------------------------------------------------------- building
def build(
    arguments: argparse.Namespace, given: dict[str, Any], launch: ranks.Launch, lock: FolderLock | None = None
) -> FineTuning:
    """Data, network and engine, at the first update or at the checkpoint; `lock`: of output_dir, once all is well."""
    with ranks.in_agreement():
        model, recipe = load_encoder(arguments.run, given)
        chosen = preset(arguments.preset, model, bool(given.get("from_scratch")), recipe.flip)
        settings = complete(FineTune(**{**chosen, **given}), arguments.run)
        image_size = image_size_of(settings, model)
        plan, loader, val_loader, last_loader = open_data(settings, recipe, image_size, launch)
        data = identity_of(settings.train_path)
        pixels = loader.normalize_by(statistics_of_tuning(settings, model, loader))
        notes = describe(settings, arguments.run, model, loader.info, pixels)
        refuse_other(Path(settings.output_dir), notes, data)
        config = ranks.merge_config(plan.deepspeed_config, plan, launch.world_size)
        vit = network(model, settings, image_size, len(loader.info.classes))
        chooser = choose_tokens(vit, settings, launch.device, pixels=pixels)
        origin = result.provenance(arguments.run, launch)
    if lock:
        lock.take(Path(settings.output_dir))
        with ranks.in_agreement():  # another one may have ended there since
            refuse_other(Path(settings.output_dir), notes, data)
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
    if not model.video and given.get("test_views", "1x1") != "1x1":
        raise UserError(f"test_views is {given['test_views']!r}, but {run} was trained on images; leave it out")
    return model, recipe


def statistics_of_tuning(settings: FineTune, model: HPMViT, loader: Loader) -> PixelStatistics:
    """By what a fine-tuning's images are normalised: as its encoder was trained, or as it began itself."""
    begun = statistics_from(read_json(Path(settings.output_dir) / checkpoint.FINETUNE_NOTES))
    return begun or statistics_for(model, loader.info, loader.source)


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


def describe(settings: FineTune, run: Path, model: HPMViT, info: DatasetInfo, pixels: PixelStatistics) -> str:
    """What tells one fine-tuning from another, and rebuilds its classifier: JSON."""
    return (
        json.dumps(
            {
                "run": str(run),
                "settings": settings.science,
                "model": architecture(model),
                "classes": list(info.classes),
                **pixels.as_json(),
            },
            indent=2,
        )
        + "\n"
    )


def refuse_other(output_dir: Path, notes: str, data: str) -> None:
    """Refuse an output folder that belongs to another fine-tuning, to other data, or to a pretraining run.

    A folder without a checkpoint belongs to nothing, whatever a killed command left in it.

    - `data`: what the training data is (`data.identity`): the same under another path is no other data

    **Raises:** `UserError` naming the first thing that differs.
    """
    path = output_dir / checkpoint.FINETUNE_NOTES
    if not checkpoint.has_checkpoints(output_dir):
        return
    if not path.is_file():
        raise UserError(f"output_dir {output_dir} holds checkpoints of another kind; choose another --output_dir")
    theirs, ours = json.loads(path.read_text()), json.loads(notes)
    theirs["settings"] = stored(theirs["settings"])
    known = checkpoint.data_of(output_dir, theirs["settings"]["train_path"], ours["settings"]["train_path"])
    if known == data:
        theirs["settings"]["train_path"] = ours["settings"]["train_path"]
    if theirs["model"] != ours["model"]:
        raise UserError(
            f"output_dir {output_dir} holds the classifier of another architecture "
            f"({differences(theirs['model'], ours['model'])}); choose another --output_dir"
        )
    if theirs["classes"] != ours["classes"]:
        raise UserError(
            f"the classifier in {output_dir} has {len(theirs['classes'])} classes, the data has {len(ours['classes'])} "
            f"or others; use the data that it was trained for, or another --output_dir"
        )
    if theirs["settings"] != ours["settings"]:
        raise UserError(
            f"output_dir {output_dir} belongs to a fine-tuning with other settings "
            f"({differences(theirs['settings'], ours['settings'])}); choose another --output_dir"
            f"{checkpoint.way_on(output_dir)}"
        )
    if known and known != data:
        raise UserError(
            f"train_path {ours['settings']['train_path']} is not what the fine-tuning in {output_dir} was trained on: "
            f"other data lies there now (it was {known[:40]}, it is {data[:40]}); put that back, give it with "
            f"--train_path, or choose another --output_dir"
        )


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
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
