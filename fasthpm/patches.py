"""Pixels and patches: the model of a recipe, and images cut into normalised patches for it."""

import dataclasses
import math
from typing import Protocol

import torch
from torch import Tensor

from fasthpm.data import Loader
from fasthpm.data.statistics import PixelStatistics
from fasthpm.data.values import Values
from fasthpm.errors import UserError, note_once
from fasthpm.model import HPMViT, create_model
from fasthpm.model_names import width_of
from fasthpm.recipe import Recipe
from fasthpm.targets import TARGETS


class Statistics(Protocol):
    """Mean and standard deviation per channel, of pixels scaled to 0..1 where they have 8 bits, and else as stored: a
    `PixelStatistics`, or a whole set's info. `values`: what the pixels are."""

    @property
    def mean(self) -> tuple[float, ...]: ...

    @property
    def std(self) -> tuple[float, ...]: ...

    @property
    def values(self) -> Values: ...


class NormalizedPatches:
    """Callable: the pixels of a recipe's images -> the patches that its models take.

    - `mean`, `std`: float32 [C], per channel on the scale of the pixels
    - `nodata`: the pixel value that means nothing and becomes the mean, 0; None: there is none

    No module: DeepSpeed would round its buffers to bfloat16.
    """

    def __init__(self, recipe: Recipe, statistics: Statistics) -> None:
        self.recipe = recipe
        self.mean, self.std = pixel_statistics(statistics, recipe.channels)
        self.nodata = statistics.values.nodata

    def move(self, device: torch.device) -> None:
        """Keep mean and standard deviation on `device`."""
        self.mean, self.std = self.mean.to(device), self.std.to(device)

    def __call__(self, images: Tensor) -> Tensor:
        """Pixels [B, (T,) H, W, C] -> float32 [B, L, t*P*P*C], zero mean and unit variance over the data set."""
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        pixels = self._cut(images)
        scaled = (pixels - mean) / std
        if self.nodata is not None:
            scaled = scaled.masked_fill(is_nodata(pixels, self.nodata), 0)
        _, slots, rows, columns, *patch = pixels.shape
        return scaled.reshape(len(images), slots * rows * columns, math.prod(patch))

    def valid(self, images: Tensor) -> Tensor | None:
        """Which patches have no nodata in any pixel: bool [B, L]; None where every pixel counts."""
        if self.nodata is None:
            return None
        return ~is_nodata(self._cut(images), self.nodata).flatten(4).any(4).flatten(1)

    def _cut(self, images: Tensor) -> Tensor:
        """float32 [B, slots, rows, columns, frames, P, P, C]."""
        side, frames = self.recipe.patch_size, self.recipe.tubelet_size
        height, width, channels = images.shape[-3:]
        shape = (self.recipe.slots, frames, height // side, side, width // side, side, channels)
        return images.reshape(len(images), *shape).permute(0, 1, 3, 5, 2, 4, 6, 7).float()


def normalised(images: Tensor, statistics: Statistics, axis: int = -1) -> Tensor:
    """Pixels -> float32 of the same shape, zero mean and unit variance over the data set, nodata 0; `axis`: of the
    channels."""
    shape = [1] * images.dim()
    shape[axis] = -1
    values = statistics.values
    deviation = statistics.std if values.unit != 1 else tuple(std or 1.0 for std in statistics.std)
    mean, std = (torch.tensor(one, device=images.device).reshape(shape) for one in (statistics.mean, deviation))
    pixels = images.float()
    scaled = (pixels / values.unit - mean) / std
    return scaled if values.nodata is None else scaled.masked_fill(is_nodata(pixels, values.nodata), 0)


def is_nodata(pixels: Tensor, nodata: float) -> Tensor:
    """Where float32 pixels mean nothing: bool, of the same shape. What is no number never means anything."""
    return (pixels == nodata) | pixels.isnan()


def pixel_statistics(statistics: Statistics, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel on the scale of the pixels, float32 [C] each; one for all where there is
    one."""
    unit = statistics.values.unit
    mean, std = torch.tensor(statistics.mean) * unit, torch.tensor(statistics.std) * unit
    if unit == 1:  # a channel that never changes becomes 0, whatever it is
        return mean[:channels], torch.where(std > 0, std, 1.0)[:channels]
    return mean[:channels], std[:channels].clamp_min(1e-3)


def statistics_for(model: HPMViT, other: Statistics, source: str) -> PixelStatistics:
    """By what a trained model's pixels are normalised, whatever they are of: everything that asks it asks here.

    By what it was trained with (`checkpoint.load_weights` finds that), and where nobody knows it by those of the first
    set that it meets here, the training set of a probe, and then by the same for all that follow.

    - `other`, `source`: of that set, and its name

    **Raises:** `UserError` as `suited`, which has the last word.
    """
    if model.pixels is None:
        remark = f"nothing tells by what the model's pixels were normalised: all are by the mean and std of {source}"
        model.pixels = PixelStatistics(tuple(other.mean), tuple(other.std), remark, other.values)
    if model.pixels.remark:
        note_once(model.pixels.remark)
    return suited(model.pixels, other, source)


def suited(statistics: PixelStatistics, other: Statistics, source: str) -> PixelStatistics:
    """`statistics` of a training for the pixels of another set: `other`, with the name `source`. What is nodata, the
    set itself says.

    **Raises:** `UserError` where one has 8 bits, and the other's values are as they were measured.
    """
    if statistics.values.unit != other.values.unit:
        raise UserError(
            f"{source} has pixels of {other.values.dtype}, and the model was trained on {statistics.values.dtype}: "
            f"they are not on one scale; prepare the set as that of the training was"
        )
    return dataclasses.replace(statistics, values=other.values)


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
            norm_pix_channels=recipe.norm_pix_channels,
            objective=TARGETS[recipe.target].of_width(target_width(recipe)),
            positions=recipe.positions,
            layer_scale=recipe.layer_scale,
            num_frames=recipe.num_frames,
            tubelet_size=recipe.tubelet_size,
            activation_checkpointing=recipe.activation_checkpointing,
        )
