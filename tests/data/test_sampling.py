"""Orders, crops, colours and replacements: functions of seed, epoch and sample."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fasthpm.data.sampling import (
    area_resize,
    block_order,
    centre_crops,
    colour_factors,
    mix,
    random_crops,
    replacements,
    sample_order,
)


# ------------------------------------------------------------------------------------------------------- colours
def test_colour_factors_are_uniform_and_have_a_key_of_their_own() -> None:
    ids = np.arange(20000)
    factors = colour_factors(0, 0, ids, 0.4, 3)
    assert factors.dtype == np.float32
    assert 0.6 <= factors.min() < 0.601
    assert 1.399 < factors.max() <= 1.4
    assert np.abs(np.quantile(factors, [0.25, 0.5, 0.75], axis=0).T - [0.8, 1.0, 1.2]).max() < 0.01
    sizes = np.tile(np.array([[300, 400]]), (len(ids), 1))
    drawn = np.column_stack([factors, random_crops(0, 0, ids, sizes, 0.2, True)])
    assert np.abs(np.corrcoef(drawn.T)[:3, 3:]).max() < 0.03
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.03
    assert (colour_factors(0, 0, ids, 0.4, 1)[:, 2] == 1).all()
    assert not np.array_equal(factors, colour_factors(0, 1, ids, 0.4, 3))
    assert np.array_equal(factors[7:9], colour_factors(0, 0, ids[7:9], 0.4, 3))


# ------------------------------------------------------------------------------------------------------- block order
@pytest.mark.parametrize(("samples", "block", "window"), [(1000, 7, 5), (1000, 1, 10), (23, 64, 256), (1, 1, 1)])
def test_block_order_is_a_permutation_of_pools_of_blocks(samples: int, block: int, window: int) -> None:
    """Against its definition: every pool is a set of whole blocks."""
    order = block_order(3, 1, samples, block, window)
    assert sorted(order.tolist()) == list(range(samples))
    start, seen = 0, set()
    while start < samples:
        blocks = set()
        pool = []
        while start < samples and (len(blocks) < window or order[start] // block in blocks):
            blocks.add(int(order[start]) // block)
            pool.append(int(order[start]))
            start += 1
        whole = [index for name in blocks for index in range(name * block, min((name + 1) * block, samples))]
        assert sorted(pool) == sorted(whole)
        assert not blocks & seen
        seen |= blocks
    assert order.tolist() != block_order(3, 2, samples, block, window).tolist() or samples == 1
    assert order.tolist() == block_order(3, 1, samples, block, window).tolist()


def test_block_order_mixes_well_within_its_bounds() -> None:
    samples, block, window = 100_000, 50, 100
    order = block_order(0, 0, samples, block, window)
    pools = order.reshape(-1, block * window)
    assert (np.abs(np.diff(order)) == 1).mean() < 0.001  # a random order has 2 / samples, blocks read through 0.98
    neighbours = (np.diff(order // block) == 0).mean()
    assert abs(neighbours - 1 / window) < 0.003  # as likely of the same block as any two of a pool
    batches = pools[:, :250] // block
    assert min(len(set(batch.tolist())) for batch in batches) > 80  # of 91 +- 4 blocks that 250 of a pool come from
    next_epoch = block_order(0, 1, samples, block, window).reshape(pools.shape)
    shared = np.intersect1d(pools[0], next_epoch[0]).size / pools[0].size
    assert shared < 0.2  # pools are new every epoch: 0.05 expected
    middle = pools.mean(1) / samples
    assert np.abs(middle - 0.5).max() < 0.15  # each pool comes from all over the set


# ------------------------------------------------------------------------------------------------------- sampling
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), min_size=1, max_size=8),
    st.floats(0.01, 1.0),
    st.integers(0, 2**40),
    st.integers(0, 1000),
)
def test_crops_lie_inside_and_depend_on_nothing_else(sizes: Any, crop_min: float, seed: int, epoch: int) -> None:
    sizes, ids = np.array(sizes, np.int64), np.arange(len(sizes)) * 7919
    crops = random_crops(seed, epoch, ids, sizes, crop_min, True)
    top, left, height, width, _ = crops.T
    assert crops[:, :2].min() >= 0
    assert crops[:, 2:4].min() >= 1
    assert (top + height <= sizes[:, 0]).all()
    assert (left + width <= sizes[:, 1]).all()
    alone = np.concatenate(
        [random_crops(seed, epoch, ids[k:][:1], sizes[k:][:1], crop_min, True) for k in range(len(ids))]
    )
    assert np.array_equal(crops, alone)
    assert np.array_equal(crops[:, :4], random_crops(seed, epoch, ids, sizes, crop_min, False)[:, :4])
    centre = centre_crops(sizes, (32, 48), crop_min)
    assert centre[:, :2].min() >= 0
    assert centre[:, 2:4].min() >= 1
    assert (centre[:, :2] + centre[:, 2:4] <= sizes).all()


def test_crops_are_distributed_as_random_resized_crop() -> None:
    ids = np.arange(20000)
    sizes = np.tile(np.array([[300, 400]]), (len(ids), 1))
    crops = random_crops(0, 0, ids, sizes, 0.2, True)
    area, aspect = crops[:, 2] * crops[:, 3] / 120000, np.log(crops[:, 3] / crops[:, 2])
    assert 0.19 < area.min() < 0.21
    assert 0.98 < area.max() <= 1
    levels = np.linspace(0.05, 0.95, 19)
    for ours, theirs in zip((area, aspect), drawn_one_by_one(4000), strict=True):
        assert np.abs(np.quantile(ours, levels) - np.quantile(theirs, levels)).max() < 0.03
    assert np.abs(aspect).max() < np.log(4 / 3) + 0.01
    assert abs(crops[:, 4].mean() - 0.5) < 0.015
    room = sizes - crops[:, 2:4]
    place = (crops[:, :2] + 0.5) / (room + 1)
    assert np.abs(place.mean(0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(np.column_stack([place, area, crops[:, 4]]).T) - np.eye(4)).max() < 0.03


def drawn_one_by_one(count: int) -> tuple[list[float], list[float]]:
    """Areas and log aspect ratios of random resized crops of 300 x 400 images, by the textbook's loop."""
    rng, areas, aspects = np.random.default_rng(0), [], []
    while len(areas) < count:
        area, aspect = 120000 * rng.uniform(0.2, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        height, width = round((area / aspect) ** 0.5), round((area * aspect) ** 0.5)
        if height <= 300 and width <= 400:
            areas.append(height * width / 120000)
            aspects.append(np.log(width / height))
    return areas, aspects


def test_extreme_shapes_fall_back_to_the_centre() -> None:
    crops = random_crops(0, 0, np.arange(2), np.array([[1000, 10], [10, 1000]]), 0.9, False)
    assert crops.tolist() == [[493, 0, 13, 10, 0], [0, 493, 10, 13, 0]]


IDS, SIZES = np.arange(50), np.tile([[300, 400]], (50, 1))
DRAWS: dict[str, Callable[[int, int], Any]] = {
    "order": lambda seed, epoch: sample_order(seed, epoch, 50),
    "order of blocks": lambda seed, epoch: block_order(seed, epoch, 50, 5, 1) // 5,
    "order in a pool": lambda seed, epoch: block_order(seed, epoch, 50, 5, 99),
    "crops": lambda seed, epoch: random_crops(seed, epoch, IDS, SIZES, 0.2, False),
    "flips": lambda seed, epoch: random_crops(seed, epoch, IDS, SIZES, 0.2, True)[:, 4],
    "colours": lambda seed, epoch: colour_factors(seed, epoch, IDS, 0.4, 3),
    "replacements": lambda seed, epoch: replacements(seed, epoch, IDS, 1, 1000),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_every_draw_follows_seed_and_epoch(draw: str) -> None:
    """What is the same in every epoch is learnt by heart, and no loss tells."""
    first = DRAWS[draw](3, 0)
    assert np.array_equal(first, DRAWS[draw](3, 0))
    for other in (DRAWS[draw](3, 1), DRAWS[draw](4, 0)):
        assert (first != other).mean() > 0.3


def test_every_attempt_has_another_replacement() -> None:
    tried = np.stack([replacements(0, 0, IDS, attempt, 1000) for attempt in range(1, 6)])
    assert min(len(set(column.tolist())) for column in tried.T) >= 4


@pytest.mark.parametrize(
    ("size", "output", "share", "want"),
    [
        ((300, 400), (32, 32), 1.0, [0, 50, 300, 300]),
        ((300, 400), (32, 48), 1.0, [16, 0, 267, 400]),
        ((300, 400), (32, 64), 0.5, [100, 100, 100, 200]),
        ((400, 300), (64, 32), 1.0, [0, 50, 400, 200]),
        ((256, 256), (224, 224), 224 / 256, [16, 16, 224, 224]),
    ],
)
def test_the_evaluation_crop_is_the_largest_box_of_the_outputs_shape(
    size: tuple[int, int], output: tuple[int, int], share: float, want: list[int]
) -> None:
    assert centre_crops(np.array([size]), output, share).tolist() == [[*want, 0]]


def test_orders_are_permutations_and_fixed_for_ever() -> None:
    for epoch in range(3):
        assert sorted(sample_order(1, epoch, 1000)) == list(range(1000))
    # Recorded: a change here would silently change the order of every run that is resumed.
    assert sample_order(0, 0, 10).tolist() == RECORDED_ORDER
    assert random_crops(0, 0, np.arange(2), np.array([[300, 400], [28, 28]]), 0.2, True).tolist() == RECORDED_CROPS

    assert block_order(0, 0, 10, 2, 2).tolist() == RECORDED_BLOCKS
    assert replacements(0, 0, np.arange(3), 1, 100).tolist() == RECORDED_REPLACEMENTS
    assert np.allclose(colour_factors(0, 0, np.arange(1), 0.4, 3), RECORDED_FACTORS)


RECORDED_BLOCKS = [2, 5, 3, 4, 7, 6, 8, 9, 0, 1]
RECORDED_REPLACEMENTS = [82, 94, 80]
RECORDED_FACTORS = [[1.357134, 0.87918, 1.294481]]
RECORDED_ORDER = [2, 0, 5, 7, 3, 6, 4, 1, 8, 9]
RECORDED_CROPS = [[26, 62, 217, 166, 0], [3, 0, 23, 28, 0]]


def test_mix_is_splitmix64() -> None:
    def plain(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    values = [0, 1, 2**63, 2**64 - 1, 12345678901234567]
    assert mix(np.array(values, np.uint64)).tolist() == [plain(value) for value in values]
    assert plain(0) == 0xE220A8397B1DCDAF  # the published generator's first output for seed 0


def test_area_resize_is_the_mean_of_what_a_pixel_covers() -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    means = image.reshape(4, 3, 5, 2, 3).mean((1, 3))
    assert np.abs(area_resize(image, (4, 5)) - means).max() <= 0.5 + 1e-9
    assert np.array_equal(area_resize(image, (24, 30)), image.repeat(2, 0).repeat(3, 1))
    assert np.array_equal(area_resize(image, (12, 10)), image)
    ramp = np.arange(3, dtype=np.uint8)[:, None, None] * 100
    assert area_resize(ramp, (2, 1)).ravel().tolist() == [33, 167]
