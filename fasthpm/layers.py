"""The parts a masked autoencoder is made of: patch embedding, attention, blocks, positions, and how blocks are run."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fasthpm import loss as losses
from fasthpm.mask_loops import on_cpu

LAYER_NORM_EPS = 1e-6
BEIT_STD = 0.02


class Attended(NamedTuple):
    """What decides which attention kernel is the fastest."""

    query: tuple[int, ...]  # B, heads, tokens, width
    key: tuple[int, ...]
    dtype: torch.dtype
    training: bool  # a backward pass follows


PINNED: dict[Attended, SDPBackend] = {}  # by `speed.attention`; for all others torch chooses


class PatchEmbed(nn.Module):
    """Linear patch embedding; a module of its own because checkpoints call its weight `patch_embed.proj`."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, tubelet_size: int = 0) -> None:
        super().__init__()
        self.proj = PatchProjection(patch_size, in_chans, embed_dim, tubelet_size)

    def forward(self, patches: Tensor) -> Tensor:
        """[B, N, t*P*P*C] -> [B, N, D]."""
        return self.proj(patches)


class PatchProjection(nn.Module):
    """A P x P convolution of stride P, applied to patches that are already cut out; t x P x P with `tubelet_size` t."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, tubelet_size: int = 0) -> None:
        super().__init__()
        kernel = (tubelet_size, patch_size, patch_size) if tubelet_size else (patch_size, patch_size)
        self.weight = nn.Parameter(torch.empty(embed_dim, in_chans, *kernel))
        bound = 1 / math.sqrt(self.weight[0].numel())
        self.bias = nn.Parameter(torch.empty(embed_dim).uniform_(-bound, bound))
        nn.init.xavier_uniform_(self.weight.view(embed_dim, -1))

    def forward(self, patches: Tensor) -> Tensor:
        """[B, N, t*P*P*C] -> [B, N, D]; the weight is reordered to the patches' (frame, row, column, channel)."""
        return F.linear(patches, self.weight.movedim(1, -1).flatten(1), self.bias)


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


class DifficultyHead(nn.Module):
    """A small multi-layer perceptron, D -> 1 in float32: how hard a patch is, from its own features."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.fc = nn.Linear(dim, dim)
        self.pred = ScalarHead(dim, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> float32 [B, N]."""
        return self.pred(F.gelu(self.fc(self.norm(tokens))))


class Attention(nn.Module):
    """Multi-head self-attention with biased qkv."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, last: int, bias: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, last, D]: the outputs of the last `last` tokens, which attend to all N.

        - `bias`: [1, heads, N, N], added to the scores
        """
        batch, length, dim = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # after a permute autograd would copy
        bias = None if bias is None else bias[:, :, length - last :]
        out = attend(query[:, :, length - last :], key, value, bias)
        return self.proj(out.transpose(1, 2).reshape(batch, last, dim))


class CrossAttention(nn.Module):
    """Multi-head attention of some tokens to others, with the parameters of `Attention`."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = CrossProjection(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """[B, N, D] and [B, K, D] -> [B, N, D]."""
        batch, length, dim = tokens.shape
        query, pairs = self.qkv(tokens, context)
        shape = (self.num_heads, dim // self.num_heads)
        key, value = (part.transpose(1, 2) for part in pairs.unflatten(2, (2, *shape)).unbind(2))
        out = attend(query.unflatten(2, shape).transpose(1, 2), key, value)
        return self.proj(out.transpose(1, 2).reshape(batch, length, dim))


class CrossProjection(nn.Linear):
    """The first third of its outputs, queries, of some tokens; the rest, keys and values, of others."""

    def forward(self, tokens: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """[B, N, D] and [B, K, D] -> [B, N, D] and [B, K, 2 D]."""
        dim = self.in_features
        queries = F.linear(tokens, self.weight[:dim], self.bias[:dim])
        return queries, F.linear(context, self.weight[dim:], self.bias[dim:])


class CrossBlock(nn.Module):
    """Pre-norm block whose tokens attend to a context alone: `Block`'s parameters, `norm1` for both."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.attn = CrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """[B, N, D] and [B, K, D] -> [B, N, D]."""
        # One module, one call: ZeRO-3 gathers the norm's weights once.
        count = tokens.shape[1]
        asking, known = self.norm1(torch.cat([tokens, context], dim=1)).split([count, context.shape[1]], dim=1)
        tokens = tokens + self.attn(asking, known)
        return tokens + self.mlp(self.norm2(tokens))


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
    """Pre-norm transformer block. With `layer_scale` both branches are scaled by weights [D] that begin at that value
    (BEiT's `gamma_1` and `gamma_2`)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, layer_scale: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None

    def forward(self, tokens: Tensor, last: int = 0, paths: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, last or N, D]; `last` computes only that many tokens at the end (exactly).

        - `paths`: [B, 2], factors of the two branches of each sample (see `path_factors`); None = all 1
        - `bias`: as in `Attention`
        """
        last = last or tokens.shape[1]
        kept = tokens[:, tokens.shape[1] - last :] + self._scaled(self.attn(self.norm1(tokens), last, bias), 0, paths)
        return kept + self._scaled(self.mlp(self.norm2(kept)), 1, paths)

    def _scaled(self, branch: Tensor, number: int, paths: Tensor | None) -> Tensor:
        gamma = self.gamma_2 if number else self.gamma_1
        branch = branch if gamma is None else gamma * branch
        return branch if paths is None else branch * paths[:, number, None, None].to(branch.dtype)


