"""Masks: exact counts, the hardest always masked, the rest uniform, ties at random, the same for any rank count."""

import json
import math
from itertools import combinations
from pathlib import Path

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fasthpm import mask as masks

GOLDEN = Path(__file__).parent / "golden"


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31), batch=st.integers(1, 4), slots=st.integers(2, 40), groups=st.integers(1, 4),
    ratio=st.floats(0.05, 0.95), alpha=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)),
    ties=st.booleans(), easiest=st.booleans(), on_device=st.booleans(),
)  # fmt: skip
def test_counts_and_hardest(
    seed: int, batch: int, slots: int, groups: int, ratio: float, alpha: float, ties: bool, easiest: bool,
    on_device: bool,
) -> None:  # fmt: skip
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
