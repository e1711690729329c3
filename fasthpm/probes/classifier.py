"""A run's encoder as timm's Vision Transformer with a head, and MAE's learning rate per layer.

The model is `timm.models.VisionTransformer`, untouched; tests hold its logits to the published fine-tuning model's.
"""

import re
from typing import Any

import timm.models
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from fasthpm.errors import UserError
from fasthpm.export_forms import encoder_of, timm_arguments
from fasthpm.model import HPMViT

POOLS = {"avg": "mean of the patch tokens, then a fresh norm (MAE's global_pool)", "token": "cls token after the norm"}
HEAD_STD = 2e-5  # of MAE's fine-tuning head at the start


def build_classifier(
    model: HPMViT,
    num_classes: int,
    *,
    image_size: tuple[int, int],
    global_pool: str = "avg",
    drop_path: float = 0.0,
    seed: int = 0,
) -> timm.models.VisionTransformer:
    """timm's ViT with the encoder of `model` and a fresh head of `num_classes` outputs.

    - `image_size`: (height, width) of the images; positions are interpolated to it (`resize_positions`)
    - `global_pool`: one of `POOLS`; with "avg" the encoder's own final norm is left out, as MAE does

    **Raises:** `UserError` for sizes that the patches do not divide.
    """
    side = model.patch_size
    if any(length % side for length in image_size):
        near = "x".join(str(max(1, round(length / side)) * side) for length in image_size)
        raise UserError(
            f"input_size {image_size[0]}x{image_size[1]} is not a multiple of patch_size {side}; use e.g. {near}"
        )
    arguments = timm_arguments(model) | {
        "img_size": image_size, "num_classes": num_classes, "global_pool": global_pool, "drop_path_rate": drop_path,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = timm.models.VisionTransformer(**arguments)
        nn.init.trunc_normal_(vit.head.weight, std=HEAD_STD)
    grid = (image_size[0] // side, image_size[1] // side)
    state = encoder_of(model)
    state["pos_embed"] = resize_positions(state["pos_embed"], model.grid_size, grid)
    if global_pool == "avg":
        state = {key: value for key, value in state.items() if not key.startswith("norm.")}
    missing = vit.load_state_dict(state, strict=False)
    fresh = {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    if set(missing.missing_keys) - fresh or missing.unexpected_keys:
        raise RuntimeError(f"timm's ViT does not take this encoder: {missing}")
    return vit


def resize_positions(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Positions [1, 1 + L, D] of one grid (rows, columns) interpolated to another, square or not; cls's row is kept.

    Bicubic without antialiasing, as in MAE: for the fixed sine-cosine table too, so that a patch keeps the position of
    the same place in the picture, which recomputing the table for the new grid would change.
    """
    return resample_abs_pos_embed(table, list(new_grid), list(old_grid), num_prefix_tokens=1, antialias=False)


def layer_id(name: str, depth: int) -> int:
    """0 for the embeddings, i + 1 for block i, depth + 1 for the rest (MAE, BEiT)."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1


def layer_scale(name: str, ndim: int, depth: int, layer_decay: float, weight_decay: float) -> tuple[float, float]:
    """(factor of the learning rate, weight decay) of a parameter of timm's ViT; 1-D ones and positions do not decay."""
    exempt = ndim == 1 or name in ("cls_token", "pos_embed")
    return layer_decay ** (depth + 1 - layer_id(name, depth)), 0.0 if exempt else weight_decay


def layer_decay_groups(vit: nn.Module, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups of timm's ViT, each with `lr_scale` and `weight_decay`, nearest the input first."""
    depth = len(vit.blocks)  # type: ignore[arg-type]
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in vit.named_parameters():
        if parameter.requires_grad:
            scale, decay = layer_scale(name, parameter.ndim, depth, layer_decay, weight_decay)
            group = {"params": [], "lr_scale": scale, "weight_decay": decay}
            groups.setdefault((scale, decay), group)["params"].append(parameter)
    return list(groups.values())
