"""What a user has without this project: MAE's and HPM's steps, structured as the published implementations are.

Written anew from a description of their data flow, not from their code: mixed precision by autocast over float32
weights (bfloat16 here, float16 and a GradScaler on GPUs as published), attention as matrices, convolutional patch
embedding of every patch, decoders and heads on every token, a loss head as wide as a patch and then averaged, boolean
gathers, the ranking loss as [B, M, M] tensors, masks drawn image by image on the host, a teacher that runs both
decoders, an average of the weights tensor by tensor, and losses read (and waited for) in every step.

Images come normalised and in floats, as from a torchvision loader, whose time is not counted.
"""

from typing import Any

import torch
from torch import Tensor, nn

EPS = 1e-6


class EagerAttention(nn.Module):
    """Self-attention with its scores as a tensor."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        batch, length, dim = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (qkv[0] @ qkv[1].transpose(-2, -1) * self.scale).softmax(dim=-1)
        return self.proj((weights @ qkv[2]).transpose(1, 2).reshape(batch, length, dim))


class EagerBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, EPS), nn.LayerNorm(dim, EPS)
        self.attn = EagerAttention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class EagerDecoder(nn.Module):
    """Blocks, norm and a head of P*P*C outputs, on all tokens."""

    def __init__(self, dim: int, depth: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(EagerBlock(dim, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim, EPS), nn.Linear(dim, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, 1 + L, D] -> [B, L, P*P*C]."""
        return self.head(self.norm(self.blocks(tokens)))[:, 1:]


class EagerModel(nn.Module):
    """Masked autoencoder with one decoder (MAE) or two (HPM)."""

    def __init__(self, student: nn.Module, predicts: bool) -> None:
        """Sizes, and the tables of positions, are those of `student`, an `HPMViT`."""
        super().__init__()
        own: Any = student
        dim, width, side = own.cls_token.shape[-1], own.mask_token.shape[-1], own.patch_size
        outputs, heads = side**2 * own.in_chans, own.decoder_blocks[0].attn.num_heads
        self.side, self.chans, self.grid = side, own.in_chans, own.grid_size
        self.patch_embed = nn.Conv2d(own.in_chans, dim, side, side)
        self.cls_token = nn.Parameter(own.cls_token.detach().clone())
        self.mask_token = nn.Parameter(own.mask_token.detach().clone())
        self.positions = nn.Parameter(own.pos_embed.detach().clone(), requires_grad=False)
        self.decoder_positions = nn.Parameter(own.decoder_pos_embed.detach().clone(), requires_grad=False)
        self.blocks = nn.Sequential(*(EagerBlock(dim, own.num_heads) for _ in own.blocks))
        self.norm, self.decoder_embed = nn.LayerNorm(dim, EPS), nn.Linear(dim, width)
        depth = len(own.decoder_blocks)
        self.reconstructor = EagerDecoder(width, depth, heads, outputs)
        self.predictor = EagerDecoder(width, depth, heads, outputs) if predicts else None

    def embed(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, L, D], every patch, with its position."""
        return self.patch_embed(images).flatten(2).transpose(1, 2) + self.positions[:, 1:]

    def encode(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, 1 + N, width]."""
        cls = (self.cls_token + self.positions[:, :1]).expand(len(tokens), -1, -1)
        return self.decoder_embed(self.norm(self.blocks(torch.cat([cls, tokens], dim=1))))

    def patches(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, L, P*P*C]."""
        (rows, columns), side = self.grid, self.side
        cut = images.reshape(len(images), self.chans, rows, side, columns, side)
        return torch.einsum("nchpwq->nhwpqc", cut).reshape(len(images), rows * columns, side * side * self.chans)


class EagerMAE(EagerModel):
    """MAE: shuffled by noise, unshuffled in the decoder, all patches predicted, a masked mean."""

    def forward(self, images: Tensor, mask_ratio: float) -> Tensor:
        """[B, C, H, W] -> the loss."""
        tokens = self.embed(images)
        batch, length, dim = tokens.shape
        kept = int(length * (1 - mask_ratio))
        shuffled = torch.rand(batch, length, device=tokens.device).argsort(dim=1)
        restore = shuffled.argsort(dim=1)
        seen = self.encode(torch.gather(tokens, 1, shuffled[:, :kept, None].repeat(1, 1, dim)))
        hidden = torch.cat([seen[:, 1:], self.mask_token.repeat(batch, length - kept, 1).to(seen.dtype)], dim=1)
        hidden = torch.gather(hidden, 1, restore[:, :, None].repeat(1, 1, seen.shape[2]))
        prediction = self.reconstructor(torch.cat([seen[:, :1], hidden], dim=1) + self.decoder_positions)
        mask = torch.ones(batch, length, device=tokens.device)
        mask[:, :kept] = 0
        mask = torch.gather(mask, 1, restore)
        per_patch = (prediction - self.patches(images)).square().mean(dim=-1)
        return (per_patch * mask).sum() / mask.sum()


class EagerHPM(EagerModel):
    """HPM: two decoders on the same tokens, boolean gathers."""

    def decode(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] and bool [B, L] -> reconstruction [B, L, P*P*C], predicted losses [B, L]; masked ones last."""
        tokens = self.embed(images)
        batch = len(tokens)
        seen = self.encode(tokens[~mask].reshape(batch, -1, tokens.shape[2]))
        places = self.decoder_positions[:, 1:].expand(batch, -1, -1)
        there, missing = (places[which].reshape(batch, -1, seen.shape[2]) for which in (~mask, mask))
        hidden = torch.cat(
            [seen[:, :1] + self.decoder_positions[:, :1], seen[:, 1:] + there, self.mask_token + missing], dim=1
        )
        assert self.predictor is not None
        return self.reconstructor(hidden), self.predictor(hidden.clone()).mean(dim=-1)

    def forward(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] and bool [B, L] -> both losses."""
        prediction, predicted = self.decode(images, mask)
        count = int(mask[0].sum())
        target = self.patches(images)[mask].reshape(len(images), count, -1)
        per_patch = (prediction[:, -count:] - target).square().mean(dim=-1)
        return per_patch.mean(), ranking_loss_as_released(predicted[:, -count:], per_patch.detach())


def ranking_loss_as_released(predicted: Tensor, actual: Tensor) -> Tensor:
    """Eq. 5-7 on all ordered pairs, with 1e-6 inside the logarithms."""
    harder, easier = (sign * (actual[:, None] - actual[:, :, None]) > 0 for sign in (1, -1))
    chance = torch.sigmoid(predicted[:, None].float() - predicted[:, :, None].float())
    terms = harder * torch.log(chance + EPS) + easier * torch.log(1 - chance + EPS)
    return -terms.sum() / (harder | easier).sum()
