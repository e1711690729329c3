"""The fused step: teacher → mask → student → losses, in one forward of the module that DeepSpeed wraps.

Nothing here waits for the device: ids, masks and metrics stay on it, counts are known beforehand, and randomness is a
function of (seed, update, sample id). The teacher is held, not registered: DeepSpeed must neither shard nor train it.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fasthpm import loss as losses
from fasthpm.clock import Stopwatch
from fasthpm.data import DatasetInfo
from fasthpm.mask import MaskPlan, draw_sets, sample_noise, split_ids
from fasthpm.model import HPMViT, Output, create_model
from fasthpm.recipe import Recipe

METRICS = ("loss", "reconstruction_loss", "difficulty_loss", "spearman", "pair_accuracy", "teacher_spearman")
HEALTH_SAMPLES = 16  # predictor health is measured on this many samples of a batch


class StepOutput(NamedTuple):
    """What one forward of `Step` gives."""

    loss: Tensor  # scalar
    metrics: Tensor  # float32 [len(METRICS)], detached
    mask: Tensor  # bool [B, L], True = masked


class Step(nn.Module):
    """What DeepSpeed wraps: a student, and everything that happens to a batch before and after it."""

    def __init__(self, student: HPMViT, recipe: Recipe, info: DatasetInfo) -> None:
        super().__init__()
        self.student = student
        self.recipe = recipe
        self.mask_plan, self.warmup_plan = recipe.mask_plan, recipe.warmup_plan
        self.stopwatch = Stopwatch()
        # Plain attributes, not buffers: DeepSpeed would round buffers to bfloat16.
        self.mean, self.std = pixel_statistics(info, recipe)
        self._teacher: list[HPMViT] = []

    def attach_teacher(self, teacher: HPMViT) -> None:
        """Let `teacher` (its `predict_loss`) choose the hard patches."""
        self._teacher = [teacher]

    def forward(
        self, images: Tensor, ids: Tensor, step: Tensor, alpha: Tensor, weights: Tensor | None = None
    ) -> StepOutput:
        """One micro-step on this rank.

        - `images`: uint8 [B, H, W, C]; `ids`: int64 [B]
        - `step`: int64 0-dim, the update; `alpha`: float64 0-dim, share of the mask chosen by the teacher
        - `weights`: float32 [B, L], of attention; None: masks are random, as before the first maps
        """
        patches = self.normalized_patches(images)
        plan = self.warmup_plan if weights is None else self.mask_plan
        mask, thrown, difficulty = self._mask(plan, patches, ids, step, alpha, weights)
        gone = {} if thrown is None else {"thrown": thrown, "num_thrown": plan.num_thrown}
        output = self.student(patches, mask, num_masked=plan.num_masked, **gone)
        return StepOutput(output.loss, self._metrics(output, mask, difficulty), mask)

    def normalized_patches(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, C] -> float32 [B, L, P*P*C], zero mean and unit variance over the data set."""
        self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        batch, height, width, channels = images.shape
        side = self.recipe.patch_size
        rows, columns = height // side, width // side
        patches = images.reshape(batch, rows, side, columns, side, channels).transpose(2, 3)
        return ((patches.float() - self.mean) / self.std).reshape(batch, rows * columns, side * side * channels)

    def _mask(
        self, plan: MaskPlan, patches: Tensor, ids: Tensor, step: Tensor, alpha: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The mask [B, L], the patches thrown away [B, L], and the teacher's difficulty [B, L] that chose the mask's
        hard part (zeros without a teacher)."""
        noise = sample_noise(self.recipe.seed, step, ids, plan.noise_size)
        difficulty = patches.new_zeros(patches.shape[:2], dtype=torch.float32)
        if self.recipe.uses_teacher:
            with torch.no_grad(), self.stopwatch.measure(patches.device):
                difficulty = self._teacher[0].predict_loss(patches)
        return *draw_sets(plan, noise, difficulty if weights is None else weights, alpha), difficulty

    @torch.no_grad()
    def _metrics(self, output: Output, mask: Tensor, difficulty: Tensor) -> Tensor:
        """Losses and predictor health. The teacher predicts with every patch visible, which nothing trains directly:
        `teacher_spearman` tells whether its difficulty, the one that makes the masks, agrees with the student's loss.
        """
        predicted = output.predicted_difficulty[:HEALTH_SAMPLES]
        actual = output.per_patch_loss[:HEALTH_SAMPLES]
        masked = split_ids(mask[:HEALTH_SAMPLES], actual.shape[1])[1]
        seen = difficulty[:HEALTH_SAMPLES].gather(1, masked)
        health = (
            losses.spearman(predicted, actual),
            losses.pair_accuracy(predicted, actual),
            losses.spearman(seen, actual),
        )
        return torch.stack([x.detach().float() for x in (*output[:3], *health)])


def pixel_statistics(info: DatasetInfo, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel on the 0..255 scale, float32 [C] each."""
    mean, std = torch.tensor(info.mean) * 255, torch.tensor(info.std) * 255
    return mean[: recipe.channels], std[: recipe.channels].clamp_min(1e-3)


def model_of(recipe: Recipe) -> HPMViT:
    """The recipe's model in float32, with weights drawn from the recipe's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return create_model(
            recipe.model,
            img_size=recipe.image_size,
            patch_size=recipe.patch_size,
            in_chans=recipe.channels,
            decoder_embed_dim=recipe.decoder_dim,
            decoder_depth=recipe.decoder_depth,
            decoder_num_heads=recipe.decoder_heads,
            predictor_dim=recipe.predictor_dim,
            predictor_depth=recipe.predictor_depth,
            predict_loss=recipe.predict_loss,
            absolute_standardize=recipe.absolute_standardize,
            pixel_loss=recipe.pixel_loss,
            norm_pix_loss=recipe.norm_pix_loss,
        )
