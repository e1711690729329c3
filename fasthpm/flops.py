"""Floating-point operations of a step, by formula. The rule: 2 per multiply-add of every matrix product (linear
layers, attention scores and values, patch embedding); a backward pass counts twice its forward; element-wise work,
norms and softmax count nothing; nothing is counted that the method does not need.
"""

from fasthpm.model import HPMViT
from fasthpm.recipe import Recipe
from fasthpm.targets import FrozenTeacher


def blocks_flops(depth: int, tokens: int, dim: int, mlp_ratio: float = 4.0) -> float:
    """Forward of `depth` transformer blocks on `tokens` tokens of width `dim`."""
    linear = 2 * tokens * dim * dim * (4 + 2 * mlp_ratio)
    attention = 4 * tokens * tokens * dim
    return depth * (linear + attention)


def last_block_saving(tokens: int, kept: int, dim: int, mlp_ratio: float = 4.0) -> float:
    """What a block saves that gives only `kept` of its `tokens` outputs (keys and values are still of all)."""
    skipped = tokens - kept
    return 2 * skipped * dim * dim * (1 + 2 * mlp_ratio) + 4 * skipped * tokens * dim


def encoder_flops(model: HPMViT, patches: int, mask_tokens: int = 0, outputs: int = 0) -> float:
    """Forward of the encoder on `patches` patches, `mask_tokens` and the cls token, patch embedding included; of the
    last block only the last `outputs` tokens (0 = all)."""
    dim, tokens = model.cls_token.shape[-1], patches + mask_tokens + 1
    embed = 2 * patches * dim * model.in_chans * model.patch_size**2
    saved = last_block_saving(tokens, outputs, dim) if outputs else 0.0
    return embed + blocks_flops(len(model.blocks), tokens, dim) - saved


def reconstructor_flops(model: HPMViT, outputs: int) -> float:
    """Forward of the reconstructor, its head on its last `outputs` tokens."""
    dim, tokens, depth = model.mask_token.shape[-1], model.num_patches + 1, len(model.decoder_blocks)
    blocks = blocks_flops(depth, tokens, dim) - (last_block_saving(tokens, outputs, dim) if depth else 0.0)
    return blocks + 2 * outputs * dim * (model.target_dim or model.in_chans * model.patch_size**2)


def predictor_flops(model: HPMViT, outputs: int) -> float:
    """Forward of the loss predictor on its last `outputs` tokens."""
    width, tokens = model.mask_token.shape[-1], model.num_patches + 1
    dim = model.decoder_pred_losspred.weight.shape[-1]
    blocks = blocks_flops(len(model.decoder_blocks_losspred), tokens, dim) - last_block_saving(tokens, outputs, dim)
    embed = 0 if dim == width else 2 * tokens * width * dim
    return embed + blocks + 2 * outputs * dim


def embed_flops(model: HPMViT, patches: int) -> float:
    """Forward of the linear map from encoder to decoder width, cls included; SimMIM has none."""
    return (
        0 if model.encoder_mask_tokens else 2 * (patches + 1) * model.cls_token.shape[-1] * model.mask_token.shape[-1]
    )


def frozen_flops(frozen: FrozenTeacher, patches: int) -> float:
    """Forward of a target's frozen teacher on `patches` patches of colour images."""
    vit = frozen.vit
    side, dim, tokens = vit.patch_embed.patch_size[0], vit.embed_dim, patches + vit.num_prefix_tokens
    ratio = vit.blocks[0].mlp.fc1.out_features / dim
    head = 2 * patches * dim * vit.head.out_features if frozen.projected else 0
    return 2 * patches * dim * 3 * side**2 + blocks_flops(len(vit.blocks), tokens, dim, ratio) + head


def step_flops(model: HPMViT, recipe: Recipe, frozen: FrozenTeacher | None = None) -> dict[str, float]:
    """FLOPs per sample of one step: {"teacher", "student" (forward and backward), "total"}.

    "teacher" is all that runs without gradients: the EMA, and the `frozen` one of the target.
    """
    length, masked, predicts = recipe.num_patches, recipe.num_masked, recipe.predict_loss != "none"
    if model.encoder_mask_tokens:
        student = encoder_flops(model, length - masked, masked, 0 if predicts else masked)
    else:
        student = encoder_flops(model, length - masked) + embed_flops(model, length - masked)
    student += reconstructor_flops(model, masked)
    if predicts:
        student += predictor_flops(model, masked)
    teacher = 0.0
    if recipe.uses_teacher:
        teacher = encoder_flops(model, length)
    if recipe.masks_by_difficulty:
        teacher += embed_flops(model, length) + predictor_flops(model, length)
    if frozen:
        teacher += frozen_flops(frozen, length)
    return {"teacher": teacher, "student": 3 * student, "total": teacher + 3 * student}
