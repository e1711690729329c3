"""Pixels and patches: the model of a recipe, and images cut into normalised patches for it."""

from typing import Protocol

import torch
from torch import Tensor

from fasthpm.data import Loader
from fasthpm.data.statistics import PixelStatistics
from fasthpm.errors import note_once
from fasthpm.model import HPMViT, create_model
from fasthpm.model_names import width_of
from fasthpm.recipe import Recipe
from fasthpm.targets import TARGETS


class Statistics(Protocol):
    """Mean and standard deviation per channel, of pixels scaled to 0..1: a `PixelStatistics`, or a whole set's info."""

    @property
    def mean(self) -> tuple[float, ...]: ...

    @property
    def std(self) -> tuple[float, ...]: ...


class NormalizedPatches:
    """Callable: the pixels of a recipe's images -> the patches that its models take.

    - `mean`, `std`: float32 [C], per channel on the 0..255 scale

    No module: DeepSpeed would round its buffers to bfloat16.
    """

    def __init__(self, recipe: Recipe, statistics: Statistics) -> None:
        self.recipe = recipe
        self.mean, self.std = pixel_statistics(statistics, recipe.channels)

    def move(self, device: torch.device) -> None:
        """Keep mean and standard deviation on `device`."""
        self.mean, self.std = self.mean.to(device), self.std.to(device)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, (T,) H, W, C] -> float32 [B, L, t*P*P*C], zero mean and unit variance over the data set."""
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        batch, (height, width, channels) = len(images), images.shape[-3:]
        side, frames = self.recipe.patch_size, self.recipe.tubelet_size
        slots, rows, columns = self.recipe.slots, height // side, width // side
        cut = images.reshape(batch, slots, frames, rows, side, columns, side, channels)
        scaled = (cut.permute(0, 1, 3, 5, 2, 4, 6, 7).float() - mean) / std
        return scaled.reshape(batch, slots * rows * columns, frames * side * side * channels)


def pixel_statistics(statistics: Statistics, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel on the 0..255 scale, float32 [C] each; one for all where there is one."""
    mean, std = torch.tensor(statistics.mean) * 255, torch.tensor(statistics.std) * 255
    return mean[:channels], std[:channels].clamp_min(1e-3)


def statistics_for(model: HPMViT, other: Statistics, source: str) -> PixelStatistics:
    """By what a trained model's pixels are normalised, whatever they are of: everything that asks it asks here.

    By what it was trained with (`checkpoint.load_weights` finds that), and where nobody knows it by those of the first
    set that it meets here, the training set of a probe, and then by the same for all that follow.

    - `other`, `source`: of that set, and its name
    """
    if model.pixels is None:
        remark = f"nothing tells by what the model's pixels were normalised: all are by the mean and std of {source}"
        model.pixels = PixelStatistics(tuple(other.mean), tuple(other.std), remark)
    if model.pixels.remark:
        note_once(model.pixels.remark)
    return model.pixels


def patches_for(model: HPMViT, recipe: Recipe, loader: Loader) -> NormalizedPatches:
    """How a trained model's images, read by `loader`, become its patches; see `statistics_for`."""
    return NormalizedPatches(recipe, statistics_for(model, loader.info, loader.source))


def target_width(recipe: Recipe) -> int:
    """Features or classes per patch that the recipe's model predicts; 0 = pixels."""
    if recipe.uses_views:
        return recipe.prototypes
    return (recipe.frozen_dim or width_of(recipe.model)) if recipe.target_teacher else 0


def model_of(recipe: Recipe) -> HPMViT:
    """The recipe's model in float32, with weights drawn from the recipe's seed alone."""
    head = {"head_hidden": recipe.head_hidden, "head_free_norm": recipe.head_free_norm} if recipe.uses_views else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return create_model(
            recipe.model,
            **head,
            img_size=recipe.image_size,
            patch_size=recipe.patch_size,
            in_chans=recipe.channels,
            decoder_embed_dim=recipe.decoder_dim,
            decoder_depth=recipe.decoder_depth,
            decoder_num_heads=recipe.decoder_heads,
            predictor_dim=recipe.predictor_dim,
            predictor_depth=recipe.predictor_depth,
            predictor=recipe.predictor,
            decoder_attention=recipe.decoder_attention,
            predict_loss=recipe.predict_loss,
            difficulty=recipe.difficulty,
            mask_ratio=recipe.mask_ratio,
            mask_unit=recipe.mask_plan.unit,
            absolute_standardize=recipe.absolute_standardize,
            pixel_loss=recipe.pixel_loss,
            norm_pix_loss=recipe.norm_pix_loss,
            objective=TARGETS[recipe.target].of_width(target_width(recipe)),
            positions=recipe.positions,
            layer_scale=recipe.layer_scale,
            num_frames=recipe.num_frames,
            tubelet_size=recipe.tubelet_size,
            activation_checkpointing=recipe.activation_checkpointing,
        )
