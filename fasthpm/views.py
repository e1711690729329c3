"""The step of runs that learn from several views of each image (iBOT): colours → teacher → mask → student → losses.

The teacher, an EMA of the student with its head, reads every token of the global crops; the student reads these masked,
and the local crops. The student's distribution over prototypes is to be the teacher's: of the cls token across views,
of masked patches within the view. As in `Step` nothing waits for the device, and randomness is a function of (seed,
update, sample id, view).

Letters: S samples, V global and n local crops of each, B = S V rows, L patches, N the most masked ones, K prototypes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasthpm import colours
from fasthpm.data import DatasetInfo
from fasthpm.difficulty import HEAD
from fasthpm.loss import full_precision
from fasthpm.mask import sample_noise
from fasthpm.mask_counts import CountPlan, counted_mask, masked_places, ranking_loss_of, spearman_of
from fasthpm.model import Crops, HPMViT, Projected
from fasthpm.projection import (
    STUDENT_TEMPERATURE,
    Centres,
    ProjectionHead,
    cross_entropy,
    entropy,
    mean_logits,
    patch_distributions,
    sharpened,
    teacher_logits,
)
from fasthpm.recipe import Recipe
from fasthpm.step import HEALTH_SAMPLES, Step, StepOutput
from fasthpm.view_fields import MOST_VIEWS

VIEW_METRICS = (
    "loss",
    "cls_loss",
    "patch_loss",
    "difficulty_loss",
    "teacher_spearman",
    "teacher_entropy",
    "mean_entropy",
    "teacher_kl",
)
COUNT_SEED, COLOUR_SEED = 0xC027, 0xC0104  # apart from the noise of the masks


class ViewTeacher(NamedTuple):
    """What the teacher says of the global crops."""

    entering: Tensor  # [B, 1 + L, 256], what enters the last layer of its head
    difficulty: Tensor | None = None  # float32 [B, L], if the masks follow it
    tokens: Tensor | None = None  # [B, L, D], if a difficulty head learns on them


class Views(NamedTuple):
    """The crops of a batch as the models take them."""

    patches: Tensor  # [B, L, P*P*C], normalised
    keys: Tensor  # int64 [B], a number for each (sample id, view)
    local: Tensor | None  # [S n, l, P*P*C]
    local_keys: Tensor | None  # int64 [S n]


def step_of(student: HPMViT, recipe: Recipe, info: DatasetInfo) -> Step:
    """The step of a recipe."""
    return (ViewStep if recipe.uses_views else Step)(student, recipe, info)


def inputs_of(recipe: Recipe, draw: Callable[[tuple[int, ...]], Tensor]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Images, ids and, where there are any, local crops of a micro-batch, as a recipe's step takes them; `draw` makes
    pixels of a shape."""
    samples, views = recipe.batch_size, recipe.global_crops
    images, ids = draw((samples * views, *recipe.sample_shape)), torch.arange(samples).repeat_interleave(views)
    side = recipe.local_size
    shape = (samples * recipe.local_crops, side, side, recipe.channels)
    return images, ids, (draw(shape),) if recipe.local_crops else ()


