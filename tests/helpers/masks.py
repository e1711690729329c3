"""Noise and masks as tests look at them."""

import torch
from torch import Tensor


def coarse_noise(seed: int, *shape: int) -> Tensor:
    """Uniform in steps of 1/512, so that equal numbers are common and no key of a fast twin is rounded."""
    return torch.randint(0, 512, shape, generator=torch.Generator().manual_seed(seed)).float() / 512


def rows_of(mask: Tensor) -> list[set[int]]:
    """The set of masked patches of every sample."""
    return [set(row.nonzero().flatten().tolist()) for row in mask]
