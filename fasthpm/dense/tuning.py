"""Building a dense task's network, engine and loaders, and what it does between two updates."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fasthpm import checkpoint, patches, ranks
from fasthpm.checkpoint import shards
from fasthpm.checkpoint.saver import Saver
from fasthpm.data.device import on_device
from fasthpm.data.identity import identity_of_files
from fasthpm.data.statistics import PixelStatistics, statistics_from
from fasthpm.dense.loader import DenseBatch, DenseLoader, DenseOptions, DenseSet
from fasthpm.dense.settings import complete
from fasthpm.dense.task import Task
from fasthpm.dense.values import shown_once
from fasthpm.errors import UserError, unlike
from fasthpm.files import read_json, write_json
from fasthpm.model import HPMViT
from fasthpm.patches import model_of
from fasthpm.probes import result
from fasthpm.probes.classifier import architecture, layer_scale
from fasthpm.ranks import zero
from fasthpm.recipe import Recipe
from fasthpm.run import state
from fasthpm.run.bad_samples import BadSampleLog
from fasthpm.run.lock import FolderLock
from fasthpm.tuning.past import begun_from, describe, refuse_other
from fasthpm.tuning.run import Tuning
from fasthpm.view_fields import PRETRAINING_ALONE

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of batch norms: training changes them
CLASSES_FILE, PICTURE_FILE = "classes.json", "pictures.png"
PLAIN = ("rel_pos", "relative_position")  # in names of positions, which do not decay


@dataclasses.dataclass
class DenseTuning(Tuning[nn.Module]):
    """A training of a dense task between two updates."""

    task: Task = dataclasses.field(kw_only=True)
    data_loader: DenseLoader = dataclasses.field(kw_only=True)  # of training, on the CPU
    val_loader: DenseLoader = dataclasses.field(kw_only=True)
    drawn_loader: DenseLoader = dataclasses.field(kw_only=True)  # of the images that are drawn

    def __post_init__(self) -> None:
        self.name, self.figure = self.task.name, self.task.best  # type: ignore[misc]

    def lr_at(self, update: int) -> float:
        """By the settings' own schedule."""
        return float(self.settings.lr_at(update))

    def inputs(self, batch: DenseBatch) -> tuple[Any, Any]:
        """Images, normalised, and targets."""
        return normalised(batch.images, self.pixels), batch.targets

    def losses(self, output: dict[str, Tensor]) -> dict[str, Tensor]:
        """Their sum, and each of them."""
        return {"loss": torch.stack([value.float() for value in output.values()]).sum(), **output}

    def buffers(self) -> dict[str, Tensor]:
        """What batch norms have seen. Training does not read it, so rank 0's is the one that counts."""
        found = dict(self.step.named_buffers())
        return {name: value for name, value in found.items() if name.rpartition(".")[2] in STATISTICS}

    def test(self) -> dict[str, float]:
        """Figures of the test set; the last test draws the picture. Collective."""
        self.share_buffers()
        folder, last = Path(self.settings.output_dir), self.done == self.recipe.total_steps
        self.engine.eval()
        try:
            with torch.no_grad():
                return tested(self, self.engine, folder, draw=last)
        finally:
            self.engine.train()

    def share_buffers(self) -> None:
        """Rank 0's buffers on every rank. Collective."""
        if self.launch.world_size > 1:
            for value in self.buffers().values():
                torch.distributed.broadcast(value, 0)

    def testing_due(self) -> bool:
        """Every `eval_every` updates."""
        return bool(self.settings.eval_every) and self.done % self.settings.eval_every == 0

    def saving_due(self) -> bool:
        """Every `save_every` updates."""
        return bool(self.done % self.settings.save_every == 0)

    def told(self) -> dict[str, float]:
        """How many samples could not be read so far."""
        return {"bad_samples": float(self.bad_samples.update(self.loader))}

    def loaders(self) -> tuple[Any, ...]:
        """Of training and test."""
        return self.loader, self.val_loader, self.drawn_loader


