"""Features of whole data sets from a frozen encoder, on all ranks."""

import itertools
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fasthpm.data import Loader
from fasthpm.errors import UserError
from fasthpm.model import HPMViT
from fasthpm.patches import patches_for
from fasthpm.recipe import Recipe


class Features(NamedTuple):
    """Features of some samples."""

    rows: Tensor  # float32 [N, D], L2-normalised
    labels: Tensor  # int64 [N]
    ids: Tensor  # int64 [N], each sample's number in its data set


def half(device: torch.device) -> torch.autocast:
    """Forward passes in bfloat16 on a GPU, where float32 takes some eight times as long; on a CPU as they are."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.inference_mode()
def features(
    model: HPMViT,
    recipe: Recipe,
    loader: Loader,
    pool: str,
    device: torch.device,
    limit: int = 0,
    world_size: int = 1,
    quiet: bool = False,
) -> Features:
    """This rank's features of its share of a data set.

    - `pool`: "cls" (the cls token) or "mean" (of the patch tokens), after the encoder's final norm; empty = cls where
      there is one: video models have none
    - `limit`: only samples whose id is below this; 0 = all
    """
    patches_of = patches_for(model, recipe, loader)
    none = torch.zeros(0, device=device).long()
    pool = pool_of(model, pool)
    parts = [Features(torch.zeros(0, model.embed_dim, device=device), none, none)]
    total = -(-limit // (loader.batch_size * world_size)) if limit else len(loader)
    batches = itertools.islice(loader, total)
    for batch in tqdm(batches, desc=f"{pool} features", unit="batch", disable=quiet, leave=False, total=total):
        with half(device):
            tokens = model.encode(patches_of(batch.images.to(device)))
        rows = F.normalize(pooled(tokens.float(), pool, model.num_prefix_tokens), dim=1)
        parts.append(first(Features(rows, batch.labels.to(device), batch.ids.to(device)), limit))
    return Features(*(torch.cat(column) for column in zip(*parts, strict=True)))


def pooled(tokens: Tensor, pool: str, prefix: int) -> Tensor:
    """Tokens [B, K + L, D] -> their cls token [B, D], the "mean" of the patches [B, D], or all "patches" [B, L, D].

    `prefix`: K, how many tokens before the patches are none.
    """
    if pool == "cls":
        return tokens[:, 0]
    patches = tokens[:, prefix:]
    return patches if pool == "patches" else patches.mean(dim=1)


def pool_of(model: HPMViT, asked: str) -> str:
    """How features are pooled. **Raises:** `UserError` for the cls token of a model that has none."""
    if asked == "cls" and not model.num_prefix_tokens:
        raise UserError("--pool cls: video models have no cls token; use --pool mean, their default")
    return asked or ("cls" if model.num_prefix_tokens else "mean")


def first(bank: Features, size: int) -> Features:
    """Those of `bank` whose id is below `size`; 0 = all."""
    return Features(*(column[bank.ids < size] for column in bank)) if size else bank


def gather_rows(rows: Tensor, world_size: int) -> Tensor:
    """The rows of all ranks, [sum of N, …]; ranks may hold different numbers."""
    if world_size == 1:
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(world_size)]
    dist.all_gather(counts, count)
    longest = int(max(counts))
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])


class PooledEncoder:
    """The frozen encoder: images in, features out.

    - `pool`: "cls" or "mean" (of the patch tokens), after the encoder's norm; see `pool_of`
    """

    def __init__(self, model: HPMViT, recipe: Recipe, loader: Loader, pool: str, device: torch.device) -> None:
        self.model, self.pool, self.device = model.to(device).eval().requires_grad_(False), pool, device
        self.patches_of = patches_for(model, recipe, loader)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, (T,) H, W, C] -> float32 [B, D]."""
        with half(self.device):
            tokens = self.model.encode(self.patches_of(images.to(self.device)))
        return pooled(tokens.float(), self.pool, self.model.num_prefix_tokens)

    def whole(self, loader: Loader, world_size: int, quiet: bool) -> tuple[Tensor, Tensor]:
        """Features [N, D] and labels [N] of a whole set on every rank, in the set's order. Collective."""
        rows, labels, ids = [], [], []
        for batch in tqdm(loader, desc="features", unit="batch", disable=quiet, leave=False):
            rows.append(self(batch.images))
            labels.append(batch.labels.to(self.device))
            ids.append(batch.ids.to(self.device))
        parts = [gather_rows(torch.cat(column), world_size) for column in (rows, labels, ids)]
        order = parts[2].argsort()
        return parts[0][order], parts[1][order]
