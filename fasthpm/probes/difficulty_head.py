"""A difficulty head for a run that has none: fitted on its frozen encoder, kept beside it.

RUN/difficulty_head.safetensors    the head's weights; in its metadata what it fits, and how well it agrees

It learns, as the head of difficulty `in_place` does while a run trains, to rank the patches of an image, all visible,
as the losses of random masks rank them. Nothing else learns. Letters: B batch, L patches, M masked ones, D width.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from fasthpm import checkpoint, files
from fasthpm import loss as losses
from fasthpm.data import Batch, build_loader, read_info
from fasthpm.difficulty import DIFFICULTIES, HEAD, refusal
from fasthpm.entry import Result
from fasthpm.errors import UserError
from fasthpm.frozen import build_frozen
from fasthpm.layers import DifficultyHead, init_linear
from fasthpm.mask import draw_mask, sample_noise, split_ids
from fasthpm.model import HPMViT
from fasthpm.patches import NormalizedPatches, Statistics, statistics_for
from fasthpm.projection import patch_distributions
from fasthpm.recipe import Recipe
from fasthpm.run.difficulty_check import CHUNK, mean_losses, random_plan

FILE = f"{HEAD}.safetensors"
NOTES = f"fasthpm_{HEAD}"  # in the file's metadata, as JSON
HELD_OUT = 64  # the last samples of the set, on which it is measured and not trained
LR, WEIGHT_DECAY = 1e-3, 0.05
HOW = "fasthpm maps RUN --fit_head 1000 --data_path SET"


class Agreement(NamedTuple):
    """How well a difficulty agrees with the mean loss over random masks; see `losses`."""

    difficulty_spearman: float
    difficulty_auc: float


def agreement(answers: Tensor, true: Tensor, valid: Tensor | None = None) -> Agreement:
    """Of two [B, L]; `valid`: bool [B, L], the patches that count; None: all."""
    spearman, auc = losses.spearman(answers, true, valid), losses.hardest_auc(answers, true, valid=valid)
    return Agreement(float(spearman), float(auc))


@dataclass(frozen=True)
class HeadNotes:
    """What a kept head fits, how it was made, and how well it agrees."""

    width: int  # D of the encoder
    grid: tuple[int, int, int]  # frame slots, rows, columns
    patch_size: int
    weights: str  # of the run, on which it was fitted: "student" or "teacher"
    step: int  # update of their checkpoint
    updates: int  # of the head
    batch_size: int
    data: str
    difficulty_spearman: float  # on samples held out of `data`
    difficulty_auc: float
    others: dict[str, float]  # difficulty_spearman on them of what the run has without it


@dataclass(frozen=True, repr=False)
class HeadResult(Result):
    """What was fitted, and how well it agrees with the mean loss over random masks of samples held out."""

    path: Path
    updates: int
    difficulty_spearman: float
    difficulty_auc: float
    before: float  # difficulty_spearman of the head before its first update
    others: dict[str, float]  # the same of what the run can be asked without it


@dataclass(frozen=True)
class KeptHead:
    """A head beside a run, as `read` found it."""

    path: Path
    weights: dict[str, Tensor]
    notes: HeadNotes


def shape_of(model: HPMViT) -> dict[str, Any]:
    """What a head must share with an encoder."""
    return {"width": model.embed_dim, "grid": (model.slots, *model.grid_size), "patch_size": model.patch_size}


# -------------------------------------------------------------------------------------------------- the file
def keep(run: Path, head: DifficultyHead, notes: HeadNotes) -> Path:
    """Write a head beside its run, in the place of any other. **Raises:** `UserError` if the disk does not take it."""
    path = run / FILE
    tensors = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    with files.writing(path, "make room, or fit it on a copy of the run"), files.replacing(path) as aside:
        files.save_tensors(tensors, aside, {NOTES: json.dumps(dataclasses.asdict(notes))})
    return path


def read(run: Path) -> KeptHead | None:
    """The head beside a run; None if there is none. **Raises:** `UserError` for a file that is not one."""
    path = run / FILE
    if not path.is_file():
        return None
    tensors, metadata = files.read_file(path)
    try:
        values = json.loads(metadata[NOTES])
        notes = HeadNotes(**{**values, "grid": tuple(values["grid"])})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not say what it fits; remove it, and fit one: {HOW}") from error
    return KeptHead(path, tensors, notes)


def attach(model: HPMViT, kept: KeptHead) -> None:
    """Give the model a kept head, so that it can be asked `in_place`.

    **Raises:** `UserError` if the head is of another encoder.
    """
    for name, ours in shape_of(model).items():
        theirs = getattr(kept.notes, name)
        if theirs != ours:
            what = name.replace("grid", "grid (slots, rows, columns)")
            raise UserError(
                f"{kept.path} is of {what} {theirs}, and this run's is {ours}; remove it, and fit one: {HOW}"
            )
    head = DifficultyHead(model.embed_dim)
    shapes = {name: value.shape for name, value in head.state_dict().items()}
    if shapes != {name: value.shape for name, value in kept.weights.items()}:
        raise UserError(f"{kept.path} holds other weights than a head's; remove it, and fit one: {HOW}")
    head.load_state_dict(kept.weights)
    model.difficulty_head = head.eval().to(model.mask_token.device)


# -------------------------------------------------------------------------------------------------- fitting
@dataclass
class Fitting:
    """A frozen model, and the samples on which a head of it learns and is measured.

    - `model`: in eval mode; it encodes, and its losses are those that the head ranks
    - `source`: the set; its last `HELD_OUT` samples are not trained on; `folder`: the checkpoint,
      which losses of distributions need

    **Raises:** `UserError` for a set that is too small, or has no such samples.
    """

    model: HPMViT
    recipe: Recipe
    info: Statistics  # mean and standard deviation that the model was trained with
    source: str
    batch_size: int = 64
    num_workers: int = 0
    folder: Path = Path()

    def __post_init__(self) -> None:
        self.samples = read_info(self.source).num_samples
        if self.samples < HELD_OUT + self.batch_size:
            raise UserError(
                f"data_path {self.source} has {self.samples} samples, and fitting needs a batch of {self.batch_size} "
                f"and {HELD_OUT} more to measure on; give a larger set, or a smaller --batch_size"
            )
        self.device, self.plan = self.model.mask_token.device, random_plan(self.recipe)
        self.patches_of = NormalizedPatches(self.recipe, self.info)
        self.features = target_features(self.model, self.recipe, self.folder)

    def fresh(self) -> DifficultyHead:
        """A head that has learnt nothing."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            return DifficultyHead(self.model.embed_dim).apply(init_linear).to(self.device)

    def train(self, head: DifficultyHead, updates: int) -> None:
        """Let a head learn for `updates` updates, by AdamW with the learning rate on half a cosine."""
        optimizer = torch.optim.AdamW(head.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        options = self.recipe.loader_options(
            batch_size=self.batch_size, num_workers=self.num_workers, max_bad_samples=1.0
        )
        loader = build_loader(self.source, options)
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        try:
            for update in tqdm(range(updates), desc="difficulty head", unit="update"):
                for group in optimizer.param_groups:
                    group["lr"] = LR * (1 + math.cos(math.pi * update / updates)) / 2
                optimizer.zero_grad()
                self._loss(head, next(batches), update).backward()
                optimizer.step()
        finally:
            loader.close()

    def _loss(self, head: DifficultyHead, batch: Batch, update: int) -> Tensor:
        """Of ranking a batch's masked patches, seen, as their losses do."""
        learnt = batch.ids < self.samples - HELD_OUT
        images, ids = batch.images[learnt].to(self.device), batch.ids[learnt].to(self.device)
        with torch.no_grad():
            patches, plan = self.patches_of(images), self.plan
            noise = sample_noise(self.recipe.seed, torch.tensor(update, device=self.device), ids, plan.noise_size)
            mask = draw_mask(plan, noise, torch.zeros_like(patches[:, :, 0]), 0.0)
            features = self.features(images, patches)
            actual = self.model(patches, mask, num_masked=plan.num_masked, target=features).per_patch_loss
            tokens = self.model.encode(patches)[:, self.model.num_prefix_tokens :]
        return losses.ranking_loss(head(tokens).gather(1, split_ids(mask, plan.num_masked)[1]), actual)

    @torch.no_grad()
    def measure(self, head: DifficultyHead) -> dict[str, Agreement]:
        """On the samples held out, seen whole: of `head` (under `HEAD`), and of all that the model can be asked by."""
        found: dict[str, list[Tensor]] = {}
        true, model = [], self.model
        for images, ids in self._held_out():
            patches = self.patches_of(images)
            true.append(mean_losses(model, patches, ids, self.plan, self.features(images, patches)))
            answers = {HEAD: head(model.encode(patches)[:, model.num_prefix_tokens :]), **self._asked(patches)}
            for name, answer in answers.items():
                found.setdefault(name, []).append(answer)
        return {name: agreement(torch.cat(parts), torch.cat(true)) for name, parts in found.items()}

    def _asked(self, patches: Tensor) -> dict[str, Tensor]:
        """The answers of the model as it is."""
        able = [name for name in DIFFICULTIES if not refusal(self.model, name)]
        if self.model.decoder_attention == "cross":
            able = [name for name in able if name != "paper"]
        own, answers = self.model.difficulty, {}
        try:
            for self.model.difficulty in able:
                answers[self.model.difficulty] = self.model.predict_loss(patches)
        finally:
            self.model.difficulty = own
        return answers

    def _held_out(self) -> list[tuple[Tensor, Tensor]]:
        """(images, ids) of the last samples, in chunks."""
        options = self.recipe.loader_options(
            batch_size=CHUNK, train=False, whole=True, num_workers=self.num_workers, max_bad_samples=1.0
        )
        loader: Any = build_loader(self.source, options)
        try:
            batch = loader.take(0, np.arange(self.samples - HELD_OUT, self.samples))
        finally:
            loader.close()
        own = ~batch.replaced  # others, which were trained on, stand in for what does not decode
        if not own.any():
            raise UserError(f"none of the last {HELD_OUT} samples of {self.source} decodes; prepare it again")
        images, ids = batch.images[own].to(self.device), batch.ids[own].to(self.device)
        return list(zip(images.split(CHUNK), ids.split(CHUNK), strict=True))


def fit_beside(
    source: Path, data_path: str, updates: int, *, weights: str = "", batch_size: int = 64, num_workers: int = 0
) -> HeadResult:
    """Fit a head on a run's encoder, and keep it beside the run.

    - `weights`: "student" or "teacher"; empty = the teacher's, if the checkpoint has them

    **Raises:** `UserError` for a run that has a head, or no losses, and for a set that is too small.
    """
    folder = checkpoint.checkpoint_of(source)
    chosen = weights or ("teacher" if checkpoint.has_teacher(folder) else "student")
    model, recipe = checkpoint.load_weights(folder, chosen)
    if recipe.question.head:
        raise UserError(f"{source} has a difficulty head already, which learnt as it trained; leave out --fit_head")
    if checkpoint.lacks_decoder(folder):
        raise UserError(f"{source} {checkpoint.NO_DECODER}")
    step = checkpoint.read_state(folder).step
    model.requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
    statistics = statistics_for(model, read_info(data_path, recipe.channels), data_path)
    fitting = Fitting(model, recipe, statistics, data_path, batch_size, num_workers, folder)
    head = fitting.fresh()
    before = fitting.measure(head)[HEAD]
    fitting.train(head, updates)
    found = fitting.measure(head)
    after = found.pop(HEAD)
    others = {name: figures.difficulty_spearman for name, figures in found.items()}
    notes = HeadNotes(
        **shape_of(model),
        weights=chosen,
        step=step,
        updates=updates,
        batch_size=batch_size,
        data=data_path,
        **after._asdict(),
        others=others,
    )
    path = keep(checkpoint.run_of(folder), head, notes)
    return HeadResult(path, updates, *after, before.difficulty_spearman, others)


def teacher_distributions(recipe: Recipe, folder: Path, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """(uint8 images, patches) -> what iBOT's teacher in a checkpoint says of every patch, [B, L, prototypes]."""
    kept = folder / checkpoint.BUFFERS
    if not checkpoint.has_teacher(folder) or not kept.is_file():
        raise UserError(
            f"{folder} holds no teacher with its centres, without which there are no losses of distributions; leave "
            f"out what measures them, or take a checkpoint of training"
        )
    teacher, centre = checkpoint.load_weights(folder, "teacher")[0].to(device), load_file(kept)["centres"][1].to(device)

    @torch.no_grad()
    def targets(images: Tensor, patches: Tensor) -> Tensor:
        return patch_distributions(teacher, patches, centre, recipe.temperature)

    return targets


def target_features(model: HPMViT, recipe: Recipe, folder: Path) -> Callable[[Tensor, Tensor], Tensor | None]:
    """(uint8 images, patches) -> the features that the recipe's student reconstructs, [B, L, D']; None: pixels.

    With target ema they are the model's own; distributions are those of the teacher in the checkpoint `folder`.
    **Raises:** `UserError` if they need what the checkpoint lacks.
    """
    if recipe.uses_views:
        return teacher_distributions(recipe, folder, model.mask_token.device)
    frozen = build_frozen(recipe, model.mask_token.device, torch.float32)
    if frozen is not None:
        return lambda images, patches: frozen(images)
    if recipe.target_teacher:
        return lambda images, patches: model.encode(patches)[:, model.num_prefix_tokens :]
    return lambda images, patches: None
