"""Which patches are masked. Batched on the device, exact counts for every sample, no host synchronisation.

Letters: B batch, L patches, M masked, V = L - M visible, T frame slots, R x C grid. A mask is bool [B, L], True =
masked, patches in raster order. All randomness is `noise`, uniform in [0, 1), that the caller draws (`sample_noise`).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasthpm.errors import UserError

POLICIES = ("random", "hpm", "hpm_easiest", "attention", "block", "blockwise", "uniform", "tube", "hpm_tube")
BY_DIFFICULTY = ("hpm", "hpm_easiest", "hpm_tube")
TUBES = ("tube", "hpm_tube")  # one mask for all frame slots
IN_UNITS = ("random", "attention", "hpm", "hpm_easiest")  # policies that can mask units of several patches
MAP_CROPS = ("image", "reference")  # how attention maps follow the crop (fasthpm/maps/run.py)
BLOCK_ASPECT = 0.3  # a block's height / width lies between this and its inverse (BEiT)
BLOCK_PROPOSALS = 32  # blocks that `blockwise_mask` tries before it fills up
_LOW_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class MaskPlan:
    """How the masks of a run are drawn: everything about them that does not change from step to step.

    - `policy`: one of `POLICIES`; `mask_ratio`: share of the patches that is masked
    - `grid_size`: (rows R, columns C) of patches; `slots`: frame slots T (1 for images), L = T*R*C
    - `unit`: side of a unit in patches: whole units are masked, from the corner of the grid (SimMIM: 32 pixels)
    - `throw_ratio`: share of the patches that is neither masked nor visible ("attention" only)

    **Raises:** `UserError` for a plan that makes no sense.
    """

    policy: str
    mask_ratio: float
    grid_size: tuple[int, int]
    slots: int = 1
    unit: int = 1
    throw_ratio: float = 0.0

    def __post_init__(self) -> None:
        rows, columns = self.grid_size
        if self.policy not in POLICIES:
            raise UserError(f"mask_policy is {self.policy!r}, expected one of {', '.join(POLICIES)}")
        if not 0 <= self.mask_ratio <= 1:
            raise UserError(f"mask_ratio is {self.mask_ratio}, expected between 0 and 1")
        if self.throw_ratio and self.policy != "attention":
            raise UserError(
                f"throw_ratio is {self.throw_ratio}, but mask_policy {self.policy} throws nothing away; use "
                f"--throw_ratio 0, or --mask_policy attention"
            )
        if self.unit > 1 and self.policy not in IN_UNITS:
            raise UserError(
                f"mask_policy {self.policy} does not mask in units; use --mask_unit 0, or one of {', '.join(IN_UNITS)}"
            )
        if rows % self.unit or columns % self.unit:
            raise UserError(
                f"a mask unit of {self.unit} x {self.unit} patches does not divide the {rows} x {columns} patches of "
                f"an image; use a --mask_unit or an --input_size that fits"
            )
        if self.policy == "uniform" and (self.mask_ratio != 0.75 or rows % 2 or columns % 2):
            raise UserError(
                f"mask_policy uniform leaves one patch of every 2 x 2 visible: it needs mask_ratio 0.75 (not "
                f"{self.mask_ratio}) and even numbers of patches (not {rows} x {columns})"
            )
        if self.policy in TUBES and self.slots == 1:
            raise UserError(
                f"mask_policy {self.policy} repeats one mask in every frame of a video, and an image has one frame; "
                f"use --mask_policy {'random' if self.policy == 'tube' else 'hpm'}"
            )

    @property
    def num_patches(self) -> int:
        """L."""
        return self.slots * self.grid_size[0] * self.grid_size[1]

    @property
    def num_masked(self) -> int:
        """M: masked patches of every sample."""
        frame, area = self.grid_size[0] * self.grid_size[1], self.unit**2
        if self.policy == "attention":
            return area * attention_counts(self.num_patches // area, self.mask_ratio, 0.0, round_up=self.unit > 1)[0]
        if self.policy == "tube":
            return self.slots * int(self.mask_ratio * frame)
        if self.policy == "random":
            return area * num_masked(self.num_patches // area, self.mask_ratio)
        return self.slots * area * num_masked(frame // area, self.mask_ratio)

    @property
    def num_thrown(self) -> int:
        """Patches of every sample that are thrown away."""
        units, area = self.num_patches // self.unit**2, self.unit**2
        return area * attention_counts(units, self.mask_ratio, self.throw_ratio, round_up=self.unit > 1)[1]

    @property
    def noise_size(self) -> int:
        """Numbers that one draw per sample takes: the last dimension of `draw_mask`'s noise."""
        extra = {"block": 3, "blockwise": 4 * BLOCK_PROPOSALS + 2}
        return self.num_patches + extra.get(self.policy, 0)


