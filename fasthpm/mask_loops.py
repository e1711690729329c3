"""The inner loops of masks: the highest of a row, blocks laid over each other, hashed noise.

Each by torch and, on a CPU, by numpy, whose vector instructions are several times faster there: bit for bit the same.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

LOW_32 = 0xFFFFFFFF
BLOCK_ASPECT = 0.3  # a block's height / width lies between this and its inverse (BEiT)


def numpy_is_faster(values: Tensor) -> bool:
    """On a CPU, unless a compiler is tracing, which cannot follow numpy."""
    return on_cpu(values) and not torch.compiler.is_compiling()


def on_cpu(values: Tensor) -> bool:
    """Whether a CPU is what computes: not in a dry run (`commands.dry_run`), which stands for a GPU."""
    return values.device.type == "cpu" and not isinstance(values, FakeTensor)


def highest(scores: Tensor, count: int | Tensor, tie_noise: Tensor | None = None) -> Tensor:
    """bool [B, L]: the `count` (one number, or [B, 1]) highest finite scores of each row, exactly that many.

    Equal scores follow `tie_noise`, or the patch number. One threshold splits a row, because every patch has a key of
    its own: the bits of its float32 score, made to ascend, above 29 low bits, which hold the leading bits of
    `tie_noise`, then the patch number. (A score that is no number ranks above or below all others, by its sign.)
    """
    if numpy_is_faster(scores):
        return _highest_numpy(scores.detach(), count, tie_noise)
    length = scores.shape[1]
    index_bits = (length - 1).bit_length()
    low = torch.arange(length, dtype=torch.int32, device=scores.device)
    if tie_noise is not None:
        low = torch.add(low, (tie_noise * 2.0 ** (29 - index_bits)).int(), alpha=1 << index_bits)
    if scores.dtype == torch.bool:
        key = (scores.int() << 29) + low
    else:
        bits = (scores.detach().float() + 0.0).view(torch.int32)  # adding 0 makes -0 and 0 equal
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # a negative float's bits count its magnitude
        key = (bits.long() << 29) + low
    ordered = key.sort(dim=1).values
    if isinstance(count, int):
        return key >= ordered[:, -count, None] if count else torch.zeros_like(key, dtype=torch.bool)
    place = (length - count).clamp_max(length - 1).expand(len(key), 1)
    return (key >= ordered.gather(1, place)) & (count > 0)


def _highest_numpy(scores: Tensor, count: int | Tensor, tie_noise: Tensor | None) -> Tensor:
    """`highest`, 3 to 6 times faster than by torch."""
    key, length = _keys_numpy(scores, tie_noise), scores.shape[1]
    if isinstance(count, Tensor) and count.numel() > 1:
        place = (length - count.numpy()).clip(max=length - 1)
        least = np.take_along_axis(np.sort(key, axis=1), place, axis=1)
        return torch.from_numpy((key >= least) & (count.numpy() > 0))
    if not (
        number := int(count.numpy().item() if isinstance(count, Tensor) else count)
    ):  # int of a tensor would be a sync
        return torch.zeros(scores.shape, dtype=torch.bool)
    return torch.from_numpy(key >= np.partition(key, length - number, axis=1)[:, length - number, None])


def _keys_numpy(scores: Tensor, tie_noise: Tensor | None) -> Any:
    """Integers that order each row as `highest` says: int32 for bool `scores`, else int64 [B, L]."""
    length = scores.shape[1]
    index_bits = (length - 1).bit_length()
    low = np.arange(length, dtype=np.int32)
    if tie_noise is not None:
        low = (tie_noise.numpy() * np.float32(2.0 ** (29 - index_bits))).astype(np.int32) << index_bits | low
    if scores.dtype == torch.bool:
        return scores.numpy().astype(np.int32) << 29 | low
    bits = (scores.float() + 0.0).numpy().view(np.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    key = bits.astype(np.int64)
    key <<= 29
    key |= low
    return key


def aspect(number: Tensor) -> Tensor:
    """Height / width of a block from a uniform number: log-uniform in [BLOCK_ASPECT, 1 / BLOCK_ASPECT]."""
    return ((2 * number.double() - 1) * -math.log(BLOCK_ASPECT)).exp()


def block_distance(numbers: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Distance of every patch from a random point, circles being rectangles: [B, 3] (row, column, aspect) -> [B, L]."""
    rows, columns = (torch.arange(n, dtype=torch.float64, device=numbers.device) for n in grid_size)
    root = aspect(numbers[:, 2]).sqrt()[:, None]
    down = (rows + 0.5 - grid_size[0] * numbers[:, :1].double()).abs() / root
    across = (columns + 0.5 - grid_size[1] * numbers[:, 1:2].double()).abs() * root
    return torch.maximum(down[:, :, None], across[:, None, :]).flatten(1)


