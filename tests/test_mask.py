"""Masks: exact counts, the hardest always masked, the rest uniform, ties at random, the same for any rank count."""

import dataclasses
import json
import math
from itertools import combinations, permutations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from fasthpm import mask as masks
from fasthpm import mask_loops
from fasthpm.errors import UserError
from tests.helpers import reference
from tests.helpers.golden import GOLDEN
from tests.helpers.masks import coarse_noise, rows_of


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 4),
    slots=st.integers(2, 40),
    groups=st.integers(1, 4),
    ratio=st.floats(0.05, 0.95),
    alpha=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)),
    ties=st.booleans(),
    easiest=st.booleans(),
    on_device=st.booleans(),
)
def test_counts_and_hardest(
    seed: int,
    batch: int,
    slots: int,
    groups: int,
    ratio: float,
    alpha: float,
    ties: bool,
    easiest: bool,
    on_device: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    difficulty = torch.rand(batch, slots * groups, generator=generator)
    difficulty = (difficulty * 3).round() if ties else difficulty
    share = torch.tensor(alpha, dtype=torch.float64) if on_device else alpha
    mask = masks.easy_to_hard_mask(difficulty, ratio, share, generator=generator, groups=groups, easiest=easiest)
    masked, hard = reference.mask_counts(slots, ratio, alpha)
    assert mask.dtype == torch.bool
    rows, values = mask.reshape(-1, slots), difficulty.reshape(-1, slots)
    assert (rows.sum(1) == masked).all()
    for row, value in zip(rows, -values if easiest else values, strict=True):
        if hard:
            threshold = value.sort(descending=True).values[hard - 1]
            assert row[value > threshold].all()  # with ties the threshold value itself is drawn at random
            assert row[value >= threshold].sum() >= hard


def test_rest_is_uniform_over_all_subsets() -> None:
    difficulty = torch.tensor([[0.0, 5.0, 1.0, 2.0, 3.0, 4.0]]).expand(60_000, 6)
    generator = torch.Generator().manual_seed(0)
    mask = masks.easy_to_hard_mask(difficulty, 0.5, 0.34, generator=generator)  # M = 3, one of them the hardest
    assert mask[:, 1].all()
    code = (mask.long() * (2 ** torch.arange(6))).sum(1)
    counts = torch.tensor([(code == 2 + 2**a + 2**b).sum() for a, b in combinations((0, 2, 3, 4, 5), 2)]).double()
    assert counts.sum() == 60_000
    chi_square = ((counts - 6000) ** 2 / 6000).sum().item()
    assert chi_square < 9 + 5 * math.sqrt(18)  # mean 9, standard deviation sqrt(2·9)


def test_ties_are_broken_at_random() -> None:
    difficulty = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]).expand(40_000, 8)
    mask = masks.easy_to_hard_mask(difficulty, 0.25, 1.0, generator=torch.Generator().manual_seed(1))
    assert not mask[:, 4:].any()
    share = mask[:, :4].double().mean(0)
    assert (share - 0.5).abs().max() < 5 * math.sqrt(0.25 / 40_000)


def test_published_counts_and_frequencies() -> None:
    """Counts of the published `generate_mask`, and the uniform law of what it leaves to chance."""
    tensors = load_file(GOLDEN / "hpm_generate_mask.safetensors")
    cases = json.loads((GOLDEN / "manifest.json").read_text())["cases"]
    grid = next(case for case in cases if case["name"] == "hpm_generate_mask")["stats"]["counts"]
    generator = torch.Generator().manual_seed(0)
    for case in grid:
        length, draws = case["L"], 100
        difficulty = tensors[f"in/loss_pred_{length}"]
        alpha = reference.alpha(case["epoch"], case["total_epoch"], 0.0, 0.5)
        stack = difficulty.repeat(draws, 1)
        mask = masks.easy_to_hard_mask(stack, case["mask_ratio"], alpha, generator=generator)
        assert (mask.sum(1) == case["n_masked"]).all()
        hard = torch.zeros_like(difficulty, dtype=torch.bool)
        hard.scatter_(1, difficulty.argsort(1, descending=True)[:, : case["len_loss"]], True)
        frequency = mask.reshape(draws, *difficulty.shape).double().mean(0)
        assert (frequency[hard] == 1).all()
        expected = case["p_masked_rest"]
        error = math.sqrt(expected * (1 - expected) / draws)
        assert ((frequency[~hard] - expected).abs() <= 6 * error).all()