def draw_mask(plan: MaskPlan, noise: Tensor, difficulty: Tensor | None = None, alpha: float | Tensor = 0.0) -> Tensor:
    """One mask per sample.

    - `noise`: [2, B, plan.noise_size] in [0, 1)
    - `difficulty`, `alpha`: as in `easy_to_hard_mask`, for the policies that follow it; a unit's difficulty is the
      mean of its patches, and in a video every frame slot is masked on its own (TPAMI 4.2), or, with "hpm_tube" (in
      no paper), all alike by the sum of a place's difficulties. For "attention" the weights

    **Returns:** bool [B, L], exactly `plan.num_masked` True per row.
    """
    return draw_sets(plan, noise, difficulty, alpha)[0]


def draw_sets(
    plan: MaskPlan, noise: Tensor, difficulty: Tensor | None = None, alpha: float | Tensor = 0.0
) -> tuple[Tensor, Tensor | None]:
    """(`draw_mask`'s mask, bool [B, L] of the patches thrown away or None where the plan throws none)."""
    if plan.policy != "attention":
        return _draw_mask(plan, noise, difficulty, alpha), None
    if difficulty is None:
        raise ValueError("mask policy attention needs weights")
    weights = pool_units(difficulty, plan.grid_size, plan.unit)
    sets = attention_mask(
        weights, plan.mask_ratio, plan.throw_ratio, noise[0, :, : weights.shape[1]], round_up=plan.unit > 1
    )
    masked, thrown = (spread_units(part, plan.grid_size, plan.unit) for part in sets)
    return masked, thrown if plan.num_thrown else None


