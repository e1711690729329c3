"""Attention of cls to the patches: the weights that AMT masks by."""

from typing import Any

import torch
from torch import Tensor, nn

ROUNDING = 32  # units in the last place within which two sums of the same values may differ


# ------------------------------------------------------------------------------------------------------ attention
def cls_attention(model: nn.Module, images: Tensor) -> Tensor:
    """Attention of the cls token to the patches in the encoder's last block, all patches visible.

    - `model`: an `HPMViT`; `images`: as in its `encode`

    **Returns:** float32 [B, heads, L], relative positions included; with the attention to itself each row would sum to
    1.
    """
    attention: Any = model.blocks[-1].attn  # type: ignore[index, union-attr]
    seen: list[Tensor] = []
    hook = attention.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        model.encode(images)  # type: ignore[operator]
    finally:
        hook.remove()
    batch, length, width = seen[0].shape
    qkv = seen[0].float().reshape(batch, length, 3, attention.num_heads, width // 3 // attention.num_heads)
    query, key = qkv[:, 0, 0], qkv[:, :, 1]
    scores = torch.einsum("bhd,bnhd->bhn", query * query.shape[-1] ** -0.5, key)
    if getattr(model, "positions", "") == "relative":
        scores = scores + model.rel_pos_bias()[0, :, 0].float()  # type: ignore[operator]
    return scores.softmax(dim=-1)[:, :, 1:]


def attention_weights(attention: Tensor, *, per_head: bool = False) -> Tensor:
    """AMT's weights: attention [B, heads, L] averaged over heads and scaled to [0, 1] per image: [B, L].

    - `per_head`: scale each head first, and not the average, as the released code does

    A constant map gives zeros, which `attention_mask` takes for equal weights (the released code: NaN); so does one
    that is constant but for rounding.
    """
    return _scaled(attention).mean(dim=1) if per_head else _scaled(attention.mean(dim=1))


def _scaled(values: Tensor) -> Tensor:
    low, high = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    return torch.where(told_apart(values), (values - low) / (high - low), 0.0)


def standardized(values: Tensor) -> Tensor:
    """Values of patches [B, L] with mean 0 and deviation 1 per image; zeros where they differ by rounding alone."""
    deviation = values.std(dim=-1, keepdim=True)
    return torch.where(told_apart(values), (values - values.mean(dim=-1, keepdim=True)) / deviation, 0.0)


def told_apart(values: Tensor) -> Tensor:
    """Whether values [..., L] differ by more than the rounding of their sums: bool [..., 1]."""
    low, high = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    rounding = ROUNDING * torch.finfo(values.dtype).eps * values.abs().amax(dim=-1, keepdim=True)
    return ~(high - low <= rounding.clamp_min(torch.finfo(values.dtype).tiny))  # what is not finite is not hidden
