"""Masks of drawn counts: exact per image, and those of plain loops."""

import pytest
import torch

from fasthpm import loss as losses
from fasthpm import mask_counts
from fasthpm.mask import MaskPlan, sample_noise
from fasthpm.mask_counts import CountPlan, counted_mask, masked_places
from tests.helpers import reference_views as reference

GRID, B = (6, 6), 64


def noise_of(plan: MaskPlan) -> torch.Tensor:
    return sample_noise(4, torch.tensor(2), torch.arange(B), plan.noise_size)


def counts_of(spread: float = 0.2, unmasked: float = 0.5) -> tuple[torch.Tensor, CountPlan]:
    plan = CountPlan(0.3, spread, unmasked, 36)
    return plan.draw(sample_noise(9, torch.tensor(2), torch.arange(B), 2, draws=1)[0]), plan


def test_counts_are_none_for_half_of_the_images_and_spread_for_the_others() -> None:
    plan = CountPlan(0.3, 0.2, 0.5, 196)
    numbers = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    counts = plan.draw(numbers)[:, 0]
    wanted = [reference.count(0.3, 0.2, 0.5, 196, row) for row in numbers.double().tolist()]
    assert counts.tolist() == wanted
    assert abs(float((counts == 0).double().mean()) - 0.5) < 0.03
    some = counts[counts > 0]
    assert some.min() >= 19
    assert some.max() <= plan.most == 98
    assert abs(float(some.double().mean()) - 58) < 2


@pytest.mark.parametrize("policy", mask_counts.COUNTED_POLICIES)
def test_every_image_has_its_own_count(policy: str) -> None:
    plan = MaskPlan(policy, 0.3, GRID)
    counts, _ = counts_of()
    mask = counted_mask(plan, counts, noise_of(plan), torch.rand(B, 36), 0.5)
    assert mask.dtype == torch.bool
    assert torch.equal(mask.sum(1, keepdim=True), counts)
    assert len(set(counts.flatten().tolist())) > 5


@pytest.mark.parametrize("easiest", [False, True])
def test_the_hardest_share_of_each_count_is_masked(easiest: bool) -> None:
    plan = MaskPlan("hpm_easiest" if easiest else "hpm", 0.3, GRID)
    counts, _ = counts_of()
    scores, noise = torch.rand(B, 36, generator=torch.Generator().manual_seed(1)), noise_of(plan)
    mask = counted_mask(plan, counts, noise, scores, torch.tensor(0.6, dtype=torch.float64))
    for row in range(B):
        values = (-scores[row] if easiest else scores[row]).tolist()
        wanted = reference.hard_and_random(values, noise[1, row, :36].tolist(), int(counts[row]), 0.6)
        assert set(mask[row].nonzero()[:, 0].tolist()) == wanted


def test_blocks_of_drawn_counts_are_those_of_each_count_alone() -> None:
    plan = MaskPlan("blockwise", 0.3, GRID)
    counts, _ = counts_of()
    noise = noise_of(plan)
    mask = counted_mask(plan, counts, noise, torch.zeros(B, 36), 0.0)
    for row in range(B):
        alone = counted_mask(plan, counts[row : row + 1], noise[:, row : row + 1], torch.zeros(1, 36), 0.0)
        assert torch.equal(alone[0], mask[row])


def test_places_are_the_masked_ones_first() -> None:
    counts, counted = counts_of()
    plan = MaskPlan("random", 0.3, GRID)
    mask = counted_mask(plan, counts, noise_of(plan), torch.zeros(B, 36), 0.0)
    places = masked_places(mask, counted.most)
    for row in range(B):
        assert places[row, : counts[row]].tolist() == mask[row].nonzero()[:, 0].tolist()


def test_ranking_and_correlation_of_valid_patches_are_those_without_the_others() -> None:
    generator = torch.Generator().manual_seed(3)
    predicted, actual, seen = (torch.randn(2, 9, generator=generator) for _ in range(3))
    valid = torch.zeros(2, 9, dtype=torch.bool)
    valid[0, :6] = True  # the second image has none
    alone = [values[:1, :6] for values in (predicted, actual, seen)]
    predicted = predicted.clone().requires_grad_()
    found = mask_counts.ranking_loss_of(predicted, actual, valid)
    assert float(found.detach()) == pytest.approx(float(losses.ranking_loss_plain(*alone[:2])), rel=1e-6)
    found.backward()
    assert predicted.grad is not None
    assert not predicted.grad[~valid].any()
    found = mask_counts.spearman_of(seen, actual, valid)
    assert float(found) == pytest.approx(float(losses.spearman(alone[2], alone[1])), rel=1e-6)
    nothing = mask_counts.ranking_loss_of(predicted, actual, valid & False)
    assert float(nothing.detach()) == 0.0
    assert float(mask_counts.spearman_of(seen, actual, valid & False)) == 0.0