def _draw_mask(plan: MaskPlan, noise: Tensor, difficulty: Tensor | None, alpha: float | Tensor) -> Tensor:
    policy, ratio, grid = plan.policy, plan.mask_ratio, plan.grid_size
    if policy == "block":
        return block_mask(noise[0], grid, ratio, plan.slots)
    if policy == "blockwise":
        return blockwise_mask(noise[0], grid, ratio, plan.slots)
    if policy == "uniform":
        return uniform_mask(noise[0], grid, plan.slots)
    if policy == "tube":
        return tube_mask(noise[0, :, : grid[0] * grid[1]], plan.slots, ratio)
    units = plan.num_patches // plan.unit**2
    if policy == "random":
        mask = random_mask(noise[0, :, :units], ratio)
    else:
        if difficulty is None:
            raise ValueError(f"mask policy {policy} needs a difficulty")
        scores, groups = pool_units(difficulty, grid, plan.unit), plan.slots
        if policy == "hpm_tube":
            scores, groups = scores.float().reshape(len(scores), groups, -1).sum(dim=1), 1
        mask = easy_to_hard_mask(
            scores, ratio, alpha, groups=groups, noise=noise[:, :, : scores.shape[1]], easiest=policy == "hpm_easiest"
        ).repeat(1, plan.slots // groups)
    return spread_units(mask, grid, plan.unit)


def num_masked(num_patches: int, mask_ratio: float) -> int:
    """M = L - int(L(1 - mask_ratio)), truncated in floating point as the released code does it."""
    return num_patches - int(num_patches * (1 - mask_ratio))


def easy_to_hard_mask(
    difficulty: Tensor,
    mask_ratio: float,
    alpha: float | Tensor,
    *,
    generator: torch.Generator | None = None,
    groups: int = 1,
    easiest: bool = False,
    noise: Tensor | None = None,
) -> Tensor:
    """Mask the int(M·alpha) hardest patches of every sample, and M - int(M·alpha) others uniformly at random.

    CVPR 3.4 and Eq. 8. Ties in `difficulty` are broken at random, so a constant difficulty gives random masks.

    - `difficulty`: [B, L], higher is harder; ranked in float32
    - `alpha`: share of the mask chosen by difficulty, 0 (random masking) to 1; a 0-dim tensor avoids recompilation
    - `groups`: split L into this many equal slots (the frames of a video) and mask each on its own
    - `easiest`: choose the easiest instead of the hardest (the papers' argmin row)
    - `noise`: [2, B, L] uniform numbers in [0, 1) to use instead of `generator` (see `sample_noise`)

    **Returns:** bool [B, L], True = masked, exactly M per group. **Raises:** `ValueError` if L does not split into
    `groups`.
    """
    batch, length = difficulty.shape
    if length % groups:
        raise ValueError(f"{length} patches do not split into {groups} groups")
    slots = length // groups
    if noise is None:
        noise = torch.rand(2, batch, length, device=difficulty.device, generator=generator)
    tie_noise, rest_noise = noise.reshape(2, batch * groups, slots)
    scores = difficulty.float().reshape(batch * groups, slots)
    masked = num_masked(slots, mask_ratio)
    hard = _highest(-scores if easiest else scores, _share(masked, alpha), tie_noise)
    return _highest(hard, masked, rest_noise).reshape(batch, length)


def random_mask(noise: Tensor, mask_ratio: float) -> Tensor:
    """MAE's mask: the int(L(1 - mask_ratio)) patches with the smallest `noise` [B, L] stay visible. bool [B, L]."""
    return _highest(noise, num_masked(noise.shape[1], mask_ratio))


def block_mask(noise: Tensor, grid_size: tuple[int, int], mask_ratio: float, slots: int = 1) -> Tensor:
    """One rectangle at a random place: the M patches nearest to a random point, in a metric whose circles are
    rectangles of random aspect. At the border it grows inwards, so that the count stays exact.

    - `noise`: [B, L + 3]: breaks ties, then point and aspect. In a video every frame slot has the same block.
    """
    frame = grid_size[0] * grid_size[1]
    distance = _block_distance(noise[:, frame : frame + 3], grid_size)
    mask = _highest(-distance, num_masked(frame, mask_ratio), noise[:, :frame])
    return mask.repeat(1, slots)


def blockwise_mask(noise: Tensor, grid_size: tuple[int, int], mask_ratio: float, slots: int = 1) -> Tensor:
    """BEiT's mask: overlapping rectangles of random size, aspect and place until M patches are masked, the count exact.

    A block's area is uniform between 16 patches (of 14 x 14; in proportion on other grids) and what is still missing;
    it is taken if it adds something and not too much. What is missing after `BLOCK_PROPOSALS` tries (BEiT: stays
    missing) is filled up with the unmasked patches nearest to a random point.

    - `noise`: [B, L + 4·BLOCK_PROPOSALS + 2]. In a video every frame slot has the same mask.
    """
    frame = grid_size[0] * grid_size[1]
    ties, numbers = noise[:, :frame], noise[:, frame:].double()
    proposals = numbers[:, : 4 * BLOCK_PROPOSALS].unflatten(1, (BLOCK_PROPOSALS, 4))
    roots = _aspect(proposals[:, :, 1]).sqrt()
    draw = _blocks_numpy if _numpy_is_faster(noise) and grid_size[1] <= 64 else _blocks
    mask, missing = draw(proposals, roots, grid_size, num_masked(frame, mask_ratio))
    point = torch.cat([numbers[:, -2:], torch.full_like(numbers[:, :1], 0.5)], dim=1)
    distance = _block_distance(point, grid_size).masked_fill(mask, 1e9)
    return (mask | _highest(-distance, missing, ties)).repeat(1, slots)


def uniform_mask(noise: Tensor, grid_size: tuple[int, int], slots: int = 1) -> Tensor:
    """UM-MAE's uniform sampling: one patch of every 2 x 2 stays visible, so three quarters are masked.

    - `noise`: [B, T*R*C / 4 or more]; rows R and columns C are even
    """
    rows, columns = grid_size
    cells = noise[:, : slots * rows * columns // 4].reshape(len(noise), slots, rows // 2, columns // 2)
    visible = (cells * 4).floor().long()  # 2 * row + column inside the cell
    inside = torch.arange(2, device=noise.device)
    place = 2 * inside[:, None, None] + inside
    mask = place[None, None, None] != visible[:, :, :, None, :, None]
    return mask.reshape(len(noise), slots * rows * columns)


def tube_mask(noise: Tensor, slots: int, mask_ratio: float) -> Tensor:
    """VideoMAE's tubes: one random mask of int(R*C·mask_ratio) patches, the same in all `slots` frame slots.

    - `noise`: [B, R*C]; the patches with the largest stay masked
    """
    return _highest(noise, int(mask_ratio * noise.shape[1])).repeat(1, slots)


def attention_mask(
    weights: Tensor, mask_ratio: float, throw_ratio: float, noise: Tensor, *, round_up: bool = False
) -> tuple[Tensor, Tensor]:
    """AMT's masking and throwing: all patches drawn without replacement in proportion to weight; the first are
    masked, the middle ones thrown away, the rest visible.

    Equal in law to drawing one patch after the other, by one sort: descending log(weight) + Gumbel noise. Patches
    without weight come last, in random order; if no patch has any, all orders are equally likely.

    - `weights`: [B, L], 0 or more; `noise`: [B, L] in [0, 1)
    - `round_up`: ceil(L·ratio) instead of the int(L·ratio) of AMT on MAE, as AMT on SimMIM counts its units

    **Returns:** (masked, thrown), bool [B, L] each, disjoint, with exact counts.
    """
    length = weights.shape[1]
    masked, thrown = attention_counts(length, mask_ratio, throw_ratio, round_up=round_up)
    gone = masked + thrown
    gumbel = -(-(noise.double() + 2.0**-25).log()).log()
    # Without weight: far behind every float32 logarithm (more than -104), still apart from each other.
    order = torch.where(weights > 0, weights.double().log(), -1e4).add(gumbel).argsort(dim=1, descending=True)
    sets = torch.zeros(2, *weights.shape, dtype=torch.bool, device=weights.device)
    sets[0].scatter_(1, order[:, :masked], True)
    sets[1].scatter_(1, order[:, masked:gone], True)
    return sets[0], sets[1]


def attention_counts(length: int, mask_ratio: float, throw_ratio: float, *, round_up: bool = False) -> tuple[int, int]:
    """How many of `length` patches or units AMT masks and throws away; see `attention_mask`."""
    count = math.ceil if round_up else int
    masked = count(length * mask_ratio)
    return masked, count(length * (mask_ratio + throw_ratio)) - masked


def pool_units(values: Tensor, grid_size: tuple[int, int], unit: int) -> Tensor:
    """Mean of every unit's patches: [B, T*R*C] -> float32 [B, T*(R/unit)*(C/unit)]."""
    if unit == 1:
        return values
    rows, columns = grid_size[0] // unit, grid_size[1] // unit
    cells = values.float().reshape(len(values), -1, rows, unit, columns, unit)
    return cells.mean(dim=(3, 5)).flatten(1)


def spread_units(mask: Tensor, grid_size: tuple[int, int], unit: int) -> Tensor:
    """Units to patches: the inverse of `pool_units`."""
    if unit == 1:
        return mask
    rows, columns = grid_size[0] // unit, grid_size[1] // unit
    cells = mask.reshape(len(mask), -1, rows, 1, columns, 1)
    return cells.expand(-1, -1, -1, unit, -1, unit).flatten(1)


def split_ids(mask: Tensor, masked: int, thrown: Tensor | None = None, gone: int = 0) -> tuple[Tensor, Tensor]:
    """Patch numbers of a mask [B, L] with `masked` True per row: (visible [B, V], masked [B, M]), each ascending.

    - `thrown`: bool [B, L], `gone` True per row: patches that are in neither
    """
    kinds = mask.to(torch.uint8) if thrown is None else mask.to(torch.uint8) + 2 * thrown
    order, length = kinds.argsort(dim=1, stable=True), mask.shape[1] - gone
    return order[:, : length - masked], order[:, length - masked : length]


def sample_noise(seed: int, step: Tensor, ids: Tensor, num_patches: int, draws: int = 2) -> Tensor:
    """Uniform noise that depends on (seed, step, sample id, patch, draw) alone, so any number of ranks agrees.

    - `step`: int64 0-dim, the update; `ids`: int64 [B], each sample's number in the data set

    **Returns:** float32 [draws, B, num_patches] in [0, 1), with 24 random bits. A counter-based hash (Murmur3's
    32-bit finaliser, applied once per word), not a random stream: nothing to save, nothing to keep in step.
    """
    patch = _mix(torch.arange(draws * num_patches, device=ids.device).reshape(draws, 1, num_patches) + 0x7F4A7C15)
    key = _mix(_mix(_mix(torch.full_like(step, (seed ^ 0x9E3779B9) & _LOW_32)) ^ (step & _LOW_32)))
    per_sample = _mix(key ^ _mix(ids & _LOW_32))
    if _numpy_is_faster(ids):
        return _uniform_numpy(per_sample, patch)
    words = _mix_small(per_sample.int()[None, :, None] ^ patch.int())
    return words.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).float().mul_(2.0**-24)


def _share(masked: int, alpha: float | Tensor) -> int | Tensor:
    """int(M·alpha), computed in float64 on the host or on the device alike."""
    return (alpha.double() * masked).floor().long() if isinstance(alpha, Tensor) else int(masked * alpha)


def _highest(scores: Tensor, count: int | Tensor, tie_noise: Tensor | None = None) -> Tensor:
    """bool [B, L]: the `count` (one number, or [B, 1]) highest finite scores of each row, exactly that many.

    Equal scores follow `tie_noise`, or the patch number. One threshold splits a row, because every patch has a key of
    its own: the bits of its float32 score, made to ascend, above 29 low bits, which hold the leading bits of
    `tie_noise`, then the patch number. (A score that is no number ranks above or below all others, by its sign.)
    """
    if _numpy_is_faster(scores):
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
    """The same on a CPU by numpy, which sorts and selects with vector instructions: 3 to 6 times faster than torch."""
    key, length = _keys_numpy(scores, tie_noise), scores.shape[1]
    if isinstance(count, Tensor) and count.numel() > 1:
        place = (length - count.numpy()).clip(max=length - 1)
        least = np.take_along_axis(np.sort(key, axis=1), place, axis=1)
        return torch.from_numpy((key >= least) & (count.numpy() > 0))
    if not (number := int(count.numpy() if isinstance(count, Tensor) else count)):  # int of a tensor would be a sync
        return torch.zeros(scores.shape, dtype=torch.bool)
    return torch.from_numpy(key >= np.partition(key, length - number, axis=1)[:, length - number, None])


def _keys_numpy(scores: Tensor, tie_noise: Tensor | None) -> Any:
    """Integers that order each row as `_highest` says: int32 for bool `scores`, else int64 [B, L]."""
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


def _numpy_is_faster(scores: Tensor) -> bool:
    """On a CPU, unless a compiler is tracing, which cannot follow numpy."""
    return scores.device.type == "cpu" and not torch.compiler.is_compiling()


def _aspect(number: Tensor) -> Tensor:
    """Height / width of a block from a uniform number: log-uniform in [BLOCK_ASPECT, 1 / BLOCK_ASPECT]."""
    return ((2 * number.double() - 1) * -math.log(BLOCK_ASPECT)).exp()


def _block_distance(numbers: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Distance of every patch from a random point, circles being rectangles: [B, 3] (row, column, aspect) -> [B, L]."""
    rows, columns = (torch.arange(n, dtype=torch.float64, device=numbers.device) for n in grid_size)
    root = _aspect(numbers[:, 2]).sqrt()[:, None]
    down = (rows + 0.5 - grid_size[0] * numbers[:, :1].double()).abs() / root
    across = (columns + 0.5 - grid_size[1] * numbers[:, 1:2].double()).abs() * root
    return torch.maximum(down[:, :, None], across[:, None, :]).flatten(1)


def _blocks(proposals: Tensor, roots: Tensor, grid_size: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
    """Rectangles laid over each other until `count` patches are masked, or none is left: (mask, missing).

    - `proposals`: float64 [B, N, 4]: area, (aspect), row, column, uniform; `roots`: [B, N], square roots of the aspects

    **Returns:** bool [B, R*C]; int64 [B, 1], how many of `count` are missing.
    """
    batch, (rows, columns) = len(proposals), grid_size
    smallest = max(1, rows * columns * 16 // 196)
    free = proposals.new_ones(batch, rows, columns)  # of numbers, for products: they count patches fastest
    missing = proposals.new_full((batch, 1), count)
    size = torch.tensor(grid_size, dtype=torch.float64, device=proposals.device)
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


def _blocks_numpy(proposals: Tensor, roots: Tensor, grid_size: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
    """The same on a CPU by numpy, a row of at most 64 patches being the bits of one number: ten times faster."""
    numbers, (rows, columns), one = proposals.numpy(), grid_size, np.uint64(1)
    smallest, row = max(1, rows * columns * 16 // 196), np.arange(rows)
    free = np.full((len(numbers), rows), (1 << columns) - 1, dtype=np.uint64)
    missing = np.full(len(numbers), float(count))
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


def _mix(word: Tensor) -> Tensor:
    """A bijection of 32-bit words (held in int64) in which every input bit moves every output bit."""
    word = ((word ^ (word >> 16)) * 0x85EBCA6B) & _LOW_32
    word = ((word ^ (word >> 13)) * 0xC2B2AE35) & _LOW_32
    return word ^ (word >> 16)


def _mix_small(word: Tensor) -> Tensor:
    """`_mix` in place, of words held in int32 (products wrap, shifts copy the sign): a third of its time."""
    part = (word >> 16).bitwise_and_(0xFFFF)
    word.bitwise_xor_(part).mul_(0x85EBCA6B - (1 << 32))
    torch.bitwise_right_shift(word, 13, out=part).bitwise_and_(0x7FFFF)
    word.bitwise_xor_(part).mul_(0xC2B2AE35 - (1 << 32))
    torch.bitwise_right_shift(word, 16, out=part).bitwise_and_(0xFFFF)
    return word.bitwise_xor_(part)


def _uniform_numpy(samples: Tensor, patches: Tensor) -> Tensor:
    """`sample_noise` of hashed samples [B] and patches [draws, 1, L] on a CPU, by numpy: it has unsigned words."""
    word = samples.numpy().astype(np.uint32)[:, None] ^ patches.numpy().astype(np.uint32)
    part = word >> 16
    word ^= part
    word *= np.uint32(0x85EBCA6B)
    word ^= np.right_shift(word, 13, out=part)
    word *= np.uint32(0xC2B2AE35)
    word ^= np.right_shift(word, 16, out=part)
    word >>= 8
    return torch.from_numpy(word.astype(np.float32)).mul_(2.0**-24)
