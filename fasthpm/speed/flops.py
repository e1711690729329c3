"""Floating-point operations of a step, by formula. The rule: 2 per multiply-add of every matrix product (linear
layers, attention scores and values, patch embedding); a backward pass counts twice its forward; element-wise work,
norms and softmax count nothing; nothing is counted that the method does not need.
"""

import dataclasses
from typing import Any

import torch
from torch import nn

from fasthpm.difficulty import DIFFICULTIES, HEAD_SHARE, views
from fasthpm.mask import num_masked
from fasthpm.model import HPMViT
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe


def blocks_flops(depth: int, tokens: int, dim: int, mlp_ratio: float = 4.0) -> float:
    """Forward of `depth` transformer blocks on `tokens` tokens of width `dim`."""
    linear = 2 * tokens * dim * dim * (4 + 2 * mlp_ratio)
    attention = 4 * tokens * tokens * dim
    return depth * (linear + attention)


def last_block_saving(tokens: int, kept: int, dim: int, mlp_ratio: float = 4.0) -> float:
    """What a block saves that gives only `kept` of its `tokens` outputs (keys and values are still of all)."""
    skipped = tokens - kept
    return 2 * skipped * dim * dim * (1 + 2 * mlp_ratio) + 4 * skipped * tokens * dim


def cross_flops(depth: int, tokens: int, context: int, dim: int, mlp_ratio: float = 4.0) -> float:
    """Forward of `depth` blocks in which `tokens` tokens attend to `context` others, which stay as they are."""
    linear = 2 * dim * dim * (tokens * (2 + 2 * mlp_ratio) + context * 2)
    return depth * (linear + 4 * tokens * context * dim)


def decoder_flops(model: HPMViT, depth: int, dim: int, seen: int, masked: int, outputs: int) -> float:
    """Forward of the blocks of a decoder: `seen` visible and `masked` mask tokens enter, `outputs` tokens leave."""
    if model.decoder_attention == "cross":
        return cross_flops(depth, outputs, seen, dim)
    saved = last_block_saving(seen + masked, outputs, dim) if depth else 0.0
    return blocks_flops(depth, seen + masked, dim) - saved


def encoder_flops(model: HPMViT, patches: int, mask_tokens: int = 0, outputs: int = 0) -> float:
    """Forward of the encoder on `patches` patches, `mask_tokens` and the cls token (where there is one), patch
    embedding included; of the last block only the last `outputs` tokens (0 = all)."""
    dim, tokens = model.embed_dim, patches + mask_tokens + model.num_prefix_tokens
    embed = 2 * patches * dim * model.patch_dim
    saved = last_block_saving(tokens, outputs, dim) if outputs else 0.0
    return embed + blocks_flops(len(model.blocks), tokens, dim) - saved


def trunk_flops(model: HPMViT, seen: int, masked: int, outputs: int) -> float:
    """Forward of the reconstructor's blocks; arguments as in `decoder_flops`."""
    return decoder_flops(model, len(model.decoder_blocks), model.mask_token.shape[-1], seen, masked, outputs)


def predictor_flops(model: HPMViT, seen: int, masked: int, outputs: int) -> float:
    """Forward of the loss predictor, without what it shares; arguments as in `decoder_flops`."""
    width, dim = model.mask_token.shape[-1], model.decoder_pred_losspred.weight.shape[-1]
    blocks = decoder_flops(model, len(model.decoder_blocks_losspred), dim, seen, masked, outputs)
    cross = model.decoder_attention == "cross"
    read = outputs if model.predictor == "shared" else seen + max(masked, outputs if cross else 0)
    return (0 if dim == width else 2 * read * width * dim) + blocks + 2 * outputs * dim


def teacher_flops(model: HPMViT, length: int) -> float:
    """Forward of `HPMViT.predict_loss` on `length` patches per sample, as the model's `difficulty` is asked."""
    if model.difficulty == "measured":
        return looks_flops(model, length)
    encoder = encoder_flops(model, length)
    if DIFFICULTIES[model.difficulty].head:
        return encoder + head_flops(model, length)
    seen, queries = length + model.num_prefix_tokens, 0
    if model.difficulty == "masked_query":
        queries = length
        if model.decoder_attention == "self":
            seen -= num_masked(length, model.mask_ratio)
    shared = trunk_flops(model, seen, queries, length) if model.predictor == "shared" else 0.0
    return encoder + embed_flops(model, length) + shared + predictor_flops(model, seen, queries, length)


