"""One masked autoencoder: ViT encoder, reconstructor and (HPM) loss predictor. MAE and SimMIM are settings of it.

Parameters carry the names of the published MAE and HPM checkpoints. Every parameter is read inside the forward of the
module that owns it, so ZeRO-3 can partition them; the expensive parts only see the tokens that they need.

Letters: B batch, L patches, M masked, V = L - M visible, P patch side, C channels, D width.
"""

import math
from typing import Any, NamedTuple

import timm.models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthpm import loss as losses
from fasthpm.errors import UserError, nearest
from fasthpm.mask import split_ids

LAYER_NORM_EPS = 1e-6
LOSS_HEAD = "decoder_pred_losspred"


class Output(NamedTuple):
    """What `HPMViT.forward` gives; per-patch fields hold the masked patches in ascending patch order."""

    loss: Tensor  # scalar, reconstruction_loss + difficulty_loss (Eq. 2)
    reconstruction_loss: Tensor  # scalar
    difficulty_loss: Tensor  # scalar, 0 without a loss predictor
    per_patch_loss: Tensor  # float32 [B, M], detached
    predicted_difficulty: Tensor  # float32 [B, M], zeros without a loss predictor
    reconstruction: Tensor  # [B, M, P*P*C], each patch as (row, column, channel); [B, M, D'] if features are the target


