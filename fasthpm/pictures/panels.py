"""Pictures of what a model sees: image, reconstruction, true loss, predicted loss, mask; of videos, frame by frame."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasthpm import mask as masks
from fasthpm.data import DatasetInfo, build_loader
from fasthpm.data.sampling import Array
from fasthpm.data.shown import NOTHING, Shown, shown_of
from fasthpm.data.values import Values
from fasthpm.difficulty import refusal
from fasthpm.errors import UserError
from fasthpm.loss import EPS
from fasthpm.maps.attention import attention_weights, cls_attention
from fasthpm.mask import MaskPlan
from fasthpm.model import VIDEO_EPS, HPMViT
from fasthpm.patches import NormalizedPatches, Statistics
from fasthpm.pictures import drawing
from fasthpm.pictures.drawing import Pictures
from fasthpm.recipe import Recipe

COLUMNS = ("image", "reconstruction", "true_loss", "predicted_loss", "mask")
FEATURE_COLUMNS = tuple(name for name in COLUMNS if name != "reconstruction")  # of features there is no picture
VIEW_COLUMNS = ("image", "attention", "predicted_loss", "mask")  # losses of distributions need centres of the run
MORE_COLUMNS = ("hardest", "attention")  # the hardest share of patches masked; what the cls token attends to
PIXELS = ("image", "reconstruction")  # a picture of these for every group of channels
TRUE_LOSS_MASKS = 10  # as in the papers' figures
GREY = 127  # of masked patches


def fixed_images(recipe: Recipe, count: int) -> tuple[Tensor, DatasetInfo]:
    """The first `count` images or clips of the recipe's data, as in evaluation: [count, (T,) H, W, C]."""
    options = recipe.loader_options(
        batch_size=count,
        train=False,
        num_workers=1,
        max_bad_samples=1.0,  # a picture needs some images, not these
    )
    loader = build_loader(recipe.data_path, options)
    try:
        return next(iter(loader)).images, loader.info
    finally:
        loader.close()


def columns_of(recipe: Recipe) -> tuple[str, ...]:
    """Names of the pictures that are drawn if none are asked for."""
    if recipe.uses_views:
        return VIEW_COLUMNS if recipe.masks_by_difficulty else tuple(n for n in VIEW_COLUMNS if n != "predicted_loss")
    return COLUMNS if has_pictures(recipe) else FEATURE_COLUMNS


def has_pictures(recipe: Recipe) -> bool:
    """Whether there is a picture of what the recipe's model predicts: pixels, or codes that are patches."""
    return not recipe.target_teacher or recipe.target_weights.startswith("kmeans:")


def check_columns(recipe: Recipe, names: Sequence[str]) -> None:
    """**Raises:** `UserError` for pictures that there can't be of the recipe's model."""
    if recipe.uses_views and (wrong := {"reconstruction", "true_loss"}.intersection(names)):
        raise UserError(
            f"there is no picture {min(wrong)} of a model that learns distributions over prototypes; use "
            f"{', '.join(columns_of(recipe))} or hardest"
        )