def tested(run: Any, forward: Any, folder: Path, *, draw: bool) -> dict[str, float]:
    """Test, keep the table of classes and, to `draw`, the picture in `folder`. Collective.

    - `run`: what has `task`, `val_loader`, `drawn_loader`, `pixels`, `launch`, `settings`
    """
    found = run.task.test(forward, run.val_loader, run.pixels, run.launch)
    with ranks.in_agreement():
        if run.launch.rank == 0 and found.table:
            write_json(folder / CLASSES_FILE, found.table)
    if draw and run.settings.pictures:
        run.task.draw(forward, run.drawn_loader, run.pixels, run.launch, folder / PICTURE_FILE, run.settings.show)
    return dict(found.figures)


def normalised(images: Any, pixels: PixelStatistics) -> Any:
    """Pixels [B, C, H, W], or a list of [C, H, W] -> float32 of the same shape, normalised."""
    if isinstance(images, list):
        return [normalised(image, pixels) for image in images]
    return patches.normalised(images, pixels, -3)


# -------------------------------------------------------------------------------------------------- building
def build(task: Task, run: Path, settings: Any, launch: ranks.Launch, lock: FolderLock | None = None) -> DenseTuning:
    """Data, network and engine, at the first update or at the checkpoint.

    - `settings`: with the recipe's numbers in it; `lock`: of output_dir, once all is well
    """
    with ranks.in_agreement():
        settings = complete(settings, run, task.name)
        model, recipe = load_encoder(task, run, settings)
        plan = plan_of(recipe, settings, launch.world_size)
        pixels = statistics_of(task, settings, model, run)
        shown_once(pixels, settings.show)  # its errors, before any work
        data = task.open(settings, "train", model.in_chans, pixels.values)
        loader = training_loader(task, data, settings, plan, launch, pixels)
        val, drawn = test_loaders(task, settings, model.in_chans, launch, pixels)
        check_classes(data, val.data)
        identity = identity_of_files(task.files(settings, data))
        now = result.provenance(run, launch)
        origin = begun_from(task.kind, settings, now)
        notes = describe(origin, settings.science, architecture(model), list(data.classes), pixels)
        refuse_other(task.kind, settings, notes, identity, now)
        config = ranks.merge_config(plan.deepspeed_config, plan, launch.world_size)
        network = task.network(model, settings, data)
    if lock:
        lock.take(Path(settings.output_dir))
        with ranks.in_agreement():  # another one may have ended there since
            refuse_other(task.kind, settings, notes, identity, now)
    groups = parameter_groups(network, len(model.blocks), settings.layer_decay, settings.weight_decay)
    engine = ranks.build_engine(network, plan, config, launch, groups)
    made = DenseTuning(
        plan,
        launch,
        on_device(loader, launch.device),  # type: ignore[arg-type]
        engine,
        network,
        None,
        zero.MasterLayout(engine),
        Saver(launch.rank, launch.world_size, timeout=ranks.timeout().total_seconds()),
        settings=settings,
        origin=origin,
        pixels=pixels,
        notes={task.kind.notes: notes},
        data=identity,
        task=task,
        data_loader=loader,
        val_loader=val,
        drawn_loader=drawn,
    )
    state.resume(made)
    made.bad_samples = BadSampleLog(
        Path(settings.output_dir), data.source, settings.max_bad_samples, rank=launch.rank, keep=made.done > 0
    )
    return made


def load_encoder(task: Task, run: Path, settings: Any) -> tuple[HPMViT, Recipe]:
    """The run's model with the weights that the training starts from, and its recipe."""
    model, recipe = checkpoint.load_weights(run, settings.weights)
    if model.video:
        raise UserError(f"{run} was trained on video, and fasthpm {task.name} takes image models; give an image run")
    if settings.from_scratch:
        pixels, model = model.pixels, model_of(dataclasses.replace(recipe, seed=settings.seed))
        model.pixels = pixels
    return model, recipe


def plan_of(recipe: Recipe, settings: Any, world_size: int) -> Recipe:
    """What engine and checkpoints go by: a recipe of one epoch of `steps` updates."""
    names = ["batch_size", "accum_iter", "global_batch_size", "lr", "weight_decay", "clip_grad", "seed", "num_workers"]
    names += ["output_dir", "deepspeed_config", "resume", "log_every", "keep_checkpoints", "stop_after"]
    own = {name: getattr(settings, name) for name in names}
    fixed = {"beta1": 0.9, "beta2": 0.999, "epochs": 1, "steps_per_epoch": settings.steps, "warmup_epochs": 0.0}
    plan = dataclasses.replace(recipe, data_path=settings.data_path, keep_every=0, **PRETRAINING_ALONE, **fixed, **own)
    plan = checkpoint.continued(plan, world_size)
    accum_iter = plan.accumulation(world_size)
    return dataclasses.replace(plan, accum_iter=accum_iter, global_batch_size=accum_iter * plan.batch_size * world_size)


