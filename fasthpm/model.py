"""One masked autoencoder: ViT encoder, reconstructor and (HPM) loss predictor. MAE, SimMIM and VideoMAE are settings
of it; an image is a video of one frame.

Parameters carry the names of the published MAE and HPM checkpoints. Every parameter is read inside the forward of the
module that owns it, so ZeRO-3 can partition them; the expensive parts only see the tokens that they need.

Letters: B batch, L patches, M masked, V = L - M visible, P patch side, C channels, D width, T frames, t frames of a
patch. A patch has t*P*P*C values, as (frame, row, column, channel); patches are in the order (slot of t frames, row,
column).
"""

from typing import Any, NamedTuple

import timm.models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasthpm import loss as losses
from fasthpm.architecture import Architecture
from fasthpm.data.statistics import PixelStatistics
from fasthpm.difficulty import DIFFICULTIES, fixed_noise, question_of
from fasthpm.errors import UserError
from fasthpm.layers import (
    LAYER_NORM_EPS,
    DifficultyHead,
    PatchEmbed,
    RelativePositions,
    ScalarHead,
    block_stack,
    cut_normal,
    init_beit,
    init_dino,
    init_linear,
    resizing,
    run_blocks,
    run_cross_blocks,
    shrink,
    sincos_positions,
    sinusoid_positions,
)
from fasthpm.mask import split_ids
from fasthpm.model_names import METHODS, SIZES, VIDEO, check_name, is_video, model_names, video_decoder
from fasthpm.projection import ProjectionHead

VIDEO_EPS = losses.EPS / 0.226  # VideoMAE's 1e-6 is of pixels in 0..1; here they are divided by ImageNet's std
LOSS_HEAD = "decoder_pred_losspred"


class Output(NamedTuple):
    """What `HPMViT.forward` gives; per-patch fields hold the masked patches in ascending patch order."""

    loss: Tensor  # scalar, reconstruction_loss + difficulty_loss (Eq. 2)
    reconstruction_loss: Tensor  # scalar
    difficulty_loss: Tensor  # scalar, 0 without a loss predictor
    per_patch_loss: Tensor  # float32 [B, M], detached
    predicted_difficulty: Tensor  # float32 [B, M], zeros without a loss predictor
    reconstruction: Tensor  # [B, M, t*P*P*C], patches as (frame, row, column, channel); [B, M, width] of other targets
    masked: Tensor  # int64 [B, M], their patch numbers
    valid: Tensor | None = None  # bool [B, M], which of them take part in the losses; None: all


class Crops(NamedTuple):
    """What `HPMViT.forward` reads beside the global crops and their masks, where several views are learnt from."""

    places: Tensor  # int64 [B, N], patch numbers whose logits are wanted
    paths: Tensor | None  # drop path of the global crops, as in `forward`
    local: Tensor | None = None  # patches of the local crops [R, l, P*P*C]
    local_grid: tuple[int, int] = (0, 0)  # their rows and columns
    local_paths: Tensor | None = None


class Projected(NamedTuple):
    """Logits of prototypes."""

    cls: Tensor  # [B + R, K], the global crops first
    patches: Tensor  # [B, N, K]