def test_random_mask_reproduces_mae() -> None:
    tensors = load_file(GOLDEN / "mae.safetensors")
    for ratio in (0.75, 0.6):
        got = masks.random_mask(tensors[f"in/noise_{ratio}"], ratio)
        assert torch.equal(got, tensors[f"in/mask_{ratio}"].bool())


def test_split_ids_ascend_and_partition() -> None:
    mask = masks.random_mask(torch.rand(5, 12), 0.6)
    visible, masked = masks.split_ids(mask, int(mask[0].sum()))
    for row in range(5):
        assert visible[row].tolist() == (~mask[row]).nonzero().flatten().tolist()
        assert masked[row].tolist() == mask[row].nonzero().flatten().tolist()


def test_noise_depends_on_the_sample_not_on_its_place() -> None:
    step, ids = torch.tensor(7), torch.tensor([3, 11, 2_000_000])
    noise = masks.sample_noise(5, step, ids, 16)
    assert torch.equal(noise[:, 1], masks.sample_noise(5, step, ids[1:2], 16)[:, 0])
    for other in (masks.sample_noise(6, step, ids, 16), masks.sample_noise(5, step + 1, ids, 16)):
        assert (other != noise).double().mean() > 0.99
    assert (noise[0] != noise[1]).double().mean() > 0.9


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**40), step=st.integers(0, 2**40), sample=st.integers(0, 2**40), length=st.integers(1, 9))
def test_noise_is_the_hash_word_by_word(seed: int, step: int, sample: int, length: int) -> None:
    noise = masks.sample_noise(seed, torch.tensor(step), torch.tensor([sample]), length)
    for draw in range(2):
        for patch in range(length):
            want = reference.hash_noise(seed, step, sample, draw * length + patch)
            assert noise[draw, 0, patch].item() == want


def test_noise_is_uniform_and_uncorrelated() -> None:
    noise = masks.sample_noise(0, torch.tensor(1), torch.arange(4000), 49)
    assert noise.min() >= 0
    assert noise.max() < 1
    counts = torch.histc(noise.flatten(), bins=50, min=0, max=1).double()
    expected = noise.numel() / 50
    assert ((counts - expected) ** 2 / expected).sum() < 49 + 6 * math.sqrt(98)
    flat = (noise.double() - 0.5) * math.sqrt(12)
    bound = 6 / math.sqrt(4000)
    for a, b in ((flat[0, :, 0], flat[0, :, 1]), (flat[0, :-1, 0], flat[0, 1:, 0]), (flat[0, :, 3], flat[1, :, 3])):
        assert abs((a * b).mean().item()) < bound * 1.1


def test_groups_must_divide() -> None:
    with pytest.raises(ValueError, match="10 patches do not split into 3"):
        masks.easy_to_hard_mask(torch.rand(1, 10), 0.5, 0.5, groups=3)


# -------------------------------------------------------------------------------------------------- slow twins
grids = st.tuples(st.integers(1, 7), st.integers(1, 7))
seeds = st.integers(0, 2**31)
ratios = st.floats(0.05, 0.95)


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    slots=st.integers(1, 12),
    groups=st.integers(1, 3),
    ratio=ratios,
    alpha=st.floats(0, 1),
    ties=st.booleans(),
    easiest=st.booleans(),
    on_device=st.booleans(),
)
def test_easy_to_hard_is_the_loop(
    seed: int, slots: int, groups: int, ratio: float, alpha: float, ties: bool, easiest: bool, on_device: bool
) -> None:
    noise = coarse_noise(seed, 2, 3, slots * groups)
    difficulty = torch.randn(3, slots * groups, generator=torch.Generator().manual_seed(seed))
    difficulty = difficulty.round() if ties else difficulty
    share = torch.tensor(alpha, dtype=torch.float64) if on_device else alpha
    mask = masks.easy_to_hard_mask(difficulty, ratio, share, groups=groups, easiest=easiest, noise=noise)
    frames = [x.reshape(-1, slots).tolist() for x in (difficulty, noise[0], noise[1])]
    for row, values, tie, rest in zip(rows_of(mask.reshape(-1, slots)), *frames, strict=True):
        assert row == reference.easy_to_hard_mask(values, ratio, alpha, tie, rest, easiest)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, grid=grids, slots=st.integers(1, 3), ratio=ratios)