class ViewStep(Step):
    """`Step` with several views. Its centres change once per update: `end_update`."""

    names = VIEW_METRICS

    def __init__(self, student: HPMViT, recipe: Recipe, info: DatasetInfo) -> None:
        super().__init__(student, recipe, info)
        self.centres = Centres(recipe.prototypes, recipe.centre_momentum)
        self.counts = CountPlan(recipe.mask_ratio, recipe.mask_ratio_spread, recipe.unmasked_share, recipe.num_patches)

    def telling(self) -> tuple[str, ...]:
        lacking = () if self.recipe.masks_by_difficulty else ("difficulty_loss", "teacher_spearman")
        return tuple(name for name in VIEW_METRICS if name not in lacking)

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside weights and optimizer."""
        return {"centres": self.centres.values}

    def end_update(self, applied: bool) -> None:
        """Take in what the update's micro-steps said of the centres, or drop it. Collective."""
        if applied:
            self.centres.update()
        else:
            self.centres.forget()

    def forward(
        self,
        images: Tensor,
        ids: Tensor,
        step: Tensor,
        alpha: Tensor,
        scores: Tensor | None = None,
        local: Tensor | None = None,
    ) -> StepOutput:
        """One micro-step on this rank.

        - `images`: uint8 [B, H, W, C], the global crops of a sample one after the other; `ids`: int64 [B]
        - `step`, `alpha`: as in `Step.forward`; `scores`: None
        - `local`: uint8 [S n, h, w, C], the local crops in the order of the samples
        """
        self.normalized_patches.move(images.device)
        self.centres.move(images.device)
        views = self._views(images, local, ids, step)
        with torch.no_grad():
            with self.stopwatch.measure(images.device):
                answer: Any = self.run_teacher(views.patches)
            self.centres.add(mean_logits(self._head, answer.entering))
        if not self.compiled:
            self.compiled = True
            self._try_gradients(views, step, alpha, answer)
        return self.run_student(views, step, alpha, answer)

    @property
    def _head(self) -> ProjectionHead:
        """The teacher's."""
        head = self._teacher[0].decoder_pred
        assert isinstance(head, ProjectionHead)
        return head

    # ---------------------------------------------------------------------------------------------- before the models
    def _views(self, images: Tensor, local: Tensor | None, ids: Tensor, step: Tensor) -> Views:
        count, recipe = self.recipe.global_crops, self.recipe
        keys = ids * MOST_VIEWS + torch.arange(len(ids), device=ids.device) % count
        patches = self.run_patches(self._coloured(images, keys, step, count))
        if local is None or not recipe.local_crops:
            return Views(patches, keys, None, None)
        numbers = torch.arange(count, count + recipe.local_crops, device=ids.device)
        local_keys = (ids[::count, None] * MOST_VIEWS + numbers).flatten()
        return Views(patches, keys, self.run_patches(self._coloured(local, local_keys, step, 0)), local_keys)

    def _coloured(self, images: Tensor, keys: Tensor, step: Tensor, views: int) -> Tensor:
        """Crops with other colours, if the recipe has any; `views`: of a sample side by side, 0 = local crops."""
        if self.recipe.view_augment == "none":
            return images
        numbers = sample_noise(self.recipe.seed ^ COLOUR_SEED, step, keys, colours.NUMBERS, draws=1)[0]
        often = (
            colours.chances(views, len(images) // max(views, 1), table, images.device)
            for table in (colours.BLURRED, colours.SOLARISED)
        )
        return colours.change_colours(images, numbers, *often)

    def teach(self, patches: Tensor, *_: Tensor | None) -> ViewTeacher:  # type: ignore[override]
        """One pass of the EMA teacher over all tokens of the global crops, [B, L, P*P*C]."""
        teacher = self._teacher[0]
        tokens = teacher.encode_in_place(patches)
        entering = self._head.bottleneck(tokens)
        if not self.recipe.masks_by_difficulty:
            return ViewTeacher(entering)
        return ViewTeacher(entering, teacher.difficulty_of(tokens), tokens[:, 1:])

    # ---------------------------------------------------------------------------------------------- mask to losses
    def learn(self, views: Views, step: Tensor, alpha: Tensor, answer: ViewTeacher) -> StepOutput:  # type: ignore[override]
        """Everything after the teacher: masks, student, losses."""
        mask, counts = self._masks(views.keys, step, alpha, answer.difficulty)
        places = masked_places(mask, self.counts.most)
        valid = torch.arange(self.counts.most, device=mask.device) < counts
        found: Projected = self.student(views.patches, mask, crops=self._crops(views, places, step))
        cls, patches = self._wanted(answer.entering, places, step)
        spread = entropy(cls)
        cls_loss = loss_across_views(found.cls, cls, self.recipe.global_crops)
        per_patch = cross_entropy(found.patches, patches)
        patch_loss = ((per_patch * valid).sum(1) / counts[:, 0].clamp_min(1)).mean()
        difficulty_loss, spearman = self._difficulty(answer, places, per_patch.detach(), valid)
        total = cls_loss + patch_loss + difficulty_loss
        figures = (total, cls_loss, patch_loss, difficulty_loss, spearman, spread.mean(), entropy(cls.mean(0)))
        metrics = torch.stack([*(value.detach().float() for value in figures), (cls_loss - spread.mean()).detach()])
        return StepOutput(total, metrics, mask)

    def _masks(self, keys: Tensor, step: Tensor, alpha: Tensor, difficulty: Tensor | None) -> tuple[Tensor, Tensor]:
        """Masks, bool [B, L], and how many patches of each are masked, int64 [B, 1]."""
        seed, plan = self.recipe.seed, self.mask_plan
        counts = self.counts.draw(sample_noise(seed ^ COUNT_SEED, step, keys, 2, draws=1)[0])
        noise = sample_noise(seed, step, keys, plan.noise_size)
        scores = noise.new_zeros(len(keys), plan.num_patches) if difficulty is None else difficulty
        return counted_mask(plan, counts, noise, scores, alpha), counts

    def _crops(self, views: Views, places: Tensor, step: Tensor) -> Crops:
        side = self.recipe.local_size // self.recipe.patch_size
        local = None if views.local_keys is None else self._paths(views.local_keys, step)
        return Crops(places, self._paths(views.keys, step), views.local, (side, side), local)

    @torch.no_grad()
    def _wanted(self, entering: Tensor, places: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's distributions: of cls [B, K], and of patches [B, N, K]. Other logits are never made."""
        masked = entering[:, 1:].gather(1, places[:, :, None].expand(-1, -1, entering.shape[2]))
        logits = teacher_logits(self._head, torch.cat([entering[:, :1], masked], dim=1))
        temperature, centres = self.temperature(step), self.centres.values
        return sharpened(logits[:, 0], centres[0], temperature), sharpened(logits[:, 1:], centres[1], temperature)

    def temperature(self, step: Tensor) -> Tensor:
        """`schedule.temperature_at`, on the device."""
        recipe = self.recipe
        warmup = recipe.temperature_epochs * recipe.steps_per_epoch
        share = (step.float() / warmup).clamp_max(1) if warmup else torch.ones_like(step, dtype=torch.float32)
        return recipe.temperature_start + share * (recipe.temperature - recipe.temperature_start)

    def _difficulty(
        self, answer: ViewTeacher, places: Tensor, per_patch: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of the difficulty head, which is to rank the masked patches as the student's losses of them do, and
        how well the teacher's difficulty did: scalars, 0 without a head."""
        if answer.tokens is None or answer.difficulty is None:
            return per_patch.new_zeros(()), per_patch.new_zeros(())
        masked = answer.tokens.gather(1, places[:, :, None].expand(-1, -1, answer.tokens.shape[2]))
        loss = ranking_loss_of(getattr(self.student, HEAD)(masked.detach()), per_patch, valid)
        some = slice(HEALTH_SAMPLES)
        seen = answer.difficulty[some].gather(1, places[some])
        return loss, spearman_of(seen, per_patch[some], valid[some])

    @torch.no_grad()
    def target_of(self, images: Tensor, patches: Tensor) -> Tensor:
        """The teacher's distribution of every patch of some images, [B, L, K], at the last temperature."""
        self.centres.move(images.device)
        return patch_distributions(self._teacher[0], patches, self.centres.values[1], self.recipe.temperature)


def loss_across_views(logits: Tensor, wanted: Tensor, views: int) -> Tensor:
    """Cross-entropy of every crop's cls token against every *other* global crop's distribution, averaged: a scalar.

    - `logits`: the student's, [S V + S n, K], global crops first; `wanted`: the teacher's, [S V, K]

    The log-probabilities of a crop are its logits less their logsumexp, so all pairs are one small matrix product.
    """
    count = len(wanted)
    wanted = wanted.unflatten(0, (-1, views))
    scaled = full_precision(logits) / STUDENT_TEMPERATURE
    samples = len(wanted)
    crops = torch.cat(
        [part.reshape(samples, -1, part.shape[1]) for part in scaled.split([count, len(logits) - count])], 1
    )
    pairs = crops.logsumexp(dim=-1)[:, None] - wanted.to(crops.dtype) @ crops.transpose(1, 2)  # [S, V, V + n]
    same = torch.eye(views, pairs.shape[2], dtype=torch.bool, device=pairs.device)
    return pairs.masked_fill(same, 0).sum() / (samples * (pairs.shape[1] * pairs.shape[2] - views))
