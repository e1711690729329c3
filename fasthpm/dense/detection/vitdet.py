"""A run's encoder as ViTDet's backbone: attention within windows, a few global blocks, positions of any grid.

ViTDet (Li et al. 2022, detectron2 `projects/ViTDet`) keeps the pretrained weights and changes what attends to what. The
grid of patches is cut into windows of 14 x 14, padded with zeros behind the norm, and patches attend to their window
(the zeros as well) in all but four blocks, the last of each quarter, where they attend to the whole grid. Names are
timm's (`blocks.N.attn.qkv`), so that the learning rate per layer finds the blocks.

Pretraining had a cls token, which this pass leaves out, as ViTDet's does: the patches lose one of their keys in every
block, and nothing else changes. There is no final norm either. With all blocks global and without relative positions
the maps are those that the encoder's own blocks make of the patches alone, to rounding.

B images, H x W the grid of patches, D the width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, resample_abs_pos_embed
from torch import Tensor, nn

from fasthpm.errors import UserError
from fasthpm.exchange.forms import encoder_of, mlp_width
from fasthpm.layers import LAYER_NORM_EPS, Attention, Mlp, again_in_backward
from fasthpm.mask_loops import on_cpu
from fasthpm.model import HPMViT

QUARTERS = 4


@dataclass(frozen=True)
class Windows:
    """How the encoder is changed for images of `grid` patches.

    - `grid`: (rows, columns) of the patches of an image
    - `window`: side of a window in patches; 0, or the grid's side and more: all blocks are global
    - `relative`: add relative positions to the attention (decomposed, zero at first), as ViTDet does
    - `drop_path`: stochastic depth, growing linearly to this
    - `again`: activation checkpointing, each block is computed again in the backward pass
    """

    grid: tuple[int, int]
    window: int = 14
    relative: bool = False
    drop_path: float = 0.1
    again: bool = False


def global_blocks(depth: int) -> tuple[int, ...]:
    """The last block of each quarter: 2, 5, 8, 11 of twelve."""
    ends = {depth * quarter // QUARTERS - 1 for quarter in range(1, QUARTERS + 1)}
    return tuple(sorted(ends - {-1}))


class ViTDet(nn.Module):
    """The encoder of `model`, with its weights, as `windows` says.

    **Raises:** `UserError` for a video model.
    """

    def __init__(self, model: HPMViT, windows: Windows) -> None:
        super().__init__()
        if model.video:
            raise UserError("the run was trained on video, and detection takes image models; give a run on images")
        self.windows, self.patch_size, self.embed_dim = windows, model.patch_size, model.embed_dim
        self.pretrained_grid = model.grid_size
        depth, everywhere = len(model.blocks), global_blocks(len(model.blocks))
        window = windows.window if windows.window < max(windows.grid) else 0
        self.patch_embed = PatchEmbed(model.in_chans, model.embed_dim, model.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, model.num_patches, model.embed_dim))
        rates = torch.linspace(0, windows.drop_path, depth).tolist()
        shape = (model.embed_dim, model.num_heads, mlp_width(model.blocks))
        self.blocks = nn.ModuleList(
            WindowBlock(shape, 0 if k in everywhere else window, windows.grid, windows.relative, rate)
            for k, rate in enumerate(rates)
        )
        self._take(encoder_of(model))

    def _take(self, state: dict[str, Tensor]) -> None:
        """Load the encoder's tensors: all but the cls token, its position and the final norm."""
        left = {"cls_token", "norm.weight", "norm.bias"}
        state = {key: value for key, value in state.items() if key not in left}
        state["pos_embed"] = state["pos_embed"][:, 1:]
        missing = self.load_state_dict(state, strict=False)
        fresh = {key for key in missing.missing_keys if ".rel_pos_" not in key}
        if fresh or missing.unexpected_keys:
            raise RuntimeError(f"the backbone does not take this encoder: {missing}")

    def forward(self, images: Tensor) -> Tensor:
        """float [B, C, P*H, P*W], normalised -> the last block's map [B, D, H, W]."""
        return self.maps(images)[-1]

    def maps(self, images: Tensor, every: bool = False) -> list[Tensor]:
        """As `forward`, the last block's map, or `every` block's."""
        tokens = self.patch_embed(images.to(self.pos_embed.dtype))
        tokens = tokens + self._positions(tokens.shape[1:3])
        found = []
        for block in self.blocks:
            again = self.windows.again and self.training and torch.is_grad_enabled()
            tokens = again_in_backward(block, tokens) if again else block(tokens)
            if every:
                found.append(tokens)
        return [one.permute(0, 3, 1, 2) for one in found or [tokens]]

    def _positions(self, grid: Any) -> Tensor:
        """The trained table [1, H, W, D], interpolated from the pretraining's grid as MAE and ViTDet do (bicubic)."""
        table = resample_abs_pos_embed(
            self.pos_embed, list(grid), list(self.pretrained_grid), num_prefix_tokens=0, antialias=False
        )
        return table.unflatten(1, tuple(grid))


