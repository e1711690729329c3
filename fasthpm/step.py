"""The fused step: teacher → mask → student → losses, in one forward of the module that DeepSpeed wraps.

Nothing here waits for the device: ids, masks and metrics stay on it, counts are known beforehand, and randomness is a
function of (seed, update, sample id). The teacher is held, not registered: DeepSpeed must neither shard nor train it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from fasthpm import loss as losses
from fasthpm.data import DatasetInfo
from fasthpm.difficulty import HEAD, HEAD_SHARE, view_noise
from fasthpm.errors import UserError
from fasthpm.layers import path_factors, regions_of
from fasthpm.mask import MaskPlan, Sets, draw_sets, sample_noise, split_ids
from fasthpm.model import HPMViT, Output
from fasthpm.patches import NormalizedPatches
from fasthpm.recipe import Recipe
from fasthpm.speed.clock import Stopwatch
from fasthpm.speed.compiled import Compiled

METRICS = ("loss", "reconstruction_loss", "difficulty_loss", "spearman", "pair_accuracy", "teacher_spearman")
PATH_SEED = 0xD20B  # apart from the noise of the masks
HEALTH_SAMPLES = 16  # predictor health is measured on this many samples of a batch


def telling(recipe: Recipe) -> tuple[str, ...]:
    """Those of `METRICS` that say something in a recipe's runs: what it lacks has no figures, which would be chance."""
    lacking = set() if recipe.predict_loss != "none" else {"spearman", "pair_accuracy"}
    if lacking and not recipe.question.head:
        lacking.add("difficulty_loss")
    if not recipe.masks_by_difficulty:
        lacking.add("teacher_spearman")
    return tuple(name for name in METRICS if name not in lacking)


class StepOutput(NamedTuple):
    """What one forward of `Step` gives."""

    loss: Tensor  # scalar
    metrics: Tensor  # float32 [len(METRICS)], detached
    mask: Tensor  # bool [B, L], True = masked


class TeacherOutput(NamedTuple):
    """What the teachers say of a batch."""

    difficulty: Tensor | None  # float32 [B, L], if the masks follow it
    features: Tensor | None  # [B, L, D'], or ids [B, L], if they are the target; or patches: ids come later
    tokens: Tensor | None = None  # [B or fewer, L, D], if a difficulty head learns on them