@torch.no_grad()
def pictures(
    model: HPMViT,
    recipe: Recipe,
    statistics: Statistics,
    images: Tensor,
    alpha: float,
    frozen: Any = None,
    names: Sequence[str] = (),
    spearman: float | None = None,
    shown: Shown | None = None,
) -> Pictures:
    """One picture of every image or frame per name: uint8 [N, T, H, W, 3] each, under the names that readers see.

    - `statistics`: by which pixels are normalised; `images`: [N, (T,) H, W, C] as they are stored
    - `alpha`: share of the mask that the predicted difficulty chooses
    - `frozen`: the target's teacher or tokenizer, for targets dino, clip and tokens; with target ema, the true loss is
      that of the model's own features
    - `names`: of `COLUMNS` and `MORE_COLUMNS`, none: `columns_of(recipe)`; "hardest" masks the recipe's share of
      patches, hardest first
    - `spearman`: difficulty_spearman of the model's difficulty, if it is known, for the predicted loss's name
    - `shown`: channels and colours, None: those of photographs. Of several groups image and reconstruction have a
      picture each, the others show the first

    Visible patches are pasted back into the reconstruction, and `norm_pix_loss` is undone with the true patches'
    statistics. Of a model that can't be asked the predicted loss stays empty.

    **Raises:** `UserError` for pictures of losses of a model that learns distributions.
    """
    check_columns(recipe, names)
    plan, patches_of = recipe.mask_plan, NormalizedPatches(recipe, statistics)
    images = images.to(model.mask_token.device)
    patches = patches_of(images)
    target = frozen(images) if frozen else model.encode(patches)[:, 1:] if recipe.target_teacher == "ema" else None
    noise = _noise(plan, len(patches), recipe.seed).to(patches.device)
    mute = bool(refusal(model, model.difficulty, targets=True))
    predicted = torch.zeros_like(patches[:, :, 0]) if mute else model.predict_loss(patches, target=target)
    valid = patches_of.valid(images)
    mask = masks.draw_sets(plan, noise, followed(model, recipe, patches, predicted), alpha, valid)[0]
    original = images.cpu().numpy().reshape(len(images), model.num_frames, *images.shape[-3:])
    shown = shown or shown_of(Values(str(original.dtype)), model.in_chans)
    seen = shown(original)

    def rebuilt() -> list[Array]:
        pixels = to_pixels(model, patches_of, reconstruct(model, patches, mask, target, frozen))
        return shown(pixels, shown.lacking(original))

    draw: dict[str, Callable[[], list[Array]]] = {
        "image": lambda: seen,
        "reconstruction": rebuilt,
        "true_loss": lambda: [heat(model, true_loss(model, recipe, patches, target), valid)],
        "predicted_loss": lambda: [heat(model, predicted, valid)],
        "mask": lambda: [hidden(model, seen[0], mask)],
        "hardest": lambda: [hidden(model, seen[0], hardest(model, recipe.mask_ratio, predicted, valid, noise))],
        "attention": lambda: [heat(model, attention_weights(cls_attention(model, patches)), None)],
    }
    known = {"predicted_loss": "predicted loss" if mute else predicted_name(model.difficulty, spearman)}
    known["image"] = "clip" if model.video else "image"
    drawn = ((titles_of(name, known, shown), draw[name]()) for name in names or columns_of(recipe))
    return {title: picture for titles, found in drawn for title, picture in zip(titles, found, strict=True)}


def followed(model: HPMViT, recipe: Recipe, patches: Tensor, predicted: Tensor) -> Tensor:
    """What the run's masks follow: attention (AMT), or the `predicted` loss, which others do not look at: [N, L]."""
    if recipe.mask_plan.record.follows != "attention":
        return predicted
    return attention_weights(cls_attention(model, patches), per_head=recipe.map_per_head)


def true_loss(model: HPMViT, recipe: Recipe, patches: Tensor, target: Tensor | None) -> Tensor:
    """Loss of every patch, averaged over masks that hide it: float32 [N, L]."""
    count = len(patches)
    hiding = policy_masks(recipe.mask_plan, count, recipe.seed) if model.video else random_masks(recipe, count)
    return average_loss(model, patches, hiding, target)


def hardest(model: HPMViT, share: float, scores: Tensor, valid: Tensor | None, noise: Tensor) -> Tensor:
    """The mask of the hardest `share` of patches, bool [N, L]: those that are not `valid` come last."""
    scores = scores if valid is None else scores.masked_fill(~valid, -torch.inf)
    ranks = noise[:, :, : model.num_patches]
    return masks.easy_to_hard_mask(scores, share, 1.0, groups=model.slots, noise=ranks)


def titles_of(name: str, known: dict[str, str], shown: Shown) -> list[str]:
    """What readers see over the pictures of a column, by its name."""
    title = known.get(name, name.replace("_", " "))
    return [f"{title} ({group})" if group else title for group in shown.titles] if name in PIXELS else [title]


def predicted_name(difficulty: str, spearman: float | None) -> str:
    """What readers see over the predicted loss: by which way, and its difficulty_spearman; neither of `paper` alone."""
    figure = "" if spearman is None else f", {spearman:.2f}"
    return f"predicted loss ({difficulty}{figure})" if figure or difficulty != "paper" else "predicted loss"


def reconstruct(
    model: HPMViT, patches: Tensor, mask: Tensor, target: Tensor | None = None, frozen: Any = None
) -> Tensor:
    """Normalised patches [N, L, t*P*P*C] with the masked ones replaced by their reconstruction, in float32.

    - `target`, `frozen`: as in `average_loss` and `pictures`; of tokens it is the likeliest one's picture
    """
    count = int(mask[0].sum())
    prediction = model(patches, mask, num_masked=count, target=target).reconstruction.float()
    ids = masks.split_ids(mask, count)[1][:, :, None].expand(-1, -1, patches.shape[-1])
    if model.objective.ids:
        prediction = frozen.pictures(prediction.argmax(dim=-1), patches.gather(1, ids))
    elif model.norm_pix_loss:
        prediction = _denormalised(model, prediction, patches.gather(1, ids))
    return patches.scatter(1, ids, prediction)