def test_predefined_masks_are_their_loops(seed: int, grid: tuple[int, int], slots: int, ratio: float) -> None:
    rows, columns = grid
    size = rows * columns
    noise = coarse_noise(seed, 3, size + 4 * masks.BLOCK_PROPOSALS + 2)
    block = masks.block_mask(noise, grid, ratio, slots)
    masked = masks.num_masked(grid[0] * grid[1], ratio)
    blockwise = masks.blockwise_mask(noise, grid, masked, slots)
    tube = masks.tube_mask(noise[:, :size], slots, ratio)
    plain = masks.random_mask(noise[:, :size], ratio)
    for i, numbers in enumerate(noise.tolist()):
        frame = reference.block_mask(numbers, rows, columns, ratio)
        assert rows_of(block)[i] == {slot * size + patch for slot in range(slots) for patch in frame}
        frame = reference.blockwise_mask(numbers, rows, columns, ratio, masks.BLOCK_PROPOSALS)
        assert rows_of(blockwise)[i] == {slot * size + patch for slot in range(slots) for patch in frame}
        assert rows_of(tube)[i] == reference.tube_mask(numbers[:size], slots, ratio)
        assert rows_of(plain)[i] == reference.random_mask(numbers[:size], ratio)


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    rows=st.integers(2, 4),
    columns=st.integers(2, 4),
    side=st.integers(2, 3),
    policy=st.sampled_from([policy.name for policy in masks.POLICIES.values() if policy.in_units]),
    ratio=st.floats(0.3, 0.7),
    alpha=st.floats(0, 1),
)
def test_units_are_the_loop(
    seed: int, rows: int, columns: int, side: int, policy: str, ratio: float, alpha: float
) -> None:
    grid = (rows * side, columns * side)
    plan = masks.MaskPlan(policy, ratio, grid, unit=side)
    noise = coarse_noise(seed, 2, 2, plan.noise_size)
    if policy == "attention":  # whose race has no rule for ties
        noise = torch.rand(noise.shape, generator=torch.Generator().manual_seed(seed))
        plan = dataclasses.replace(plan, throw_ratio=0.25)
    difficulty = coarse_noise(seed + 1, 2, plan.num_patches) * 8 * 36  # sums and means of units are exact
    mask, thrown = masks.draw_sets(plan, noise, difficulty, alpha)
    assert torch.equal(mask, masks.draw_mask(plan, noise, difficulty, alpha))
    assert (mask.sum(1) == plan.num_masked).all()
    assert thrown is None or (thrown.sum(1) == plan.num_thrown).all()
    for i, row in enumerate(rows_of(mask)):
        first, second = noise[:, i, : rows * columns].tolist()
        means = [reference.single(m) for m in reference.unit_means(difficulty[i].tolist(), *grid, side)]
        if policy == "random":
            units = reference.random_mask(first, ratio)
        elif policy == "attention":
            units, gone = reference.attention_mask(means, ratio, 0.25, first, round_up=True)
            assert rows_of(thrown)[i] == reference.in_units(gone, *grid, side) if thrown is not None else not gone
        else:
            units = reference.easy_to_hard_mask(means, ratio, alpha, first, second, policy == "hpm_easiest")
        assert row == reference.in_units(units, *grid, side)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, rows=st.integers(1, 4), columns=st.integers(1, 4), slots=st.integers(1, 3))