def lay_blocks(
    proposals: Tensor, roots: Tensor, grid_size: tuple[int, int], count: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Rectangles laid over each other until `count` patches are masked, or none is left: (mask, missing).

    - `count`: the same of all images, or one of each, int64 [B, 1]
    - `proposals`: float64 [B, N, 4]: area, (aspect), row, column, uniform; `roots`: [B, N], square roots of the aspects

    **Returns:** bool [B, R*C]; int64 [B, 1], how many of `count` are missing.
    """
    if numpy_is_faster(proposals) and grid_size[1] <= 64:
        return _lay_blocks_numpy(proposals, roots, grid_size, count)
    batch, (rows, columns) = len(proposals), grid_size
    smallest = max(1, rows * columns * 16 // 196)
    free = proposals.new_ones(batch, rows, columns)  # of numbers, for products: they count patches fastest
    missing = count.double() if isinstance(count, Tensor) else proposals.new_full((batch, 1), count)
    size = proposals.new_full((2,), columns)
    size[:1].fill_(rows)  # not copied from the host, who would wait for it
    index = [torch.arange(n, dtype=torch.float64, device=proposals.device) for n in grid_size]
    for number in range(proposals.shape[1]):
        proposal, root = proposals[:, number], roots[:, number, None]
        length = (smallest + proposal[:, :1] * (missing - smallest)).sqrt()
        side = torch.cat([length * root, length / root], dim=1).round()
        first = (proposal[:, 2:] * (size - side + 1)).floor()
        end = first + side * (side < size).all(dim=1, keepdim=True)
        down, across = (
            ((index[axis] >= first[:, axis, None]) & (index[axis] < end[:, axis, None])).double() for axis in (0, 1)
        )
        gain = (torch.bmm(down[:, None], free).squeeze(1) * across).sum(dim=1, keepdim=True)
        gain = gain * (gain <= missing)
        free = free - free * (down * (gain > 0))[:, :, None] * across[:, None]
        missing = missing - gain
    return free.flatten(1) == 0, missing.long()


def _lay_blocks_numpy(
    proposals: Tensor, roots: Tensor, grid_size: tuple[int, int], count: int | Tensor
) -> tuple[Tensor, Tensor]:
    """`lay_blocks`, a row of at most 64 patches being the bits of one number: ten times faster."""
    numbers, (rows, columns), one = proposals.numpy(), grid_size, np.uint64(1)
    smallest, row = max(1, rows * columns * 16 // 196), np.arange(rows)
    free = np.full((len(numbers), rows), (1 << columns) - 1, dtype=np.uint64)
    wanted = count.numpy()[:, 0] if isinstance(count, Tensor) else count
    missing = np.full(len(numbers), wanted, np.float64)
    for number, root in enumerate(roots.numpy().T):
        length = np.sqrt(smallest + numbers[:, number, 0] * (missing - smallest))
        height, width = np.rint(length * root), np.rint(length / root)
        top = np.floor(numbers[:, number, 2] * (rows - height + 1))[:, None]
        left = np.floor(numbers[:, number, 3] * (columns - width + 1))
        fits = (height < rows) & (width < columns)
        left, width = (np.where(fits, x, 0).astype(np.uint64) for x in (left, width))
        across = ((one << width) - one) << left
        block = free & np.where((row >= top) & (row < top + height[:, None]), across[:, None], np.uint64(0))
        gain = np.bitwise_count(block).sum(axis=1)
        gain *= gain <= missing
        free ^= np.where(gain[:, None] > 0, block, np.uint64(0))
        missing -= gain
    mask = (free[:, :, None] >> np.arange(columns, dtype=np.uint64)) & one == 0
    return torch.from_numpy(mask).flatten(1), torch.from_numpy(missing).long()[:, None]


def mix(word: Tensor) -> Tensor:
    """A bijection of 32-bit words (held in int64) in which every input bit moves every output bit."""
    word = ((word ^ (word >> 16)) * 0x85EBCA6B) & LOW_32
    word = ((word ^ (word >> 13)) * 0xC2B2AE35) & LOW_32
    return word ^ (word >> 16)


def hashed_uniform(samples: Tensor, patches: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), 24 random bits each, from hashed words: float32 [draws, B, L].

    - `samples`: int64 [B]; `patches`: int64 [draws, 1, L]; words of `mix`
    """
    if numpy_is_faster(samples):
        return _uniform_numpy(samples, patches)
    words = _mix_small(samples.int()[None, :, None] ^ patches.int())
    return words.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).float().mul_(2.0**-24)


def _mix_small(word: Tensor) -> Tensor:
    """`mix` in place, of words held in int32 (products wrap, shifts copy the sign): a third of its time."""
    part = (word >> 16).bitwise_and_(0xFFFF)
    word.bitwise_xor_(part).mul_(0x85EBCA6B - (1 << 32))
    torch.bitwise_right_shift(word, 13, out=part).bitwise_and_(0x7FFFF)
    word.bitwise_xor_(part).mul_(0xC2B2AE35 - (1 << 32))
    torch.bitwise_right_shift(word, 16, out=part).bitwise_and_(0xFFFF)
    return word.bitwise_xor_(part)


def _uniform_numpy(samples: Tensor, patches: Tensor) -> Tensor:
    """`sample_noise` of hashed samples [B] and patches [draws, 1, L] by unsigned words, which torch lacks."""
    word = samples.numpy().astype(np.uint32)[:, None] ^ patches.numpy().astype(np.uint32)
    part = word >> 16
    word ^= part
    word *= np.uint32(0x85EBCA6B)
    word ^= np.right_shift(word, 13, out=part)
    word *= np.uint32(0xC2B2AE35)
    word ^= np.right_shift(word, 16, out=part)
    word >>= 8
    return torch.from_numpy(word.astype(np.float32)).mul_(2.0**-24)