def training_loader(
    task: Task, data: DenseSet, settings: Any, plan: Recipe, launch: ranks.Launch, pixels: PixelStatistics
) -> DenseLoader:
    """Endless, shuffled and augmented."""
    options = DenseOptions(
        batch_size=plan.batch_size,
        train=True,
        seed=settings.seed,
        rank=launch.rank,
        world_size=launch.world_size,
        accum_iter=plan.accum_iter,
        num_workers=settings.num_workers,
        max_bad_samples=settings.max_bad_samples,
    )
    return DenseLoader(data, task.transform(settings, "train", pixels), task.collate(settings), options)


def test_loaders(
    task: Task, settings: Any, channels: int, launch: ranks.Launch, pixels: PixelStatistics
) -> tuple[DenseLoader, DenseLoader]:
    """The test set, shared among the ranks, and the first images of it, which every rank has."""
    data = task.open(settings, "val", channels, pixels.values)
    if not len(data):
        raise UserError(f"{data.source} has no images to test on; give others")
    transform, collate = task.transform(settings, "val", pixels), task.collate(settings)
    own = DenseOptions(settings.batch_size, False, 0, launch.rank, launch.world_size, 1, settings.num_workers)
    few = DenseOptions(settings.batch_size, False, num_workers=1)
    first = First(data, max(settings.pictures, 1))
    return DenseLoader(data, transform, collate, own), DenseLoader(first, transform, collate, few)


class First:
    """The first samples of a set."""

    def __init__(self, data: DenseSet, count: int) -> None:
        self.data, self.count = data, min(count, len(data))
        self.source, self.classes = data.source, data.classes

    def __len__(self) -> int:
        return self.count

    def __getattr__(self, name: str) -> Any:
        if name == "data":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.data, name)


def check_classes(train: DenseSet, val: DenseSet) -> None:
    """Both sets have the same classes. **Raises:** `UserError`."""
    if train.classes != val.classes:
        what = unlike(train.source, train.classes, val.source, val.classes)
        raise UserError(f"{what}; expected two splits of the same data set")


def statistics_of(task: Task, settings: Any, model: HPMViT, run: Path) -> PixelStatistics:
    """By what images are normalised: as the encoder was trained, or as this training began."""
    begun = statistics_from(read_json(Path(settings.output_dir) / task.kind.notes))
    found = begun or model.pixels
    if found is None:
        raise UserError(
            f"{run} does not say by what its pixels were normalised; pretrain or import it again with this version"
        )
    return found


def parameter_groups(network: Any, depth: int, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: the encoder's learning rates fall with depth (`layer_scale`), the head has the whole one."""
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        inner = network.encoder_name(name)
        scale, decay = layer_scale(inner or "head", parameter.ndim, depth, layer_decay, weight_decay)
        decay = 0.0 if any(part in name for part in PLAIN) else decay
        if parameter.requires_grad:
            group = {"params": [], "lr_scale": scale, "weight_decay": decay}
            groups.setdefault((scale, decay), group)["params"].append(parameter)
    return list(groups.values())


def saved_state(folder: Path) -> dict[str, Tensor]:
    """Weights and buffers of a checkpoint of a dense task, by name."""
    saved = shards.SavedState(folder)
    kept = folder / checkpoint.BUFFERS
    return {name: saved.whole("master", name) for name in saved.names} | (load_file(kept) if kept.is_file() else {})


def notes_of(task: Task, folder: Path) -> dict[str, Any]:
    """What a checkpoint says of its training. **Raises:** `UserError` if it is not one of this task."""
    path = folder / task.kind.notes
    if not path.is_file():
        raise UserError(f"{folder} holds no network of fasthpm {task.name}; train first, or give another --output_dir")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def table_of(folder: Path) -> list[dict[str, Any]]:
    """The last test's row per class."""
    path = folder / CLASSES_FILE
    return json.loads(path.read_text()) if path.is_file() else []