class HPMViT(nn.Module):
    """Masked autoencoder with a loss predictor (HPM), or without (MAE). Fixed 2-D sine-cosine positions, cls token.

    With `encoder_mask_tokens` it is SimMIM: the mask tokens enter the encoder, which sees all L patches, and the
    reconstructor is a linear head on the encoder's output. Paper: that, 32 x 32 units and `pixel_loss="l1"`. From the
    AMT paper's SimMIM: absolute positions (SimMIM has relative ones, and LayerScale). Ours: HPM on it, which neither
    HPM paper tried (they added it to MAE, BEiT and iBOT); the loss predictor reads the encoder's output.

    - `img_size`: side or (height, width) in pixels, multiples of `patch_size`
    - `predict_loss`: "relative", "absolute" or "none" (no predictor: MAE)
    - `predictor_dim`, `predictor_depth`: of the loss predictor; 0 = the decoder's. Another width than that of the
      tokens that it reads (of the decoder, in SimMIM of the encoder) costs one linear map
    - `pixel_loss`: "mse" or "l1"; `absolute_standardize`, `norm_pix_loss`: see `fasthpm.loss`
    - `target_dim`: width D' of the features that are predicted; 0 = pixels are

    **Raises:** `UserError` for sizes that do not fit together.
    """

    pos_embed: Tensor
    decoder_pos_embed: Tensor

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        predictor_dim: int = 0,
        predictor_depth: int = 0,
        encoder_mask_tokens: bool = False,
        predict_loss: str = "relative",
        absolute_standardize: bool = True,
        pixel_loss: str = "mse",
        norm_pix_loss: bool = False,
        target_dim: int = 0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        self.patch_size, self.in_chans = patch_size, in_chans
        self.predict_loss_kind, self.absolute_standardize = predict_loss, absolute_standardize
        self.pixel_loss, self.norm_pix_loss = pixel_loss, norm_pix_loss
        self.encoder_mask_tokens, self.target_dim = encoder_mask_tokens, target_dim
        self.grid_size = _grid(self.img_size, patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        patch_dim = patch_size**2 * in_chans

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_buffer("pos_embed", sincos_positions(embed_dim, self.grid_size)[None])
        self.blocks = _blocks(depth, embed_dim, num_heads, mlp_ratio)
        self.norm = nn.LayerNorm(embed_dim, LAYER_NORM_EPS)

        width = embed_dim if encoder_mask_tokens else decoder_embed_dim  # of the tokens that both heads read
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_blocks = _blocks(0 if encoder_mask_tokens else decoder_depth, width, decoder_num_heads, mlp_ratio)
        self.decoder_norm: nn.Module = nn.Identity()
        if not encoder_mask_tokens:
            self.decoder_embed = nn.Linear(embed_dim, width)
            self.register_buffer("decoder_pos_embed", sincos_positions(width, self.grid_size)[None])
            self.decoder_norm = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(width, target_dim or patch_dim)
        if predict_loss != "none":
            dim = predictor_dim or decoder_embed_dim
            self.decoder_embed_losspred = nn.Identity() if dim == width else nn.Linear(width, dim)
            self.decoder_blocks_losspred = _blocks(predictor_depth or decoder_depth, dim, decoder_num_heads, mlp_ratio)
            self.decoder_norm_losspred = nn.LayerNorm(dim, LAYER_NORM_EPS)
            self.decoder_pred_losspred = ScalarHead(dim, patch_dim)
        self.apply(_init_linear)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def patchify(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, L, P*P*C], patches in raster order, values as (row, column, channel)."""
        if images.dim() == 3:
            return images
        batch, channels, height, width = images.shape
        if (channels, height, width) != (self.in_chans, *self.img_size):
            raise ValueError(f"images are {tuple(images.shape)}, expected [B, {self.in_chans}, {self.img_size}]")
        rows, columns = self.grid_size
        side = self.patch_size
        patches = images.reshape(batch, channels, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1)
        return patches.reshape(batch, rows * columns, side * side * channels)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """[B, L, P*P*C] -> [B, C, H, W]; the inverse of `patchify`."""
        rows, columns = self.grid_size
        side = self.patch_size
        pixels = patches.reshape(len(patches), rows, columns, side, side, self.in_chans).permute(0, 5, 1, 3, 2, 4)
        return pixels.reshape(len(patches), self.in_chans, rows * side, columns * side)

    def encode(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features of the visible patches, after the final norm.

        - `images`: float [B, C, H, W], normalised, or patches [B, L, P*P*C]
        - `mask`: bool [B, L], True = masked, the same number in every row; None = nothing masked

        **Returns:** [B, 1 + V, D], cls token first, visible patches in ascending order. SimMIM's encoder sees the mask
        tokens too, and returns none of them.
        """
        if mask is None:
            return self._encode(self.patchify(images))
        visible, masked = split_ids(mask, _count(mask))
        return self._encode(self.patchify(images), visible, masked)[:, : 1 + visible.shape[1]]

    def predict_loss(self, images: Tensor) -> Tensor:
        """Predicted difficulty of every patch, from all of them visible (the teacher's forward): float32 [B, L]."""
        return self.difficulty_of(self._encode(self.patchify(images)))

    def difficulty_of(self, tokens: Tensor) -> Tensor:
        """`predict_loss` from what `encode` gives of all patches, [B, 1 + L, D]: float32 [B, L]."""
        if not self.encoder_mask_tokens:
            tokens = self.decoder_embed(tokens) + self.decoder_pos_embed
        return self._difficulty(tokens, self.num_patches)

    def forward(
        self, images: Tensor, mask: Tensor, *, num_masked: int | None = None, target: Tensor | None = None
    ) -> Output:
        """Reconstruct the masked patches, or their features, and predict their losses (Eq. 2-7).

        - `images`, `mask`: as in `encode`
        - `num_masked`: M, if known; else it is read from `mask`, which waits for the device
        - `target`: [B, L, target_dim], the features of all patches, if those are what the model predicts
        """
        patches = self.patchify(images)
        visible, masked = split_ids(mask, _count(mask) if num_masked is None else num_masked)
        tokens, count = self._tokens(patches, visible, masked), masked.shape[1]
        reconstruction = self.decoder_pred(self.decoder_norm(_run(self.decoder_blocks, tokens, count)))
        per_patch = self._per_patch(reconstruction, patches, target, masked)
        actual = per_patch.detach()
        if self.predict_loss_kind == "none":
            predicted, difficulty = torch.zeros_like(actual), actual.new_zeros(())
        else:
            predicted = self._difficulty(tokens, count)
            difficulty = losses.difficulty_loss(
                self.predict_loss_kind, predicted, actual, standardize=self.absolute_standardize
            )
        mean = per_patch.mean()
        return Output(mean + difficulty, mean, difficulty, actual, predicted, reconstruction)

    def _per_patch(self, prediction: Tensor, patches: Tensor, features: Tensor | None, masked: Tensor) -> Tensor:
        """Reconstruction loss of the masked patches [B, M]: of their pixels, or of their features."""
        given = 0 if features is None else features.shape[-1]
        if given != self.target_dim:
            raise ValueError(f"the target has {given} features per patch, the model predicts {self.target_dim}")
        if features is not None:
            return losses.feature_loss(prediction, _gather(features, masked))
        pixels = losses.pixel_target(_gather(patches, masked), self.norm_pix_loss)
        return losses.patch_loss(prediction, pixels, self.pixel_loss)

    def _encode(
        self, patches: Tensor, visible: Tensor | None = None, masked: Tensor | None = None, last: int = 0
    ) -> Tensor:
        """cls, visible patches and, in SimMIM, mask tokens through the encoder; `last`: as in `_run`."""
        positions = self.pos_embed[:, 1:].expand(len(patches), -1, -1)
        seen = positions if visible is None else _gather(positions, visible)
        patches = patches if visible is None else _gather(patches, visible)
        tokens = self.patch_embed(patches.to(self.cls_token.dtype)) + seen
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        sequence = [cls, tokens]
        if self.encoder_mask_tokens and masked is not None:
            sequence.append(self.mask_token + _gather(positions, masked))
        return self.norm(_run(self.blocks, torch.cat(sequence, dim=1), last))

    def _tokens(self, patches: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """What reconstructor and loss predictor read: cls, visible and masked tokens; only masked ones where no more
        are needed."""
        if self.encoder_mask_tokens:
            return self._encode(patches, visible, masked, masked.shape[1] if self.predict_loss_kind == "none" else 0)
        positions = self.decoder_pos_embed[:, 1:].expand(len(patches), -1, -1)
        latent = self.decoder_embed(self._encode(patches, visible))
        cls = latent[:, :1] + self.decoder_pos_embed[:, :1]
        return torch.cat(
            [cls, latent[:, 1:] + _gather(positions, visible), self.mask_token + _gather(positions, masked)], dim=1
        )

    def _difficulty(self, tokens: Tensor, last: int) -> Tensor:
        """The loss predictor on what `_tokens` gives: float32 [B, last], the last `last` patches' difficulty."""
        hidden = _run(self.decoder_blocks_losspred, self.decoder_embed_losspred(tokens), last)
        return self.decoder_pred_losspred(self.decoder_norm_losspred(hidden))


class PatchEmbed(nn.Module):
    """Linear patch embedding; a module of its own because checkpoints call its weight `patch_embed.proj`."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = PatchProjection(patch_size, in_chans, embed_dim)

    def forward(self, patches: Tensor) -> Tensor:
        """[B, N, P*P*C] -> [B, N, D]."""
        return self.proj(patches)


class PatchProjection(nn.Module):
    """A P x P convolution of stride P, applied to patches that are already cut out."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(embed_dim, in_chans, patch_size, patch_size))
        bound = 1 / math.sqrt(in_chans * patch_size**2)
        self.bias = nn.Parameter(torch.empty(embed_dim).uniform_(-bound, bound))
        nn.init.xavier_uniform_(self.weight.view(embed_dim, -1))

    def forward(self, patches: Tensor) -> Tensor:
        """[B, N, P*P*C] -> [B, N, D]; the weight is reordered to the patches' (row, column, channel)."""
        return F.linear(patches, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class ScalarHead(nn.Module):
    """D -> 1 in float32, so that difficulties can be ranked.

    The published head has `rows` outputs and averages them; that is this head with the averaged rows, and is
    initialised so.
    """

    def __init__(self, dim: int, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rows, dim)).mean(0, keepdim=True))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> float32 [B, N]."""
        values = (losses.full_precision(x) for x in (tokens, self.weight, self.bias))
        return F.linear(*values).squeeze(-1)


class Attention(nn.Module):
    """Multi-head self-attention with biased qkv."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, last: int) -> Tensor:
        """[B, N, D] -> [B, last, D]: the outputs of the last `last` tokens, which attend to all N."""
        batch, length, dim = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = attend(query[:, :, length - last :], key, value)
        return self.proj(out.transpose(1, 2).reshape(batch, last, dim))


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, tokens: Tensor, last: int = 0) -> Tensor:
        """[B, N, D] -> [B, last or N, D]; `last` computes only that many tokens at the end (exactly)."""
        last = last or tokens.shape[1]
        kept = tokens[:, tokens.shape[1] - last :] + self.attn(self.norm1(tokens), last)
        return kept + self.mlp(self.norm2(kept))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of [B, heads, N, d]: torch's fused kernel, or `attend_plain` where that is faster.

    In bfloat16 on a CPU plain matmuls are 2-4 times faster, forward and backward, at these token counts
    (bench/LOG.md).
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return attend_plain(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


def attend_plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, as written."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return scores.softmax(dim=-1) @ value


def sincos_positions(dim: int, grid_size: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine positions (MAE): float32 [1 + rows*columns, dim]; the first row, for cls, is zero.

    The first half of the channels encodes the column, the second the row; each half is all sines, then all cosines,
    of index / 10000^(k/(dim/4)).
    """
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid_size), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (column, row)]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), table]).float()


# -------------------------------------------------------------------------------------------------- names and sizes
SIZES: dict[str, dict[str, int]] = {
    "nano": {"embed_dim": 128, "depth": 4, "num_heads": 4},  # for tests and laptops
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}
LAYOUTS: dict[str, tuple[tuple[int, int], ...]] = {  # size: (patch side, image side) …
    "nano": ((4, 28),),
    "tiny": ((16, 224), (4, 28)),
    "small": ((16, 224),),
    "base": ((16, 224),),
    "large": ((16, 224),),
    "huge": ((14, 224),),
}


METHODS: dict[str, dict[str, Any]] = {
    "hpm": {},
    "mae": {"predict_loss": "none"},
    "simmim": {"predict_loss": "none", "encoder_mask_tokens": True, "pixel_loss": "l1"},
}


def model_names() -> list[str]:
    """All registered names: {hpm,mae,simmim}_vit_{size}_patch{P}_{input}."""
    return [
        f"{method}_vit_{size}_patch{patch}_{side}"
        for method in METHODS
        for size, layouts in LAYOUTS.items()
        for patch, side in layouts
    ]


def width_of(name: str) -> int:
    """Width D of the encoder of a registered name. **Raises:** `UserError` for an unknown one."""
    _check_name(name)
    return SIZES[name.split("_")[2]]["embed_dim"]


def create_model(name: str, **overrides: Any) -> HPMViT:
    """Build a registered model; `overrides` are `HPMViT`'s arguments.

    **Raises:** `UserError` for an unknown name, naming the nearest.
    """
    _check_name(name)
    method, _, size, patch, side = name.split("_")
    shape = {"img_size": int(side), "patch_size": int(patch.removeprefix("patch"))}
    return HPMViT(**{**shape, **SIZES[size], **METHODS[method], **overrides})


def _check_name(name: str) -> None:
    names = model_names()
    if name not in names:
        raise UserError(f"unknown model {name!r}{nearest(name, names)}; expected one of {', '.join(names)}")


def _register(name: str) -> None:
    def build(pretrained: bool = False, **overrides: Any) -> HPMViT:
        if pretrained:
            raise UserError(f"{name} has no downloadable weights; load a file with fasthpm.checkpoint.load_reference")
        # timm hands every builder its own keywords (pretrained_cfg, cache_dir …), None where unused.
        known = {key: value for key, value in overrides.items() if value is not None}
        return create_model(name, **known)

    build.__name__ = name
    build.__module__ = __name__
    globals()[name] = build  # timm lists registered names in the module's __all__
    timm.models.register_model(build)


# -------------------------------------------------------------------------------------------------- small helpers
def _grid(img_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    if any(side % patch_size for side in img_size):
        raise UserError(f"image size {img_size} is not a multiple of patch_size {patch_size}; choose sides that are")
    return img_size[0] // patch_size, img_size[1] // patch_size


def _blocks(depth: int, dim: int, num_heads: int, mlp_ratio: float) -> nn.ModuleList:
    return nn.ModuleList(Block(dim, num_heads, mlp_ratio) for _ in range(depth))


def _run(blocks: nn.ModuleList, tokens: Tensor, last: int = 0) -> Tensor:
    """All blocks; the last one only for the `last` tokens at the end (0 = all)."""
    for block in blocks[:-1]:
        tokens = block(tokens)
    return blocks[-1](tokens, last) if len(blocks) else tokens[:, -last:]


def _gather(tokens: Tensor, ids: Tensor) -> Tensor:
    """tokens [B, L, D] at ids [B, N] -> [B, N, D]."""
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[-1]))


def _count(mask: Tensor) -> int:
    """Masked patches per row, checked to be the same in every row."""
    counts = mask.sum(dim=1)
    if not (counts == counts[0]).all():
        raise ValueError(f"rows of a mask must have the same number of masked patches, got {counts.tolist()}")
    return int(counts[0])


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


for _name in model_names():
    _register(_name)
