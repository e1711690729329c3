"""Floating-point operations of a step, by formula. The rule: 2 per multiply-add of every matrix product (linear
layers, attention scores and values, patch embedding); a backward pass counts twice its forward; element-wise work,
norms and softmax count nothing; nothing is counted that the method does not need.
"""

from fasthpm.model import HPMViT
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


def encoder_flops(model: HPMViT, patches: int) -> float:
    """Forward of the encoder on `patches` patches and the cls token, patch embedding included."""
    dim = model.cls_token.shape[-1]
    embed = 2 * patches * dim * model.in_chans * model.patch_size**2
    return embed + blocks_flops(len(model.blocks), patches + 1, dim)


def decoder_flops(model: HPMViT, outputs: int, head: int) -> float:
    """Forward of one decoder with a `head` wide head on its last `outputs` tokens."""
    dim, tokens = model.mask_token.shape[-1], model.num_patches + 1
    blocks = blocks_flops(len(model.decoder_blocks), tokens, dim) - last_block_saving(tokens, outputs, dim)
    return blocks + 2 * outputs * dim * head


def embed_flops(model: HPMViT, patches: int) -> float:
    """Forward of the linear map from encoder to decoder width, cls included."""
    return 2 * (patches + 1) * model.cls_token.shape[-1] * model.mask_token.shape[-1]


def step_flops(model: HPMViT, recipe: Recipe) -> dict[str, float]:
    """FLOPs per sample of one step: {"teacher", "student" (forward and backward), "total"}."""
    visible = recipe.num_patches - recipe.num_masked
    student = encoder_flops(model, visible) + embed_flops(model, visible)
    student += decoder_flops(model, recipe.num_masked, model.in_chans * model.patch_size**2)
    if recipe.predict_loss != "none":
        student += decoder_flops(model, recipe.num_masked, 1)
    teacher = 0.0
    if recipe.uses_teacher:
        teacher = encoder_flops(model, recipe.num_patches) + embed_flops(model, recipe.num_patches)
        teacher += decoder_flops(model, recipe.num_patches + 1, 1)
    return {"teacher": teacher, "student": 3 * student, "total": teacher + 3 * student}
