"""Which patches are masked. Batched on the device, exact counts for every sample, no host synchronisation.

Letters: B batch, L patches, M masked, V = L - M visible, T frame slots, R x C grid. A mask is bool [B, L], True =
masked, patches in raster order. All randomness is `noise`, uniform in [0, 1), that the caller draws (`sample_noise`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fasthpm.errors import UserError
from fasthpm.mask_loops import LOW_32, aspect, block_distance, hashed_uniform, highest, lay_blocks, mix

MAP_CROPS = ("image", "reference")  # how attention maps follow the crop (fasthpm/maps/run.py)
LAST = 1e30  # a score behind all others, of which units can still make means
BLOCK_PROPOSALS = 32  # blocks that `blockwise_mask` tries before it fills up

Sets = tuple[Tensor, Tensor | None]  # bool [B, L]: patches that are masked; those thrown away, None = no policy's


@dataclass(frozen=True)
class MaskPlan:
    """How the masks of a run are drawn: everything about them that does not change from step to step.

    - `policy`: a name in `POLICIES`; `mask_ratio`: share of the patches that is masked
    - `grid_size`: (rows R, columns C) of patches; `slots`: frame slots T (1 for images), L = T*R*C
    - `unit`: side of a unit in patches: whole units are masked, from the corner of the grid (SimMIM: 32 pixels)
    - `throw_ratio`: share of the patches that is neither masked nor visible, for the policies that throw some away

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
        if self.throw_ratio and not self.record.throws:
            raise UserError(
                f"throw_ratio is {self.throw_ratio}, but mask_policy {self.policy} throws nothing away; use "
                f"--throw_ratio 0, or --mask_policy {' or '.join(p.name for p in POLICIES.values() if p.throws)}"
            )
        if self.unit > 1 and not self.record.in_units:
            raise UserError(
                f"mask_policy {self.policy} does not mask in units; use --mask_unit 0, or one of "
                f"{', '.join(p.name for p in POLICIES.values() if p.in_units)}"
            )
        if rows % self.unit or columns % self.unit:
            raise UserError(
                f"a mask unit of {self.unit} x {self.unit} patches does not divide the {rows} x {columns} patches of "
                f"an image; use a --mask_unit or an --input_size that fits"
            )
        if self.record.tube and self.slots == 1:
            raise UserError(
                f"mask_policy {self.policy} repeats one mask in every frame of a video, and an image has one frame; "
                f"use --mask_policy {'hpm' if self.record.follows else 'random'}"
            )
        self.record.check(self)

    @property
    def record(self) -> "Policy":
        """The policy's entry in `POLICIES`."""
        return POLICIES[self.policy]

    @property
    def num_patches(self) -> int:
        """L."""
        return self.slots * self.grid_size[0] * self.grid_size[1]

    @property
    def num_units(self) -> int:
        """Units in all frame slots together."""
        return self.num_patches // self.unit**2

    @property
    def num_masked(self) -> int:
        """M: masked patches of every sample."""
        return self.record.counts(self)[0]

    @property
    def num_thrown(self) -> int:
        """Patches of every sample that are thrown away."""
        return self.record.counts(self)[1]

    @property
    def noise_size(self) -> int:
        """Numbers that one draw per sample takes: the last dimension of `draw_mask`'s noise."""
        return self.num_patches + self.record.extra_noise


