"""Masks of the eager baseline."""

import torch

from bench import eager as bench_eager


def test_masks_drawn_one_by_one_hold_the_hardest() -> None:
    difficulty = torch.rand(4, 49)
    mask = bench_eager.masks_one_by_one(difficulty, 0.75, 0.5)
    assert (mask.sum(1) == 37).all()
    for row, values in zip(mask, difficulty, strict=True):
        assert row[values.argsort(descending=True)[:18]].all()
