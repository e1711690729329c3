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
from fasthpm.mask import draw_mask, sample_noise, split_ids
from fasthpm.model import HPMViT, Output, create_model, width_of
from fasthpm.recipe import Recipe
from fasthpm.targets import FrozenTeacher

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
        self.mask_plan = recipe.mask_plan
        self.stopwatch = Stopwatch()
        # Plain attributes, not buffers: DeepSpeed would round buffers to bfloat16.
        self.mean, self.std = pixel_statistics(info, recipe)
        self._teacher: list[HPMViT] = []
        self._frozen: list[FrozenTeacher] = []

    def attach_teacher(self, teacher: HPMViT) -> None:
        """Let `teacher` choose the hard patches (its `predict_loss`) and, with target ema, give the features."""
        self._teacher = [teacher]

    def attach_frozen(self, teacher: FrozenTeacher) -> None:
        """Let a DINO or CLIP `teacher` give the features (see `targets.build_frozen`)."""
        self._frozen = [teacher]

    @property
    def frozen(self) -> FrozenTeacher | None:
        """The DINO or CLIP teacher, if the target has one."""
        return self._frozen[0] if self._frozen else None

    def forward(self, images: Tensor, ids: Tensor, step: Tensor, alpha: Tensor) -> StepOutput:
        """One micro-step on this rank.

        - `images`: uint8 [B, H, W, C]; `ids`: int64 [B]
        - `step`: int64 0-dim, the update; `alpha`: float64 0-dim, share of the mask chosen by the teacher
        """
        patches = self.normalized_patches(images)
        tokens, difficulty = self._teach(patches)
        mask = self._mask(ids, step, difficulty, alpha)
        target = self.feature_target(images, tokens)
        output = self.student(patches, mask, num_masked=self.recipe.num_masked, target=target)
        return StepOutput(output.loss, self._metrics(output, mask, difficulty), mask)

    def normalized_patches(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, C] -> float32 [B, L, P*P*C], zero mean and unit variance over the data set."""
        self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        batch, height, width, channels = images.shape
        side = self.recipe.patch_size
        rows, columns = height // side, width // side
        patches = images.reshape(batch, rows, side, columns, side, channels).transpose(2, 3)
        return ((patches.float() - self.mean) / self.std).reshape(batch, rows * columns, side * side * channels)

    def _teach(self, patches: Tensor) -> tuple[Tensor | None, Tensor]:
        """One pass of the EMA teacher: its tokens [B, 1 + L, D], and the difficulty [B, L] that chooses the mask's hard
        part (zeros where no policy asks for it)."""
        difficulty = patches.new_zeros(patches.shape[:2], dtype=torch.float32)
        if not self.recipe.uses_teacher:
            return None, difficulty
        teacher = self._teacher[0]
        with torch.no_grad(), self.stopwatch.measure(patches.device):
            tokens = teacher.encode(patches)
            return tokens, teacher.difficulty_of(tokens) if self.recipe.masks_by_difficulty else difficulty

    def _mask(self, ids: Tensor, step: Tensor, difficulty: Tensor, alpha: Tensor) -> Tensor:
        noise = sample_noise(self.recipe.seed, step, ids, self.mask_plan.noise_size)
        return draw_mask(self.mask_plan, noise, difficulty, alpha)

    @torch.no_grad()
    def feature_target(self, images: Tensor, tokens: Tensor | None) -> Tensor | None:
        """What the recipe's `target` names: features [B, L, D'] of all patches, or None for their pixels.

        - `images`: as in `forward`; `tokens`: the EMA teacher's, [B, 1 + L, D]
        """
        if self.recipe.target == "pixels":
            return None
        if self.recipe.target == "ema":
            return tokens[:, 1:] if tokens is not None else None
        if not self._frozen:
            raise ValueError(f"target {self.recipe.target} needs a frozen teacher: call attach_frozen")
        with self.stopwatch.measure(images.device):
            return self._frozen[0](images)

    @torch.no_grad()
    def _metrics(self, output: Output, mask: Tensor, difficulty: Tensor) -> Tensor:
        """Losses and predictor health. The teacher predicts with every patch visible, which nothing trains directly:
        `teacher_spearman` tells whether its difficulty, the one that makes the masks, agrees with the student's loss.
        """
        predicted = output.predicted_difficulty[:HEALTH_SAMPLES]
        actual = output.per_patch_loss[:HEALTH_SAMPLES]
        masked = split_ids(mask[:HEALTH_SAMPLES], self.recipe.num_masked)[1]
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
            target_dim=width_of(recipe.model) if recipe.target == "ema" else recipe.frozen_dim,
        )