class Step(nn.Module):
    """What DeepSpeed wraps: a student, and everything that happens to a batch before and after it."""

    names: tuple[str, ...] = METRICS  # of what its metrics are

    def __init__(self, student: HPMViT, recipe: Recipe, info: DatasetInfo) -> None:
        super().__init__()
        self.student = student
        self.recipe = recipe
        self.mask_plan, self.warmup_plan = recipe.mask_plan, recipe.warmup_plan
        self.stopwatch = Stopwatch()
        self.normalized_patches = NormalizedPatches(recipe, info)
        self._teacher: list[HPMViT] = []
        self._frozen: list[nn.Module] = []
        self._ids_checked = False
        self.run_patches: Callable[[Tensor], Tensor] = self.normalized_patches
        self.run_teacher: Callable[..., TeacherOutput] = self.teach
        self.run_student: Callable[..., StepOutput] = self.learn
        self.compiled = True  # False: the next forward compiles first
        if recipe.compile:
            self.compile_with("inductor")

    def compile_with(self, backend: str | Callable[..., Any]) -> None:
        """Compile, of the teacher's forward and of all from the pixels to the losses, what is worth it.

        Masks and metrics are not: their sorts take three quarters of the time that compiling takes.
        """
        loss = (self.student, "_per_patch")
        self.run_patches = Compiled(self.normalized_patches, "the pixels", backend)
        self.run_teacher = Compiled(self.teach, "the teacher", backend, lambda: regions_of(self._teacher[0]))
        self.run_student = Compiled(self.learn, "the step", backend, lambda: [loss, *regions_of(self.student)])
        self.compiled = False

    def telling(self) -> tuple[str, ...]:
        """Those of `names` that say something; see the function."""
        return telling(self.recipe)

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside weights and optimizer: nothing."""
        return {}

    def end_update(self, applied: bool) -> None:
        """An update is over, its last micro-step too; `applied`: it was not left out. Nothing."""

    def attach_teacher(self, teacher: HPMViT) -> None:
        """Let `teacher` choose the hard patches (its `predict_loss`) and, with target ema, give the features."""
        self._teacher = [teacher]

    def attach_frozen(self, teacher: nn.Module) -> None:
        """Let a `teacher` that does not learn give the features (see `frozen.build_frozen`)."""
        self._frozen = [teacher]

    @property
    def frozen(self) -> Any:
        """The teacher that does not learn, if the target has one."""
        return self._frozen[0] if self._frozen else None

    def forward(
        self, images: Tensor, ids: Tensor, step: Tensor, alpha: Tensor, scores: Tensor | None = None
    ) -> StepOutput:
        """One micro-step on this rank.

        - `images`: [B, H, W, C] as stored, or clips [B, T, H, W, C]; `ids`: int64 [B]
        - `step`: int64 0-dim, the update; `alpha`: float64 0-dim, share of the mask chosen by the teacher
        - `scores`: float32 [B, L], the samples' maps (attention, or the teacher's difficulty) for the policies that
          keep some; None: masks are random, as before the first maps
        """
        self.normalized_patches.move(images.device)
        plan = self.warmup_plan if scores is None else self.mask_plan
        patches, valid = self.run_patches(images), self.normalized_patches.valid(images)
        answer = self.ask_teachers(images, patches, ids, step)
        if answer.difficulty is not None:
            scores = answer.difficulty
        elif scores is None:
            scores, alpha = self._no_scores(images), torch.zeros_like(alpha)
        if not self.compiled:
            self._compile_now(patches, ids, step, alpha, scores, answer.features, answer.tokens, valid)
        return self.run_student(plan, patches, ids, step, alpha, scores, answer.features, answer.tokens, valid)

    def ask_teachers(self, images: Tensor, patches: Tensor, ids: Tensor, step: Tensor) -> TeacherOutput:
        """What the recipe's teachers say of this batch: the EMA teacher, unless its maps are kept, and a frozen one.

        - `patches`: those of `images`, normalised

        With kept maps a difficulty head learns on the teacher's features of a few of the samples.
        """
        recipe, answer = self.recipe, TeacherOutput(None, None)
        with torch.no_grad():
            given = None
            if self._frozen:
                with self.stopwatch.measure(images.device):
                    given = self.frozen.cut(images) if self._asks_late else self.frozen(images)
                if not self._asks_late:
                    self._check_ids(given)
            if recipe.uses_teacher and not recipe.teacher_maps:
                noise = view_noise(step, ids, recipe.num_patches, recipe.seed) if recipe.question.look else None
                with self.stopwatch.measure(images.device):
                    answer = self.run_teacher(patches, noise, given if recipe.question.look else None)
            elif recipe.uses_teacher and recipe.question.head:
                with self.stopwatch.measure(images.device):
                    answer = self.run_teacher(patches[: -(-len(patches) // HEAD_SHARE)])
        return answer if given is None else answer._replace(features=given)

    @property
    def _asks_late(self) -> bool:
        """Whether the tokenizer is asked when the mask is drawn, about the masked patches."""
        return getattr(self.frozen, "by_patch", False) and not self.recipe.asks_all_targets

    @torch.no_grad()
    def _ids_of_masked(self, patches: Tensor, mask: Tensor, plan: MaskPlan) -> Tensor:
        """Ids of the masked patches in their places, int64 [B, L], 0 elsewhere; `patches`: as stored, [B, L, P*P*C]."""
        places = split_ids(mask, plan.num_masked)[1]
        with self.stopwatch.measure(patches.device):
            found: Tensor = self.frozen.ids(patches.gather(1, places[:, :, None].expand(-1, -1, patches.shape[2])))
        self._check_ids(found)
        return torch.zeros_like(mask, dtype=torch.int64).scatter(1, places, found)

    def _check_ids(self, given: Tensor) -> None:
        """**Raises:** `UserError` for ids of tokens that the student does not know; looks at the first batch alone,
        because that waits for the device."""
        width = self.student.objective.width
        if self.student.objective.ids and not self._ids_checked and not isinstance(given, FakeTensor):
            low, high = int(given.min()), int(given.max())
            if low < 0 or high >= width:
                raise UserError(
                    f"the target's tokenizer gives ids {low} to {high}, and the model predicts {width} tokens; use "
                    f"--target_dim {high + 1} or more"
                )
            self._ids_checked = True

    def _no_scores(self, images: Tensor) -> Tensor:
        """Nothing to follow: float32 zeros [B, L]."""
        return torch.zeros(len(images), self.recipe.num_patches, device=images.device)

    def teach(self, patches: Tensor, noise: Tensor | None = None, target: Tensor | None = None) -> TeacherOutput:
        """One pass of the EMA teacher, for difficulty (unless its maps are kept), features or both.

        - `patches`: normalised, [B, L, t*P*P*C]; `noise`, `target`: as in `HPMViT.predict_loss`
        """
        features, head = self.recipe.target_teacher == "ema", self.recipe.question.head
        asked = self.recipe.masks_by_difficulty and not self.recipe.teacher_maps
        teacher = self._teacher[0]
        if not (features or head):
            return TeacherOutput(teacher.predict_loss(patches, self.recipe.teacher_scale, noise, target), None)
        tokens = teacher.encode(patches)
        found, difficulty = tokens[:, teacher.num_prefix_tokens :], None
        if asked and self.recipe.question.look:
            difficulty = teacher.predict_loss(patches, noise=noise, target=found)
        elif asked:
            difficulty = teacher.difficulty_of(tokens)
        return TeacherOutput(difficulty, found if features else None, found if head else None)

    @torch.no_grad()
    def map_spearman(self, images: Tensor, scores: Tensor | None = None) -> Tensor:
        """Rank correlation of the map that the masks follow with the exact teacher's, over some samples of a batch.

        `scores`: as in `forward`; without any, those that the teacher of the recipe gives.
        """
        images = images[:HEALTH_SAMPLES]
        used = self.difficulty(images) if scores is None else scores[:HEALTH_SAMPLES]
        patches = self.normalized_patches(images)
        exact = self._teacher[0].predict_loss(patches, target=self.target_of(images, patches))
        return losses.spearman(used, exact, self.normalized_patches.valid(images))

    def difficulty(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """The teacher's difficulty of every patch, float32 [B, L]; `noise`: as in `HPMViT.predict_loss`."""
        patches = self.normalized_patches(images)
        target = self.target_of(images, patches) if self.recipe.question.look else None
        return self._teacher[0].predict_loss(patches, self.recipe.teacher_scale, noise, target)

    def target_of(self, images: Tensor, patches: Tensor) -> Tensor | None:
        """What the student reconstructs of all patches of some images, if not their pixels; `patches`: of the same."""
        if self._frozen:
            given: Tensor = self._frozen[0](images)
            return given
        teacher = self._teacher[0] if self.recipe.target_teacher == "ema" else None
        return teacher.encode(patches)[:, teacher.num_prefix_tokens :] if teacher else None

    def learn(
        self,
        plan: MaskPlan,
        patches: Tensor,
        ids: Tensor,
        step: Tensor,
        alpha: Tensor,
        scores: Tensor,
        features: Tensor | None,
        tokens: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> StepOutput:
        """Everything after the teachers: mask, student, losses.

        - `patches`: normalised, [B, L, t*P*P*C]
        - `scores`: [B, L], what the mask follows
        - `features`: what is reconstructed, [B, L, D'] or ids [B, L], or patches as stored, whose ids are asked for
          here; None = pixels
        - `tokens`: [B or fewer, L, D], features of the teacher on which a difficulty head learns
        - `valid`: bool [B, L], the patches without nodata: the others are in no loss. None: all
        """
        mask, thrown = self._sets(plan, ids, step, alpha, scores, valid)
        if features is not None and self._asks_late:
            features = self._ids_of_masked(features, mask, plan)
        output = self.student(
            patches,
            mask,
            num_masked=plan.num_masked,
            thrown=thrown,
            num_thrown=plan.num_thrown,
            target=features,
            valid=valid,
            paths=self._paths(ids, step),
        )
        if tokens is not None:
            output = self._with_head(output, tokens)
        difficulty = scores if self.recipe.masks_by_difficulty else torch.zeros_like(scores)
        return StepOutput(output.loss, self._metrics(output, difficulty), mask)

    def _with_head(self, output: Output, tokens: Tensor) -> Output:
        """`output` with the loss of the difficulty head in it: it is to rank the masked patches, seen by the teacher,
        as the student's losses of them do. The gradient reaches the head alone."""
        count = len(tokens)
        answers = getattr(self.student, HEAD)(tokens.detach())
        valid = None if output.valid is None else output.valid[:count]
        actual = losses.comparable(output.per_patch_loss[:count], valid)
        loss = losses.ranking_loss(answers.gather(1, output.masked[:count]), actual)
        return output._replace(loss=output.loss + loss, difficulty_loss=output.difficulty_loss + loss)

    def _sets(
        self, plan: MaskPlan, ids: Tensor, step: Tensor, alpha: Tensor, scores: Tensor, valid: Tensor | None = None
    ) -> Sets:
        """What is masked and what is thrown away, bool [B, L] each; the latter None if the plan throws nothing."""
        noise = sample_noise(self.recipe.seed, step, ids, plan.noise_size)
        return draw_sets(plan, noise, scores, alpha, valid)

    def _paths(self, ids: Tensor, step: Tensor) -> Tensor | None:
        """Which branches of the encoder each sample takes, for `HPMViT.forward`; None without drop path."""
        if not self.recipe.drop_path:
            return None
        noise = sample_noise(self.recipe.seed ^ PATH_SEED, step, ids, 2 * len(self.student.blocks), draws=1)[0]
        return path_factors(noise, self.recipe.drop_path)

    def _compile_now(self, *arguments: Any) -> None:
        """Compile the step for both plans, so that none is compiled in mid-run when the first maps arrive, and let a
        compiler that fails do so here, where there is a way back: it meets the gradients at their first use.

        No hook of DeepSpeed's sees these gradients, and no weight has any afterwards.
        """
        self.compiled = True
        for plan in dict.fromkeys((self.warmup_plan, self.mask_plan)):
            self._try_gradients(plan, *arguments)

    def _try_gradients(self, *arguments: Any) -> None:
        learn = self.run_student
        if isinstance(learn, Compiled) and not learn.failure and torch.is_grad_enabled():
            loss = learn(*arguments).loss
            try:
                torch.autograd.grad(loss, [w for w in self.student.parameters() if w.requires_grad], allow_unused=True)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                learn.give_up(error)

    @torch.no_grad()
    def _metrics(self, output: Output, difficulty: Tensor) -> Tensor:
        """Losses and predictor health. The teacher predicts with every patch visible, which nothing trains directly:
        `teacher_spearman` tells whether its difficulty, the one that makes the masks, agrees with the student's loss.
        """
        some = slice(HEALTH_SAMPLES)
        seen = difficulty[some].gather(1, output.masked[some])
        valid = None if output.valid is None else output.valid[some]
        health = losses.health(output.predicted_difficulty[some], output.per_patch_loss[some], seen, valid)
        return torch.cat([torch.stack([x.detach().float() for x in output[:3]]), health])
