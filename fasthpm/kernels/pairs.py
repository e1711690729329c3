"""All pairs of patches of a sample, in Triton: the ranking loss with its gradient, and what says how well it is learnt.

No sort, no atomics, nothing of the size [B, M, M], no waiting. A program has one sample's ROWS patches and compares
them with all M: every pair is seen from either side, so that what belongs to a patch is a sum within one program. A
second kernel of one program adds up the programs' sums. The twins are `loss.ranking_loss` and `loss.health`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, WARPS = 16, 64, 4
SUMMED = 1024  # programs whose sums are added at a time


@triton.jit
def ranking_kernel(predicted, actual, slope, sums, M, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of pairs (i, j) of unequal `actual`: softplus(-margin) and its slope, margin > 0 where i and j are in order.

    `predicted`, `actual`: float32 [B, M]; `slope`: float32 [B, M], the derivatives of each pair's loss, summed;
    `sums`: float64 [2, programs], loss and number of pairs, both twice.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(M, ROWS)
    base = (program // blocks).to(tl.int64) * M
    row = (program % blocks) * ROWS + tl.arange(0, ROWS)
    here = row < M
    p_i = tl.load(predicted + base + row, mask=here, other=0.0)[:, None]
    a_i = tl.load(actual + base + row, mask=here, other=0.0)[:, None]
    push = tl.zeros((ROWS, COLUMNS), tl.float32)
    loss = tl.zeros((ROWS, COLUMNS), tl.float32)
    pairs = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, M, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = column < M
        p_j = tl.load(predicted + base + column, mask=there, other=0.0)[None, :]
        a_j = tl.load(actual + base + column, mask=there, other=0.0)[None, :]
        both = here[:, None] & there[None, :]
        harder = (a_i > a_j) & both
        valid = (harder | ((a_i < a_j) & both)).to(tl.float32)
        margin = tl.where(harder, p_i - p_j, p_j - p_i)
        small = tl.exp(-tl.abs(margin))  # in (0, 1]
        inverse = 1.0 / (1.0 + small)
        chance = tl.where(margin > 0, small, 1.0) * inverse * valid  # sigmoid(-margin)
        # Products with `valid` keep what is no number, as the twin does; max(-margin, 0) alone would lose it.
        loss += (tl.where(margin > 0, 0.0, -margin) - tl.log(inverse)) * valid
        push += tl.where(harder, -chance, chance)
        pairs += valid
    tl.store(slope + base + row, tl.sum(push, axis=1), mask=here)
    tl.store(sums + program, tl.sum(loss).to(tl.float64))
    tl.store(sums + tl.num_programs(0) + program, tl.sum(pairs).to(tl.float64))


@triton.jit
def ranking_totals(sums, value, factor, programs, SUMMED: tl.constexpr):  # type: ignore[no-untyped-def]
    """`value`: float32 [], the mean loss of a pair; `factor`: what the slopes are to be multiplied with."""
    loss = tl.zeros((SUMMED,), tl.float64)
    pairs = tl.zeros((SUMMED,), tl.float64)
    for start in range(0, programs, SUMMED):
        place = start + tl.arange(0, SUMMED)
        loss += tl.load(sums + place, mask=place < programs, other=0.0)
        pairs += tl.load(sums + programs + place, mask=place < programs, other=0.0)
    seen = tl.maximum(tl.sum(pairs), 2.0)
    tl.store(value, (tl.sum(loss) / seen).to(tl.float32))
    tl.store(factor, (2.0 / seen).to(tl.float32))


@triton.jit
def _before(x_i, x_j, earlier):  # type: ignore[no-untyped-def]
    """Whether j comes before i in ascending order: equal ones in order of their numbers, what is no number last."""
    less = (x_j < x_i) | ((x_i != x_i) & (x_j == x_j))
    more = (x_i < x_j) | ((x_j != x_j) & (x_i == x_i))
    return less | (earlier & ~more)


@triton.jit
def health_kernel(predicted, actual, seen, sums, M, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Ranks of patches, and how many pairs are in order.

    `predicted`, `actual`, `seen`: [N, M] of any floating type; `sums`: float64 [4, programs], squared differences of
    the ranks of `predicted` and of `seen` from those of `actual`; then, both twice, pairs in order and all pairs.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(M, ROWS)
    base = (program // blocks).to(tl.int64) * M
    row = (program % blocks) * ROWS + tl.arange(0, ROWS)
    here = row < M
    p_i = tl.load(predicted + base + row, mask=here, other=0.0).to(tl.float32)[:, None]
    a_i = tl.load(actual + base + row, mask=here, other=0.0).to(tl.float32)[:, None]
    s_i = tl.load(seen + base + row, mask=here, other=0.0).to(tl.float32)[:, None]
    rank_p = tl.zeros((ROWS, COLUMNS), tl.int32)
    rank_a = tl.zeros((ROWS, COLUMNS), tl.int32)
    rank_s = tl.zeros((ROWS, COLUMNS), tl.int32)
    right = tl.zeros((ROWS, COLUMNS), tl.int32)
    pairs = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, M, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = column < M
        p_j = tl.load(predicted + base + column, mask=there, other=0.0).to(tl.float32)[None, :]
        a_j = tl.load(actual + base + column, mask=there, other=0.0).to(tl.float32)[None, :]
        s_j = tl.load(seen + base + column, mask=there, other=0.0).to(tl.float32)[None, :]
        both = here[:, None] & there[None, :]
        earlier = column[None, :] < row[:, None]
        rank_p += (_before(p_i, p_j, earlier) & both).to(tl.int32)
        rank_a += (_before(a_i, a_j, earlier) & both).to(tl.int32)
        rank_s += (_before(s_i, s_j, earlier) & both).to(tl.int32)
        harder, easier = (a_i > a_j) & both, (a_i < a_j) & both
        right += ((harder & (p_i > p_j)) | (easier & (p_i < p_j))).to(tl.int32)
        pairs += (harder | easier).to(tl.int32)
    ranks = tl.sum(rank_a, axis=1)
    off_p, off_s = (tl.sum(rank_p, axis=1) - ranks).to(tl.int64), (tl.sum(rank_s, axis=1) - ranks).to(tl.int64)
    programs = tl.num_programs(0)
    tl.store(sums + program, tl.sum(off_p * off_p).to(tl.float64))
    tl.store(sums + programs + program, tl.sum(off_s * off_s).to(tl.float64))
    tl.store(sums + 2 * programs + program, tl.sum(right).to(tl.float64))
    tl.store(sums + 3 * programs + program, tl.sum(pairs).to(tl.float64))


@triton.jit
def health_totals(sums, results, programs, largest, SUMMED: tl.constexpr):  # type: ignore[no-untyped-def]
    """`results`: float32 [3], rank correlation of `predicted`, share of pairs in order, rank correlation of `seen`;
    `largest`: the sum of squares that would make a correlation of 0."""
    off_p = tl.zeros((SUMMED,), tl.float64)
    off_s = tl.zeros((SUMMED,), tl.float64)
    right = tl.zeros((SUMMED,), tl.float64)
    pairs = tl.zeros((SUMMED,), tl.float64)
    for start in range(0, programs, SUMMED):
        place = start + tl.arange(0, SUMMED)
        mask = place < programs
        off_p += tl.load(sums + place, mask=mask, other=0.0)
        off_s += tl.load(sums + programs + place, mask=mask, other=0.0)
        right += tl.load(sums + 2 * programs + place, mask=mask, other=0.0)
        pairs += tl.load(sums + 3 * programs + place, mask=mask, other=0.0)
    tl.store(results, (1 - tl.sum(off_p) / largest).to(tl.float32))
    tl.store(results + 1, (tl.sum(right) / tl.maximum(tl.sum(pairs), 1.0)).to(tl.float32))
    tl.store(results + 2, (1 - tl.sum(off_s) / largest).to(tl.float32))


def ranking(predicted: Tensor, actual: Tensor) -> tuple[Tensor, Tensor]:
    """The ranking loss of float32 [B, M] and [B, M], and its derivatives [B, M] by the first."""
    predicted, actual = predicted.contiguous(), actual.contiguous()
    batch, count = predicted.shape
    programs = batch * triton.cdiv(count, ROWS)
    slope, sums = torch.empty_like(predicted), predicted.new_empty(2, programs, dtype=torch.float64)
    value, factor = predicted.new_empty(()), predicted.new_empty(())
    ranking_kernel[(programs,)](predicted, actual, slope, sums, count, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS)
    ranking_totals[(1,)](sums, value, factor, programs, SUMMED=SUMMED)
    return value, slope.mul_(factor)


def health(predicted: Tensor, actual: Tensor, seen: Tensor) -> Tensor:
    """float32 [3] from [N, M] each: as `loss.health`."""
    predicted, actual, seen = predicted.contiguous(), actual.contiguous(), seen.contiguous()
    samples, count = predicted.shape
    programs = samples * triton.cdiv(count, ROWS)
    sums, results = predicted.new_empty(4, programs, dtype=torch.float64), predicted.new_empty(3, dtype=torch.float32)
    health_kernel[(programs,)](predicted, actual, seen, sums, count, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=WARPS)
    health_totals[(1,)](sums, results, programs, samples * count * (count**2 - 1) / 6, SUMMED=SUMMED)
    return results