# -------------------------------------------------------------------------------------------------- policies
def counts_per_slot(plan: MaskPlan) -> tuple[int, int]:
    """(M, 0): `num_masked` of every frame slot."""
    return plan.slots * plan.unit**2 * num_masked(plan.num_units // plan.slots, plan.mask_ratio), 0


def counts_per_clip(plan: MaskPlan) -> tuple[int, int]:
    """(M, 0): `num_masked` of all frame slots together."""
    return plan.unit**2 * num_masked(plan.num_units, plan.mask_ratio), 0


Draw = Callable[[MaskPlan, Tensor, Tensor, "float | Tensor"], Sets]
Drawing = TypeVar("Drawing", bound=Draw)


@dataclass(frozen=True)
class Policy:
    """A way to mask: how it draws, and all that the package must know of it; see `register`.

    - `draw`: (plan, noise [2, B, plan.noise_size] in [0, 1), scores [B, L], alpha) -> `Sets`, with exact counts
    - `counts`: plan -> (masked, thrown away) patches of every sample
    - `follows`: what its scores are: "difficulty" predicted by the EMA teacher, "attention" maps that the run keeps of
      its samples (masks are random before the first), or "" for zeros
    - `extra_noise`: random numbers per draw, beyond one per patch
    - `in_units`: can mask units of several patches; `tube`: one mask for all frame slots; `throws`: minds throw_ratio
    - `easiest`: takes the lowest scores first, not the highest
    - `check`: raises `UserError` for a plan that it cannot draw
    """

    name: str
    summary: str  # one line for the docs
    draw: Draw
    counts: Callable[[MaskPlan], tuple[int, int]] = counts_per_slot
    follows: str = ""
    extra_noise: int = 0
    in_units: bool = False
    tube: bool = False
    easiest: bool = False
    throws: bool = False
    check: Callable[[MaskPlan], None] = lambda plan: None

    def __post_init__(self) -> None:
        if self.follows not in ("", "difficulty", "attention"):
            raise ValueError(f"mask policy {self.name} follows {self.follows!r}; expected difficulty, attention or ''")


POLICIES: dict[str, Policy] = {}


def register(name: str, summary: str, **facts: Any) -> Callable[[Drawing], Drawing]:
    """Decorator: the function draws the masks of a new --mask_policy `name`; `facts`: the other fields of `Policy`.

    **Raises:** `ValueError` for a name that is taken.
    """

    def enter(draw: Drawing) -> Drawing:
        if name in POLICIES:
            raise ValueError(f"there is a mask policy {name} already; give the new one another name")
        POLICIES[name] = Policy(name, summary, draw, **facts)
        return draw

    return enter


def draw_mask(plan: MaskPlan, noise: Tensor, scores: Tensor | None = None, alpha: float | Tensor = 0.0) -> Tensor:
    """One mask per sample.

    - `noise`: [2, B, plan.noise_size] in [0, 1)
    - `scores`: [B, L], what the policy follows, if it follows anything: difficulty or attention
    - `alpha`: share of the mask chosen by difficulty, as in `easy_to_hard_mask`

    **Returns:** bool [B, L], exactly `plan.num_masked` True per row.
    """
    return draw_sets(plan, noise, scores, alpha)[0]


def draw_sets(
    plan: MaskPlan,
    noise: Tensor,
    scores: Tensor | None = None,
    alpha: float | Tensor = 0.0,
    valid: Tensor | None = None,
) -> Sets:
    """(`draw_mask`'s mask, bool [B, L] of the patches thrown away or None where the plan throws none).

    - `valid`: bool [B, L]; where it is False a patch is not chosen by its score as long as there are others. None: all
    """
    if valid is not None and scores is not None and plan.record.follows:
        worst = 0.0 if plan.record.follows == "attention" else LAST if plan.record.easiest else -LAST
        scores = scores.masked_fill(~valid, worst)
    if scores is None:
        if plan.record.follows:
            raise ValueError(f"mask policy {plan.policy} needs scores: {plan.record.follows} of every patch")
        scores = noise.new_zeros(noise.shape[1], plan.num_patches)
    return plan.record.draw(plan, noise, scores, alpha)


@register("random", "uniformly at random (MAE, SimMIM)", counts=counts_per_clip, in_units=True)
def _random(plan: MaskPlan, noise: Tensor, scores: Tensor, alpha: float | Tensor) -> Sets:
    mask = random_mask(noise[0, :, : plan.num_units], plan.mask_ratio)
    return spread_units(mask, plan.grid_size, plan.unit), None


@register("hpm", "the hardest by the teacher, the rest at random (HPM)", follows="difficulty", in_units=True)
def _hardest(plan: MaskPlan, noise: Tensor, scores: Tensor, alpha: float | Tensor, easiest: bool = False) -> Sets:
    """Every frame slot on its own (TPAMI 4.2); a unit's difficulty is the mean of its patches."""
    units = pool_units(scores, plan.grid_size, plan.unit)
    draws = noise[:, :, : plan.num_units]
    mask = easy_to_hard_mask(units, plan.mask_ratio, alpha, groups=plan.slots, noise=draws, easiest=easiest)
    return spread_units(mask, plan.grid_size, plan.unit), None


@register("hpm_easiest", "the easiest instead (HPM's argmin)", follows="difficulty", in_units=True, easiest=True)
def _easiest(plan: MaskPlan, noise: Tensor, scores: Tensor, alpha: float | Tensor) -> Sets:
    return _hardest(plan, noise, scores, alpha, easiest=True)


def _attention_counts(plan: MaskPlan) -> tuple[int, int]:
    counts = attention_counts(plan.num_units, plan.mask_ratio, plan.throw_ratio, round_up=plan.unit > 1)
    return plan.unit**2 * counts[0], plan.unit**2 * counts[1]


@register(
    "attention",
    "by attention maps of the whole image; a middle part can be thrown away (AMT)",
    counts=_attention_counts,
    follows="attention",
    in_units=True,
    throws=True,
)
def _attention(plan: MaskPlan, noise: Tensor, scores: Tensor, alpha: float | Tensor) -> Sets:
    weights = pool_units(scores, plan.grid_size, plan.unit)
    draws = noise[0, :, : plan.num_units]
    sets = attention_mask(weights, plan.mask_ratio, plan.throw_ratio, draws, round_up=plan.unit > 1)
    masked, thrown = (spread_units(part, plan.grid_size, plan.unit) for part in sets)
    return masked, thrown if plan.num_thrown else None


@register("block", "one rectangle at a random place", extra_noise=3)
def _block(plan: MaskPlan, noise: Tensor, scores: Tensor, alpha: float | Tensor) -> Sets:
    return block_mask(noise[0], plan.grid_size, plan.mask_ratio, plan.slots), None


@register("blockwise", "overlapping rectangles (BEiT)", extra_noise=4 * BLOCK_PROPOSALS + 2)
def _blockwise(plan: MaskPlan, noise: Tensor, scores: Tensor, alpha: float | Tensor) -> Sets:
    frame = plan.num_patches // plan.slots
    return blockwise_mask(noise[0], plan.grid_size, num_masked(frame, plan.mask_ratio), plan.slots), None


def _check_uniform(plan: MaskPlan) -> None:
    rows, columns = plan.grid_size
    if plan.mask_ratio != 0.75 or rows % 2 or columns % 2:
        raise UserError(
            f"mask_policy uniform leaves one patch of every 2 x 2 visible: it needs mask_ratio 0.75 (not "
            f"{plan.mask_ratio}) and even numbers of patches (not {rows} x {columns})"
        )


@register("uniform", "all but one patch of every 2 x 2 (UM-MAE)", check=_check_uniform)
def _uniform(plan: MaskPlan, noise: Tensor, scores: Tensor, alpha: float | Tensor) -> Sets:
    return uniform_mask(noise[0], plan.grid_size, plan.slots), None


def _tube_counts(plan: MaskPlan) -> tuple[int, int]:
    return plan.slots * int(plan.mask_ratio * (plan.num_patches // plan.slots)), 0


@register("tube", "one random mask for all frame slots (VideoMAE)", counts=_tube_counts, tube=True)
def _tube(plan: MaskPlan, noise: Tensor, scores: Tensor, alpha: float | Tensor) -> Sets:
    return tube_mask(noise[0, :, : plan.num_patches // plan.slots], plan.slots, plan.mask_ratio), None


@register("hpm_tube", "the places hardest over all frame slots, in all of them (ours)", follows="difficulty", tube=True)
def _hardest_tube(plan: MaskPlan, noise: Tensor, scores: Tensor, alpha: float | Tensor) -> Sets:
    places = scores.float().reshape(len(scores), plan.slots, -1).sum(dim=1)
    mask = easy_to_hard_mask(places, plan.mask_ratio, alpha, noise=noise[:, :, : places.shape[1]])
    return mask.repeat(1, plan.slots), None


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
    - `groups`: split L into this many equal parts (the frame slots of a video) and mask each on its own
    - `easiest`: choose the easiest instead of the hardest (the papers' argmin row)
    - `noise`: [2, B, L] uniform numbers in [0, 1) to use instead of `generator` (see `sample_noise`)

    **Returns:** bool [B, L], True = masked, exactly M per group. **Raises:** `ValueError` if L does not split into
    `groups`.
    """
    batch, length = difficulty.shape
    if length % groups:
        raise ValueError(f"{length} patches do not split into {groups} groups")
    per_group = length // groups
    if noise is None:
        noise = torch.rand(2, batch, length, device=difficulty.device, generator=generator)
    tie_noise, rest_noise = noise.reshape(2, batch * groups, per_group)
    scores = difficulty.float().reshape(batch * groups, per_group)
    masked = num_masked(per_group, mask_ratio)
    hard = highest(-scores if easiest else scores, _share(masked, alpha), tie_noise)
    return highest(hard, masked, rest_noise).reshape(batch, length)


def random_mask(noise: Tensor, mask_ratio: float) -> Tensor:
    """MAE's mask: the int(L(1 - mask_ratio)) patches with the smallest `noise` [B, L] stay visible. bool [B, L]."""
    return highest(noise, num_masked(noise.shape[1], mask_ratio))


def block_mask(noise: Tensor, grid_size: tuple[int, int], mask_ratio: float, slots: int = 1) -> Tensor:
    """One rectangle at a random place: the M patches nearest to a random point, in a metric whose circles are
    rectangles of random aspect. At the border it grows inwards, so that the count stays exact.

    - `noise`: [B, L + 3]: breaks ties, then point and aspect. In a video every frame slot has the same block.
    """
    frame = grid_size[0] * grid_size[1]
    distance = block_distance(noise[:, frame : frame + 3], grid_size)
    mask = highest(-distance, num_masked(frame, mask_ratio), noise[:, :frame])
    return mask.repeat(1, slots)


def blockwise_mask(noise: Tensor, grid_size: tuple[int, int], masked: int | Tensor, slots: int = 1) -> Tensor:
    """BEiT's mask: overlapping rectangles of random size, aspect and place until M patches are masked, the count exact.

    A block's area is uniform between 16 patches (of 14 x 14; in proportion on other grids) and what is still missing;
    it is taken if it adds something and not too much. What is missing after `BLOCK_PROPOSALS` tries (BEiT: stays
    missing) is filled up with the unmasked patches nearest to a random point.

    - `noise`: [B, L + 4·BLOCK_PROPOSALS + 2]; `masked`: M of a frame, or another of every image, int64 [B, 1]. In a
      video every frame slot has the same mask.
    """
    frame = grid_size[0] * grid_size[1]
    ties, numbers = noise[:, :frame], noise[:, frame:].double()
    proposals = numbers[:, : 4 * BLOCK_PROPOSALS].unflatten(1, (BLOCK_PROPOSALS, 4))
    roots = aspect(proposals[:, :, 1]).sqrt()
    mask, missing = lay_blocks(proposals, roots, grid_size, masked)
    point = torch.cat([numbers[:, -2:], torch.full_like(numbers[:, :1], 0.5)], dim=1)
    distance = block_distance(point, grid_size).masked_fill(mask, 1e9)
    return (mask | highest(-distance, missing, ties)).repeat(1, slots)


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
    return highest(noise, int(mask_ratio * noise.shape[1])).repeat(1, slots)


def attention_mask(
    weights: Tensor, mask_ratio: float, throw_ratio: float, noise: Tensor, *, round_up: bool = False
) -> tuple[Tensor, Tensor]:
    """AMT's masking and throwing: all patches drawn without replacement in proportion to weight; the first are
    masked, the middle ones thrown away, the rest visible.

    Equal in law to drawing one patch after the other, by one sort: descending log(weight) + Gumbel noise. Patches
    without weight come last, in random order; if no patch has any, all orders are equally likely.

    - `weights`: [B, L], 0 or more; `noise`: [B, L] in [0, 1)
    - `round_up`: as AMT on SimMIM counts its units; see `attention_counts`

    **Returns:** (masked, thrown), bool [B, L] each, disjoint, with exact counts.
    """
    length = weights.shape[1]
    masked, thrown = attention_counts(length, mask_ratio, throw_ratio, round_up=round_up)
    gumbel = -(-(noise.double() + 2.0**-25).log()).log()
    # Without weight: far behind every float32 logarithm (more than -104), still apart from each other.
    order = torch.where(weights > 0, weights.double().log(), -1e4).add(gumbel).argsort(dim=1, descending=True)
    sets = torch.zeros(2, *weights.shape, dtype=torch.bool, device=weights.device)
    sets[0].scatter_(1, order[:, :masked], True)
    sets[1].scatter_(1, order[:, masked : masked + thrown], True)
    return sets[0], sets[1]


def attention_counts(length: int, mask_ratio: float, throw_ratio: float, *, round_up: bool = False) -> tuple[int, int]:
    """How many of `length` patches or units AMT masks and throws away; see `attention_mask`.

    AMT on MAE cuts the order at int(L·mask) and int(L·(mask + throw)). AMT on SimMIM (`round_up`) takes ceil(L·mask)
    and then ceil(L·throw), as far as there are so many left.
    """
    if round_up:
        masked = math.ceil(length * mask_ratio)
        return masked, min(math.ceil(length * throw_ratio), length - masked)
    masked = int(length * mask_ratio)
    return masked, int(length * (mask_ratio + throw_ratio)) - masked


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


def split_ids(mask: Tensor, masked: int, thrown: Tensor | None = None, num_thrown: int = 0) -> tuple[Tensor, Tensor]:
    """Patch numbers of a mask [B, L] with `masked` True per row: (visible [B, V], masked [B, M]), each ascending.

    - `thrown`: bool [B, L], `num_thrown` True per row: patches that are in neither
    """
    kinds = mask.to(torch.uint8) if thrown is None else mask.to(torch.uint8) + 2 * thrown
    order, length = kinds.argsort(dim=1, stable=True), mask.shape[1] - num_thrown
    return order[:, : length - masked], order[:, length - masked : length]


def sample_noise(seed: int, step: Tensor, ids: Tensor, num_patches: int, draws: int = 2) -> Tensor:
    """Uniform noise that depends on (seed, step, sample id, patch, draw) alone, so any number of ranks agrees.

    - `step`: int64 0-dim, the update; `ids`: int64 [B], each sample's number in the data set

    **Returns:** float32 [draws, B, num_patches] in [0, 1), with 24 random bits. A counter-based hash (Murmur3's
    32-bit finaliser, applied once per word), not a random stream: nothing to save, nothing to keep in step.
    """
    patch = mix(torch.arange(draws * num_patches, device=ids.device).reshape(draws, 1, num_patches) + 0x7F4A7C15)
    key = mix(mix(mix(torch.full_like(step, (seed ^ 0x9E3779B9) & LOW_32)) ^ (step & LOW_32)))
    per_sample = mix(key ^ mix(ids & LOW_32))
    return hashed_uniform(per_sample, patch)


def _share(masked: int, alpha: float | Tensor) -> int | Tensor:
    """int(M·alpha), computed in float64 on the host or on the device alike."""
    return (alpha.double() * masked).floor().long() if isinstance(alpha, Tensor) else int(masked * alpha)
