"""Floating-point operations of a step, by formula. The rule: 2 per multiply-add of every matrix product (linear
layers, attention scores and values, patch embedding); a backward pass counts twice its forward; element-wise work,
norms and softmax count nothing; nothing is counted that the method does not need.
"""

import dataclasses
from typing import Any

import torch
from torch import nn

from fasthpm.model import HPMViT
from fasthpm.patches import model_of
from fasthpm.recipe import Recipe
from fasthpm.speed.cost import Price, step_cost
from fasthpm.view_fields import ViewFields


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


def linear_flops(tokens: float, inputs: int, outputs: int) -> float:
    """Forward of a linear layer."""
    return 2 * tokens * inputs * outputs


FLOPS = Price(encoder_flops, decoder_flops, linear_flops)


def frozen_flops(frozen: Any, patches: int) -> float:
    """Forward of a `FrozenTeacher` on `patches` patches of colour images, or of a tokenizer; 0 of other modules, which
    nobody counts."""
    if hasattr(frozen, "flops"):
        return float(frozen.flops(patches))
    vit = getattr(frozen, "vit", None)
    if vit is None:
        return 0.0
    side, dim, tokens = vit.patch_embed.patch_size[0], vit.embed_dim, patches + vit.num_prefix_tokens
    ratio = vit.blocks[0].mlp.fc1.out_features / dim
    head = 2 * patches * dim * vit.head.out_features if frozen.projected else 0
    if hasattr(frozen, "codes"):  # VQ-KD
        head += 2 * patches * sum(weight.numel() for weight in (*frozen.head.parameters(), frozen.codes))
    return 2 * patches * dim * 3 * side**2 + blocks_flops(len(vit.blocks), tokens, dim, ratio) + head


def step_flops(model: HPMViT, recipe: Recipe, frozen: nn.Module | None = None) -> dict[str, float]:
    """FLOPs per sample of one step: {"teacher", "student" (forward and backward), "total"}.

    "teacher" is all that runs without gradients: the EMA, and the `frozen` one of the target.
    """
    found = step_cost(model, recipe, FLOPS)
    late = getattr(frozen, "by_patch", False) and not recipe.asks_all_targets
    extra = frozen_flops(frozen, recipe.num_masked if late else recipe.num_patches) if frozen else 0.0
    return {**found, "teacher": found["teacher"] + extra, "total": found["total"] + extra}


def mae_of(recipe: Recipe) -> Recipe:
    """MAE with the recipe's encoder, reconstructor and masks, which follow no difficulty."""
    fast = ("teacher_maps", "teacher_scale", "predictor", "predictor_depth", "predictor_dim")
    usual = {name: getattr(Recipe, name) for name in (*fast, "decoder_attention", "difficulty")}
    if recipe.uses_views:  # one view, with MAE's decoder and masks
        usual |= {field.name: field.default for field in dataclasses.fields(ViewFields)}
        usual |= {"target": "pixels", "mask_ratio": Recipe.mask_ratio, "freeze_last_layer_epochs": 0}
        usual |= {"model": recipe.model.replace("ibot_", "mae_")}
    policy = "random" if recipe.masks_by_difficulty else recipe.mask_policy
    return dataclasses.replace(recipe, mask_policy=policy, predict_loss="none", absolute_standardize=True, **usual)


def cost_over_mae(recipe: Recipe) -> float:
    """FLOPs of the recipe's step over those of `mae_of`."""
    with torch.device("meta"):
        totals = [step_flops(model_of(one), one)["total"] for one in (recipe, mae_of(recipe))]
    return totals[0] / totals[1]
