"""`bench.baselines` for clips: VideoMAE's step as its published implementation is structured, and HPM on it.

Written anew from a description of the data flow: a three-dimensional convolution embeds every tubelet, boolean gathers
take the visible ones, the decoders read all tokens and answer for the masked ones, and targets are made from clips that
are first scaled back. HPM on video was never released; `EagerVideoHPM` is its image code's structure on these parts.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.baselines import EPS, EagerBlock, EagerDecoder, ranking_loss_as_released


class EagerVideoDecoder(EagerDecoder):
    """Blocks on all tokens; norm and head on the last ones."""

    def forward(self, tokens: Tensor, last: int = 0) -> Tensor:
        """[B, L, D] -> [B, last, t*P*P*C]; 0 = all."""
        return self.head(self.norm(self.blocks(tokens)[:, -last:]))


class EagerVideoModel(nn.Module):
    """VideoMAE with one decoder, or with two for HPM."""

    def __init__(self, student: nn.Module, predicts: bool) -> None:
        """Sizes, and the tables of positions, are those of `student`, an `HPMViT` of clips."""
        super().__init__()
        own: Any = student
        dim, width, heads = own.embed_dim, own.mask_token.shape[-1], own.decoder_blocks[0].attn.num_heads
        kernel = (own.tubelet_size, own.patch_size, own.patch_size)
        self.kernel, self.chans = kernel, own.in_chans
        self.patch_embed = nn.Conv3d(own.in_chans, dim, kernel, kernel)
        self.mask_token = nn.Parameter(own.mask_token.detach().clone())
        self.positions = nn.Parameter(own.pos_embed.detach().clone(), requires_grad=False)
        self.decoder_positions = nn.Parameter(own.decoder_pos_embed.detach().clone(), requires_grad=False)
        self.blocks = nn.Sequential(*(EagerBlock(dim, own.num_heads) for _ in own.blocks))
        self.norm, self.decoder_embed = nn.LayerNorm(dim, EPS), nn.Linear(dim, width, bias=False)
        depth = len(own.decoder_blocks)
        self.reconstructor = EagerVideoDecoder(width, depth, heads, own.patch_dim)
        self.predictor = EagerVideoDecoder(width, depth, heads, own.patch_dim) if predicts else None

    def hidden(self, clips: Tensor, mask: Tensor) -> Tensor:
        """[B, C, T, H, W] and bool [B, L] -> what the decoders read, [B, L, width], masked tokens last."""
        tokens = self.patch_embed(clips).flatten(2).transpose(1, 2) + self.positions
        batch = len(tokens)
        seen = tokens[~mask].reshape(batch, -1, tokens.shape[2])
        seen = self.decoder_embed(self.norm(self.blocks(seen)))
        places = self.decoder_positions.expand(batch, -1, -1)
        there, missing = (places[which].reshape(batch, -1, seen.shape[2]) for which in (~mask, mask))
        return torch.cat([seen + there, self.mask_token + missing], dim=1)

    @torch.no_grad()
    def targets(self, clips: Tensor, mask: Tensor) -> Tensor:
        """Clips in [-1, 1] -> normalised tubelets [B, M, t*P*P*C], each channel by itself, in [0, 1] first."""
        frames, side, _ = self.kernel
        batch, chans, length, height, width = clips.shape
        scaled = clips * 0.5 + 0.5
        cut = scaled.reshape(batch, chans, length // frames, frames, height // side, side, width // side, side)
        cut = cut.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(batch, -1, frames * side * side, chans)
        cut = (cut - cut.mean(dim=-2, keepdim=True)) / (cut.var(dim=-2, keepdim=True).sqrt() + EPS)
        return cut.flatten(-2)[mask].reshape(batch, -1, frames * side * side * chans)


class EagerVideoMAE(EagerVideoModel):
    """VideoMAE: one mask for all frames, drawn clip by clip on the host."""

    def forward(self, clips: Tensor, mask_ratio: float) -> Tensor:
        """[B, C, T, H, W] -> the loss."""
        slots = clips.shape[2] // self.kernel[0]
        mask = tubes(len(clips), slots, self.positions.shape[1] // slots, mask_ratio).to(clips.device)
        target = self.targets(clips, mask)
        return (self.reconstructor(self.hidden(clips, mask), target.shape[1]) - target).square().mean()


class EagerVideoHPM(EagerVideoModel):
    """HPM: two decoders on the same tokens."""

    def decode(self, clips: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, T, H, W] and bool [B, L] -> reconstruction and predicted losses of the masked tubelets, or of all."""
        hidden, count = self.hidden(clips, mask), int(mask[0].sum())
        assert self.predictor is not None
        return self.reconstructor(hidden, count), self.predictor(hidden.clone(), count).mean(dim=-1)

    def forward(self, clips: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, T, H, W] and bool [B, L] -> both losses."""
        prediction, predicted = self.decode(clips, mask)
        per_patch = (prediction - self.targets(clips, mask)).square().mean(dim=-1)
        return per_patch.mean(), ranking_loss_as_released(predicted, per_patch.detach())


def tubes(batch: int, slots: int, places: int, mask_ratio: float) -> Tensor:
    """bool [B, slots * places]: int(places * ratio) random places, the same in every frame slot."""
    chance, rows = np.random.default_rng(), []
    for _ in range(batch):
        row = np.zeros(places, bool)
        row[: int(places * mask_ratio)] = True
        chance.shuffle(row)
        rows.append(torch.from_numpy(np.tile(row, slots)))
    return torch.stack(rows)