def test_uniform_leaves_one_of_every_four(seed: int, rows: int, columns: int, slots: int) -> None:
    grid = (2 * rows, 2 * columns)
    noise = coarse_noise(seed, 3, slots * 4 * rows * columns)
    mask = masks.uniform_mask(noise, grid, slots)
    frames = mask.reshape(-1, 4 * rows * columns)
    numbers = noise[:, : slots * rows * columns].reshape(-1, rows * columns).tolist()
    for row, frame in zip(rows_of(frames), numbers, strict=True):
        assert row == reference.uniform_mask(frame, *grid)


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    length=st.integers(1, 30),
    masked=st.floats(0, 0.6),
    thrown=st.floats(0, 0.4),
    zeros=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_attention_mask_is_the_race(seed: int, length: int, masked: float, thrown: float, zeros: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(3, length, generator=generator) * (torch.rand(3, length, generator=generator) >= zeros)
    noise = torch.rand(3, length, generator=generator)
    sets = masks.attention_mask(weights, masked, thrown, noise)
    assert not (sets[0] & sets[1]).any()
    for i, pair in enumerate(zip(*map(rows_of, sets), strict=True)):
        assert pair == reference.attention_mask(weights[i].tolist(), masked, thrown, noise[i].tolist())


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    rows=st.integers(1, 9),
    columns=st.sampled_from([1, 3, 8, 63, 64, 65]),
    ratio=ratios,
    alpha=st.floats(0, 1),
    ties=st.booleans(),
    on_device=st.booleans(),
    policy=st.sampled_from(["random", "hpm", "hpm_easiest", "block", "blockwise"]),
)
@example(seed=1, rows=9, columns=64, ratio=0.5, alpha=0.5, ties=False, on_device=False, policy="blockwise")
@example(seed=1, rows=9, columns=65, ratio=0.5, alpha=0.5, ties=False, on_device=False, policy="blockwise")
def test_numpy_and_torch_draw_the_same(
    seed: int, rows: int, columns: int, ratio: float, alpha: float, ties: bool, on_device: bool, policy: str
) -> None:
    """A CPU and a GPU: bit for bit the same noise and masks."""
    plan = masks.MaskPlan(policy, ratio, (rows, columns))
    difficulty = torch.randn(3, plan.num_patches, generator=torch.Generator().manual_seed(seed))
    difficulty = difficulty.round() if ties else difficulty
    share = torch.tensor(alpha, dtype=torch.float64) if on_device else alpha
    drawn = []
    for numpy in (True, False):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(mask_loops, "numpy_is_faster", lambda values, numpy=numpy: numpy)
            noise = masks.sample_noise(seed, torch.tensor(seed), torch.tensor([5, 2**40, seed]), plan.noise_size)
            drawn.append((noise, masks.draw_mask(plan, noise, difficulty, share)))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])


# -------------------------------------------------------------------------------------------------- laws
@settings(max_examples=80, deadline=None)
@given(
    seed=seeds,
    grid=grids,
    slots=st.integers(1, 3),
    policy=st.sampled_from(list(masks.POLICIES)),
    ratio=ratios,
    alpha=st.floats(0, 1),
)
def test_every_policy_keeps_its_count(
    seed: int, grid: tuple[int, int], slots: int, policy: str, ratio: float, alpha: float
) -> None:
    if policy == "uniform":
        grid, ratio = (2 * grid[0], 2 * grid[1]), 0.75
    slots = max(slots, 2) if masks.POLICIES[policy].tube else slots
    plan = masks.MaskPlan(policy, ratio, grid, slots)
    noise = torch.rand(2, 3, plan.noise_size, generator=torch.Generator().manual_seed(seed))
    mask = masks.draw_mask(plan, noise, torch.rand(3, plan.num_patches), alpha)
    assert mask.shape == (3, plan.num_patches)
    assert mask.sum(1).tolist() == [plan.num_masked] * 3