class HPMViT(nn.Module):
    """Masked autoencoder with a loss predictor (HPM), or without (MAE). Fixed 2-D sine-cosine positions, cls token.

    With `encoder_mask_tokens` it is SimMIM: the mask tokens enter the encoder, which sees all L patches, and the
    reconstructor is a linear head on the encoder's output, as in BEiT. Paper: that, 32 x 32 units and
    `pixel_loss="l1"`. From the AMT paper's SimMIM: absolute positions (SimMIM has relative ones, and LayerScale).
    Ours: HPM on it, which neither HPM paper tried (they added it to MAE, BEiT and iBOT); the loss predictor reads the
    encoder's output.

    With `video` it has VideoMAE's layout: no cls token, one sine-cosine position per token counted through space and
    time, no bias between encoder and decoders, targets normalised per channel. VideoMAE has no bias on the keys;
    here they have one, which softmax ignores (it adds the same to all scores of a query).

    - `options`: the fields of `Architecture`

    **Raises:** `UserError` for sizes that do not fit together.
    """

    pos_embed: Tensor
    decoder_pos_embed: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__()
        made = Architecture(**options)
        self._remember(made)
        self._make_encoder(made)
        self._make_reconstructor(made)
        if made.predict_loss != "none":
            self._make_predictor(made)
        self.apply(init_linear)
        if not made.video:
            nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        if made.init != "mae":
            {"beit": init_beit, "dino": init_dino}[made.init](self)
        if DIFFICULTIES[self.difficulty].head:  # last, so that the other weights are those without it
            self.difficulty_head = DifficultyHead(made.embed_dim).apply(init_linear)

    def _remember(self, made: Architecture) -> None:
        """What the forward pass and the model's users ask for."""
        self.num_heads, self.embed_dim = made.num_heads, made.embed_dim
        self.video, self.num_frames, self.tubelet_size = made.video, made.num_frames, made.tubelet_size
        self.num_prefix_tokens = 0 if made.video else 1  # cls
        self.activation_checkpointing = made.activation_checkpointing
        self.img_size, self.patch_size, self.in_chans = made.image_size, made.patch_size, made.in_chans
        self.predict_loss_kind, self.absolute_standardize = made.predict_loss, made.absolute_standardize
        self.pixel_loss, self.norm_pix_loss = made.pixel_loss, made.norm_pix_loss
        self.norm_pix_channels = made.norm_pix_channels
        self.encoder_mask_tokens, self.objective = made.encoder_mask_tokens, made.objective
        self.predictor, self.decoder_attention = made.predictor, made.decoder_attention
        self.difficulty = question_of(made.difficulty, made.decoder_attention)
        self.mask_ratio, self.mask_unit = made.mask_ratio, made.mask_unit
        self.positions, self.layer_scale = made.positions, made.layer_scale
        self.grid_size = (made.image_size[0] // made.patch_size, made.image_size[1] // made.patch_size)
        self.slots = made.num_frames // made.tubelet_size
        self.num_patches = self.slots * self.grid_size[0] * self.grid_size[1]
        self.patch_dim = made.tubelet_size * made.patch_size**2 * made.in_chans
        self.pixels: PixelStatistics | None = None  # by which its images are normalised, if that is known

    def _make_encoder(self, made: Architecture) -> None:
        dim = made.embed_dim
        self.patch_embed = PatchEmbed(made.patch_size, made.in_chans, dim, made.tubelet_size if made.video else 0)
        if not made.video:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if made.positions == "sincos":
            self.register_buffer("pos_embed", self._positions(dim))
        elif made.positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros_like(self._positions(dim)))
            cut_normal(self.pos_embed)
        else:
            self.rel_pos_bias = RelativePositions(self.grid_size, made.num_heads)
        self.blocks = block_stack(made.depth, dim, made.num_heads, made.mlp_ratio, layer_scale=made.layer_scale)
        self.norm = nn.LayerNorm(dim, LAYER_NORM_EPS)

    def _make_reconstructor(self, made: Architecture) -> None:
        width, simmim = made.decoder_width, made.encoder_mask_tokens
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_blocks = block_stack(
            0 if simmim else made.decoder_depth, width, made.decoder_num_heads, made.mlp_ratio, made.decoder_attention
        )
        self.decoder_norm: nn.Module = nn.Identity()
        if not simmim:
            self.decoder_embed = nn.Linear(made.embed_dim, width, bias=not made.video)
            self.register_buffer("decoder_pos_embed", self._positions(width))
            self.decoder_norm = nn.LayerNorm(width, LAYER_NORM_EPS)
        outputs = made.objective.width or self.patch_dim
        self.decoder_pred: nn.Module = nn.Linear(width, outputs)
        if made.head_hidden:
            self.decoder_pred = ProjectionHead(width, outputs, made.head_hidden, made.head_free_norm)

    def _make_predictor(self, made: Architecture) -> None:
        width, dim = made.decoder_width, made.predictor_dim or made.decoder_embed_dim
        depth = 0 if made.predictor == "shared" else made.predictor_depth or made.decoder_depth
        self.decoder_embed_losspred = nn.Identity() if dim == width else nn.Linear(width, dim)
        self.decoder_blocks_losspred = block_stack(
            depth, dim, made.decoder_num_heads, made.mlp_ratio, made.decoder_attention
        )
        self.decoder_norm_losspred = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.decoder_pred_losspred = ScalarHead(dim, self.patch_dim)

    def patchify(self, images: Tensor) -> Tensor:
        """[B, C, (T,) H, W] -> [B, L, t*P*P*C]; the orders are those at the top of this file."""
        if images.dim() == 3:
            return images
        clips = images[:, :, None] if images.dim() == 4 else images
        expected = (self.in_chans, self.num_frames, *self.img_size)
        if clips.shape[1:] != expected:
            raise ValueError(f"images are {tuple(images.shape)}, expected [B, C, (T,) H, W] with C, T, H, W {expected}")
        (rows, columns), side, frames = self.grid_size, self.patch_size, self.tubelet_size
        cut = clips.reshape(len(clips), self.in_chans, self.slots, frames, rows, side, columns, side)
        return cut.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(len(clips), self.num_patches, self.patch_dim)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """[B, L, t*P*P*C] -> [B, C, T, H, W], or [B, C, H, W] where T = 1; the inverse of `patchify`."""
        (rows, columns), side, frames = self.grid_size, self.patch_size, self.tubelet_size
        cut = patches.reshape(len(patches), self.slots, rows, columns, frames, side, side, self.in_chans)
        clips = cut.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(len(patches), self.in_chans, -1, *self.img_size)
        return clips[:, :, 0] if self.num_frames == 1 else clips

    def encode(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features of the visible patches, after the final norm.

        - `images`: float [B, C, H, W], clips [B, C, T, H, W], normalised, or patches [B, L, t*P*P*C]
        - `mask`: bool [B, L], True = masked, the same number in every row; None = nothing masked

        **Returns:** [B, 1 + V, D], cls token first, visible patches in ascending order; [B, V, D] of a video model,
        which has no cls token. SimMIM's encoder sees the mask tokens too, and returns none of them.
        """
        if mask is None:
            return self._encode(self.patchify(images))
        visible, masked = split_ids(mask, _count(mask))
        return self._encode(self.patchify(images), visible, masked)[:, : self.num_prefix_tokens + visible.shape[1]]

    def predict_loss(
        self, images: Tensor, scale: int = 1, noise: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        """Difficulty of every patch, as the model's `difficulty` answers (the teacher's forward): float32 [B, L].

        - `images`: as in `encode`
        - `scale`: see the image this many times smaller in both directions, and enlarge the map; it divides the grid
        - `noise`: [B, L] in [0, 1), for the looks of `difficulty.views`; None: the same looks at all images
        - `target`: as in `forward`, for a difficulty that measures losses of anything else than pixels
        """
        patches, look = self.patchify(images), DIFFICULTIES[self.difficulty].look
        if look:
            return look(self, patches, fixed_noise(patches) if noise is None else noise, target)
        if scale == 1:
            return self._predict(patches)
        small = self._predict(shrink(patches, self.grid_size, self.patch_size, scale), scale)
        maps = small.reshape(-1, 1, self.grid_size[0] // scale, self.grid_size[1] // scale)
        return F.interpolate(maps, self.grid_size, mode="bilinear", align_corners=False).flatten(1)

    def _predict(self, patches: Tensor, scale: int = 1) -> Tensor:
        table = None if scale == 1 else self._table("pos_embed", scale)
        return self.difficulty_of(self._encode(patches, table=table), scale)

    def difficulty_of(self, tokens: Tensor, scale: int = 1) -> Tensor:
        """`predict_loss` from what `encode` gives of all patches, [B, 1 + L, D]: float32 [B, L]."""
        read = DIFFICULTIES[self.difficulty].read
        if read is None:
            raise ValueError(f"difficulty {self.difficulty} looks at patches by itself; call predict_loss")
        return read(self, tokens, scale)

    def decoder_tokens(self, tokens: Tensor, scale: int = 1) -> Tensor:
        """What the decoders read of the encoder's tokens of all patches: [B, 1 + L, D] -> [B, 1 + L, width]."""
        if self.encoder_mask_tokens:
            return tokens
        return self.decoder_embed(tokens) + self._table("decoder_pos_embed", scale)

    def queries(self, batch: int, scale: int = 1) -> Tensor:
        """A mask token at every place, as the decoders read them: [B, L, width]."""
        positions = self._table("decoder_pos_embed", scale)[:, self.num_prefix_tokens :]
        return (self.mask_token + positions).expand(batch, -1, -1)

    def predictor_on(self, tokens: Tensor, last: int) -> Tensor:
        """The loss predictor on tokens [B, N, width], with the reconstructor's blocks if it shares them: float32
        [B, last], of the last ones."""
        return self._difficulty(self._trunk(tokens, last) if self.predictor == "shared" else tokens, last)

    def reconstruction_losses(
        self, patches: Tensor, visible: Tensor, masked: Tensor, target: Tensor | None = None
    ) -> Tensor:
        """Losses of the masked patches, as `forward` has them, without a mask and the loss predictor.

        - `patches`: [B, L, t*P*P*C]; `visible`, `masked`: int64 patch numbers [B, V] and [B, M], ascending; patches in
          neither are not seen at all; `target`: as in `forward`

        **Returns:** float32 [B, M].
        """
        trunk = self._trunk(self._tokens(patches, visible, masked), masked.shape[1])
        return self._per_patch(self.decoder_pred(self.decoder_norm(trunk)), patches, target, masked)

    def _table(self, name: str, scale: int) -> Tensor:
        """A table of positions [1, 1 + L, D], or that of a grid `scale` times coarser: means over scale x scale."""
        table: Tensor = getattr(self, name)
        if scale == 1:
            return table
        grid = table[:, 1:].transpose(1, 2).unflatten(2, self.grid_size)
        return torch.cat([table[:, :1], F.avg_pool2d(grid, scale).flatten(2).transpose(1, 2)], dim=1)

    def forward(
        self,
        images: Tensor,
        mask: Tensor,
        *,
        num_masked: int | None = None,
        thrown: Tensor | None = None,
        num_thrown: int = 0,
        target: Tensor | None = None,
        valid: Tensor | None = None,
        paths: Tensor | None = None,
        crops: Crops | None = None,
    ) -> Output | Projected:
        """Reconstruct the masked patches, or what the objective has of them, and predict their losses (Eq. 2-7).

        - `images`, `mask`: as in `encode`
        - `num_masked`: M, if known; else it is read from `mask`, which waits for the device
        - `thrown`: bool [B, L], `num_thrown` True per row: patches that are not masked and that nothing sees (AMT)
        - `target`: of all patches, if the model's objective is not their pixels: [B, L, width], or ids [B, L]
        - `valid`: bool [B, L], the patches that may take part in a loss; None: all
        - `paths`: [B, 2 * depth], drop path in the encoder: see `layers.path_factors`
        - `crops`: what else is read of several views (iBOT), which are projected: see `project`
        """
        patches = self.patchify(images)
        if crops is not None:
            return self.project(patches, mask, crops)
        visible, masked = split_ids(mask, _count(mask) if num_masked is None else num_masked, thrown, num_thrown)
        tokens, count = self._tokens(patches, visible, masked, paths), masked.shape[1]
        trunk = self._trunk(tokens, count)
        reconstruction = self.decoder_pred(self.decoder_norm(trunk))
        per_patch = self._per_patch(reconstruction, patches, target, masked)
        actual = per_patch.detach()
        counted = None if valid is None else valid.gather(1, masked)
        if self.predict_loss_kind == "none":
            predicted, difficulty = torch.zeros_like(actual), actual.new_zeros(())
        else:
            predicted = self._difficulty(trunk if self.predictor == "shared" else tokens, count)
            difficulty = losses.difficulty_loss(
                self.predict_loss_kind, predicted, actual, standardize=self.absolute_standardize, valid=counted
            )
        mean = per_patch.mean() if counted is None else losses.valid_mean(per_patch, counted)
        return Output(mean + difficulty, mean, difficulty, actual, predicted, reconstruction, masked, counted)

    def project(self, patches: Tensor, mask: Tensor, crops: Crops) -> Projected:
        """The projection head on the cls token of all crops and on some patches of the global ones.

        - `patches`: of the global crops, [B, L, P*P*C]; `mask`: bool [B, L], any number per row, where the mask token
          stands for the patch
        """
        tokens = self.encode_in_place(patches, mask, crops.paths)
        cls = [tokens[:, 0]]
        if crops.local is not None:
            cls.append(self.encode_in_place(crops.local, None, crops.local_paths, crops.local_grid, last=1)[:, 0])
        rows = torch.cat([*cls, _gather(tokens[:, 1:], crops.places).flatten(0, 1)])
        logits, count = self.decoder_pred(rows), sum(map(len, cls))
        return Projected(logits[:count], logits[count:].unflatten(0, crops.places.shape))

    def encode_in_place(
        self,
        patches: Tensor,
        mask: Tensor | None = None,
        paths: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        last: int = 0,
    ) -> Tensor:
        """All tokens in raster order, mask tokens in the places of masked patches: [B, 1 + L, D], cls first.

        - `grid`: rows and columns of patches, if they are not those of the model, whose positions are interpolated
        - `last`: 1 = the cls token alone is wanted, [B, 1, D]
        """
        tokens = self.patch_embed(patches.to(self.mask_token.dtype))
        if mask is not None:
            tokens = torch.where(mask[:, :, None], self.mask_token, tokens)
        positions = self.pos_embed[:, 1:]
        if grid is not None and grid != self.grid_size:
            positions = (resizing(self.grid_size, grid, patches.device).to(positions) @ positions[0])[None]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(patches), -1, -1)
        tokens = tokens + positions
        sequence = torch.cat([tokens, cls] if last else [cls, tokens], dim=1)
        return self.norm(self._run(self.blocks, sequence, last, paths=paths))

    def _per_patch(self, prediction: Tensor, patches: Tensor, target: Tensor | None, masked: Tensor) -> Tensor:
        """Reconstruction loss of the masked patches [B, M]: of their pixels, or of their `target`."""
        self.objective.check(target)
        if target is not None and self.objective.loss:
            return self.objective.loss(prediction, _gather(target, masked))
        return losses.patch_loss(prediction, self.target(_gather(patches, masked)), self.pixel_loss)

    def target(self, patches: Tensor) -> Tensor:
        """What the reconstruction of patches [B, M, t*P*P*C] is compared with, of the same shape."""
        if self.norm_pix_loss and (self.video or self.norm_pix_channels):
            return losses.channelwise_target(patches, self.in_chans, VIDEO_EPS if self.video else losses.EPS)
        return losses.pixel_target(patches, self.norm_pix_loss)

    def _positions(self, dim: int) -> Tensor:
        """[1, prefix tokens + L, dim]."""
        made = sinusoid_positions(dim, self.num_patches) if self.video else sincos_positions(dim, self.grid_size)
        return made[None].clone()  # no view: DeepSpeed casts buffers in place, which leaves the base of a view behind

    def _run(
        self,
        blocks: nn.ModuleList,
        tokens: Tensor,
        last: int = 0,
        cross: bool = False,
        paths: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        again = self.activation_checkpointing and torch.is_grad_enabled()
        if cross:
            return run_cross_blocks(blocks, tokens, last, again)
        return run_blocks(blocks, tokens, last, again, paths, bias)

    def _encode(
        self,
        patches: Tensor,
        visible: Tensor | None = None,
        masked: Tensor | None = None,
        last: int = 0,
        table: Tensor | None = None,
        paths: Tensor | None = None,
    ) -> Tensor:
        """cls, visible patches and, in SimMIM, mask tokens through the encoder; `last`, `paths`: as in `_run`;
        `table`: of positions, if not `pos_embed`."""
        if self.positions == "relative":
            return self._encode_in_place(patches, visible, masked, last, paths)
        prefix = self.num_prefix_tokens
        positions = (self.pos_embed if table is None else table)[:, prefix:].expand(len(patches), -1, -1)
        seen = positions if visible is None else _gather(positions, visible)
        patches = patches if visible is None else _gather(patches, visible)
        sequence = [self.patch_embed(patches.to(self.mask_token.dtype)) + seen]
        if prefix:
            sequence.insert(0, (self.cls_token + self.pos_embed[:, :1]).expand(len(patches), -1, -1))
        if self.encoder_mask_tokens and masked is not None:
            sequence.append(self.mask_token + _gather(positions, masked))
        return self.norm(self._run(self.blocks, torch.cat(sequence, dim=1), last, paths=paths))

    def _encode_in_place(
        self, patches: Tensor, visible: Tensor | None, masked: Tensor | None, last: int, paths: Tensor | None
    ) -> Tensor:
        """`_encode` with relative positions: all tokens stay in raster order, so that one bias suits all samples, and
        are sorted at the end."""
        tokens = self.patch_embed(patches.to(self.mask_token.dtype))
        if masked is not None:
            hidden = torch.zeros(patches.shape[:2], dtype=torch.bool, device=patches.device).scatter(1, masked, True)
            tokens = torch.where(hidden[:, :, None], self.mask_token, tokens)
        sequence = torch.cat([self.cls_token.expand(len(patches), -1, -1), tokens], dim=1)
        encoded = self.norm(self._run(self.blocks, sequence, paths=paths, bias=self.rel_pos_bias()))
        if visible is None or masked is None:
            return encoded
        order = torch.cat([visible.new_zeros(len(visible), 1), 1 + visible, 1 + masked], dim=1)
        return _gather(encoded, order[:, order.shape[1] - last :] if last else order)

    def _tokens(self, patches: Tensor, visible: Tensor, masked: Tensor, paths: Tensor | None = None) -> Tensor:
        """What reconstructor and loss predictor read: cls, visible and masked tokens; only masked ones where no more
        are needed."""
        if self.encoder_mask_tokens:
            last = masked.shape[1] if self.predict_loss_kind == "none" else 0
            return self._encode(patches, visible, masked, last, paths=paths)
        prefix = self.num_prefix_tokens
        positions = self.decoder_pos_embed[:, prefix:].expand(len(patches), -1, -1)
        latent = self.decoder_embed(self._encode(patches, visible, paths=paths))
        seen = latent[:, prefix:] + _gather(positions, visible)
        sequence = [seen, self.mask_token + _gather(positions, masked)]
        if prefix:
            sequence.insert(0, latent[:, :1] + self.decoder_pos_embed[:, :1])
        return torch.cat(sequence, dim=1)

    def _trunk(self, tokens: Tensor, last: int) -> Tensor:
        """The reconstructor's blocks on what `_tokens` gives: [B, last, width], the last `last` tokens."""
        return self._run(self.decoder_blocks, tokens, last, self.decoder_attention == "cross")

    def _difficulty(self, tokens: Tensor, last: int) -> Tensor:
        """The loss predictor on what `_tokens`, or `_trunk` if it is shared, gives: float32 [B, last]."""
        cross = self.decoder_attention == "cross" and self.predictor == "separate"
        hidden = self._run(self.decoder_blocks_losspred, self.decoder_embed_losspred(tokens), last, cross)
        return self.decoder_pred_losspred(self.decoder_norm_losspred(hidden))


# -------------------------------------------------------------------------------------------------- names and sizes
def create_model(name: str, **overrides: Any) -> HPMViT:
    """Build a registered model; `overrides` are fields of `Architecture`.

    **Raises:** `UserError` for an unknown name, naming the nearest.
    """
    check_name(name)
    method, _, size, patch, side = name.removesuffix("_video").split("_")
    shape = {"img_size": int(side), "patch_size": int(patch.removeprefix("patch"))}
    layout = {**VIDEO, **video_decoder(size)} if is_video(name) else {}
    return HPMViT(**{**shape, **SIZES[size], **METHODS[method], **layout, **overrides})


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


def _gather(tokens: Tensor, ids: Tensor) -> Tensor:
    """tokens [B, L, D] at ids [B, N] -> [B, N, D]; [B, L] -> [B, N]."""
    return tokens.gather(1, ids if tokens.dim() == 2 else ids[:, :, None].expand(-1, -1, tokens.shape[-1]))


def _count(mask: Tensor) -> int:
    """Masked patches per row, checked to be the same in every row."""
    counts = mask.sum(dim=1)
    if not (counts == counts[0]).all():
        raise ValueError(f"rows of a mask must have the same number of masked patches, got {counts.tolist()}")
    return int(counts[0])


for _name in model_names():
    _register(_name)
