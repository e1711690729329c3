"""Which parts a step runs, and how often: one walk for whatever is counted, operations (`flops`) or bytes (`traffic`).

All figures are of a forward pass and per sample, but for those of `step_cost`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from fasthpm.difficulty import DIFFICULTIES, HEAD_SHARE, views
from fasthpm.mask import num_masked
from fasthpm.model import HPMViT
from fasthpm.projection import BOTTLENECK
from fasthpm.recipe import Recipe


class Price(NamedTuple):
    """What the parts cost."""

    encoder: Callable[[HPMViT, int, int, int], float]  # patches, mask tokens, outputs of the last block (0 = all)
    decoder: Callable[[HPMViT, int, int, int, int, int], float]  # depth, width, visible tokens, mask tokens, outputs
    linear: Callable[[float, int, int], float]  # tokens, inputs, outputs: a linear layer by itself


def step_cost(model: HPMViT, recipe: Recipe, price: Price) -> dict[str, float]:
    """Cost per sample of one step: {"teacher" (what runs without gradients), "student" (forward and backward, which
    counts twice), "total"}. Of maps that are kept a step has its share of the pass that renews them."""
    if recipe.uses_views:
        return views_cost(model, recipe, price)
    length, masked = recipe.num_patches, recipe.num_masked
    visible = length - masked - recipe.mask_plan.num_thrown
    student = reconstruction_cost(model, price, visible, masked)
    if recipe.predict_loss != "none":
        student += predictor_cost(model, price, visible + model.num_prefix_tokens, masked, masked)
    teacher = 0.0
    if recipe.masks_by_difficulty:
        teacher = teacher_cost(model, price, length // recipe.teacher_scale**2)
        if recipe.question.look and recipe.target_teacher == "ema":  # its own features, of the whole image
            teacher += price.encoder(model, length, 0, 0)
    elif recipe.uses_teacher:
        teacher = price.encoder(model, length, 0, 0)
    if recipe.teacher_maps:
        teacher /= recipe.map_refresh_epochs
    if recipe.question.head:
        share = head_share(recipe)
        # No gradient enters the encoder, but one leaves the head's first layer: the norm before it has weights.
        student += share * head_cost(model, price, length)
        teacher += share * price.encoder(model, length, 0, 0) if recipe.teacher_maps else 0.0
    return {"teacher": teacher, "student": 3 * student, "total": teacher + 3 * student}


def views_cost(model: HPMViT, recipe: Recipe, price: Price) -> dict[str, float]:
    """`step_cost` of several views: the teacher reads the global crops, the student these and the local ones; logits
    are made of cls tokens and of as many patches as are masked on average."""
    length, views, small = recipe.num_patches, recipe.global_crops, recipe.local_crops
    cells = (recipe.local_size // recipe.patch_size) ** 2
    masked = (1 - recipe.unmasked_share) * recipe.mask_ratio * length
    teacher = views * (price.encoder(model, length, 0, 0) + neck_cost(recipe, model, price, 1 + length))
    teacher += views * price.linear(1 + masked, BOTTLENECK, recipe.prototypes)
    rows = views * (1 + masked) + small
    student = views * price.encoder(model, length, 0, 0) + small * price.encoder(model, cells, 0, 1)
    student += neck_cost(recipe, model, price, rows) + price.linear(rows, BOTTLENECK, recipe.prototypes)
    if recipe.masks_by_difficulty:
        teacher += views * head_cost(model, price, length)
        student += views * head_cost(model, price, masked)
    return {"teacher": teacher, "student": 3 * student, "total": teacher + 3 * student}


def neck_cost(recipe: Recipe, model: HPMViT, price: Price, tokens: float) -> float:
    """The projection head on `tokens` tokens, without its last layer."""
    hidden = recipe.head_hidden
    sizes = ((model.embed_dim, hidden), (hidden, hidden), (hidden, BOTTLENECK))
    return sum(price.linear(tokens, *size) for size in sizes)


def head_share(recipe: Recipe) -> float:
    """On how many of a batch's samples a difficulty head learns, over all of them: few where maps are kept."""
    return -(-recipe.batch_size // HEAD_SHARE) / recipe.batch_size if recipe.teacher_maps else 1.0


def teacher_cost(model: HPMViT, price: Price, length: int) -> float:
    """`HPMViT.predict_loss` on `length` patches, as the model's `difficulty` is asked."""
    way = DIFFICULTIES[model.difficulty]
    if way.look:
        return sum(reconstruction_cost(model, price, *sizes) for sizes in look_sizes(model, length))
    encoder = price.encoder(model, length, 0, 0)
    if way.head:
        return encoder + head_cost(model, price, length)
    seen, queries = length + model.num_prefix_tokens, 0
    if model.difficulty == "masked_query":
        queries = length
        if model.decoder_attention == "self":
            seen -= num_masked(length, model.mask_ratio)
    shared = trunk_cost(model, price, seen, queries, length) if model.predictor == "shared" else 0.0
    return encoder + embed_cost(model, price, length) + shared + predictor_cost(model, price, seen, queries, length)


def look_sizes(model: HPMViT, length: int) -> list[tuple[int, int]]:
    """(visible patches, mask tokens) of the looks that measure the losses of `length` patches."""
    noise = torch.zeros(1, length, device="cpu")
    looks = views(noise, model.grid_size, model.mask_ratio, model.mask_unit)
    pairs = [(look.visible, look.masked if model.encoder_mask_tokens else look.asked) for look in looks]
    return [(visible.shape[1], masked.shape[1]) for visible, masked in pairs]


def reconstruction_cost(model: HPMViT, price: Price, visible: int, masked: int) -> float:
    """Encoder and reconstructor that see `visible` patches and reconstruct `masked` ones."""
    width, values = model.mask_token.shape[-1], model.objective.width or model.patch_dim
    if model.encoder_mask_tokens:
        last = model.predict_loss_kind == "none" and model.positions != "relative"
        encoder = price.encoder(model, visible, masked, masked if last else 0)
    else:
        encoder = price.encoder(model, visible, 0, 0) + embed_cost(model, price, visible)
    trunk = trunk_cost(model, price, visible + model.num_prefix_tokens, masked, masked)
    return encoder + trunk + price.linear(masked, width, values)


def embed_cost(model: HPMViT, price: Price, patches: int) -> float:
    """The linear map from encoder to decoder width, cls included; SimMIM has none."""
    tokens = patches + model.num_prefix_tokens
    return 0.0 if model.encoder_mask_tokens else price.linear(tokens, model.embed_dim, model.mask_token.shape[-1])


def trunk_cost(model: HPMViT, price: Price, seen: int, masked: int, outputs: int) -> float:
    """The reconstructor's blocks: `seen` visible and `masked` mask tokens enter, `outputs` tokens leave."""
    return price.decoder(model, len(model.decoder_blocks), model.mask_token.shape[-1], seen, masked, outputs)


def predictor_cost(model: HPMViT, price: Price, seen: int, masked: int, outputs: int) -> float:
    """The loss predictor, without what it shares; arguments as in `trunk_cost`."""
    width, dim = model.mask_token.shape[-1], model.decoder_pred_losspred.weight.shape[-1]
    cross = model.decoder_attention == "cross"
    read = outputs if model.predictor == "shared" else seen + max(masked, outputs if cross else 0)
    narrowed = 0.0 if dim == width else price.linear(read, width, dim)
    blocks = price.decoder(model, len(model.decoder_blocks_losspred), dim, seen, masked, outputs)
    return narrowed + blocks + price.linear(outputs, dim, 1)


def head_cost(model: HPMViT, price: Price, patches: float) -> float:
    """The difficulty head on the features of `patches` patches."""
    return price.linear(patches, model.embed_dim, model.embed_dim) + price.linear(patches, model.embed_dim, 1)
