"""Pixels and patches: the model of a recipe, and images cut into normalised patches for it."""

from contextlib import suppress

import torch
from torch import Tensor

from fasthpm.data import DatasetInfo, read_info
from fasthpm.errors import UserError
from fasthpm.model import HPMViT, create_model, width_of
from fasthpm.recipe import Recipe
from fasthpm.targets import TARGETS


class NormalizedPatches:
    """Callable: the pixels of a recipe's images -> the patches that its models take.

    - `mean`, `std`: float32 [C], per channel on the 0..255 scale

    No module: DeepSpeed would round its buffers to bfloat16.
    """

    def __init__(self, recipe: Recipe, info: DatasetInfo) -> None:
        self.recipe = recipe
        self.mean, self.std = pixel_statistics(info, recipe.channels)

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


def pixel_statistics(info: DatasetInfo, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel on the 0..255 scale, float32 [C] each."""
    mean, std = torch.tensor(info.mean) * 255, torch.tensor(info.std) * 255
    return mean[:channels], std[:channels].clamp_min(1e-3)


def training_info(recipe: Recipe, other: DatasetInfo) -> DatasetInfo:
    """Mean and standard deviation that a recipe's model was trained with, or, if its data is gone, those of `other`."""
    with suppress(UserError):
        return read_info(recipe.data_path)
    return other


def target_width(recipe: Recipe) -> int:
    """Features per patch that the recipe's model predicts; 0 = pixels."""
    return (recipe.frozen_dim or width_of(recipe.model)) if recipe.target_teacher else 0


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
            predictor=recipe.predictor,
            decoder_attention=recipe.decoder_attention,
            predict_loss=recipe.predict_loss,
            difficulty=recipe.difficulty,
            mask_ratio=recipe.mask_ratio,
            mask_unit=recipe.mask_plan.unit,
            absolute_standardize=recipe.absolute_standardize,
            pixel_loss=recipe.pixel_loss,
            norm_pix_loss=recipe.norm_pix_loss,
            target_dim=target_width(recipe),
            feature_loss=TARGETS[recipe.target].loss,
            num_frames=recipe.num_frames,
            tubelet_size=recipe.tubelet_size,
            activation_checkpointing=recipe.activation_checkpointing,
        )