def _denormalised(model: HPMViT, prediction: Tensor, patches: Tensor) -> Tensor:
    """What `model.target` normalises, undone with the statistics of the true `patches` [N, M, t*P*P*C]."""
    if not (model.video or model.norm_pix_channels):
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return prediction * (variance + EPS).sqrt() + mean
    channels = (-1, model.in_chans)
    std, mean = torch.std_mean(patches.unflatten(-1, channels), dim=-2, keepdim=True)
    eps = VIDEO_EPS if model.video else EPS
    return (prediction.unflatten(-1, channels) * (std + eps) + mean).flatten(-2)


# -------------------------------------------------------------------------------------------------- true loss
def random_masks(recipe: Recipe, count: int, number: int = TRUE_LOSS_MASKS) -> Iterator[Tensor]:
    """`number` random masks of `count` images at the recipe's ratio, whatever its policy: bool [count, L] each."""
    generator = torch.Generator().manual_seed(recipe.seed)
    for _ in range(number):
        yield masks.random_mask(torch.rand(count, recipe.num_patches, generator=generator), recipe.mask_ratio)


def policy_masks(plan: MaskPlan, count: int, seed: int) -> Iterator[Tensor]:
    """Masks of `count` clips as the plan draws them without a teacher: bool [count, L] each.

    Which slots a mask hides together changes what is hard about a clip, so they follow its policy.
    """
    even = torch.zeros(count, plan.num_patches)
    for number in range(TRUE_LOSS_MASKS):
        yield masks.draw_mask(plan, _noise(plan, count, seed + 1 + number), even, 0.0)


def average_loss(model: HPMViT, patches: Tensor, hiding: Iterable[Tensor], target: Tensor | None = None) -> Tensor:
    """Reconstruction loss of every patch, averaged over those of the masks `hiding` that hide it: [N, L].

    `target`: features of all patches, if those are what the model predicts.
    """
    total, count = torch.zeros_like(patches[:, :, 0]), torch.zeros_like(patches[:, :, 0])
    for mask in hiding:
        mask = mask.to(patches.device)
        output = model(patches, mask, target=target)
        ids = masks.split_ids(mask, output.per_patch_loss.shape[1])[1]
        total.scatter_add_(1, ids, output.per_patch_loss)
        count += mask
    return total / count.clamp_min(1)


def _noise(plan: MaskPlan, count: int, seed: int) -> Tensor:
    return torch.rand((2, count, plan.noise_size), generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------- to pixels
def per_pixel(model: HPMViT, values: Tensor) -> Array:
    """One value per patch [N, L] -> one per pixel [N, T, H, W]."""
    grid = values.reshape(len(values), model.slots, *model.grid_size).cpu().numpy()
    return drawing.per_pixel(grid, (model.num_frames, *model.img_size))


def heat(model: HPMViT, values: Tensor, valid: Tensor | None) -> Array:
    """One value per patch [N, L] as colours, uint8 [N, T, H, W, 3]; those that are not `valid` take no part."""
    if valid is None or bool(valid.all()):
        return drawing.heat(per_pixel(model, values))
    least = values.masked_fill(~valid, torch.inf).amin(dim=1, keepdim=True).nan_to_num(posinf=0.0)
    colours = drawing.heat(per_pixel(model, torch.where(valid, values, least)))
    return np.where(per_pixel(model, valid)[..., None], colours, np.array(NOTHING, np.uint8))


def hidden(model: HPMViT, pictures: Array, mask: Tensor) -> Array:
    """uint8 [N, T, H, W, 3] with the masked patches grey."""
    return np.where(per_pixel(model, mask)[..., None], np.uint8(GREY), pictures)


def to_pixels(model: HPMViT, patches_of: NormalizedPatches, patches: Tensor) -> Array:
    """Normalised patches [N, L, t*P*P*C] -> what is stored, float32 [N, T, H, W, C], not rounded."""
    clips = model.unpatchify(patches)
    clips = clips[:, :, None] if clips.dim() == 4 else clips
    device = clips.device
    pixels = clips.permute(0, 2, 3, 4, 1) * patches_of.std.to(device) + patches_of.mean.to(device)
    return pixels.cpu().numpy()
