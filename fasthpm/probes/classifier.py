"""A run's encoder as timm's Vision Transformer with a head, and MAE's learning rate per layer.

The model is `timm.models.VisionTransformer`, untouched; tests hold its logits to the published fine-tuning model's.
For clips it is given VideoMAE's tubelet embedding and fixed positions, and has no cls token.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

import timm.models
import torch
from safetensors import safe_open
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from fasthpm.errors import UserError
from fasthpm.exchange.forms import encoder_of, timm_arguments
from fasthpm.layers import PatchProjection
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
    - `global_pool`: one of `POOLS`; with "avg" the encoder's own final norm is left out, as MAE and VideoMAE do

    Of a video model it takes clips [B, C, T, H, W]; its positions are fixed, as in VideoMAE.

    **Raises:** `UserError` for sizes that the patches do not divide, and for the cls token of a video model.
    """
    if model.video and global_pool != "avg":
        raise UserError(f"global_pool is {global_pool!r}, but video models have no cls token; use --global_pool avg")
    side = model.patch_size
    if any(length % side for length in image_size):
        near = "x".join(str(max(1, round(length / side)) * side) for length in image_size)
        raise UserError(
            f"input_size {image_size[0]}x{image_size[1]} is not a multiple of patch_size {side}; use e.g. {near}"
        )
    arguments = architecture(model) | {
        "img_size": image_size,
        "num_classes": num_classes,
        "global_pool": global_pool,
        "drop_path_rate": drop_path,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = build_vit(arguments)
        nn.init.trunc_normal_(vit.head.weight, std=HEAD_STD)
    grid = (image_size[0] // side, image_size[1] // side)
    state = encoder_of(model)
    if model.video:
        vit.pos_embed = resize_slots(state.pop("pos_embed"), model.slots, model.grid_size, grid)
    else:
        state["pos_embed"] = resize_positions(state["pos_embed"], model.grid_size, grid)
    if global_pool == "avg":
        state = {key: value for key, value in state.items() if not key.startswith("norm.")}
    missing = vit.load_state_dict(state, strict=False)
    fresh = {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    if set(missing.missing_keys) - fresh or missing.unexpected_keys:
        raise RuntimeError(f"timm's ViT does not take this encoder: {missing}")
    return vit


# -------------------------------------------------------------------------------------------------- clips
class TubeletEmbed(nn.Module):
    """The place of timm's `PatchEmbed` for clips: tokens in the order (slot of t frames, row, column).

    - `num_frames`, `tubelet_size`: T frames of a clip, t of a token; the other arguments are timm's
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        num_frames: int,
        tubelet_size: int,
        **options: Any,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = tuple(img_size), (patch_size, patch_size)
        self.tubelet_size, self.num_frames = tubelet_size, num_frames
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_patches = num_frames // tubelet_size * self.grid_size[0] * self.grid_size[1]
        self.proj = PatchProjection(patch_size, in_chans, embed_dim, tubelet_size)

    def forward(self, clips: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, L, D]; T = 1 also without its dimension."""
        clips = clips[:, :, None] if clips.dim() == 4 else clips
        frames, (rows, columns), side = self.tubelet_size, self.grid_size, self.patch_size[0]
        cut = clips.unflatten(4, (columns, side)).unflatten(3, (rows, side)).unflatten(2, (-1, frames))
        return self.proj(cut.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3))


def architecture(model: HPMViT) -> dict[str, Any]:
    """What `build_vit` makes the encoder of `model` with: timm's arguments; of a video model, two more."""
    clips = {"num_frames": model.num_frames, "tubelet_size": model.tubelet_size} if model.video else {}
    return timm_arguments(model) | clips


def build_vit(arguments: dict[str, Any]) -> Any:
    """`timm.models.VisionTransformer` of these arguments; with `num_frames` and `tubelet_size` among them, of clips."""
    clips = {name: arguments[name] for name in ("num_frames", "tubelet_size") if name in arguments}
    rest = {name: value for name, value in arguments.items() if name not in clips}
    if not clips:
        return timm.models.VisionTransformer(**rest)
    vit = timm.models.VisionTransformer(**rest, class_token=False, embed_layer=functools.partial(TubeletEmbed, **clips))
    table = torch.zeros_like(vit.pos_embed)
    del vit.pos_embed
    vit.register_buffer("pos_embed", table, persistent=False)  # not trained
    return vit


def load_classifier(path: Path) -> tuple[Any, dict[str, Any]]:
    """The network of a `classifier.safetensors`, in evaluation mode, and its "classes", "mean" and "std"."""
    with safe_open(path, "pt") as file:
        notes = {name: json.loads(text) for name, text in file.metadata().items()}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    vit = build_vit(notes.pop("timm"))
    if "pos_embed" in dict(vit.named_buffers()):
        vit.pos_embed = state.pop("pos_embed")
    vit.load_state_dict(state)
    return vit.eval(), notes


def resize_slots(table: Tensor, slots: int, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Positions [1, L, D] of clips, each slot's grid (rows, columns) interpolated as `resize_positions` does."""
    resize = functools.partial(resample_abs_pos_embed, num_prefix_tokens=0, antialias=False)
    return torch.cat([resize(slot, list(new_grid), list(old_grid)) for slot in table.chunk(slots, dim=1)], dim=1)


# -------------------------------------------------------------------------------------------------- both
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