class RelativePositions(nn.Module):
    """BEiT's relative position bias, shared by all blocks: one number per head and distance of two patches, and three
    for cls. It begins at 0.

    - `grid_size`: (rows, columns) of patches
    """

    def __init__(self, grid_size: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        count = (2 * grid_size[0] - 1) * (2 * grid_size[1] - 1) + 3
        self.relative_position_bias_table = nn.Parameter(torch.zeros(count, num_heads))
        self.index = relative_index(*grid_size)  # no buffer: no part of checkpoints and averages

    def forward(self) -> Tensor:
        """[1, heads, 1 + L, 1 + L], cls first and patches in raster order."""
        table = self.relative_position_bias_table
        if self.index.device != table.device:
            self.index = self.index.to(table.device)
        index = self.index
        return table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1)[None]


def relative_index(rows: int, columns: int) -> Tensor:
    """BEiT's row of the table for every pair of tokens, cls first: int64 [1 + L, 1 + L].

    Row (dy + rows - 1) * (2 columns - 1) + dx + columns - 1 for a patch dy, dx below and right of another; the three
    last rows are of cls to patches, patches to cls, cls to itself.
    """
    row, column = (axis.flatten() for axis in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    down, right = row[:, None] - row + rows - 1, column[:, None] - column + columns - 1
    count = (2 * rows - 1) * (2 * columns - 1)
    index = torch.empty(1 + rows * columns, 1 + rows * columns, dtype=torch.int64)
    index[1:, 1:] = down * (2 * columns - 1) + right
    index[0], index[1:, 0], index[0, 0] = count, count + 1, count + 2
    return index


def path_factors(noise: Tensor, rate: float) -> Tensor:
    """Drop path: factors of the branches of all blocks, 0 with a chance of `rate` in the last block and less before
    it, else so much more than 1 that the mean stays: float32 [B, 2 * depth].

    - `noise`: [B, 2 * depth], uniform in [0, 1)
    """
    depth = noise.shape[1] // 2
    rates = torch.linspace(0, rate, depth, device=noise.device).repeat_interleave(2)
    return (noise >= rates).float() / (1 - rates)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of [B, heads, N, d]: torch's fused kernel, or `attend_plain` where that is faster.

    In bfloat16 on a CPU plain matmuls are 2-4 times faster, forward and backward, at these token counts
    (bench/LOG.md). `bias`, [1, heads, N, N], is added to the scores; flash attention can't do that.
    """
    if on_cpu(query) and query.dtype == torch.bfloat16:
        return attend_plain(query, key, value, bias)
    if bias is not None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
    backend = PINNED.get(attended(query, key)) if PINNED else None
    if backend is None:
        return F.scaled_dot_product_attention(query, key, value)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value)


def attended(query: Tensor, key: Tensor) -> Attended:
    """What `attend` is asked for."""
    return Attended(tuple(query.shape), tuple(key.shape), query.dtype, query.requires_grad)


def attend_plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, as written."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    scores = scores if bias is None else scores + bias
    return scores.softmax(dim=-1) @ value


def shrink(patches: Tensor, grid_size: tuple[int, int], side: int, scale: int) -> Tensor:
    """The patches of images made `scale` times smaller by averaging: [B, L, P*P*C] -> [B, L / scale^2, P*P*C]."""
    rows, columns = grid_size[0] // scale, grid_size[1] // scale
    cut = patches.reshape(len(patches), rows, scale, columns, scale, side, side, -1).permute(0, 1, 3, 2, 5, 4, 6, 7)
    pixels = cut.reshape(len(patches), rows * columns, side, scale, side, scale, -1).mean(dim=(3, 5))
    return pixels.flatten(2)


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


def sinusoid_positions(dim: int, count: int) -> Tensor:
    """Fixed 1-D sine-cosine positions (VideoMAE): float32 [count, dim].

    Channel 2k holds the sine and channel 2k + 1 the cosine of index / 10000^(2k/dim).
    """
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(count, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[:, :dim].float()


def block_stack(
    depth: int, dim: int, num_heads: int, mlp_ratio: float, attention: str = "self", layer_scale: float = 0.0
) -> nn.ModuleList:
    if attention == "cross":
        return nn.ModuleList(CrossBlock(dim, num_heads, mlp_ratio) for _ in range(depth))
    return nn.ModuleList(Block(dim, num_heads, mlp_ratio, layer_scale) for _ in range(depth))


def regions_of(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The methods of a model that are worth compiling: its blocks'."""
    return [(module, "forward") for module in model.modules() if isinstance(module, Block | CrossBlock)]


def again_in_backward(block: nn.Module, *tokens: Any) -> Any:
    """Activation checkpointing of one block: by its compiled method too where that is in place now."""
    return checkpoint(vars(block).get("forward", block), *tokens, use_reentrant=False)


def run_blocks(
    blocks: nn.ModuleList,
    tokens: Tensor,
    last: int = 0,
    again: bool = False,
    paths: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """All blocks; the last one only for the `last` tokens at the end (0 = all).

    - `again`: activation checkpointing, each block is computed again in the backward pass
    - `paths`: [B, 2 * depth], `path_factors`; `bias`: as in `Attention`
    """
    for number, block in enumerate(blocks, 1):
        kept = last if number == len(blocks) else 0
        more = () if paths is None and bias is None else (None if paths is None else paths[:, 2 * number - 2 :], bias)
        tokens = again_in_backward(block, tokens, kept, *more) if again else block(tokens, kept, *more)
    return tokens if len(blocks) else tokens[:, -last:]


def run_cross_blocks(blocks: nn.ModuleList, tokens: Tensor, last: int, again: bool = False) -> Tensor:
    """All cross-attention blocks: the `last` tokens at the end attend to those before them."""
    context, tokens = tokens.split([tokens.shape[1] - last, last], dim=1)
    for block in blocks:
        tokens = again_in_backward(block, tokens, context) if again else block(tokens, context)
    return tokens


def init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_beit(model: nn.Module) -> None:
    """BEiT's initial values: weights of linear layers, tokens and learned positions are normal with deviation 0.02, cut
    off there, biases 0; the encoder's layers that end a branch are divided by sqrt(2 * layer)."""
    for module in model.modules():
        if isinstance(module, nn.Linear | PatchProjection):
            cut_normal(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name in ("cls_token", "mask_token", "pos_embed"):
        if isinstance(tokens := getattr(model, name, None), nn.Parameter):
            cut_normal(tokens)
    blocks: Any = model.blocks
    with torch.no_grad():
        for layer, block in enumerate(blocks, 1):
            block.attn.proj.weight.div_(math.sqrt(2 * layer))
            block.mlp.fc2.weight.div_(math.sqrt(2 * layer))


@torch.no_grad()
def cut_normal(tensor: Tensor) -> None:
    """Normal values within one deviation, by the inverse of their distribution; torch's own looks at its result."""
    edge = math.erf(math.sqrt(0.5))
    tensor.uniform_(-edge, edge).erfinv_().mul_(math.sqrt(2) * BEIT_STD).clamp_(-BEIT_STD, BEIT_STD)


def init_dino(model: nn.Module) -> None:
    """DINO's and iBOT's initial values: weights of linear layers, cls and positions normal with deviation 0.02, biases
    and the mask token 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=BEIT_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name in ("cls_token", "pos_embed"):
        if isinstance(tokens := getattr(model, name, None), nn.Parameter):
            nn.init.normal_(tokens, std=BEIT_STD)
    nn.init.zeros_(model.mask_token)  # type: ignore[arg-type]


def resizing(grid_size: tuple[int, int], other: tuple[int, int], device: torch.device) -> Tensor:
    """What makes a table of positions one of another grid: float32 [l, L], to multiply it by.

    Bicubic interpolation, which is linear; as a product its gradient has one order of additions on every device.
    """
    count = grid_size[0] * grid_size[1]
    cells = torch.eye(count, device=device).reshape(count, 1, *grid_size)
    return F.interpolate(cells, other, mode="bicubic", align_corners=False).flatten(1).T.contiguous()