def check_pairs(visible: Tensor, count: int) -> None:
    """Single and joint frequencies of `count` visible patches, drawn uniformly from all columns of bool [N, K]."""
    draws, size = visible.shape
    together = visible.double().T @ visible.double() / draws
    single, pair = count / size, count * (count - 1) / (size * (size - 1))  # hypergeometric
    limit = 5.5 * math.sqrt(single * (1 - single) / draws)
    assert (together.diagonal() - single).abs().max() < limit
    off = together[~torch.eye(size, dtype=torch.bool)]
    assert (off - pair).abs().max() < 5.5 * math.sqrt(pair * (1 - pair) / draws)
    chi_square = ((off - pair) ** 2 / (pair * (1 - pair) / draws)).mean()
    assert 0.8 < chi_square < 1.2


def test_pairs_of_the_rest_are_visible_as_often_as_by_chance() -> None:
    """What difficulty leaves to chance is a uniform subset, pair by pair: L = 49, M = 37, the 18 hardest fixed."""
    difficulty = torch.randn(49, generator=torch.Generator().manual_seed(0)).expand(30_000, 49)
    noise = masks.sample_noise(0, torch.tensor(9), torch.arange(30_000), 49)
    mask = masks.easy_to_hard_mask(difficulty, 0.75, 0.5, noise=noise)
    hard = difficulty[0].argsort(descending=True)[:18]
    assert mask[:, hard].all()
    rest = torch.ones(49, dtype=torch.bool).index_fill_(0, hard, False)
    check_pairs(~mask[:, rest], 12)
    check_pairs(~masks.random_mask(noise[0], 0.75), 12)
    check_pairs(~masks.tube_mask(noise[1], 2, 0.75)[:, :49], 13)


def test_constant_difficulty_gives_random_masks() -> None:
    """Ties are broken by a uniformly random order: with alpha 1 every subset is equally likely."""
    for value in (0.0, -3.5):
        noise = masks.sample_noise(1, torch.tensor(2), torch.arange(20_000), 20)
        check_pairs(~masks.easy_to_hard_mask(torch.full((20_000, 20), value), 0.5, 1.0, noise=noise), 10)