class PatchEmbed(nn.Module):
    """timm's name for the projection of patches."""

    def __init__(self, channels: int, dim: int, side: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, side, side)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, P*H, P*W] -> [B, H, W, D]."""
        return self.proj(images).permute(0, 2, 3, 1)


class WindowBlock(nn.Module):
    """A pre-norm block of the encoder whose attention stays within windows.

    - `shape`: width, heads, hidden units of the MLP
    - `window`: side of a window; 0 = the whole grid
    - `grid`: (rows, columns), which relative positions are made for
    """

    def __init__(
        self, shape: tuple[int, int, int], window: int, grid: tuple[int, int], relative: bool, drop_path: float
    ) -> None:
        super().__init__()
        dim, heads, hidden = shape
        self.window = window
        self.norm1 = nn.LayerNorm(dim, LAYER_NORM_EPS)
        size = (window, window) if window else grid
        self.attn: Attention = RelativeAttention(dim, heads, size) if relative else Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.mlp = Mlp(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, H, W, D] -> [B, H, W, D]."""
        tokens = tokens + self.drop_path(self._attend(self.norm1(tokens)))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))

    def _attend(self, tokens: Tensor) -> Tensor:
        grid = tokens.shape[1:3]
        side = (self.window, self.window) if self.window else grid
        cut = into_windows(tokens, side).flatten(1, 2)
        return from_windows(self.attn(cut, cut.shape[1]).unflatten(1, side), grid)


def into_windows(tokens: Tensor, side: Any) -> Tensor:
    """[B, H, W, D] -> [B * windows, h, w, D] for a `side` of (h, w); zeros where the lowest and rightmost need them."""
    rows, columns = tokens.shape[1:3]
    if (rows, columns) == tuple(side):
        return tokens
    below, right = -rows % side[0], -columns % side[1]
    if below or right:
        tokens = F.pad(tokens, (0, 0, 0, right, 0, below))
    cut = tokens.unflatten(2, (-1, side[1])).unflatten(1, (-1, side[0]))  # [B, down, h, across, w, D]
    return cut.transpose(2, 3).flatten(0, 2)


def from_windows(windows: Tensor, grid: Any) -> Tensor:
    """The inverse: [B * windows, h, w, D] -> [B, H, W, D] for a `grid` of (H, W)."""
    rows, columns = grid
    side = windows.shape[1:3]
    if (rows, columns) == tuple(side):
        return windows
    down, across = -(-rows // side[0]), -(-columns // side[1])
    cut = windows.unflatten(0, (-1, down, across)).transpose(2, 3)
    return cut.flatten(3, 4).flatten(1, 2)[:, :rows, :columns]


class RelativeAttention(Attention):
    """Attention with decomposed relative positions (MViTv2, ViTDet): q·R of the row and of the column are added to the
    scores. Tables `rel_pos_h` [2h - 1, d] and `rel_pos_w` [2w - 1, d], zero at first, are shared by the heads.

    - `size`: (h, w) of what attends to itself
    """

    def __init__(self, dim: int, num_heads: int, size: tuple[int, int]) -> None:
        super().__init__(dim, num_heads)
        self.size = size
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * size[0] - 1, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * size[1] - 1, dim // num_heads))

    def forward(self, tokens: Tensor, last: int) -> Tensor:  # type: ignore[override]
        """[B, h*w, D] -> [B, h*w, D]."""
        batch, length, dim = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        out = attend_biased(query, key, value, self.bias(query))
        return self.proj(out.transpose(1, 2).reshape(batch, length, dim))

    def bias(self, query: Tensor) -> Tensor:
        """What is added to the scores of [B, heads, h*w, d]: [B, heads, h*w, h*w]."""
        of_row, of_column = (
            table[distances(length, table.device)]
            for table, length in zip((self.rel_pos_h, self.rel_pos_w), self.size, strict=True)
        )
        grid = query.unflatten(2, self.size)
        rows = torch.einsum("bnhwd,hkd->bnhwk", grid, of_row)
        columns = torch.einsum("bnhwd,wkd->bnhwk", grid, of_column)
        return (rows[..., :, None] + columns[..., None, :]).flatten(4, 5).flatten(2, 3)


def distances(length: int, device: torch.device) -> Tensor:
    """Row of the table for query q and key k, q - k + length - 1: int64 [length, length]."""
    places = torch.arange(length, device=device)
    return places[:, None] - places[None, :] + length - 1


def attend_biased(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """`attend` with something added to the scores; plain where the fused kernel is the slower one."""
    if on_cpu(query):
        return ((query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1) + bias).softmax(dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