def looks_flops(model: HPMViT, length: int) -> float:
    """Forward of the looks that measure the losses of `length` patches (`difficulty.views`)."""
    noise = torch.zeros(1, length, device="cpu")
    total = 0.0
    for view in views(noise, model.grid_size, model.mask_ratio, model.mask_unit):
        visible, masked = view.visible.shape[1], (view.masked if model.encoder_mask_tokens else view.asked).shape[1]
        if model.encoder_mask_tokens:
            total += encoder_flops(model, visible, masked)
        else:
            total += encoder_flops(model, visible) + embed_flops(model, visible)
        total += trunk_flops(model, visible + model.num_prefix_tokens, masked, masked)
        total += 2 * masked * model.decoder_pred.weight.numel()
    return total


def head_flops(model: HPMViT, patches: int) -> float:
    """Forward of the difficulty head on the features of `patches` patches."""
    return 2 * patches * model.embed_dim * (model.embed_dim + 1)


def embed_flops(model: HPMViT, patches: int) -> float:
    """Forward of the linear map from encoder to decoder width, cls included; SimMIM has none."""
    tokens = patches + model.num_prefix_tokens
    return 0 if model.encoder_mask_tokens else 2 * tokens * model.embed_dim * model.mask_token.shape[-1]


def frozen_flops(frozen: Any, patches: int) -> float:
    """Forward of a `FrozenTeacher` on `patches` patches of colour images; 0 of other modules, which nobody counts."""
    vit = getattr(frozen, "vit", None)
    if vit is None:
        return 0.0
    side, dim, tokens = vit.patch_embed.patch_size[0], vit.embed_dim, patches + vit.num_prefix_tokens
    ratio = vit.blocks[0].mlp.fc1.out_features / dim
    head = 2 * patches * dim * vit.head.out_features if frozen.projected else 0
    return 2 * patches * dim * 3 * side**2 + blocks_flops(len(vit.blocks), tokens, dim, ratio) + head


def step_flops(model: HPMViT, recipe: Recipe, frozen: nn.Module | None = None) -> dict[str, float]:
    """FLOPs per sample of one step: {"teacher", "student" (forward and backward), "total"}.

    "teacher" is all that runs without gradients: the EMA, and the `frozen` one of the target.
    """
    length, masked, predicts = recipe.num_patches, recipe.num_masked, recipe.predict_loss != "none"
    thrown = recipe.mask_plan.num_thrown
    visible = length - masked - thrown
    if model.encoder_mask_tokens:
        student = encoder_flops(model, visible, masked, 0 if predicts else masked)
    else:
        student = encoder_flops(model, visible) + embed_flops(model, visible)
    tokens = (visible + model.num_prefix_tokens, masked, masked)
    student += trunk_flops(model, *tokens) + 2 * masked * model.decoder_pred.weight.numel()
    if predicts:
        student += predictor_flops(model, *tokens)
    teacher, head = 0.0, recipe.question.head
    if recipe.masks_by_difficulty:
        teacher = teacher_flops(model, length // recipe.teacher_scale**2)
    elif recipe.uses_teacher:
        teacher = encoder_flops(model, length)
    if recipe.teacher_maps:
        teacher = teacher / recipe.map_refresh_epochs + (encoder_flops(model, length) / HEAD_SHARE if head else 0.0)
    if head:
        student += head_flops(model, length) / (HEAD_SHARE if recipe.teacher_maps else 1)
    teacher += frozen_flops(frozen, length) if frozen else 0.0
    return {"teacher": teacher, "student": 3 * student, "total": teacher + 3 * student}


def cost_over_mae(recipe: Recipe) -> float:
    """FLOPs of the recipe's step over those of MAE's, same encoder, reconstructor and masks."""
    fast = ("teacher_maps", "teacher_scale", "teacher_precision", "predictor", "predictor_depth", "predictor_dim")
    usual = {name: getattr(Recipe, name) for name in (*fast, "decoder_attention")}
    policy = "random" if recipe.masks_by_difficulty else recipe.mask_policy
    usual["difficulty"] = Recipe.difficulty
    mae = dataclasses.replace(recipe, mask_policy=policy, predict_loss="none", absolute_standardize=True, **usual)
    with torch.device("meta"):
        totals = [step_flops(model_of(one), one)["total"] for one in (recipe, mae)]
    return totals[0] / totals[1]