def test_attention_draws_without_replacement_in_proportion_to_weight() -> None:
    weights, draws = [0.1, 0.5, 0.05, 0.3, 0.05], 60_000
    noise = masks.sample_noise(3, torch.tensor(0), torch.arange(draws), 5)[0]
    masked, thrown = masks.attention_mask(torch.tensor(weights).expand(draws, 5), 0.4, 0.2, noise)
    code = ((masked.long() + 2 * thrown.long()) * 3 ** torch.arange(5)).sum(1)
    expected: dict[int, float] = {}
    for order in permutations(range(5), 3):
        key = 3 ** order[0] + 3 ** order[1] + 2 * 3 ** order[2]
        expected[key] = expected.get(key, 0) + reference.draw_probability(weights, order) * draws
    observed = {key: (code == key).sum().item() for key in expected}
    assert sum(observed.values()) == draws
    assert sum(expected.values()) == pytest.approx(draws)
    chi_square = sum((observed[key] - want) ** 2 / want for key, want in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_patches_without_weight_come_last_whatever_the_noise() -> None:
    """Behind the smallest weight there is, and with the largest noise there is, 1 - 2^-24."""
    weights = torch.tensor([[0.0] * 5 + [1e-38] * 5]).expand(500, 10)
    noise = masks.sample_noise(0, torch.tensor(1), torch.arange(500), 10)[0]
    for numbers in (noise, torch.where(weights > 0, noise, 1 - 2.0**-24)):
        masked, thrown = masks.attention_mask(weights, 0.5, 0.2, numbers)
        assert masked[:, 5:].all()
        assert not masked[:, :5].any()
        assert (thrown[:, :5].sum(1) == 2).all()


def test_published_attention_counts() -> None:
    for length, mask_ratio, throw_ratio, round_up, want in (
        (196, 0.45, 0.4, False, (88, 78)),
        (196, 0.75, 0.0, False, (147, 0)),
        (49, 0.44, 0.26, True, (22, 13)),
        (49, 0.33, 0.5, True, (17, 25)),  # each rounded: of units of 4 patches 100 thrown, 28 visible
        (49, 0.75, 0.0, True, (37, 0)),
        (49, 0.1, 0.1, True, (5, 5)),
        (49, 0.6, 0.4, True, (30, 19)),  # no more than there are
        (36, 0.5, 0.25, True, (18, 9)),
    ):
        noise = torch.rand(2, length)
        sets = masks.attention_mask(torch.rand(2, length), mask_ratio, throw_ratio, noise, round_up=round_up)
        assert [x.sum(1).tolist() for x in sets] == [[count] * 2 for count in want]


def test_a_blockwise_mask_is_made_of_blocks() -> None:
    """Masked patches have far more masked neighbours than random ones have, in BEiT's 14 x 14 at 40 %."""
    plan = masks.MaskPlan("blockwise", 0.4, (14, 14))
    noise = torch.rand(2, 100, plan.noise_size, generator=torch.Generator().manual_seed(0))
    for policy, low, high in (("random", 0.35, 0.45), ("blockwise", 0.75, 1.0), ("block", 0.85, 1.0)):
        grid = masks.draw_mask(masks.MaskPlan(policy, 0.4, (14, 14)), noise).reshape(100, 14, 14)
        below = (grid[:, 1:] & grid[:, :-1]).sum() / grid[:, :-1].sum()
        assert low < below < high


def test_published_counts_of_units_and_tubes() -> None:
    assert masks.MaskPlan("random", 0.6, (14, 14), unit=2).num_masked == 30 * 4  # SimMIM: ceil(49 * 0.6) units
    assert masks.MaskPlan("random", 0.6, (48, 48), unit=8).num_masked == 22 * 64
    tube = masks.MaskPlan("tube", 0.9, (14, 14), slots=8)
    assert (tube.num_patches, tube.num_patches - tube.num_masked) == (1568, 160)
    assert masks.MaskPlan("random", 0.9, (14, 14), slots=8).num_masked == 1568 - 156


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"policy": "blok"}, "mask_policy is 'blok', expected one of random, hpm"),
        ({"policy": "uniform", "mask_ratio": 0.6}, "it needs mask_ratio 0.75 \\(not 0.6\\)"),
        ({"policy": "uniform", "grid_size": (7, 8)}, "even numbers of patches \\(not 7 x 8\\)"),
        ({"policy": "tube"}, "an image has one frame; use --mask_policy random"),
        ({"policy": "block", "unit": 2}, "mask_policy block does not mask in units"),
        ({"unit": 3}, "3 x 3 patches does not divide the 8 x 8 patches"),
        ({"mask_ratio": float("nan")}, "mask_ratio is nan, expected between 0 and 1"),
    ],
)
def test_plans_that_make_no_sense(plan: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        masks.MaskPlan(**{"policy": "random", "mask_ratio": 0.75, "grid_size": (8, 8), **plan})


def test_a_difficulty_that_is_no_number_still_gives_exact_counts() -> None:
    difficulty = torch.rand(4, 10)
    difficulty[0, 3], difficulty[1] = math.nan, math.nan
    difficulty[2, 4], difficulty[3, 1] = math.inf, -math.inf
    for alpha in (0.5, torch.tensor(0.5, dtype=torch.float64)):
        assert (masks.easy_to_hard_mask(difficulty, 0.5, alpha).sum(1) == 5).all()


def test_noise_is_enough_for_every_policy() -> None:
    for policy in masks.POLICIES:
        plan = masks.MaskPlan(policy, 0.75, (4, 4), slots=2)
        noise = torch.rand(2, 2, plan.noise_size)
        difficulty = torch.rand(2, plan.num_patches)
        want = masks.draw_mask(plan, torch.cat([noise, torch.rand(2, 2, 5)], dim=2), difficulty, 0.5)
        assert torch.equal(masks.draw_mask(plan, noise, difficulty, 0.5), want)


# -------------------------------------------------------------------------------------------------- videos
def test_published_tube_masks() -> None:
    cases = json.loads((GOLDEN / "manifest.json").read_text())["cases"]
    for case in next(case for case in cases if case["name"] == "videomae")["tube_mask_invariants"]:
        slots, rows, columns = case["window"]
        plan = masks.MaskPlan("tube", case["mask_ratio"], (rows, columns), slots)
        mask = masks.draw_mask(plan, torch.rand(2, 3, plan.noise_size))
        assert mask.sum(1).tolist() == [case["total_masked"]] * 3 == [plan.num_masked] * 3
        frames = mask.reshape(3, slots, -1)
        assert torch.equal(frames, frames[:, :1].expand_as(frames))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    slots=st.integers(2, 4),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    policy=st.sampled_from(list(masks.POLICIES)),
    ratio=st.floats(0.1, 0.95),
    alpha=st.floats(0, 1),
)
def test_every_policy_masks_exactly_in_every_slot(
    seed: int, slots: int, rows: int, columns: int, policy: str, ratio: float, alpha: float
) -> None:
    """The count of a slot is exact for every policy but random and attention, whose counts are exact over the clip."""
    if policy == "uniform":
        rows, columns, ratio = 2 * rows, 2 * columns, 0.75
    plan, size = masks.MaskPlan(policy, ratio, (rows, columns), slots), rows * columns
    noise = coarse_noise(seed, 2, 3, plan.noise_size)
    difficulty = torch.randn(3, slots * size, generator=torch.Generator().manual_seed(seed))
    mask = masks.draw_mask(plan, noise, difficulty, alpha)
    assert mask.sum(1).tolist() == [plan.num_masked] * 3
    frames = mask.reshape(3, slots, size)
    if policy not in ("random", "attention"):
        assert (frames.sum(2) == plan.num_masked // slots).all()
    if masks.POLICIES[policy].tube:
        assert torch.equal(frames, frames[:, :1].expand_as(frames))
    easiest = policy == "hpm_easiest"
    for i, values in enumerate(difficulty.reshape(3, slots, size).tolist()):
        ties, rest = noise[:, i].tolist()
        if policy == "hpm_tube":
            summed = [sum(frame[k] for frame in values) for k in range(size)]
            want = reference.easy_to_hard_mask(summed, ratio, alpha, ties[:size], rest[:size], False)
            assert rows_of(frames[i])[0] == want
        elif masks.POLICIES[policy].follows == "difficulty":
            for slot, row in enumerate(rows_of(frames[i])):
                part = slice(slot * size, (slot + 1) * size)
                assert row == reference.easy_to_hard_mask(values[slot], ratio, alpha, ties[part], rest[part], easiest)


def test_the_hardest_tubes_are_hard_in_all_slots_together() -> None:
    """Not in the one where they are hardest: 2 + 2 and 2 + 1 before 3 + 0 and 0 + 2.5."""
    difficulty = torch.tensor([[3.0, 2.0, 2.0, 0.0, 0.0, 2.0, 1.0, 2.5]]).repeat(50, 1)
    plan = masks.MaskPlan("hpm_tube", 0.5, (2, 2), slots=2)
    noise = torch.rand(2, 50, plan.noise_size, generator=torch.Generator().manual_seed(0))
    assert (masks.draw_mask(plan, noise, difficulty, 0.5).reshape(50, 2, 4)[:, :, 1]).all()
    mask = masks.draw_mask(plan, noise, difficulty + torch.tensor([[0, 0, 0.25, 0, 0, 0, 0.25, 0]]), 1.0)
    assert rows_of(mask) == [{1, 2, 5, 6}] * 50


def test_videos_of_the_papers_size_are_masked_as_published() -> None:
    """16 x 224 x 224 at 0.9: TPAMI masks every slot on its own, VideoMAE's tubes leave 160 patches visible."""
    for policy, count in (("hpm", 8 * 177), ("hpm_tube", 8 * 177), ("tube", 1408), ("random", 1412)):
        assert masks.MaskPlan(policy, 0.9, (14, 14), 8).num_masked == count
    plan = masks.MaskPlan("hpm", 0.9, (14, 14), 8)
    mask = masks.draw_mask(plan, torch.rand(2, 2, 1568), torch.rand(2, 1568), 0.0).reshape(2, 8, 196)
    assert not torch.equal(mask[:, 0], mask[:, 1])  # not a tube
